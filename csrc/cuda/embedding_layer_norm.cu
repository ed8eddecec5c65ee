// dropout(LN(word + position + type)) on packed ids, and its backward up to the tables' rows.
#include "kernels.h"
#include "rows.h"

namespace bertfast::cuda {
namespace {

template <class T>
struct Tables {
  const int64_t *ids, *positions, *types;  // types may be null
  const T *word, *position, *type;
  Dropout dropout;
  int64_t hidden;
  bool whole;  // rows in 16-byte accesses
};

// s = the sum of token t's three rows.
template <class S, class T>
__device__ __forceinline__ void sum_row(const Tables<T>& in, int64_t t, Row<S>& s) {
  const T* word = in.word + in.ids[t] * in.hidden;
  const T* position = in.position + in.positions[t] * in.hidden;
  const T* type = in.types ? in.type + in.types[t] * in.hidden : nullptr;
#pragma unroll
  for (int c = 0; c < S::kChunks; ++c) {
    const int64_t j = column<S>(c), left = in.hidden - j;
    float other[kVector];
    load8(s[c], word + j, left, in.whole);
    load8(other, position + j, left, in.whole);
#pragma unroll
    for (int i = 0; i < kVector; ++i) s[c][i] += other[i];
    if (type) {
      load8(other, type + j, left, in.whole);
#pragma unroll
      for (int i = 0; i < kVector; ++i) s[c][i] += other[i];
    }
  }
}

// Dropout of token t's values from column j on.
template <class T>
__device__ __forceinline__ void drop8(const Tables<T>& in, int64_t t, int64_t j,
                                      float (&v)[kVector]) {
  if (!in.dropout.seed) return;
  const uint32_t keep = keep8(in.dropout, t, j);
#pragma unroll
  for (int i = 0; i < kVector; ++i) v[i] = keep >> i & 1 ? v[i] * in.dropout.scale : 0;
}

template <class S, class T>
__global__ void __launch_bounds__(S::kThreads)
    forward(Tables<T> in, const T* weight, const T* bias, float eps, T* y, float* mean_out,
            float* rstd_out) {
  const int64_t t = blockIdx.x;
  Row<S> s;
  float mean, rstd;
  sum_row<S>(in, t, s);
  row_statistics<S>(s, in.hidden, eps, mean, rstd);
  if (threadIdx.x == 0) mean_out[t] = mean, rstd_out[t] = rstd;
#pragma unroll
  for (int c = 0; c < S::kChunks; ++c) {
    const int64_t j = column<S>(c), left = in.hidden - j;
    float w[kVector], b[kVector];
    load8(w, weight + j, left, in.whole);
    load8(b, bias + j, left, in.whole);
#pragma unroll
    for (int i = 0; i < kVector; ++i) s[c][i] = s[c][i] * rstd * w[i] + b[i];
    drop8(in, t, j, s[c]);
    store8(y + t * in.hidden + j, s[c], left, in.whole);
  }
}

// Block b takes rows b, b + blocks, ...; partial is [blocks, 2, hidden].
template <class S, class T>
__global__ void __launch_bounds__(S::kThreads)
    backward(Tables<T> in, const T* grad, const T* weight, const float* mean, const float* rstd,
             float* ds, float* partial, int64_t tokens) {
  Row<S> dweight = {}, dbias = {};
  for (int64_t t = blockIdx.x; t < tokens; t += gridDim.x) {
    Row<S> s, g;
    sum_row<S>(in, t, s);
#pragma unroll
    for (int c = 0; c < S::kChunks; ++c) {
      const int64_t j = column<S>(c);
      load8(g[c], grad + t * in.hidden + j, in.hidden - j, in.whole);
      drop8(in, t, j, g[c]);
    }
    row_backward<S>(g, s, Parameter<T>{weight, false}, in.hidden, mean[t], rstd[t], in.whole,
                    dweight, dbias);
#pragma unroll
    for (int c = 0; c < S::kChunks; ++c) {
      const int64_t j = column<S>(c);
      store8(ds + t * in.hidden + j, s[c], in.hidden - j, in.whole);
    }
  }
  float* sums = partial + int64_t(blockIdx.x) * 2 * in.hidden;
  store_partial<S>(sums, in.hidden, dweight);
  store_partial<S>(sums + in.hidden, in.hidden, dbias);
}

}  // namespace

void embedding_layer_norm(int dtype, const int64_t* ids, const int64_t* positions,
                          const int64_t* types, const void* word, const void* position,
                          const void* type, const void* weight, const void* bias,
                          const int64_t* seed, float keep_scale, uint32_t threshold, float eps,
                          int64_t tokens, int64_t hidden, void* y, float* mean, float* rstd,
                          int device, void* stream) {
  if (tokens == 0) return;
  const DeviceGuard guard(device);
  const bool whole = vectorised(hidden, word, position, type, weight, bias, y);
  by_dtype(dtype, [&](auto value) {
    by_hidden(hidden, [&](auto spread) {
      using T = decltype(value);
      using S = decltype(spread);
      const auto of = [](const void* p) { return static_cast<const T*>(p); };
      const Tables<T> in{
          ids,    positions, types, of(word), of(position), of(type), {seed, keep_scale, threshold},
          hidden, whole};
      launch("embedding_layer_norm", forward<S, T>, dim3(unsigned(tokens)), S::kThreads, S::kShared,
             stream, in, of(weight), of(bias), eps, static_cast<T*>(y), mean, rstd);
    });
  });
}

void embedding_layer_norm_backward(int dtype, const void* grad, const int64_t* ids,
                                   const int64_t* positions, const int64_t* types, const void* word,
                                   const void* position, const void* type, const void* weight,
                                   const int64_t* seed, float keep_scale, uint32_t threshold,
                                   const float* mean, const float* rstd, int64_t tokens,
                                   int64_t hidden, float* ds, float* partial, int64_t blocks,
                                   float* columns, int device, void* stream) {
  const DeviceGuard guard(device);
  const bool whole = vectorised(hidden, grad, word, position, type, weight, ds);
  if (blocks > 0)
    by_dtype(dtype, [&](auto value) {
      by_hidden(hidden, [&](auto spread) {
        using T = decltype(value);
        using S = decltype(spread);
        const auto of = [](const void* p) { return static_cast<const T*>(p); };
        const Tables<T> in{ids,
                           positions,
                           types,
                           of(word),
                           of(position),
                           of(type),
                           {seed, keep_scale, threshold},
                           hidden,
                           whole};
        launch("embedding_layer_norm_backward", backward<S, T>, dim3(unsigned(blocks)), S::kThreads,
               S::kShared, stream, in, of(grad), of(weight), mean, rstd, ds, partial, tokens);
      });
    });
  launch_add_partials(partial, columns, blocks, 2 * hidden, stream);
}

}  // namespace bertfast::cuda
