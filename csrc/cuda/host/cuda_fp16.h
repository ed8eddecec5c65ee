// float16 for the host harness; see cuda_runtime.h.
#pragma once

struct __half {
  _Float16 value;
};

inline float __half2float(__half v) { return float(v.value); }
inline __half __float2half(float f) { return {_Float16(f)}; }

struct alignas(4) __half2 {
  __half x, y;
};
inline __half2 __floats2half2_rn(float x, float y) { return {__float2half(x), __float2half(y)}; }
