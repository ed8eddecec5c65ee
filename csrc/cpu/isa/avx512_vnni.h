// AVX-512 with dot products of bytes (VNNI).
#pragma once
#include "avx512.h"

namespace bertfast::isa {
namespace {

struct avx512_vnni : avx512 {
  static bool supported() { return avx512::supported() && __builtin_cpu_supports("avx512vnni"); }
  static constexpr bool kSums16 = false;

  static vf dot_int8(vf acc, vf a, vf b) {
    return (vf)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)a, (__m512i)b);
  }
};

}  // namespace
}  // namespace bertfast::isa
