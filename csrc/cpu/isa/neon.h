// 64-bit ARM.
#pragma once
#include <arm_neon.h>

#include "generic.h"

namespace bertfast::isa {
namespace {

struct neon : Generic<4, 12> {  // 24 accumulators of 32 registers
  // gcc converts between lanes of 16 and 32 bits piece by piece, and multiplies 64 bits so.
  static vf load_bf16(const bf16* p) {
    return (vf)vshll_n_u16(vld1_u16(reinterpret_cast<const uint16_t*>(p)), 16);
  }
  static void store_bf16(bf16* p, vf v) {
    vst1_u16(reinterpret_cast<uint16_t*>(p), vmovn_u32((uint32x4_t)round_bf16(v)));
  }
  static vq multiply_low(vq a, uint32_t m) {
    return (vq)vmull_u32(vmovn_u64((uint64x2_t)a), vdup_n_u32(m));
  }
};

}  // namespace
}  // namespace bertfast::isa
