// int8 products where there is no VNNI: those of two neighbours in each of two units are added in
// 16 bits. Weights of one sign among these four may add up to 128 at most, 255 * 128 being less
// than 2^15.
#pragma once
#include "generic.h"

namespace bertfast::isa {
namespace {

#if defined(BERTFAST_EMULATED)
using emulated::dot_two;
#else
// acc + a0 b0 + a1 b1. In one piece, or the compiler would take all products before the sums, and
// spill; the weights from memory, since the registers are taken.
template <class vf>
inline vf dot_two(vf acc, vf a0, vf a1, const float* b0, const float* b1) {
  constexpr int lanes = sizeof(vf) / 4;
  using Units = const float (*)[lanes];
  const auto ones = typename Register<int32_t, lanes>::Type{} + 0x00010001;
  vf sum, other;
  asm("vpmaddubsw %5, %3, %1\n\tvpmaddubsw %6, %4, %2\n\tvpaddw %2, %1, %1\n\t"
      "vpmaddwd %7, %1, %1\n\tvpaddd %1, %0, %0"
      : "+v"(acc), "=&v"(sum), "=&v"(other)
      : "v"(a0), "v"(a1), "m"(*reinterpret_cast<Units>(b0)), "m"(*reinterpret_cast<Units>(b1)),
        "v"(ones));
  return acc;
}
#endif

}  // namespace
}  // namespace bertfast::isa
