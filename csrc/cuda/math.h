// The arithmetic that the kernels share: dropout's random bits, activations, sums and maxima over
// threads.
#pragma once
#include "vector.h"

namespace bertfast::cuda {

// The block's dynamic shared memory; no kernel has any other.
__device__ __forceinline__ char* shared_memory() {
#ifdef __CUDACC__
  extern __shared__ uint4 memory[];
  return reinterpret_cast<char*>(memory);
#else
  return host::shared_memory();
#endif
}

// --- dropout: see ops/dropout.py ---

struct Dropout {
  const int64_t* seed;  // (seed, offset), null for no dropout
  float scale;          // 1 / (1 - p)
  uint32_t threshold;   // kept where the random bits are >= this
};

// Philox4x32-10 (Salmon et al., SC 2011): which of columns [4 block, 4 block + 4) of a row are
// kept, the first in bit 0.
__host__ __device__ inline uint32_t keep4(const Dropout& d, int64_t row, uint32_t block) {
  uint32_t c0 = block, c1 = uint32_t(row), c2 = uint32_t(uint64_t(row) >> 32);
  uint32_t c3 = uint32_t(d.seed[1]);
  uint32_t key0 = uint32_t(d.seed[0]), key1 = uint32_t(uint64_t(d.seed[0]) >> 32);
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = uint64_t(c0) * 0xD2511F53u, p1 = uint64_t(c2) * 0xCD9E8D57u;
    c0 = uint32_t(p1 >> 32) ^ c1 ^ key0;
    c2 = uint32_t(p0 >> 32) ^ c3 ^ key1;
    c1 = uint32_t(p1);
    c3 = uint32_t(p0);
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  const uint32_t t = d.threshold;
  return (c0 >= t) | (c1 >= t) << 1 | (c2 >= t) << 2 | (c3 >= t) << 3;
}

// Columns [j, j + 8) of a row, j a multiple of 8.
__host__ __device__ inline uint32_t keep8(const Dropout& d, int64_t row, int64_t j) {
  return keep4(d, row, uint32_t(j / 4)) | keep4(d, row, uint32_t(j / 4 + 1)) << 4;
}

// --- activations: 0 none, 1 GELU (erf), 2 GELU (tanh), 3 ReLU ---

constexpr float kRootHalf = 0.70710678f, kTanhScale = 0.79788456f, kTanhCubic = 0.044715f;

__host__ __device__ inline float sigmoid(float x) { return 1 / (1 + expf(-x)); }

__host__ __device__ inline float twice_tanh_argument(float z) {
  return 2 * kTanhScale * (z + kTanhCubic * z * z * z);
}

template <int activation>
__host__ __device__ inline float activate(float z) {
  if (activation == 0) return z;
  if (activation == 3) return z < 0 ? 0 : z;  // a NaN stays
  if (z == -INFINITY) return 0;               // the limit, not -inf * 0
  if (activation == 1) return z * (0.5f * erfcf(-z * kRootHalf));
  return z * sigmoid(twice_tanh_argument(z));
}

template <int activation>
__host__ __device__ inline float derivative(float z) {
  if (activation == 0) return 1;
  if (activation == 3) return z > 0 ? 1 : 0;
  if (z > 12 || z < -12) return z > 0 ? 1 : 0;  // so in fp32; z * z may overflow
  if (activation == 1) return 0.5f * erfcf(-z * kRootHalf) + z * expf(-0.5f * z * z) * 0.39894228f;
  const float s = sigmoid(twice_tanh_argument(z));
  return s + 2 * z * s * (1 - s) * kTanhScale * (1 + 3 * kTanhCubic * z * z);
}

// --- sums and maxima over threads, the same in every thread ---

struct Sum {
  __device__ __forceinline__ float operator()(float a, float b) const { return a + b; }
};
struct Max {
  __device__ __forceinline__ float operator()(float a, float b) const { return fmaxf(a, b); }
};

template <class F>
__device__ __forceinline__ float warp_fold(float v, F f) {
#pragma unroll
  for (int lanes = 16; lanes; lanes /= 2) v = f(v, __shfl_xor_sync(~0u, v, lanes));
  return v;
}

// Over a block of kThreads; uses the first kThreads / 32 floats of shared memory. All threads call.
template <int kThreads, class F>
__device__ __forceinline__ float block_fold(float v, F f) {
  v = warp_fold(v, f);
  if (kThreads == 32) return v;
  float* parts = reinterpret_cast<float*>(shared_memory());
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = v;
  __syncthreads();
  v = parts[0];
#pragma unroll
  for (int warp = 1; warp < kThreads / 32; ++warp) v = f(v, parts[warp]);
  __syncthreads();  // before the next fold overwrites
  return v;
}

__device__ __forceinline__ float warp_sum(float v) { return warp_fold(v, Sum()); }
template <int kThreads>
__device__ __forceinline__ float block_sum(float v) {
  return block_fold<kThreads>(v, Sum());
}
template <int kThreads>
__device__ __forceinline__ float block_max(float v) {
  return block_fold<kThreads>(v, Max());
}

}  // namespace bertfast::cuda
