// The AVX-512 and AMX instructions that the kernels name, in plain C++, for a test build
// (BERTFAST_EMULATE) on a processor without them: it shows results, not speed. Included before all
// else; BERTFAST_EMULATED is 1 for AVX-512 alone, 2 with VNNI, 3 with bf16 and 4 with AMX too.
#pragma once
#include <immintrin.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>

namespace emulated {

inline float from_bf16(uint16_t b) {
  const uint32_t u = uint32_t(b) << 16;
  float f;
  std::memcpy(&f, &u, sizeof f);
  return f;
}
inline uint16_t to_bf16(float f) {  // to nearest, ties to even; a NaN stays one
  uint32_t u;
  std::memcpy(&u, &f, sizeof u);
  return f == f ? (u + 0x7fff + (u >> 16 & 1)) >> 16 : u >> 16 | 0x40;
}

// Sums of neighbours' products into a 32-bit lane.
inline void dot_bf16(void* sum, const void* a, const void* b) {
  float s;
  uint16_t x[2], y[2];
  std::memcpy(&s, sum, 4), std::memcpy(x, a, 4), std::memcpy(y, b, 4);
  for (int i = 0; i < 2; ++i) s += from_bf16(x[i]) * from_bf16(y[i]);
  std::memcpy(sum, &s, 4);
}
inline void dot_bytes(void* sum, const void* a, const void* b) {
  int32_t s;
  uint8_t x[4];
  int8_t y[4];
  std::memcpy(&s, sum, 4), std::memcpy(x, a, 4), std::memcpy(y, b, 4);
  for (int i = 0; i < 4; ++i) s += x[i] * y[i];
  std::memcpy(sum, &s, 4);
}
template <void lane(void*, const void*, const void*), class V, class A>
V dot(V sum, A a, A b) {
  for (size_t i = 0; i < sizeof(V); i += 4)
    lane(reinterpret_cast<char*>(&sum) + i, reinterpret_cast<char*>(&a) + i,
         reinterpret_cast<char*>(&b) + i);
  return sum;
}

// As sums16.h's assembly: the sums of two products saturate at 16 bits, theirs wrap around.
template <class V, class Quad>
V dot_two(V acc, V a0, V a1, const Quad* b0, const Quad* b1) {
  uint8_t x[2][sizeof(V)];
  int8_t y[2][sizeof(V)];
  int32_t s[sizeof(V) / 4];
  std::memcpy(x[0], &a0, sizeof(V)), std::memcpy(x[1], &a1, sizeof(V));
  std::memcpy(y[0], b0, sizeof(V)), std::memcpy(y[1], b1, sizeof(V));
  std::memcpy(s, &acc, sizeof(V));
  for (size_t i = 0; i < sizeof(V); i += 2) {
    int both = 0;
    for (int j = 0; j < 2; ++j) {
      const int sum = x[j][i] * y[j][i] + x[j][i + 1] * y[j][i + 1];
      both += sum > 32767 ? 32767 : sum < -32768 ? -32768 : sum;
    }
    s[i / 4] += int16_t(both);
  }
  std::memcpy(&acc, s, sizeof(V));
  return acc;
}

inline __m512 set1_ps(float x) {  // bits as they are
  __m512 v;
  for (int i = 0; i < 16; ++i) std::memcpy(reinterpret_cast<char*>(&v) + 4 * i, &x, 4);
  return v;
}
inline __m512i set1_epi64(int64_t x) { return __m512i{} + x; }
inline __m512i mul_epu32(unsigned, __m512i a, __m512i b) {
  return (a & 0xFFFFFFFFll) * (b & 0xFFFFFFFFll);
}
inline __m256bh cvtneps_pbh(__m512 v) {
  uint16_t h[16];
  for (int i = 0; i < 16; ++i) h[i] = to_bf16(v[i]);
  __m256bh out;
  std::memcpy(&out, h, sizeof out);
  return out;
}
inline __m512bh cvtne2ps_pbh(__m512 high, __m512 low) {
  const __m256bh half[2] = {cvtneps_pbh(low), cvtneps_pbh(high)};
  __m512bh out;
  std::memcpy(&out, half, sizeof out);
  return out;
}

// A thread's tile registers, of 16 rows of 64 bytes.
inline thread_local char tiles[8][16][64];
inline thread_local bool configured = false;

inline auto& tile(int i) {
  if (!configured) std::abort();  // as the instruction would
  return tiles[i];
}
inline void tile_loadconfig(const void*) {
  configured = true;
  std::memset(tiles, 0, sizeof tiles);
}
inline void tile_release() { configured = false; }
inline void tile_zero(int i) { std::memset(tile(i), 0, sizeof tiles[i]); }
inline void tile_loadd(int i, const void* from, int64_t stride) {
  for (int m = 0; m < 16; ++m)
    std::memcpy(tile(i)[m], static_cast<const char*>(from) + m * stride, 64);
}
inline void tile_stored(int i, void* to, int64_t stride) {
  for (int m = 0; m < 16; ++m) std::memcpy(static_cast<char*>(to) + m * stride, tile(i)[m], 64);
}
template <void lane(void*, const void*, const void*)>
void tile_dot(int c, int a, int b) {
  for (int m = 0; m < 16; ++m)
    for (int k = 0; k < 16; ++k)
      for (int n = 0; n < 16; ++n) lane(tile(c)[m] + 4 * n, tile(a)[m] + 4 * k, tile(b)[k] + 4 * n);
}

}  // namespace emulated

#define _mm512_set1_ps emulated::set1_ps
#define _mm512_set1_epi64 emulated::set1_epi64
#define _mm512_maskz_mul_epu32 emulated::mul_epu32
#if BERTFAST_EMULATED > 1
#define _mm512_dpbusd_epi32 emulated::dot<emulated::dot_bytes>
#define _mm256_dpbusd_avx_epi32 emulated::dot<emulated::dot_bytes>
#endif
#if BERTFAST_EMULATED > 2
#define _mm512_dpbf16_ps emulated::dot<emulated::dot_bf16>
#define _mm512_cvtneps_pbh emulated::cvtneps_pbh
#define _mm512_cvtne2ps_pbh emulated::cvtne2ps_pbh
#endif
#if BERTFAST_EMULATED > 3
#undef _tile_loadconfig
#undef _tile_release
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#undef _tile_dpbusd
#define _tile_loadconfig emulated::tile_loadconfig
#define _tile_release emulated::tile_release
#define _tile_zero emulated::tile_zero
#define _tile_loadd emulated::tile_loadd
#define _tile_stored emulated::tile_stored
#define _tile_dpbf16ps emulated::tile_dot<emulated::dot_bf16>
#define _tile_dpbusd emulated::tile_dot<emulated::dot_bytes>
#endif
