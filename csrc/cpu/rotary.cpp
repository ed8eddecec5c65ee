// Rotary positions of packed queries and keys.
#include "operators.h"
#include "vec.h"

namespace bertfast::BERTFAST_ISA {
namespace {

// One head: x and out [2 * half], cosines and sines [half].
template <class T>
void turn(const T* x, const float* cosines, const float* sines, int64_t half, float sign, T* out) {
  for (int64_t j = 0; j < half; j += W) {
    const int64_t n = half - j;
    const vf a = load_upto(x + j, n), b = load_upto(x + half + j, n);
    const vf c = load_upto(cosines + j, n), s = load_upto(sines + j, n) * sign;
    store_upto(out + j, a * c - b * s, n);
    store_upto(out + half + j, b * c + a * s, n);
  }
}

template <class T>
void turn_all(const RotaryArgs& g) {
  const int64_t half = g.dim / 2, width = g.heads * g.dim;
#pragma omp parallel for schedule(static) if (g.tokens * width > (1 << 13))
  for (int64_t t = 0; t < g.tokens; ++t) {
    const float* cosines = g.angles + t * g.dim;
    const T* x = static_cast<const T*>(g.qkv) + t * 3 * width;
    T* out = static_cast<T*>(g.out) + t * 3 * width;
    for (int64_t h = 0; h < 2 * g.heads; ++h)
      turn(x + h * g.dim, cosines, cosines + half, half, g.inverse ? -1.f : 1.f, out + h * g.dim);
    std::memcpy(out + 2 * width, x + 2 * width, width * sizeof(T));
  }
}

}  // namespace

void rotary(const RotaryArgs& g) {
  if (g.bf16)
    turn_all<bf16>(g);
  else
    turn_all<float>(g);
}

}  // namespace bertfast::BERTFAST_ISA
