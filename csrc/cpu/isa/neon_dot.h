// 64-bit ARM with dot products of bytes of a sign (ARMv8.2's FEAT_DotProd).
#pragma once
#include "hwcap.h"
#include "neon.h"

namespace bertfast::isa {
namespace {

struct neon_dot : neon {
  static bool supported() { return hwcap::dot(); }
  static constexpr Unit kUnits[] = {Unit::fp32, Unit::wide_bf16, Unit::int8};
  static constexpr int kByteZero = 128;

  static vf dot_int8(vf acc, vf a, vf b) {
    return (vf)vdotq_s32((int32x4_t)acc, (int8x16_t)a, (int8x16_t)b);
  }
};

}  // namespace
}  // namespace bertfast::isa
