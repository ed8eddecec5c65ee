// The register tile that every product here is made of, and the packing that feeds it.
//
// A panel holds TILE rows, k-major: unit[k][TILE], zero-padded. A unit is 32 bits: one float, or
// two bf16 of neighbouring k for the bf16 dot-product instruction. See Goto & van de Geijn,
// "Anatomy of high-performance matrix multiplication", 2008. Where the processor has a matrix unit
// (AMX), bf16 panels of a hold row after row instead: unit[TILE][k].
#pragma once
#include <utility>

#include "vec.h"
#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

namespace bertfast::BERTFAST_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int MR = 14;  // 28 accumulators of 32 registers
#else
constexpr int MR = 6;  // 12 accumulators of 16 registers
#endif
constexpr int NV = 2, NR = NV * W;

enum class Math { fp32, bf16 };
#if defined(__AVX512BF16__)
constexpr bool kHasBf16 = true;
#else
constexpr bool kHasBf16 = false;  // bf16 inputs are widened when packed
#endif
template <Math math>
constexpr int kPerUnit = math == Math::bf16 ? 2 : 1;
#if defined(__AMX_BF16__)
constexpr bool kHasAmx = true;
#else
constexpr bool kHasAmx = false;
#endif
template <Math math>
constexpr bool kAmx = kHasAmx && math == Math::bf16;
template <Math math>
constexpr int kRows = kAmx<math> ? 32 : MR;  // of a tile
template <Math math>
constexpr int kUnitStep = kAmx<math> ? 16 : 1;  // panels have a multiple of this many units

template <Math math>
inline vf multiply_add(vf acc, float a, vf b) {
#if defined(__AVX512BF16__)
  if constexpr (math == Math::bf16) {
    const __m512 as = _mm512_set1_ps(a);
    return (vf)_mm512_dpbf16_ps((__m512)acc, (__m512bh)as, (__m512bh)(__m512)b);
  }
#endif
  return acc + a * b;
}

// out[i, 0:NR] (+)= sum_k a[i][k * step] b[k, 0:NR], i < MR.
// rows: where each row of a starts; unit bf16 pairs travel as floats' bits.
template <Math math, class Rows>
inline void tile_product(const Rows& rows, int64_t step, const float* b, int64_t units, float* out,
                         int64_t out_row, bool accumulate) {
  vf acc[MR][NV];
#pragma GCC unroll 16
  for (int i = 0; i < MR; ++i)
#pragma GCC unroll 2
    for (int j = 0; j < NV; ++j) acc[i][j] = accumulate ? load(out + i * out_row + j * W) : vf{};
  for (int64_t k = 0; k < units; ++k) {
    vf bk[NV];
#pragma GCC unroll 2
    for (int j = 0; j < NV; ++j) bk[j] = load(b + k * NR + j * W);
#pragma GCC unroll 16
    for (int i = 0; i < MR; ++i) {
      const float a = rows(i)[k * step];
#pragma GCC unroll 2
      for (int j = 0; j < NV; ++j) acc[i][j] = multiply_add<math>(acc[i][j], a, bk[j]);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < MR; ++i)
#pragma GCC unroll 2
    for (int j = 0; j < NV; ++j) store(out + i * out_row + j * W, acc[i][j]);
}

#if defined(__AMX_BF16__)
static_assert(NR == 32);

// The calling thread's tile registers: eight of 16 rows of 64 bytes. Others may have left them in
// another shape, so every task that uses them says so anew.
struct AmxScope {
  AmxScope() {
    alignas(64) struct {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } const config;
    _tile_loadconfig(&config);
  }
  ~AmxScope() { _tile_release(); }
};

// Tiles 0-3: the sums' quarters; 4, 5: rows of a; 6, 7: columns of b.
inline void tile_amx(const float* a, int64_t a_row, const float* b, int64_t units, float* out,
                     int64_t out_row, bool accumulate) {
  float* low = out + 16 * out_row;
  if (accumulate) {
    _tile_loadd(0, out, out_row * 4);
    _tile_loadd(1, out + 16, out_row * 4);
    _tile_loadd(2, low, out_row * 4);
    _tile_loadd(3, low + 16, out_row * 4);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t u = 0; u < units; u += 16) {
    _tile_loadd(6, b + u * NR, NR * 4);
    _tile_loadd(4, a + u, a_row * 4);
    _tile_loadd(7, b + u * NR + 16, NR * 4);
    _tile_loadd(5, a + 16 * a_row + u, a_row * 4);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, out, out_row * 4);
  _tile_stored(1, out + 16, out_row * 4);
  _tile_stored(2, low, out_row * 4);
  _tile_stored(3, low + 16, out_row * 4);
}
#else
struct AmxScope {};
#endif

// a is a packed panel.
template <Math math>
void tile_packed(const float* a, const float* b, int64_t units, float* out, int64_t out_row,
                 bool accumulate) {
#if defined(__AMX_BF16__)
  if constexpr (kAmx<math>) return tile_amx(a, units, b, units, out, out_row, accumulate);
#endif
  tile_product<math>([a](int i) { return a + i; }, MR, b, units, out, out_row, accumulate);
}

// a is a matrix with any strides and `valid` rows; the tile's other rows repeat the last.
inline void tile_strided(const float* a, int64_t row, int64_t step, int64_t valid, const float* b,
                         int64_t k, float* out, int64_t out_row, bool accumulate) {
  const float* start[MR];
  for (int i = 0; i < MR; ++i) start[i] = a + (i < valid ? i : valid - 1) * row;
  tile_product<Math::fp32>([&](int i) { return start[i]; }, step, b, k, out, out_row, accumulate);
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
  return (vf)(round_bf16(even) | (round_bf16(odd) << 16));
}

// 2 W neighbours as W pairs.
inline vf load_pairs(const bf16* p) {
  vf v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
inline vf load_pairs(const float* p) {
#if defined(__AVX512BF16__)
  return (vf)_mm512_cvtne2ps_pbh((__m512)load(p + W), (__m512)load(p));
#else
  bf16 pairs[2 * W];
  store(pairs, load(p));
  store(pairs + W, load(p + W));
  return load_pairs(pairs);
#endif
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
template <Math math, int TILE, class T>
void pack_panel(float* dst, const T* src, int64_t row, int64_t kstep, int64_t valid,
                int64_t count) {
  constexpr int per = kPerUnit<math>;
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
        if constexpr (math == Math::bf16) {
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
        if constexpr (math == Math::bf16)
          v = pair_up(v, n == W ? load(from + kstep) : load_n(from + kstep, n));
        store_rows<TILE>(dst + k / per * TILE, v, lane, k + per >= count);
      }
    }
  }
  for (; k < count; k += per)  // what the fast forms leave
    for (int i = 0; i < TILE; ++i) {
      const bool in = i < valid;
      vf v = splat(in ? to_float(src[i * row + k * kstep]) : 0.f);
      if constexpr (math == Math::bf16)
        v = pair_up(v, splat(in && k + 1 < count ? to_float(src[i * row + (k + 1) * kstep]) : 0.f));
      dst[k / per * TILE + i] = v[0];
    }
}

// The same rows as bf16 pairs, row after row: dst[TILE][units], zeros behind count.
template <int TILE, class T>
void pack_rows(float* dst, const T* src, int64_t row, int64_t kstep, int64_t valid, int64_t count,
               int64_t units) {
  const auto element = [&](int64_t i, int64_t k) {
    return i < valid && k < count ? to_float(src[i * row + k * kstep]) : 0.f;
  };
  for (int64_t i = 0; i < TILE; i += W)
    for (int64_t u = 0; u < units; u += W) {
      const int64_t k = 2 * u;
      vf r[W];
      if (row == 1 && i + W <= valid && k + 2 * W <= count) {
#pragma GCC unroll 16
        for (int j = 0; j < W; ++j)
          r[j] =
              pair_up(load(src + i + (k + 2 * j) * kstep), load(src + i + (k + 2 * j + 1) * kstep));
        transpose(r);
      } else if (kstep == 1 && k + 2 * W <= count) {
        for (int j = 0; j < W; ++j)
          r[j] = i + j < valid ? load_pairs(src + (i + j) * row + k) : vf{};
      } else {
        for (int j = 0; j < W; ++j)
          for (int lane = 0; lane < W; ++lane)
            r[j][lane] = pair_up(splat(element(i + j, k + 2 * lane)),
                                 splat(element(i + j, k + 2 * lane + 1)))[0];
      }
      for (int j = 0; j < W; ++j) store(dst + (i + j) * units + u, r[j]);
    }
}

}  // namespace
}  // namespace bertfast::BERTFAST_ISA
