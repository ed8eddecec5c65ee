// AVX2 with dot products of bytes (AVX-VNNI).
#pragma once
#include "avx2.h"

namespace bertfast::isa {
namespace {

struct avx2_vnni : avx2 {
  static bool supported() { return avx2::supported() && __builtin_cpu_supports("avxvnni"); }
  static constexpr bool kSums16 = false;

  static vf dot_int8(vf acc, vf a, vf b) {
    return (vf)_mm256_dpbusd_avx_epi32((__m256i)acc, (__m256i)a, (__m256i)b);
  }
};

}  // namespace
}  // namespace bertfast::isa
