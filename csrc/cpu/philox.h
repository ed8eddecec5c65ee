// Philox4x32-10 (Salmon et al., SC 2011), a row of a dropout mask at a time; see ops/dropout.py.
#pragma once
#include <utility>

#include "../kernels.h"
#include "vec.h"

namespace bertfast::BERTFAST_ISA {
namespace {

using vq = Isa::vq;

// out = a[0], b[0], a[1], b[1] ...
template <int... I>
inline void interleave(vq a, vq b, uint32_t* out, std::integer_sequence<int, I...>) {
  const vq first = __builtin_shufflevector(a, b, (I / 2 + I % 2 * (W / 2))...);
  const vq second = __builtin_shufflevector(a, b, (W / 4 + I / 2 + I % 2 * (W / 2))...);
  __builtin_memcpy(out, &first, sizeof first);
  __builtin_memcpy(out + W, &second, sizeof second);
}

// The random bits of columns [first, n) of a row, first a multiple of 4; bits has room for their
// number rounded up to 64.
// A counter's four words stand in the low halves of 64-bit lanes; what gathers in the high halves
// is never read.
inline void philox_row(const int64_t* seed, int64_t row, int64_t n, uint32_t* bits,
                       int64_t first = 0) {
  constexpr int L = W / 2, U = 2;  // counters in a register, registers at a time
  vq lanes;
  for (int i = 0; i < L; ++i) lanes[i] = i;
  for (int64_t block = first / 4; 4 * block < n; block += U * L) {
    vq c0[U], c1[U], c2[U], c3[U];
    for (int u = 0; u < U; ++u) {
      c0[u] = lanes + uint64_t(block + u * L);
      c1[u] = vq{} + uint64_t(row);
      c2[u] = vq{} + (uint64_t(row) >> 32);
      c3[u] = vq{} + uint64_t(seed[1]);
    }
    uint32_t key0 = uint32_t(seed[0]), key1 = uint32_t(uint64_t(seed[0]) >> 32);
#pragma GCC unroll 10
    for (int round = 0; round < 10; ++round) {
#pragma GCC unroll 2
      for (int u = 0; u < U; ++u) {
        const vq p0 = Isa::multiply_low(c0[u], 0xD2511F53u),
                 p1 = Isa::multiply_low(c2[u], 0xCD9E8D57u);
        c0[u] = (p1 >> 32) ^ c1[u] ^ uint64_t(key0);
        c2[u] = (p0 >> 32) ^ c3[u] ^ uint64_t(key1);
        c1[u] = p1;
        c3[u] = p0;
      }
      key0 += 0x9E3779B9u;
      key1 += 0xBB67AE85u;
    }
    for (int u = 0; u < U; ++u) {
      const vq low = (c0[u] & 0xFFFFFFFFu) | c1[u] << 32,
               high = (c2[u] & 0xFFFFFFFFu) | c3[u] << 32;
      interleave(low, high, bits + 4 * (block + u * L) - first,
                 std::make_integer_sequence<int, L>{});
    }
  }
}

// v where kept, scaled; else 0.
inline vf drop(vf v, const uint32_t* bits, const Dropout& d) {
  vu u;
  __builtin_memcpy(&u, bits, sizeof u);
  return u >= d.threshold ? v * d.scale : vf{};
}

}  // namespace
}  // namespace bertfast::BERTFAST_ISA
