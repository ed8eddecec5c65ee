// AVX2 with FMA.
#pragma once
#include <immintrin.h>

#include "generic.h"
#include "sums16.h"

namespace bertfast::isa {
namespace {

struct avx2 : Generic<8, 6> {  // 12 accumulators of 16 registers
  static bool supported() {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  }
  static constexpr Unit kUnits[] = {Unit::fp32, Unit::wide_bf16, Unit::int8};
  static constexpr bool kSums16 = true;

  // gcc converts between lanes of 16 and 32 bits piece by piece.
  static vf load_bf16(const bf16* p) {
    const __m128i h8 = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return (vf)_mm256_slli_epi32(_mm256_cvtepu16_epi32(h8), 16);
  }
  static void store_bf16(bf16* p, vf v) {
    const __m256i i8 = (__m256i)round_bf16(v);
    const __m128i h8 =
        _mm_packus_epi32(_mm256_castsi256_si128(i8), _mm256_extracti128_si256(i8, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), h8);
  }
  static void store_bytes(uint8_t* p, vi v) {
    const __m256i i8 = (__m256i)v;
    const __m128i h8 = _mm_packs_epi32(_mm256_castsi256_si128(i8), _mm256_extracti128_si256(i8, 1));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packus_epi16(h8, h8));
  }
  static vf broadcast(const float* p) { return (vf)_mm256_set1_ps(*p); }
  static vq multiply_low(vq a, uint32_t m) {
    return (vq)_mm256_mul_epu32((__m256i)a, _mm256_set1_epi64x(m));
  }
  static vf dot_two(vf acc, vf a0, vf a1, const float* b0, const float* b1) {
    return isa::dot_two(acc, a0, a1, b0, b1);
  }
};

}  // namespace
}  // namespace bertfast::isa
