// LN(residual + dropout(x + x_bias)) and its backward; RMS norm or none in LN's place.
#include "operators.h"
#include "philox.h"
#include "rows.h"

namespace bertfast::BERTFAST_ISA {
namespace {

// s = residual + dropout(x + x_bias) of row t; bits keeps the row's random bits for later.
template <class T>
void sum_row(const AddLayerNormArgs& g, int64_t t, float* s, uint32_t* bits) {
  const T* x = static_cast<const T*>(g.x) + t * g.hidden;
  const T* residual = g.residual ? static_cast<const T*>(g.residual) + t * g.hidden : nullptr;
  const Vector x_bias{g.x_bias, g.x_bias_bf16};
  if (g.dropout.seed) philox_row(g.dropout.seed, t, g.hidden, bits);
  for (int64_t j = 0; j < g.hidden; j += W) {
    vf v = load_upto(x + j, g.hidden - j);
    if (g.x_bias) v += x_bias.at(j, g.hidden);
    if (g.dropout.seed) v = drop(v, bits + j, g.dropout);
    if (residual) v += load_upto(residual + j, g.hidden - j);
    store(s + j, v);
  }
}

template <class T>
void forward(const AddLayerNormArgs& g) {
  const Vector weight{g.weight, g.weight_bf16}, bias{g.bias, g.bias_bf16};
  static thread_local Buffer buffer;
  const PerThread<float> scratch(buffer, 2 * padded(g.hidden));
#pragma omp parallel if (g.tokens * g.hidden > (1 << 14))
  {
    float* s = scratch.mine();
    uint32_t* bits = reinterpret_cast<uint32_t*>(s + padded(g.hidden));
#pragma omp for schedule(static)
    for (int64_t t = 0; t < g.tokens; ++t) {
      sum_row<T>(g, t, s, bits);
      float mean = 0, low = 0, rstd = 1;
      if (g.rms)
        rstd = row_rms(s, g.hidden, g.eps);
      else if (g.rstd)
        row_statistics(s, g.hidden, g.eps, mean, low, rstd);
      if (g.rstd) g.mean[t] = mean, g.rstd[t] = rstd;
      T* y = static_cast<T*>(g.y) + t * g.hidden;
      for (int64_t j = 0; j < g.hidden; j += W) {
        vf v = load(s + j);
        if (g.rstd) v = (v - mean - low) * rstd * weight.at(j, g.hidden);
        if (g.bias) v += bias.at(j, g.hidden);
        store_upto(y + j, v, g.hidden - j);
      }
    }
  }
}

template <class T>
void backward(const AddLayerNormArgs& g) {
  const Vector weight{g.weight, g.weight_bf16};
  const int64_t chunks = row_chunks(g.tokens), stride = padded(g.hidden);
  static thread_local Buffer partial_buffer, buffer;
  const PerThread<float> scratch(buffer, 3 * stride);
  float* partial = partial_buffer.get<float>(chunks * 3 * stride);
#pragma omp parallel for schedule(static) if (g.tokens * g.hidden > (1 << 14))
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    float* s = scratch.mine();
    float* grad_row = s + stride;
    uint32_t* bits = reinterpret_cast<uint32_t*>(s + 2 * stride);
    float* dweight = partial + chunk * 3 * stride;
    float *dbias = dweight + stride, *dx_bias = dbias + stride;
    std::memset(dweight, 0, 3 * stride * sizeof(float));
    for (int64_t t = g.tokens * chunk / chunks; t < g.tokens * (chunk + 1) / chunks; ++t) {
      const T* grad = static_cast<const T*>(g.grad) + t * g.hidden;
      float* ds = g.rstd ? s : grad_row;  // without a norm the sum's gradient is the result's
      for (int64_t j = 0; j < g.hidden; j += W)
        store(grad_row + j, load_upto(grad + j, g.hidden - j));
      if (g.rstd) {
        sum_row<T>(g, t, s, bits);
        row_backward(grad_row, s, weight, g.hidden, g.mean[t], g.rstd[t], dweight, dbias, g.rms);
      } else if (g.dropout.seed) {
        philox_row(g.dropout.seed, t, g.hidden, bits);
      }
      T* dx = static_cast<T*>(g.dx) + t * g.hidden;
      T* dresidual = g.dresidual ? static_cast<T*>(g.dresidual) + t * g.hidden : nullptr;
      for (int64_t j = 0; j < g.hidden; j += W) {
        vf d = load(ds + j);
        if (dresidual) store_upto(dresidual + j, d, g.hidden - j);
        if (g.dropout.seed) d = drop(d, bits + j, g.dropout);
        store_upto(dx + j, d, g.hidden - j);
        store(dx_bias + j, load(dx_bias + j) + d);
      }
    }
  }
  add_chunks(partial, chunks, 3, g.hidden, g.columns);
}

}  // namespace

void add_layer_norm(const AddLayerNormArgs& g) {
  if (g.bf16)
    forward<bf16>(g);
  else
    forward<float>(g);
}

void add_layer_norm_backward(const AddLayerNormArgs& g) {
  if (g.bf16)
    backward<bf16>(g);
  else
    backward<float>(g);
}

}  // namespace bertfast::BERTFAST_ISA
