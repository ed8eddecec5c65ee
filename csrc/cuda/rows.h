// Layer norm's rows: a block holds one row in registers, eight adjacent values of each chunk in a
// thread. What add_layer_norm and embedding_layer_norm share.
#pragma once
#include "check.h"
#include "math.h"

namespace bertfast::cuda {

// How a row is spread over a block: kThreads threads, kChunks times eight values in each.
template <int threads, int chunks>
struct Spread {
  static constexpr int kThreads = threads, kChunks = chunks;
  static constexpr size_t kShared = threads / 32 * sizeof(float);  // for block_sum
};

constexpr int64_t kMaxHidden = 4096;

template <class F>
void by_hidden(int64_t hidden, const F& f) {
  if (hidden <= 256) return f(Spread<32, 1>());
  if (hidden <= 1024) return f(Spread<128, 1>());
  if (hidden <= kMaxHidden) return f(Spread<256, 2>());
  throw std::invalid_argument("hidden is " + std::to_string(hidden) + ", expected at most 4096");
}

template <class S>
using Row = float[S::kChunks][kVector];

// This thread's first column of a chunk.
template <class S>
__device__ __forceinline__ int64_t column(int chunk) {
  return (int64_t(chunk) * S::kThreads + threadIdx.x) * kVector;
}

// s less its mean, in place; after the mean what its rounding left is taken off too. What lies past
// `hidden` is zero.
template <class S>
__device__ __forceinline__ void centre(Row<S>& s, int64_t hidden, float mean) {
  float rest = 0;
#pragma unroll
  for (int c = 0; c < S::kChunks; ++c)
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      s[c][i] = column<S>(c) + i < hidden ? s[c][i] - mean : 0.f;
      rest += s[c][i];
    }
  rest = block_sum<S::kThreads>(rest) / float(hidden);
#pragma unroll
  for (int c = 0; c < S::kChunks; ++c)
#pragma unroll
    for (int i = 0; i < kVector; ++i)
      if (column<S>(c) + i < hidden) s[c][i] -= rest;
}

// Mean and 1 / sqrt(var + eps) of s, which is centred; what lies past `hidden` is zero.
template <class S>
__device__ __forceinline__ void row_statistics(Row<S>& s, int64_t hidden, float eps, float& mean,
                                               float& rstd) {
  float total = 0, squares = 0;
#pragma unroll
  for (int c = 0; c < S::kChunks; ++c)
#pragma unroll
    for (int i = 0; i < kVector; ++i) total += s[c][i];
  mean = block_sum<S::kThreads>(total) / float(hidden);
  centre<S>(s, hidden, mean);
#pragma unroll
  for (int c = 0; c < S::kChunks; ++c)
#pragma unroll
    for (int i = 0; i < kVector; ++i) squares += s[c][i] * s[c][i];
  rstd = 1 / sqrtf(block_sum<S::kThreads>(squares) / float(hidden) + eps);
}

// For one row: grad and the sum that was normalised in s, in place: s becomes that sum's gradient;
// dweight and dbias gain this row's share.
template <class S, class T>
__device__ __forceinline__ void row_backward(const Row<S>& grad, Row<S>& s,
                                             const Parameter<T>& weight, int64_t hidden, float mean,
                                             float rstd, bool whole, Row<S>& dweight,
                                             Row<S>& dbias) {
  Row<S> scaled;
  float a = 0, b = 0;
  centre<S>(s, hidden, mean);
#pragma unroll
  for (int c = 0; c < S::kChunks; ++c) {
    const int64_t j = column<S>(c);
    weight.load(scaled[c], j, hidden - j, whole);
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      s[c][i] *= rstd;
      scaled[c][i] = __fmul_rn(scaled[c][i], grad[c][i]);  // not fused below: a is of its rounding
      a += scaled[c][i];
      b += scaled[c][i] * s[c][i];
      dweight[c][i] += grad[c][i] * s[c][i];
      dbias[c][i] += grad[c][i];
    }
  }
  a = block_sum<S::kThreads>(a) / float(hidden);
  b = block_sum<S::kThreads>(b) / float(hidden);
#pragma unroll
  for (int c = 0; c < S::kChunks; ++c)
#pragma unroll
    for (int i = 0; i < kVector; ++i) s[c][i] = (scaled[c][i] - a - s[c][i] * b) * rstd;
}

// Sums over rows go in two steps of fixed order, so their bits never change: each block adds up
// its share of the rows into partial [blocks, columns], then add_partials sums over the blocks.
template <class S>
__device__ __forceinline__ void store_partial(float* partial, int64_t hidden, const Row<S>& sum) {
#pragma unroll
  for (int c = 0; c < S::kChunks; ++c) {
    const int64_t j = column<S>(c);
    store8(partial + j, sum[c], hidden - j, false);
  }
}

constexpr int kGroups = 8;  // warps that share out the blocks of 32 columns

static __global__ void add_partials(const float* partial, float* out, int64_t blocks,
                                    int64_t columns) {
  const int lane = threadIdx.x % 32, group = threadIdx.x / 32;
  const int64_t j = int64_t(blockIdx.x) * 32 + lane;
  float* sums = reinterpret_cast<float*>(shared_memory());
  float total = 0;
  if (j < columns)
#pragma unroll 8
    for (int64_t b = group; b < blocks; b += kGroups) total += partial[b * columns + j];
  sums[threadIdx.x] = total;
  __syncthreads();
  if (group > 0 || j >= columns) return;
  for (int g = 1; g < kGroups; ++g) total += sums[32 * g + lane];
  out[j] = total;
}

inline void launch_add_partials(const float* partial, float* out, int64_t blocks, int64_t columns,
                                void* stream) {
  if (columns > 0)
    launch("add_partials", add_partials, dim3(unsigned((columns + 31) / 32)), 32 * kGroups,
           32 * kGroups * sizeof(float), stream, partial, out, blocks, columns);
}

}  // namespace bertfast::cuda
