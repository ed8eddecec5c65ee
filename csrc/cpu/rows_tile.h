// Products of rows as they lie in memory with weights packed once, for inference.
//
// A row of a is a row of units. Weights stand in panels [k][NR] of what meets a unit, zero-padded
// along n and k; for the matrix unit, weights and a stand in its panels.
#pragma once
#include <array>

#include "tile.h"

namespace bertfast::BERTFAST_ISA {
namespace {

template <Unit u>
constexpr bool kSums16 = Isa::kSums16 && u == Unit::int8;
template <Unit u>
constexpr int kTileRows = kSums16<u> ? MR - MR / 5 : kRows<u>;  // registers for two of a and sums
constexpr int kMaxTileRows = Isa::kHasMatrix ? kMatrixRows : MR;
template <Unit u>
constexpr int kUnitMultiple =  // a row is a multiple of so many units
    u == Unit::split ? 2 * kStep
    : kSums16<u>     ? 2
                     : kUnitStep<u>;

inline vf load(const int8_t* p) {
  typedef int8_t vb __attribute__((vector_size(W)));
  vb b;
  __builtin_memcpy(&b, p, sizeof b);
  return __builtin_convertvector(__builtin_convertvector(b, vi), vf);
}

// What is read after a tile, fetched into L2 while it is computed: `step` bytes for each unit.
struct Ahead {
  const char* from;
  int64_t step;
};

// out[R][V * W] = sum over units of a[R][units] b[units][V * W]. Five base pointers serve all rows:
// with one a row, they would not fit the registers.
template <int R, Unit u, int V = NV>
void rows_tile(const float* a, int64_t a_row, const Stored<u>* b, int64_t b_row, int64_t units,
               float* out, int64_t out_row, Ahead ahead) {
  constexpr int bases = (R + 2) / 3, once = kSums16<u> ? 2 : 1;
  const int64_t run = u == Unit::int8 ? units : kRun;
  const float* base[bases];
#pragma GCC unroll 5  // or it would be an array in memory
  for (int i = 0; i < bases; ++i) base[i] = a + 3 * i * a_row;
  for (int64_t start = 0; start == 0 || start < units; start += run) {
    vf acc[R][V];
#pragma GCC unroll 16
    for (int i = 0; i < R; ++i)
#pragma GCC unroll 2
      for (int j = 0; j < V; ++j) acc[i][j] = vf{};
    for (int64_t left = min(run, units - start); left > 0;
         left -= once, b += once * b_row, ahead.from += once * ahead.step) {
#pragma GCC unroll 2
      for (int i = 0; i < once; ++i) __builtin_prefetch(ahead.from + i * ahead.step, 0, 2);
      [[maybe_unused]] vf bu[V];
      if constexpr (once == 1)
#pragma GCC unroll 2
        for (int j = 0; j < V; ++j) bu[j] = load(b + j * W);
#pragma GCC unroll 16
      for (int i = 0; i < R; ++i) {
        const float* from = base[i / 3] + i % 3 * a_row;
        const vf v = Isa::broadcast(from);
#pragma GCC unroll 2
        for (int j = 0; j < V; ++j)
          if constexpr (once == 1)
            acc[i][j] = dot<u>(acc[i][j], v, bu[j]);
          else
            acc[i][j] =
                Isa::dot_two(acc[i][j], v, Isa::broadcast(from + 1), b + j * W, b + b_row + j * W);
      }
#pragma GCC unroll 5
      for (int i = 0; i < bases; ++i) {
        base[i] += once;
        asm("" : "+r"(base[i]));  // or the compiler would keep a pointer for each row
      }
    }
#pragma GCC unroll 16
    for (int i = 0; i < R; ++i)
#pragma GCC unroll 2
      for (int j = 0; j < V; ++j) {
        float* to = out + i * out_row + j * W;
        store(to, start ? load(to) + acc[i][j] : acc[i][j]);
      }
  }
}

template <Unit u>
using RowsTile = void (*)(const float*, int64_t, const Stored<u>*, int64_t, int64_t, float*,
                          int64_t, Ahead);
template <Unit u, int V, int... I>
constexpr std::array<RowsTile<u>, sizeof...(I)> rows_tiles(std::integer_sequence<int, I...>) {
  return {rows_tile<I + 1, u, V>...};
}

// out[rows][V * W], rows <= kTileRows; up to kMaxTileRows rows of out may be written. On the matrix
// unit V is NV, b_row is NR, and nothing is fetched ahead.
template <Unit u, int V = NV>
inline void multiply(const float* a, int64_t a_row, int64_t rows, const Stored<u>* b, int64_t b_row,
                     int64_t units, float* out, int64_t out_row, const Ahead& ahead) {
  if constexpr (kMatrix<u>) {
    Isa::matrix_product<u>({a, a_row, kStep}, rows, b, units / kStep, out, out_row, false, [] {});
  } else {
    using Rows = std::make_integer_sequence<int, kTileRows<u>>;
    static constexpr auto tiles = rows_tiles<u, V>(Rows{});
    tiles[rows - 1](a, a_row, b, b_row, units, out, out_row, ahead);
  }
}

template <Unit u>
inline void multiply(const float* a, int64_t a_row, int64_t rows, const Stored<u>* b, int64_t b_row,
                     int64_t units, float* out, int64_t out_row) {
  multiply<u>(a, a_row, rows, b, b_row, units, out, out_row, {reinterpret_cast<const char*>(b), 0});
}

// The tiles that `rows` take, and the first row of each: alike in size, since one of few rows would
// wait for its sums; the matrix unit's are whole but the last.
template <Unit u>
inline int64_t tile_count(int64_t rows) {
  return ceil_div(rows, kTileRows<u>);
}
template <Unit u>
inline int64_t tile_begin(int64_t rows, int64_t tile) {
  if (kMatrix<u>) return min(rows, tile * kMatrixRows);
  return rows * tile / tile_count<u>(rows);
}

}  // namespace
}  // namespace bertfast::BERTFAST_ISA
