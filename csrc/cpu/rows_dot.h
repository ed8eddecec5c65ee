// Products of a few rows as they lie in memory with weights that lie so too, [n][k]: vectors run
// along k, and nothing is packed.
#pragma once
#include "rows_tile.h"

namespace bertfast::BERTFAST_ISA {
namespace {

constexpr int kDotColumns = 4, kDotTile = MR < 12 ? 3 : 4;  // columns and rows in registers
// More of them cost what lanes do (Zen 5).
template <Unit u>
constexpr int64_t kDotRows = (u == Unit::bf16 ? 3 : 2) * kDotTile;
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

template <Unit u, int R>
void dot_block(const float* a, int64_t a_row, const float* b, int64_t units, float* out,
               int64_t out_row, Ahead ahead) {
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
      const vf column = at(b + c * units);
#pragma GCC unroll 4
      for (int i = 0; i < R; ++i) acc[i][c] = dot<u>(acc[i][c], rows[i], column);
    }
  };
  int64_t j = 0;
  for (; j + W <= units; j += W, ahead.from += ahead.step) {
#pragma GCC unroll 4
    for (int c = 0; c < kDotColumns; ++c)
      __builtin_prefetch(ahead.from + c * ahead.step / kDotColumns, 0, 2);
    add([&](const float* p) { return load(p + j); });
  }
  if (j < units) add([&](const float* p) { return load_n(p + j, units - j); });
#pragma GCC unroll 4
  for (int i = 0; i < R; ++i) store_sums(acc[i], out + i * out_row);
}

// out[rows][NR] = a[rows][units] b[NR][units]^T, rows <= kDotRows<u>; `fetched` bytes of `next` are
// fetched meanwhile.
template <Unit u>
void dot_tile(const float* a, int64_t a_row, int64_t rows, const float* b, int64_t units,
              float* out, const char* next, int64_t fetched) {
  constexpr auto blocks =
      std::array{dot_block<u, 1>, dot_block<u, 2>, dot_block<u, 3>, dot_block<u, kDotTile>};
  const int64_t parts = ceil_div(rows, kDotTile), share = fetched / NR * kDotColumns;
  const int64_t step = share / (parts * max(units / W, 1));
  for (int64_t c = 0; c < NR; c += kDotColumns, next += share)
    for (int64_t part = 0; part < parts; ++part) {
      const int64_t m = rows * part / parts, count = rows * (part + 1) / parts - m;
      blocks[count - 1](a + m * a_row, a_row, b + c * units, units, out + m * NR + c, NR,
                        {next + share * part / parts, step});
    }
}

}  // namespace
}  // namespace bertfast::BERTFAST_ISA
