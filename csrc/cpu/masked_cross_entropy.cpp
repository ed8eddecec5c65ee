// Softmax cross-entropy of rows of logits, and its gradient in their place.
#include <omp.h>

#include "operators.h"
#include "vec.h"

namespace bertfast::BERTFAST_ISA {
namespace {

// A row of z becomes exp(z - max) / sum as T, which may be narrower: writes never pass reads.
template <class T>
void scale_row(float* z, int64_t n, float factor) {
  T* to = reinterpret_cast<T*>(z);
  for (int64_t j = 0; j < n; j += W) store_upto(to + j, load_upto(z + j, n - j) * factor, n - j);
}

template <class T>
void one_row(float* z, int64_t n, int64_t label, bool gradient, float* loss) {
  vf top = splat(-kInf);
  for (int64_t j = 0; j < n; j += W) top = max(top, only(load_upto(z + j, n - j), n - j, top));
  const float m = max_of(top), at_label = z[label];
  vf total = {};
  for (int64_t j = 0; j < n; j += W) {
    const vf e = only(exp(load_upto(z + j, n - j) - m), n - j);
    total += e;
    if (gradient) store_upto(z + j, e, n - j);
  }
  const float s = sum(total);
  *loss = __builtin_logf(s) + (m - at_label);  // m may be large
  if (!gradient) return;
  const float p = z[label] / s;
  scale_row<T>(z, n, 1 / s);
  store_n(reinterpret_cast<T*>(z) + label, splat(p - 1), 1);
}

template <class T>
void rows_of(const CrossEntropyArgs& g) {
#pragma omp parallel for schedule(static) if (g.rows * g.vocabulary > (1 << 14))
  for (int64_t r = 0; r < g.rows; ++r) {
    float* z = g.logits + r * g.vocabulary;
    if (g.labels[r] != g.ignore_index) {
      one_row<T>(z, g.vocabulary, g.labels[r], g.gradient, g.loss + r);
      continue;
    }
    g.loss[r] = 0;
    if (g.gradient && g.vocabulary) std::memset(z, 0, g.vocabulary * sizeof(T));
  }
}

}  // namespace

void cross_entropy_rows(const CrossEntropyArgs& g) {
  if (g.bf16)
    rows_of<bf16>(g);
  else
    rows_of<float>(g);
}

}  // namespace bertfast::BERTFAST_ISA
