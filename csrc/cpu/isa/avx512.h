// AVX-512: F, BW, DQ and VL.
#pragma once
#include <immintrin.h>

#include "generic.h"
#include "sums16.h"

namespace bertfast::isa {
namespace {

struct avx512 : Generic<16, 14> {  // 28 accumulators of 32 registers
  static bool supported() {
    return __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vl");
  }
  static constexpr Unit kUnits[] = {Unit::fp32, Unit::wide_bf16, Unit::int8};
  static constexpr bool kSums16 = true;

  static vf broadcast(const float* p) { return (vf)_mm512_set1_ps(*p); }
  static vq multiply_low(vq a, uint32_t m) {
    return (vq)_mm512_maskz_mul_epu32(0xFF, (__m512i)a, _mm512_set1_epi64(m));
  }
  static vf dot_two(vf acc, vf a0, vf a1, const float* b0, const float* b1) {
    return isa::dot_two(acc, a0, a1, b0, b1);
  }
};

}  // namespace
}  // namespace bertfast::isa
