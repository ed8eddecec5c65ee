// Philox4x32-10 (Salmon et al., SC 2011), a row of a dropout mask at a time; see ops/dropout.py.
#pragma once
#include "../kernels.h"
#include "vec.h"

namespace bertfast::BERTFAST_ISA {
namespace {

// The random bits of columns [0, n) of a row; bits has room for n rounded up to 64.
inline void philox_row(const int64_t* seed, int64_t row, int64_t n, uint32_t* bits) {
  constexpr int L = 16;  // counters at a time
  for (int64_t block = 0; 4 * block < n; block += L) {
    uint32_t c0[L], c1[L], c2[L], c3[L];
    for (int i = 0; i < L; ++i) {
      c0[i] = uint32_t(block + i);
      c1[i] = uint32_t(row);
      c2[i] = uint32_t(uint64_t(row) >> 32);
      c3[i] = uint32_t(seed[1]);
    }
    uint32_t key0 = uint32_t(seed[0]), key1 = uint32_t(uint64_t(seed[0]) >> 32);
    for (int round = 0; round < 10; ++round) {
      for (int i = 0; i < L; ++i) {
        const uint64_t p0 = uint64_t(c0[i]) * 0xD2511F53u, p1 = uint64_t(c2[i]) * 0xCD9E8D57u;
        c0[i] = uint32_t(p1 >> 32) ^ c1[i] ^ key0;
        c2[i] = uint32_t(p0 >> 32) ^ c3[i] ^ key1;
        c1[i] = uint32_t(p1);
        c3[i] = uint32_t(p0);
      }
      key0 += 0x9E3779B9u;
      key1 += 0xBB67AE85u;
    }
    for (int i = 0; i < L; ++i) {
      uint32_t* out = bits + 4 * (block + i);
      out[0] = c0[i], out[1] = c1[i], out[2] = c2[i], out[3] = c3[i];
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
