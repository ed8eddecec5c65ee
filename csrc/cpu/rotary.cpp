// Rotary positions of packed queries and keys.
#include "rotary.h"

#include "operators.h"

namespace bertfast::BERTFAST_ISA {
namespace {

template <class T>
void turn_all(const RotaryArgs& g) {
  const int64_t width = g.heads * g.dim;
  if (width == 0) return;
#pragma omp parallel for schedule(static) if (g.tokens * width > (1 << 13))
  for (int64_t t = 0; t < g.tokens; ++t) {
    const T* x = static_cast<const T*>(g.qkv) + t * 3 * width;
    T* out = static_cast<T*>(g.out) + t * 3 * width;
    turn(x, g.angles + t * g.dim, 2 * g.heads, g.dim, g.inverse ? -1.f : 1.f, out);
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
