// Operands of a matrix unit: which units go there, and floats in parts.
#pragma once
#include "vec.h"

namespace bertfast::BERTFAST_ISA {
namespace {

template <Unit u>
constexpr bool kMatrix = Isa::kHasMatrix && u != Unit::fp32;
template <Unit u>
using MatrixScope = std::conditional_t<kMatrix<u>, Isa::MatrixScope, int>;

// The nearest bf16, as a float, and in x what is left. An infinity leaves a NaN: it makes every sum
// that it enters NaN.
inline vf take_bf16(vf& x) {
  const vf near = (vf)((bits(x) + 0x8000) & 0xffff0000);
  x -= near;
  return near;
}
// Of bf16 that are floats so far: pairs of an element of each.
inline vf pairs(vf even, vf odd) { return (vf)((bits(even) >> 16) | bits(odd)); }

// A panel of b in fp32, [k][32 columns], on its way to [step][parts][16 units][32 columns].
struct Splitter {
  const float* from;
  float* to;
  int64_t at, end;  // in registers of pairs, two for each unit

  void take(int64_t count) {
    constexpr int64_t kAhead = 64 * kMatrixRows;  // it is far away: in L3 or in memory
    for (const int64_t stop = min(at + count, end); at < stop; ++at) {
      const int64_t unit = at / 2, column = at % 2 * W;
      const float *even = from + 2 * unit * kMatrixRows + column, *odd = even + kMatrixRows;
      __builtin_prefetch(even + kAhead);
      __builtin_prefetch(odd + kAhead);
      vf x0 = load(even), x1 = load(odd);
      float* out =
          to + (unit / kStep * kParts<Unit::split> * kStep + unit % kStep) * kMatrixRows + column;
      for (int part = 0; part < kParts<Unit::split>; ++part, out += kBlock)
        store(out, pairs(take_bf16(x0), take_bf16(x1)));
    }
  }
};

}  // namespace
}  // namespace bertfast::BERTFAST_ISA
