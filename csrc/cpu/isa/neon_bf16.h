// 64-bit ARM with dot products of bf16, and of bytes with and without a sign (ARMv8.6's FEAT_BF16
// and FEAT_I8MM).
#pragma once
#include "hwcap.h"
#include "neon.h"

namespace bertfast::isa {
namespace {

struct neon_bf16 : neon {
  static bool supported() { return hwcap::bf16() && hwcap::i8mm(); }
  static constexpr Unit kUnits[] = {Unit::fp32, Unit::bf16, Unit::int8};

  static void store_bf16(isa::bf16* p, vf v) {
    const bfloat16x4_t rounded = vcvt_bf16_f32((float32x4_t)v);
    __builtin_memcpy(p, &rounded, sizeof rounded);
  }
  static vf dot_bf16(vf acc, vf a, vf b) {
    return (vf)vbfdotq_f32((float32x4_t)acc, (bfloat16x8_t)a, (bfloat16x8_t)b);
  }
  static vf dot_int8(vf acc, vf a, vf b) {
    return (vf)vusdotq_s32((int32x4_t)acc, (uint8x16_t)a, (int8x16_t)b);
  }
};

}  // namespace
}  // namespace bertfast::isa
