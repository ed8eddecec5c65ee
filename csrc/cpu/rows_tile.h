// Products of rows as they lie in memory with weights packed once, for inference.
//
// A row of a is a row of 32-bit units: one float, two bf16, or four bytes of neighbouring k.
// Weights stand in panels unit[k][NR], zero-padded along n and k. Where the instruction set has no
// dot product for a weight's type, a is wider and each weight is widened as it is loaded. For the
// matrix unit, weights and a stand in the panels of amx.h.
#pragma once
#include <array>
#include <type_traits>

#include "tile.h"

namespace bertfast::BERTFAST_ISA {
namespace {

struct quad {  // four int8 of neighbouring k, which meet uint8 of a
  uint32_t bits;
};
struct pair {  // two bf16
  uint32_t bits;
};
struct split {  // a float that becomes three bf16 before the matrix unit takes it, see amx.h
  float value;
};

#if defined(__AVX2__)
constexpr bool kHasInt8 = true;
#else
constexpr bool kHasInt8 = false;
#endif
// Without VNNI the products of two neighbours in each of two units are added in 16 bits: weights of
// one sign among these four may add up to 128 at most, 255 * 128 being less than 2^15.
#if defined(__AVX512VNNI__)
constexpr bool kSums16 = false;
#else
constexpr bool kSums16 = kHasInt8;
#endif

// The weights of each precision here: what a unit of a panel holds, and what a holds beside it.
template <int precision>
struct Format;
template <>
struct Format<0> {
  using Weight = std::conditional_t<kHasAmx, split, float>;
  using A = std::conditional_t<kHasAmx, bf16, float>;
};
template <>
struct Format<1> {
  static constexpr bool kDot = kHasBf16 || kHasAmx;
  using Weight = std::conditional_t<kDot, pair, bf16>;
  using A = std::conditional_t<kDot, bf16, float>;
};
template <>
struct Format<2> {
  using Weight = std::conditional_t<kHasInt8, quad, int8_t>;
  using A = std::conditional_t<kHasInt8, uint8_t, float>;
};
template <class A>
constexpr int kPer = 4 / sizeof(A);  // elements of a in a unit
template <class Weight>
constexpr bool kSplit = std::is_same_v<Weight, split>;
template <class Weight>
constexpr bool kSumsInt32 = std::is_same_v<Weight, quad>;
template <class Weight>
constexpr bool kSumsInt16 = kSums16 && std::is_same_v<Weight, quad>;
template <class Weight>
constexpr bool kMatrixUnit = kHasAmx && !std::is_same_v<Weight, float>;
template <class Weight>
constexpr int kTileRows = kMatrixUnit<Weight>  ? kAmxRows
                          : kSumsInt16<Weight> ? MR - MR / 5  // registers for two of a and sums
                                               : MR;
constexpr int kMaxTileRows = kHasAmx ? kAmxRows : MR;
template <class Weight>
constexpr int kUnits = kSplit<Weight>        ? 2 * kStep
                       : kMatrixUnit<Weight> ? kStep
                       : kSumsInt16<Weight>  ? 2
                                             : 1;  // a row is a multiple of so many units

inline vf load(const pair* p) { return load(reinterpret_cast<const float*>(p)); }
inline vf load(const quad* p) { return load(reinterpret_cast<const float*>(p)); }
inline vf load(const int8_t* p) {
  typedef int8_t vb __attribute__((vector_size(W)));
  vb b;
  __builtin_memcpy(&b, p, sizeof b);
  return __builtin_convertvector(__builtin_convertvector(b, vi), vf);
}

// The unit at p in all lanes. Not splat(): arithmetic would change units that are no floats.
inline vf broadcast(const float* p) {
#if defined(__AVX512F__)
  return (vf)_mm512_set1_ps(*p);
#elif defined(__AVX2__)
  return (vf)_mm256_set1_ps(*p);
#else
  return splat(*p);
#endif
}

// acc + a b.
template <class Weight>
inline vf dot(vf acc, vf a, vf b) {
#if defined(__AVX512BF16__)
  if constexpr (std::is_same_v<Weight, pair>)
    return (vf)_mm512_dpbf16_ps((__m512)acc, (__m512bh)(__m512)a, (__m512bh)(__m512)b);
#endif
#if defined(__AVX512VNNI__)
  if constexpr (std::is_same_v<Weight, quad>)
    return (vf)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)a, (__m512i)b);
#endif
  return acc + a * b;
}

#if defined(BERTFAST_EMULATED)
using emulated::dot_two;
#elif defined(__AVX2__)
// acc + a0 b0 + a1 b1. In one piece, or the compiler would take all products before the sums, and
// spill; the weights from memory, since the registers are taken.
inline vf dot_two(vf acc, vf a0, vf a1, const quad* b0, const quad* b1) {
  const vi ones = (vi)(vu{} + 0x00010001);
  vf sum, other;
  asm("vpmaddubsw %5, %3, %1\n\tvpmaddubsw %6, %4, %2\n\tvpaddw %2, %1, %1\n\t"
      "vpmaddwd %7, %1, %1\n\tvpaddd %1, %0, %0"
      : "+v"(acc), "=&v"(sum), "=&v"(other)
      : "v"(a0), "v"(a1), "m"(*reinterpret_cast<const quad(*)[W]>(b0)),
        "m"(*reinterpret_cast<const quad(*)[W]>(b1)), "v"(ones));
  return acc;
}
#endif

// What is read after a tile, fetched into L2 while it is computed: `step` bytes for each unit.
struct Ahead {
  const char* from;
  int64_t step;
};

// out[R][NR] = sum over units of a[R][units] b[units][NR]. Five base pointers serve all rows: with
// one a row, they would not fit the registers.
template <int R, class Weight>
void rows_tile(const float* a, int64_t a_row, const Weight* b, int64_t b_row, int64_t units,
               float* out, int64_t out_row, Ahead ahead) {
  constexpr int bases = (R + 2) / 3, once = kSumsInt16<Weight> ? 2 : 1;
  const int64_t run = kSumsInt32<Weight> ? units : kRun;
  const float* base[bases];
  for (int i = 0; i < bases; ++i) base[i] = a + 3 * i * a_row;
  for (int64_t start = 0; start == 0 || start < units; start += run) {
    vf acc[R][NV];
#pragma GCC unroll 16
    for (int i = 0; i < R; ++i)
#pragma GCC unroll 2
      for (int j = 0; j < NV; ++j) acc[i][j] = vf{};
    for (int64_t u = min(run, units - start); u > 0;
         u -= once, b += once * b_row, ahead.from += once * ahead.step) {
#pragma GCC unroll 2
      for (int i = 0; i < once; ++i) __builtin_prefetch(ahead.from + i * ahead.step, 0, 2);
      [[maybe_unused]] vf bu[NV];
      if constexpr (once == 1)
#pragma GCC unroll 2
        for (int j = 0; j < NV; ++j) bu[j] = load(b + j * W);
#pragma GCC unroll 16
      for (int i = 0; i < R; ++i) {
        const float* from = base[i / 3] + i % 3 * a_row;
        const vf v = broadcast(from);
#pragma GCC unroll 2
        for (int j = 0; j < NV; ++j)
          if constexpr (once == 1)
            acc[i][j] = dot<Weight>(acc[i][j], v, bu[j]);
          else
            acc[i][j] = dot_two(acc[i][j], v, broadcast(from + 1), b + j * W, b + b_row + j * W);
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
      for (int j = 0; j < NV; ++j) {
        float* to = out + i * out_row + j * W;
        store(to, start ? load(to) + acc[i][j] : acc[i][j]);
      }
  }
}

template <class Weight>
using RowsTile = void (*)(const float*, int64_t, const Weight*, int64_t, int64_t, float*, int64_t,
                          Ahead);
template <class Weight, int... I>
constexpr std::array<RowsTile<Weight>, sizeof...(I)> rows_tiles(std::integer_sequence<int, I...>) {
  return {rows_tile<I + 1, Weight>...};
}

// out[rows][NR], rows <= kTileRows; up to kMaxTileRows rows of out may be written. On the matrix
// unit b_row is NR, and nothing is fetched ahead.
template <class Weight>
inline void multiply(const float* a, int64_t a_row, int64_t rows, const Weight* b, int64_t b_row,
                     int64_t units, float* out, int64_t out_row, const Ahead& ahead) {
  if constexpr (kMatrixUnit<Weight>) {
    amx_multiply<Dot::bf16, 1>({a, a_row, kStep}, rows, reinterpret_cast<const float*>(b),
                               units / kStep, out, out_row, false, [] {});
  } else {
    using Rows = std::make_integer_sequence<int, kTileRows<Weight>>;
    static constexpr auto tiles = rows_tiles<Weight>(Rows{});
    tiles[rows - 1](a, a_row, b, b_row, units, out, out_row, ahead);
  }
}

template <class Weight>
inline void multiply(const float* a, int64_t a_row, int64_t rows, const Weight* b, int64_t b_row,
                     int64_t units, float* out, int64_t out_row) {
  multiply(a, a_row, rows, b, b_row, units, out, out_row, {reinterpret_cast<const char*>(b), 0});
}

// The tiles that `rows` take, and the first row of each: alike in size, since one of few rows would
// wait for its sums; the matrix unit's are whole but the last.
template <class Weight>
inline int64_t tile_count(int64_t rows) {
  return ceil_div(rows, kTileRows<Weight>);
}
template <class Weight>
inline int64_t tile_begin(int64_t rows, int64_t tile) {
  if (kMatrixUnit<Weight>) return min(rows, tile * kAmxRows);
  return rows * tile / tile_count<Weight>(rows);
}

}  // namespace
}  // namespace bertfast::BERTFAST_ISA
