// dropout(activation(up) * gate) and its backward.
#include "operators.h"
#include "philox.h"
#include "rows.h"

namespace bertfast::BERTFAST_ISA {
namespace {

template <class T>
vf at(const void* rows, int64_t row, int64_t t, int64_t j, int64_t n) {
  return load_upto(static_cast<const T*>(rows) + t * row + j, n - j);
}
template <class T>
void put(void* out, int64_t t, int64_t j, int64_t n, vf v) {
  store_upto(static_cast<T*>(out) + t * n + j, v, n - j);
}

// f(t, j, bits) for each register of values, from column j of row t, and its random bits.
template <class F>
void each(const GatedActArgs& g, const F& f) {
  static thread_local Buffer buffer;
  const PerThread<uint32_t> scratch(buffer, g.dropout.seed ? padded(g.n) : 0);
#pragma omp parallel if (g.rows * g.n > (1 << 14))
  {
    uint32_t* bits = scratch.mine();
#pragma omp for schedule(static)
    for (int64_t t = 0; t < g.rows; ++t) {
      if (g.dropout.seed) philox_row(g.dropout.seed, t, g.n, bits);
      for (int64_t j = 0; j < g.n; j += W) f(t, j, bits + j);
    }
  }
}

template <class T, class A>
void forward(const GatedActArgs& g, A) {
  each(g, [&](int64_t t, int64_t j, const uint32_t* bits) {
    const vf up = at<T>(g.up, g.up_row, t, j, g.n), gate = at<T>(g.gate, g.gate_row, t, j, g.n);
    const vf y = activate<A::value>(up) * gate;
    put<T>(g.y, t, j, g.n, g.dropout.seed ? drop(y, bits, g.dropout) : y);
  });
}

template <class T, class A>
void backward(const GatedActArgs& g, A) {
  each(g, [&](int64_t t, int64_t j, const uint32_t* bits) {
    const vf up = at<T>(g.up, g.up_row, t, j, g.n), gate = at<T>(g.gate, g.gate_row, t, j, g.n);
    vf d = at<T>(g.grad, g.grad_row, t, j, g.n);
    if (g.dropout.seed) d = drop(d, bits, g.dropout);
    put<T>(g.dup, t, j, g.n, d * gate * derivative<A::value>(up));
    put<T>(g.dgate, t, j, g.n, d * activate<A::value>(up));
  });
}

}  // namespace

void gated_act(const GatedActArgs& g) {
  by_activation(g.activation, [&](auto activation) {
    if (g.bf16)
      forward<bf16>(g, activation);
    else
      forward<float>(g, activation);
  });
}

void gated_act_backward(const GatedActArgs& g) {
  by_activation(g.activation, [&](auto activation) {
    if (g.bf16)
      backward<bf16>(g, activation);
    else
      backward<float>(g, activation);
  });
}

}  // namespace bertfast::BERTFAST_ISA
