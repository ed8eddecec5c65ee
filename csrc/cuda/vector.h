// Floating types, and rows eight values at a time.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>

namespace bertfast::cuda {

using bf16 = __nv_bfloat16;
using fp16 = __half;

__device__ inline float to_float(float v) { return v; }
__device__ inline float to_float(bf16 v) { return __bfloat162float(v); }
__device__ inline float to_float(fp16 v) { return __half2float(v); }
__device__ inline void from_float(float* to, float v) { *to = v; }
__device__ inline void from_float(bf16* to, float v) { *to = __float2bfloat16(v); }
__device__ inline void from_float(fp16* to, float v) { *to = __float2half(v); }

// Calls f with a value of the type that a dtype's code names; see dtype_code in ops/cuda.
template <class F>
void by_dtype(int dtype, const F& f) {
  if (dtype == 0) return f(float());
  if (dtype == 1) return f(bf16());
  if (dtype == 2) return f(fp16());
  throw std::invalid_argument("dtype code " + std::to_string(dtype) + ", expected 0, 1 or 2");
}

template <class F>
void by_half(int dtype, const F& f) {
  if (dtype == 1) return f(bf16());
  if (dtype == 2) return f(fp16());
  throw std::invalid_argument("dtype code " + std::to_string(dtype) + ", expected 1 or 2");
}

constexpr int kVector = 8;  // values a thread handles together: 16 bytes in half precision

// Whether rows of `row` values can be read and written 16 bytes at a time.
template <class... P>
bool vectorised(int64_t row, const P*... pointers) {
  return row % kVector == 0 && ((reinterpret_cast<uintptr_t>(pointers) | ... | 0) % 16 == 0);
}

template <class T>
struct alignas(16) Eight {
  T at[kVector];
};

// v = p[0..8); zeros from `valid` on. `whole`: see vectorised().
template <class T>
__device__ __forceinline__ void load8(float (&v)[kVector], const T* p, int64_t valid, bool whole) {
  if (whole && valid > 0) {
    Eight<T> part;
#pragma unroll
    for (int i = 0; i < int(sizeof part) / 16; ++i)
      reinterpret_cast<uint4*>(&part)[i] = reinterpret_cast<const uint4*>(p)[i];
#pragma unroll
    for (int i = 0; i < kVector; ++i) v[i] = to_float(part.at[i]);
  } else {
#pragma unroll
    for (int i = 0; i < kVector; ++i) v[i] = i < valid ? to_float(p[i]) : 0.f;
  }
}

template <class T>
__device__ __forceinline__ void store8(T* p, const float (&v)[kVector], int64_t valid, bool whole) {
  if (whole && valid > 0) {
    Eight<T> part;
#pragma unroll
    for (int i = 0; i < kVector; ++i) from_float(&part.at[i], v[i]);
#pragma unroll
    for (int i = 0; i < int(sizeof part) / 16; ++i)
      reinterpret_cast<uint4*>(p)[i] = reinterpret_cast<const uint4*>(&part)[i];
  } else {
#pragma unroll
    for (int i = 0; i < kVector; ++i)
      if (i < valid) from_float(p + i, v[i]);
  }
}

// A parameter vector, in the activations' type or in fp32.
template <class T>
struct Parameter {
  const void* data;
  bool is_fp32;

  __device__ __forceinline__ void load(float (&v)[kVector], int64_t j, int64_t valid,
                                       bool whole) const {
    if (is_fp32)
      load8(v, static_cast<const float*>(data) + j, valid, whole);
    else
      load8(v, static_cast<const T*>(data) + j, valid, whole);
  }
};

}  // namespace bertfast::cuda
