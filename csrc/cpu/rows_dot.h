// Products of a few rows as they lie in memory with weights that lie so too, [n][k]: vectors run
// along k, and nothing is packed.
#pragma once
#include "rows_tile.h"

namespace bertfast::BERTFAST_ISA {
namespace {

constexpr int kDotColumns = 4, kDotRows = MR < 12 ? 3 : 4;  // in registers at a time
static_assert(NR % kDotColumns == 0);

// out[0:4] = the sums of four registers, folded side by side.
inline void store_sums(vf* v, float* out) {
  constexpr std::make_integer_sequence<int, W> lanes;
  swap_blocks<W / 2>(v[0], v[1], lanes);
  swap_blocks<W / 2>(v[2], v[3], lanes);
  vf x = v[0] + v[1], y = v[2] + v[3];
  swap_blocks<W / 4>(x, y, lanes);
  vf folded = x + y;  // by quarters: of v[0], v[2], v[1], v[3]
  if constexpr (W > 8) folded += rotate<2>(folded, lanes);
  if constexpr (W > 4) folded += rotate<1>(folded, lanes);
  constexpr int q = W / 4;
  out[0] = folded[0], out[1] = folded[2 * q], out[2] = folded[q], out[3] = folded[3 * q];
}

template <int R>
void dot_block(const float* a, int64_t a_row, const float* b, int64_t k, float* out,
               int64_t out_row, Ahead& ahead) {
  vf acc[R][kDotColumns];
#pragma GCC unroll 4
  for (int i = 0; i < R; ++i)
#pragma GCC unroll 4
    for (int c = 0; c < kDotColumns; ++c) acc[i][c] = vf{};
  const auto add = [&](const auto& at) __attribute__((always_inline)) {
    vf rows[R];
#pragma GCC unroll 4
    for (int i = 0; i < R; ++i) rows[i] = at(a + i * a_row);
#pragma GCC unroll 4
    for (int c = 0; c < kDotColumns; ++c) {
      const vf column = at(b + c * k);
#pragma GCC unroll 4
      for (int i = 0; i < R; ++i) acc[i][c] += rows[i] * column;
    }
  };
  int64_t j = 0;
  const char* next = ahead.from;
  for (; j + W <= k; j += W, next += ahead.step) {
    __builtin_prefetch(next, 0, 2);
    add([&](const float* p) { return load(p + j); });
  }
  if (j < k) add([&](const float* p) { return load_n(p + j, k - j); });
  ahead.from = next;
#pragma GCC unroll 4
  for (int i = 0; i < R; ++i) store_sums(acc[i], out + i * out_row);
}

// out[rows][NR] = a[rows][k] b[NR][k]^T, rows <= kDotRows; `fetched` bytes of `next` are fetched
// meanwhile.
inline void dot_tile(const float* a, int64_t a_row, int64_t rows, const float* b, int64_t k,
                     float* out, const char* next, int64_t fetched) {
  Ahead ahead{next, fetched / (NR / kDotColumns * max(k / W, 1))};
  for (int64_t c = 0; c < NR; c += kDotColumns) {
    const float* columns = b + c * k;
    float* to = out + c;
    switch (rows) {
      case 1:
        dot_block<1>(a, a_row, columns, k, to, NR, ahead);
        break;
      case 2:
        dot_block<2>(a, a_row, columns, k, to, NR, ahead);
        break;
      case 3:
        dot_block<3>(a, a_row, columns, k, to, NR, ahead);
        break;
      default:
        dot_block<4>(a, a_row, columns, k, to, NR, ahead);
    }
  }
}

}  // namespace
}  // namespace bertfast::BERTFAST_ISA
