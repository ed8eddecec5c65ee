// LN(residual + dropout(x + x_bias)) and its backward.
#include "kernels.h"
#include "rows.h"

namespace bertfast::cuda {
namespace {

template <class T>
struct Inputs {
  const T *x, *residual;  // residual may be null, x_bias.data too
  Parameter<T> x_bias;
  Dropout dropout;
  int64_t hidden;
  bool whole;  // rows in 16-byte accesses
};

// s = residual + dropout(x + x_bias) of row t; keep holds a bit a value where there is dropout.
template <class S, class T>
__device__ __forceinline__ void sum_row(const Inputs<T>& in, int64_t t, Row<S>& s,
                                        uint32_t (&keep)[S::kChunks]) {
#pragma unroll
  for (int c = 0; c < S::kChunks; ++c) {
    const int64_t j = column<S>(c), left = in.hidden - j, at = t * in.hidden + j;
    float other[kVector];
    load8(s[c], in.x + at, left, in.whole);
    if (in.x_bias.data) {
      in.x_bias.load(other, j, left, in.whole);
#pragma unroll
      for (int i = 0; i < kVector; ++i) s[c][i] += other[i];
    }
    if (in.dropout.seed) {
      keep[c] = keep8(in.dropout, t, j);
#pragma unroll
      for (int i = 0; i < kVector; ++i) s[c][i] = keep[c] >> i & 1 ? s[c][i] * in.dropout.scale : 0;
    }
    if (in.residual) {
      load8(other, in.residual + at, left, in.whole);
#pragma unroll
      for (int i = 0; i < kVector; ++i) s[c][i] += other[i];
    }
  }
}

template <class S, class T>
__global__ void __launch_bounds__(S::kThreads)
    forward(Inputs<T> in, Parameter<T> weight, Parameter<T> bias, float eps, T* y, float* mean_out,
            float* rstd_out) {
  start_next_kernel();
  await_last_kernel();
  const int64_t t = blockIdx.x;
  Row<S> s;
  uint32_t keep[S::kChunks];
  float mean, rstd;
  sum_row<S>(in, t, s, keep);
  row_statistics<S>(s, in.hidden, eps, mean, rstd);
  if (threadIdx.x == 0) mean_out[t] = mean, rstd_out[t] = rstd;
#pragma unroll
  for (int c = 0; c < S::kChunks; ++c) {
    const int64_t j = column<S>(c), left = in.hidden - j;
    float w[kVector], b[kVector];
    weight.load(w, j, left, in.whole);
    bias.load(b, j, left, in.whole);
#pragma unroll
    for (int i = 0; i < kVector; ++i) s[c][i] = s[c][i] * rstd * w[i] + b[i];
    store8(y + t * in.hidden + j, s[c], left, in.whole);
  }
}

// Block b takes rows b, b + blocks, ...; partial is [blocks, 3, hidden].
template <class S, class T>
__global__ void __launch_bounds__(S::kThreads)
    backward(Inputs<T> in, const T* grad, Parameter<T> weight, const float* mean, const float* rstd,
             T* dx, T* dresidual, float* partial, int64_t tokens) {
  Row<S> dweight = {}, dbias = {}, dx_bias = {};
  for (int64_t t = blockIdx.x; t < tokens; t += gridDim.x) {
    Row<S> s, g;
    uint32_t keep[S::kChunks];
    sum_row<S>(in, t, s, keep);
#pragma unroll
    for (int c = 0; c < S::kChunks; ++c) {
      const int64_t j = column<S>(c);
      load8(g[c], grad + t * in.hidden + j, in.hidden - j, in.whole);
    }
    row_backward<S>(g, s, weight, in.hidden, mean[t], rstd[t], in.whole, dweight, dbias);
#pragma unroll
    for (int c = 0; c < S::kChunks; ++c) {
      const int64_t j = column<S>(c), left = in.hidden - j, at = t * in.hidden + j;
      store8(dresidual + at, s[c], left, in.whole);
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        if (in.dropout.seed) s[c][i] = keep[c] >> i & 1 ? s[c][i] * in.dropout.scale : 0;
        dx_bias[c][i] += s[c][i];
      }
      store8(dx + at, s[c], left, in.whole);
    }
  }
  float* sums = partial + int64_t(blockIdx.x) * 3 * in.hidden;
  store_partial<S>(sums, in.hidden, dweight);
  store_partial<S>(sums + in.hidden, in.hidden, dbias);
  store_partial<S>(sums + 2 * in.hidden, in.hidden, dx_bias);
}

}  // namespace

void add_layer_norm(int dtype, const void* x, const void* residual, const void* weight,
                    bool weight_fp32, const void* bias, bool bias_fp32, const void* x_bias,
                    bool x_bias_fp32, const int64_t* seed, float keep_scale, uint32_t threshold,
                    float eps, int64_t tokens, int64_t hidden, void* y, float* mean, float* rstd,
                    int device, void* stream) {
  if (tokens == 0) return;
  const DeviceGuard guard(device);
  const bool whole = vectorised(hidden, x, residual, weight, bias, x_bias, y);
  by_dtype(dtype, [&](auto type) {
    by_hidden(hidden, [&](auto spread) {
      using T = decltype(type);
      using S = decltype(spread);
      const Inputs<T> in{static_cast<const T*>(x),
                         static_cast<const T*>(residual),
                         {x_bias, x_bias_fp32},
                         {seed, keep_scale, threshold},
                         hidden,
                         whole};
      launch("add_layer_norm", forward<S, T>, dim3(unsigned(tokens)), S::kThreads, S::kShared,
             stream, in, Parameter<T>{weight, weight_fp32}, Parameter<T>{bias, bias_fp32}, eps,
             static_cast<T*>(y), mean, rstd);
    });
  });
}

void add_layer_norm_backward(int dtype, const void* grad, const void* x, const void* residual,
                             const void* weight, bool weight_fp32, const void* x_bias,
                             bool x_bias_fp32, const int64_t* seed, float keep_scale,
                             uint32_t threshold, const float* mean, const float* rstd,
                             int64_t tokens, int64_t hidden, void* dx, void* dresidual,
                             float* partial, int64_t blocks, float* columns, int device,
                             void* stream) {
  const DeviceGuard guard(device);
  const bool whole = vectorised(hidden, grad, x, residual, weight, x_bias, dx, dresidual);
  if (blocks > 0)
    by_dtype(dtype, [&](auto type) {
      by_hidden(hidden, [&](auto spread) {
        using T = decltype(type);
        using S = decltype(spread);
        const Inputs<T> in{static_cast<const T*>(x),
                           static_cast<const T*>(residual),
                           {x_bias, x_bias_fp32},
                           {seed, keep_scale, threshold},
                           hidden,
                           whole};
        launch("add_layer_norm_backward", backward<S, T>, dim3(unsigned(blocks)), S::kThreads,
               S::kShared, stream, in, static_cast<const T*>(grad),
               Parameter<T>{weight, weight_fp32}, mean, rstd, static_cast<T*>(dx),
               static_cast<T*>(dresidual), partial, tokens);
      });
    });
  launch_add_partials(partial, columns, blocks, 3 * hidden, stream);
}

}  // namespace bertfast::cuda
