// dropout(LN(word + position + type)) on packed ids, and its backward up to the tables' rows.
#include <omp.h>

#include "operators.h"
#include "philox.h"
#include "rows.h"

namespace bertfast::BERTFAST_ISA {
namespace {

template <class T>
void sum_row(const EmbeddingArgs& g, int64_t t, float* s) {
  const T* word = static_cast<const T*>(g.word) + g.ids[t] * g.hidden;
  const T* position = static_cast<const T*>(g.position) + g.positions[t] * g.hidden;
  const T* type = g.types ? static_cast<const T*>(g.type) + g.types[t] * g.hidden : nullptr;
  for (int64_t j = 0; j < g.hidden; j += W) {
    const int64_t left = g.hidden - j;
    vf v = load_upto(word + j, left) + load_upto(position + j, left);
    if (type) v += load_upto(type + j, left);
    store(s + j, v);
  }
}

template <class T>
void forward(const EmbeddingArgs& g) {
  const Vector weight{g.weight, g.bf16}, bias{g.bias, g.bf16};
  static thread_local Buffer buffer;
  const PerThread<float> scratch(buffer, 2 * padded(g.hidden));
#pragma omp parallel if (g.tokens * g.hidden > (1 << 14))
  {
    float* s = scratch.mine();
    uint32_t* bits = reinterpret_cast<uint32_t*>(s + padded(g.hidden));
#pragma omp for schedule(static)
    for (int64_t t = 0; t < g.tokens; ++t) {
      sum_row<T>(g, t, s);
      float mean, low, rstd;
      row_statistics(s, g.hidden, g.eps, mean, low, rstd);
      g.mean[t] = mean, g.rstd[t] = rstd;
      if (g.dropout.seed) philox_row(g.dropout.seed, t, g.hidden, bits);
      T* y = static_cast<T*>(g.y) + t * g.hidden;
      for (int64_t j = 0; j < g.hidden; j += W) {
        vf v = (load(s + j) - mean - low) * rstd * weight.at(j, g.hidden) + bias.at(j, g.hidden);
        if (g.dropout.seed) v = drop(v, bits + j, g.dropout);
        store_upto(y + j, v, g.hidden - j);
      }
    }
  }
}

template <class T>
void backward(const EmbeddingArgs& g) {
  const Vector weight{g.weight, g.bf16};
  const int64_t chunks = row_chunks(g.tokens), stride = padded(g.hidden);
  static thread_local Buffer partial_buffer, buffer;
  const PerThread<float> scratch(buffer, 3 * stride);
  float* partial = partial_buffer.get<float>(chunks * 2 * stride);
#pragma omp parallel for schedule(static) if (g.tokens * g.hidden > (1 << 14))
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    float* s = scratch.mine();
    float* grad_row = s + stride;
    uint32_t* bits = reinterpret_cast<uint32_t*>(s + 2 * stride);
    float* dweight = partial + chunk * 2 * stride;
    std::memset(dweight, 0, 2 * stride * sizeof(float));
    for (int64_t t = g.tokens * chunk / chunks; t < g.tokens * (chunk + 1) / chunks; ++t) {
      sum_row<T>(g, t, s);
      if (g.dropout.seed) philox_row(g.dropout.seed, t, g.hidden, bits);
      const T* grad = static_cast<const T*>(g.grad) + t * g.hidden;
      for (int64_t j = 0; j < g.hidden; j += W) {
        vf v = load_upto(grad + j, g.hidden - j);
        if (g.dropout.seed) v = drop(v, bits + j, g.dropout);
        store(grad_row + j, v);
      }
      row_backward(grad_row, s, weight, g.hidden, g.mean[t], g.rstd[t], dweight, dweight + stride);
      for (int64_t j = 0; j < g.hidden; j += W)
        store_upto(g.ds + t * g.hidden + j, load(s + j), g.hidden - j);
    }
  }
  add_chunks(partial, chunks, 2, g.hidden, g.columns);
}

}  // namespace

void embedding_layer_norm(const EmbeddingArgs& g) {
  if (g.bf16)
    forward<bf16>(g);
  else
    forward<float>(g);
}

void embedding_layer_norm_backward(const EmbeddingArgs& g) {
  if (g.bf16)
    backward<bf16>(g);
  else
    backward<float>(g);
}

void scatter_add(const float* x, const int64_t* rows, float* out, int64_t tokens, int64_t hidden,
                 int64_t table) {
  if (hidden == 0) return;
#pragma omp parallel if (table * hidden > (1 << 15))
  {
#pragma omp for schedule(static)
    for (int64_t r = 0; r < table; ++r) std::memset(out + r * hidden, 0, hidden * sizeof(float));
    // Each thread owns columns, so rows add up in one order.
#pragma omp for schedule(static)
    for (int64_t j0 = 0; j0 < hidden; j0 += 64)
      for (int64_t t = 0; t < tokens; ++t) {
        float* to = out + rows[t] * hidden;
        for (int64_t j = j0; j < min(j0 + 64, hidden); j += W) {
          const int64_t left = min(j0 + 64, hidden) - j;
          store_upto(to + j, load_upto(to + j, left) + load_upto(x + t * hidden + j, left), left);
        }
      }
  }
}

}  // namespace bertfast::BERTFAST_ISA
