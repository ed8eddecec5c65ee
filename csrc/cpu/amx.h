// Products on the matrix unit (AMX): tiles of 16 rows of 64 bytes, two by two at a time.
//
// fp32 operands go as the sum of three bf16 each, most significant first: 24 bits, all that a float
// has. Six of the nine products are formed; the others are below 2^-24 of the result. See Henry,
// Tang & Heinecke, "Leveraging the bfloat16 artificial intelligence datatype for higher-precision
// computations", 2019.
#pragma once
#include "vec.h"

namespace bertfast::BERTFAST_ISA {
namespace {

#if defined(__AMX_BF16__)
constexpr bool kHasAmx = true;
#else
constexpr bool kHasAmx = false;
#endif
constexpr int kParts = 3;                     // of a float
constexpr int64_t kStep = 16;                 // units of 32 bits that a tile takes of k
constexpr int64_t kAmxRows = 32;              // rows and columns of a product
constexpr int64_t kBlock = kAmxRows * kStep;  // units of an operand's step, of one part

template <int parts>
constexpr int64_t kPauses = parts == kParts ? 6 : 1;  // in a step: where other work may run

enum class Dot { bf16, uint8 };  // uint8: a; b is int8

// Where a step's rows of a lie, and how far the next step is, in units. A step of b is
// [parts][16 units][32 columns].
struct AmxOperand {
  const float* data;
  int64_t row, step;
};

// The nearest bf16, as a float, and in x what is left. An infinity leaves a NaN: it makes every sum
// that it enters NaN.
inline vf take_bf16(vf& x) {
  const vf near = (vf)((bits(x) + 0x8000) & 0xffff0000);
  x -= near;
  return near;
}
// Of bf16 that are floats so far: pairs of an element of each.
inline vf pairs(vf even, vf odd) { return (vf)((bits(even) >> 16) | bits(odd)); }

#if defined(__AMX_BF16__)
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

// Macros: the instructions take their registers' numbers as literals.
#define BERTFAST_DOT(c, a, b)     \
  if constexpr (dot == Dot::bf16) \
    _tile_dpbf16ps(c, a, b);      \
  else                            \
    _tile_dpbusd(c, a, b)
#define BERTFAST_LOAD_A(part)                      \
  _tile_loadd(4, at + (part) * kBlock, a.row * 4); \
  if constexpr (low) _tile_loadd(5, at + (part) * kBlock + 16 * a.row, a.row * 4)
#define BERTFAST_LOAD_B(part)                         \
  _tile_loadd(6, bt + (part) * kBlock, kAmxRows * 4); \
  _tile_loadd(7, bt + (part) * kBlock + 16, kAmxRows * 4)
#define BERTFAST_DOTS      \
  BERTFAST_DOT(0, 4, 6);   \
  BERTFAST_DOT(1, 4, 7);   \
  if constexpr (low) {     \
    BERTFAST_DOT(2, 5, 6); \
    BERTFAST_DOT(3, 5, 7); \
  }

// out[32][32], or [16][32] without the low rows, (+)= a b. Rows of a past the valid ones are read,
// and their sums mean nothing. `meanwhile` is called at every step: the matrix unit works on its
// own, and other instructions cost nothing beside it.
template <Dot dot, int parts, bool low, class Meanwhile>
inline void amx_product(const AmxOperand& a, const float* b, int64_t steps, float* out,
                        int64_t out_row, bool accumulate, const Meanwhile& meanwhile) {
  float* below = out + 16 * out_row;
  if (accumulate) {
    _tile_loadd(0, out, out_row * 4);
    _tile_loadd(1, out + 16, out_row * 4);
    if constexpr (low) {
      _tile_loadd(2, below, out_row * 4);
      _tile_loadd(3, below + 16, out_row * 4);
    }
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  const float *at = a.data, *bt = b;
  for (int64_t s = 0; s < steps; ++s, at += a.step, bt += parts * kBlock) {
    BERTFAST_LOAD_A(0);
    if constexpr (parts == kParts) {  // each load serves two products or more
      BERTFAST_LOAD_B(2);
      BERTFAST_DOTS
      meanwhile();
      BERTFAST_LOAD_B(1);
      BERTFAST_DOTS
      meanwhile();
      BERTFAST_LOAD_A(1);
      BERTFAST_DOTS
      meanwhile();
      BERTFAST_LOAD_B(0);
      BERTFAST_DOTS
      meanwhile();
      BERTFAST_LOAD_A(2);
      BERTFAST_DOTS
      meanwhile();
      BERTFAST_LOAD_A(0);
      BERTFAST_DOTS
      meanwhile();
    } else {
      BERTFAST_LOAD_B(0);
      BERTFAST_DOTS
      meanwhile();
    }
  }
  _tile_stored(0, out, out_row * 4);
  _tile_stored(1, out + 16, out_row * 4);
  if constexpr (low) {
    _tile_stored(2, below, out_row * 4);
    _tile_stored(3, below + 16, out_row * 4);
  }
}
#undef BERTFAST_DOT
#undef BERTFAST_LOAD_A
#undef BERTFAST_LOAD_B
#undef BERTFAST_DOTS

template <Dot dot, int parts, class Meanwhile>
inline void amx_multiply(const AmxOperand& a, int64_t rows, const float* b, int64_t steps,
                         float* out, int64_t out_row, bool accumulate, const Meanwhile& meanwhile) {
  if (rows > 16)
    amx_product<dot, parts, true>(a, b, steps, out, out_row, accumulate, meanwhile);
  else
    amx_product<dot, parts, false>(a, b, steps, out, out_row, accumulate, meanwhile);
}

// x0 as bf16, then x1.
inline vf both(vf x0, vf x1) { return (vf)_mm512_cvtne2ps_pbh((__m512)x1, (__m512)x0); }

// A panel of b in fp32, [k][32 columns], on its way to [step][parts][16 units][32 columns].
struct Splitter {
  const float* from;
  float* to;
  int64_t at, end;  // in registers of pairs, two for each unit

  void take(int64_t count) {
    constexpr int64_t kAhead = 64 * kAmxRows;  // it is far away: in L3 or in memory
    for (const int64_t stop = min(at + count, end); at < stop; ++at) {
      const int64_t unit = at / 2, column = at % 2 * W;
      const float *even = from + 2 * unit * kAmxRows + column, *odd = even + kAmxRows;
      __builtin_prefetch(even + kAhead);
      __builtin_prefetch(odd + kAhead);
      vf x0 = load(even), x1 = load(odd);
      float* out = to + (unit / kStep * kParts * kStep + unit % kStep) * kAmxRows + column;
      for (int part = 0; part < kParts; ++part, out += kBlock)
        store(out, pairs(take_bf16(x0), take_bf16(x1)));
    }
  }
};
#else  // what templates name but never use
inline vf both(vf x0, vf) { return x0; }
struct AmxScope {};
struct Splitter {
  const float* from;
  float* to;
  int64_t at, end;
  void take(int64_t) {}
};
template <Dot dot, int parts, class Meanwhile>
void amx_multiply(const AmxOperand&, int64_t, const float*, int64_t, float*, int64_t, bool,
                  const Meanwhile&);
#endif

}  // namespace
}  // namespace bertfast::BERTFAST_ISA
