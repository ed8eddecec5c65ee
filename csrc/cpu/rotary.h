// Rotary positions of a row of heads, for the operator and for the encoder.
#pragma once
#include "vec.h"

namespace bertfast::BERTFAST_ISA {
namespace {

// Heads side by side, each pair (x[j], x[j + dim / 2]) turned by angles [2, dim / 2], cosines and
// sines; sign -1: the other way. out may be x.
template <class X, class T>
void turn(const X* x, const float* angles, int64_t heads, int64_t dim, float sign, T* out) {
  const int64_t half = dim / 2;
  for (int64_t h = 0; h < heads; ++h, x += dim, out += dim)
    for (int64_t j = 0; j < half; j += W) {
      const int64_t n = half - j;
      const vf a = load_upto(x + j, n), b = load_upto(x + half + j, n);
      const vf c = load_upto(angles + j, n), s = load_upto(angles + half + j, n) * sign;
      store_upto(out + j, a * c - b * s, n);
      store_upto(out + half + j, b * c + a * s, n);
    }
}

}  // namespace
}  // namespace bertfast::BERTFAST_ISA
