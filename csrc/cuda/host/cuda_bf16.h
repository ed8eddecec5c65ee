// bfloat16 for the host harness; see cuda_runtime.h.
#pragma once
#include <cstdint>
#include <cstring>

struct __nv_bfloat16 {
  uint16_t bits;
};

inline float __bfloat162float(__nv_bfloat16 v) {
  const uint32_t wide = uint32_t(v.bits) << 16;
  float f;
  std::memcpy(&f, &wide, sizeof f);
  return f;
}

inline __nv_bfloat16 __float2bfloat16(float f) {  // to the nearest, ties to even
  uint32_t wide;
  std::memcpy(&wide, &f, sizeof wide);
  if (f != f) return {uint16_t(0x7FFF)};
  return {uint16_t((wide + 0x7FFF + (wide >> 16 & 1)) >> 16)};
}

struct alignas(4) __nv_bfloat162 {
  __nv_bfloat16 x, y;
};
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) {
  return {__float2bfloat16(x), __float2bfloat16(y)};
}
