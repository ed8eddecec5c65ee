// AVX-512 with dot products of bytes and of bf16.
#pragma once
#include "avx512_vnni.h"

namespace bertfast::isa {
namespace {

struct avx512_bf16 : avx512_vnni {
  static bool supported() {
    return avx512_vnni::supported() && __builtin_cpu_supports("avx512bf16");
  }
  // Intel runs the bf16 dot product at half the flops of fp32 (measured on Emerald Rapids: 160
  // against 320 GFLOP/s), Zen 5 at twice.
  static bool preferred() { return !__builtin_cpu_is("intel"); }
  static constexpr Unit kUnits[] = {Unit::fp32, Unit::bf16, Unit::int8};

  static void store_bf16(bf16* p, vf v) {
    const __m256bh rounded = _mm512_cvtneps_pbh((__m512)v);
    __builtin_memcpy(p, &rounded, sizeof rounded);
  }
  static vf dot_bf16(vf acc, vf a, vf b) {
    return (vf)_mm512_dpbf16_ps((__m512)acc, (__m512bh)(__m512)a, (__m512bh)(__m512)b);
  }
  static vf narrow(vf x0, vf x1) { return (vf)_mm512_cvtne2ps_pbh((__m512)x1, (__m512)x0); }
};

}  // namespace
}  // namespace bertfast::isa
