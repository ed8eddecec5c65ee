// The register tile that every product here is made of, and the packing that feeds it.
//
// A panel holds TILE rows, k-major: unit[k][TILE], zero-padded. See Goto & van de Geijn, "Anatomy
// of high-performance matrix multiplication", 2008. Panels for the matrix unit hold a step of k
// after the other, see isa/unit.h: [part][TILE][16 units] of a, [part][16 units][TILE] of b.
#pragma once
#include <array>
#include <utility>

#include "matrix.h"

namespace bertfast::BERTFAST_ISA {
namespace {

constexpr int MR = Isa::kTileRows, NV = 2, NR = NV * W;
static_assert(!Isa::kHasMatrix || NR == kMatrixRows);

template <Unit u>
constexpr int kRows = kMatrix<u> ? kMatrixRows : MR;  // of a tile
template <Unit u>
constexpr int kUnitStep = kMatrix<u> ? kStep : 1;  // panels have a multiple of this many units

// acc + a b.
template <Unit u>
inline vf dot(vf acc, vf a, vf b) {
  if constexpr (u == Unit::bf16)
    return Isa::dot_bf16(acc, a, b);
  else if constexpr (u == Unit::int8)
    return Isa::dot_int8(acc, a, b);
  else
    return acc + a * b;
}

// Units in one running sum, which is rounded to its own size each time: several shorter ones lose
// less.
constexpr int64_t kRun = 256;

// out[i, 0:NR] (+)= sum_k a[i][k * step] b[k, 0:NR], i < R.
// rows: where each row of a starts.
template <Unit u, int R = MR, class Rows>
inline void tile_product(const Rows& rows, int64_t step, const float* b, int64_t units, float* out,
                         int64_t out_row, bool accumulate) {
  for (int64_t start = 0; start == 0 || start < units; start += kRun) {
    vf acc[R][NV];
#pragma GCC unroll 16
    for (int i = 0; i < R; ++i)
#pragma GCC unroll 2
      for (int j = 0; j < NV; ++j) acc[i][j] = vf{};
    for (int64_t k = start; k < min(start + kRun, units); ++k) {
      vf bk[NV];
#pragma GCC unroll 2
      for (int j = 0; j < NV; ++j) bk[j] = load(b + k * NR + j * W);
#pragma GCC unroll 16
      for (int i = 0; i < R; ++i) {
        const vf a = Isa::broadcast(rows(i) + k * step);
#pragma GCC unroll 2
        for (int j = 0; j < NV; ++j) acc[i][j] = dot<u>(acc[i][j], a, bk[j]);
      }
    }
#pragma GCC unroll 16
    for (int i = 0; i < R; ++i)
#pragma GCC unroll 2
      for (int j = 0; j < NV; ++j) {
        float* to = out + i * out_row + j * W;
        store(to, start || accumulate ? load(to) + acc[i][j] : acc[i][j]);
      }
  }
}

template <Unit u, int R>
void tile_of(const float* a, const float* b, int64_t units, float* out, bool accumulate) {
  tile_product<u, R>([a](int i) { return a + i; }, MR, b, units, out, NR, accumulate);
}
template <Unit u, int... I>
constexpr std::array<decltype(&tile_of<u, 1>), sizeof...(I)> tiles_of(
    std::integer_sequence<int, I...>) {
  return {tile_of<u, I + 1>...};
}

// A whole tile out[rows][NR]; a is a packed panel, of which `rows` are wanted. units: of all parts.
// `meanwhile(n)` is called n times while the matrix unit works, never elsewhere.
template <Unit u, class Meanwhile>
void tile_packed(const float* a, [[maybe_unused]] int64_t rows, const float* b, int64_t units,
                 float* out, bool accumulate, [[maybe_unused]] const Meanwhile& meanwhile) {
  if constexpr (kMatrix<u>) {
    const int64_t steps = units / (kStep * kParts<u>);
    Isa::matrix_product<u>({a, kStep, kParts<u> * kBlock}, rows, b, steps, out, NR, accumulate,
                           [&] { meanwhile(steps * kPauses<u>); });
  } else {
    static constexpr auto tiles = tiles_of<u>(std::make_integer_sequence<int, MR>{});
    tiles[rows - 1](a, b, units, out, accumulate);
  }
}

// a is a matrix with any strides and `valid` rows; the tile's other rows repeat the last.
inline void tile_strided(const float* a, int64_t row, int64_t step, int64_t valid, const float* b,
                         int64_t k, float* out, int64_t out_row, bool accumulate) {
  const float* start[MR];
  for (int i = 0; i < MR; ++i) start[i] = a + (i < valid ? i : valid - 1) * row;
  tile_product<Unit::fp32>([&](int i) { return start[i]; }, step, b, k, out, out_row, accumulate);
}

// --- packing ---

template <int S, int... J>
inline void swap_blocks(vf& a, vf& b, std::integer_sequence<int, J...>) {
  const vf low = __builtin_shufflevector(a, b, ((J & S) ? W + J - S : J)...);
  b = __builtin_shufflevector(a, b, ((J & S) ? W + J : J + S)...);
  a = low;
}
template <int S>
inline void transpose_stage(vf* r) {
#pragma GCC unroll 16
  for (int i = 0; i < W; ++i)
    if (!(i & S)) swap_blocks<S>(r[i], r[i + S], std::make_integer_sequence<int, W>{});
  if constexpr (S > 1) transpose_stage<S / 2>(r);
}
// W registers as a W x W matrix.
inline void transpose(vf* r) { transpose_stage<W / 2>(r); }

inline vf pair_up(vf even, vf odd) {  // two bf16 in each 32-bit unit
  return (vf)(Isa::round_bf16(even) | (Isa::round_bf16(odd) << 16));
}

// A register's lanes become rows lane0... of one k. A whole store runs over into the next k,
// which comes later; the last k must not: another thread may own what lies behind the panel.
template <int TILE>
inline void store_rows(float* to, vf v, int lane0, bool last) {
  if (lane0 + W <= TILE || (TILE < W && !last))
    store(to + lane0, v);
  else
    __builtin_memcpy(to + lane0, &v, TILE % W * 4);
}

// One panel: rows [0, valid) of src, k [0, count), into dst[ceil(count / per unit)][TILE].
template <Unit u, int TILE, class T>
void pack_panel(float* dst, const T* src, int64_t row, int64_t kstep, int64_t valid,
                int64_t count) {
  constexpr int per = kPer<u>;
  int64_t k = 0;  // the elements along k done so far
  if (kstep == 1 && valid > 0) {
    for (; k + W <= count; k += W) {
      const bool end = k + W >= count;
#pragma GCC unroll 2
      for (int lane = 0; lane < TILE; lane += W) {
        vf r[W];
#pragma GCC unroll 16
        for (int i = 0; i < W; ++i)
          r[i] = lane + i < valid ? load(src + (lane + i) * row + k) : vf{};
        transpose(r);
        float* to = dst + k / per * TILE;
        if constexpr (u == Unit::bf16) {
#pragma GCC unroll 16
          for (int i = 0; i < W; i += 2)
            store_rows<TILE>(to + i / 2 * TILE, pair_up(r[i], r[i + 1]), lane, end && i == W - 2);
        } else {
#pragma GCC unroll 16
          for (int i = 0; i < W; ++i)
            store_rows<TILE>(to + i * TILE, r[i], lane, end && i == W - 1);
        }
      }
    }
  } else if (row == 1 && valid == TILE) {
    for (; k + per <= count; k += per) {
#pragma GCC unroll 2
      for (int lane = 0; lane < TILE; lane += W) {
        const int n = TILE - lane < W ? TILE - lane : W;
        const T* from = src + k * kstep + lane;
        vf v = n == W ? load(from) : load_n(from, n);
        if constexpr (u == Unit::bf16)
          v = pair_up(v, n == W ? load(from + kstep) : load_n(from + kstep, n));
        store_rows<TILE>(dst + k / per * TILE, v, lane, k + per >= count);
      }
    }
  }
  for (; k < count; k += per)  // what the fast forms leave
    for (int i = 0; i < TILE; ++i) {
      const bool in = i < valid;
      vf v = splat(in ? to_float(src[i * row + k * kstep]) : 0.f);
      if constexpr (u == Unit::bf16)
        v = pair_up(v, splat(in && k + 1 < count ? to_float(src[i * row + (k + 1) * kstep]) : 0.f));
      dst[k / per * TILE + i] = v[0];
    }
}

// 16 rows of 32 k for the matrix unit: unit j of row i of a part goes to dst[i * dst_row + j], or,
// where the rows are b's, to dst[j * dst_row + i].
template <int parts, bool is_b, class T>
void pack_step(float* dst, int64_t dst_row, const T* src, int64_t row, int64_t kstep, int64_t valid,
               int64_t count) {
  vf units[parts][W];
  const bool by_k = !(row == 1 && kstep != 1 && valid >= W && count >= 2 * W);  // lanes are k
  for (int i = 0; i < W; ++i) {
    vf x0 = {}, x1 = {};
    if (!by_k) {
      x0 = load(src + 2 * i * kstep), x1 = load(src + (2 * i + 1) * kstep);
    } else if (kstep == 1 && i < valid) {
      x0 = load_upto(src + i * row, count < 0 ? 0 : count);
      x1 = load_upto(src + i * row + W, count < W ? 0 : count - W);
    } else if (i < valid) {
      for (int64_t k = 0; k < min(W, count); ++k) x0[k] = to_float(src[i * row + k * kstep]);
      for (int64_t k = W; k < min(2 * W, count); ++k)
        x1[k - W] = to_float(src[i * row + k * kstep]);
    }
    for (int part = 0; part < parts; ++part) {
      vf e = x0, o = x1;
      if (parts > 1) e = take_bf16(x0), o = take_bf16(x1);
      units[part][i] = by_k ? Isa::narrow(e, o) : parts > 1 ? pairs(e, o) : pair_up(e, o);
    }
  }
  for (int part = 0; part < parts; ++part) {
    if (by_k == is_b) transpose(units[part]);
    for (int i = 0; i < W; ++i) store(dst + part * kBlock + i * dst_row, units[part][i]);
  }
}

template <Unit u, bool is_b, class T>
void pack_steps(float* dst, const T* src, int64_t row, int64_t kstep, int64_t valid,
                int64_t count) {
  constexpr int parts = kParts<u>;
  for (int64_t k = 0; k < count; k += 2 * W, dst += parts * kBlock)
    for (int64_t i = 0; i < kMatrixRows; i += W)
      pack_step<parts, is_b>(dst + i * (is_b ? 1 : kStep), is_b ? kMatrixRows : kStep,
                             src + i * row + k * kstep, row, kstep, valid - i, count - k);
}

// A panel of gemm's operand a or b, see pack_panel.
template <Unit u, bool is_b, class T>
void pack_operand(float* dst, const T* src, int64_t row, int64_t kstep, int64_t valid,
                  int64_t count) {
  if constexpr (kMatrix<u>)
    pack_steps<u, is_b>(dst, src, row, kstep, valid, count);
  else
    pack_panel<u, is_b ? NR : MR>(dst, src, row, kstep, valid, count);
}

}  // namespace
}  // namespace bertfast::BERTFAST_ISA
