// A linear layer on weights packed once, and its operand.
#pragma once
#include "rows_tile.h"

namespace bertfast::BERTFAST_ISA {
namespace {

int64_t round_up(int64_t n, int64_t to) { return ceil_div(n, to) * to; }

// Of the projection to queries, keys and values, and of attention after it. int8 activations cost
// it most, for layer norm's outliers, so that it is in bf16 where that is quick.
template <int precision>
constexpr int kQkvPrecision = precision == 2 && (Format<1>::kDot || !kHasInt8) ? 1 : precision;

// What a call multiplies: the columns of panels [p0, p1) and k of [k0, k0 + k), k0 > 0 only where
// weights are split.
struct Part {
  int64_t p0, p1, k0, k;
};

// The view of a block of packed weights: panels, then bias, scale and sum by output.
template <int precision>
struct Linear {
  using Weight = typename Format<precision>::Weight;
  using A = typename Format<precision>::A;
  static constexpr int kPerUnit = kSplit<Weight> ? 1 : kPer<A>;
  int64_t n, k, panels, units;  // units: of a column
  const Weight* data;
  const float *bias, *scale, *sum;  // of int8 weights: their scale, and the sum of an output's

  Linear(const void* packed, int64_t n_, int64_t k_)
      : n(n_),
        k(k_),
        panels(ceil_div(n_, NR)),
        units(round_up(ceil_div(k_, kPerUnit), kUnits<Weight>)),
        data(static_cast<const Weight*>(packed)) {
    const char* end = static_cast<const char*>(packed) + round_up(panel_bytes() * panels, 64);
    bias = reinterpret_cast<const float*>(end);
    scale = bias + panels * NR;
    sum = scale + panels * NR;
  }
  int64_t panel_bytes() const { return units * NR * int64_t(sizeof(Weight)); }
  int64_t bytes() const {
    return reinterpret_cast<const char*>(sum + panels * NR) - reinterpret_cast<const char*>(data);
  }
  const Weight* panel(int64_t p) const { return data + p * units * NR; }
  Part whole() const { return {0, panels, 0, k}; }
};

// Rows of a; for int8, byte q of a row stands for low + q * scale. `row` elements stand for k of
// them, a multiple of what a tile reads; weights behind k are 0, and so is a but for bytes. For the
// matrix unit, 32 rows follow each other step by step.
template <int precision>
struct Operand {
  using Weight = typename Format<precision>::Weight;
  using A = typename Format<precision>::A;
  static constexpr int64_t kParts = kSplit<Weight> ? bertfast::BERTFAST_ISA::kParts : 1;
  static constexpr int64_t kStepK = kStep * kPer<A>;
  A* data;
  int64_t row;
  float *scale, *low;

  static int64_t elements(int64_t rows, int64_t row) { return rows * row * kParts; }
  A* at(int64_t m, int64_t n) const {  // of the first part
    if constexpr (!kMatrixUnit<Weight>) return data + m * row + n;
    const int64_t step = m / kAmxRows * (row / kStepK) + n / kStepK;
    return data + (step * kParts * kAmxRows + m % kAmxRows) * kStepK + n % kStepK;
  }
  // W elements from n on, a multiple of W.
  void put(int64_t m, int64_t n, vf v) const {
    A* to = at(m, n);
    if constexpr (kSplit<Weight>)
      for (int part = 0; part < kParts; ++part) store(to + part * kBlock * kPer<A>, take_bf16(v));
    else if constexpr (!std::is_integral_v<A>)
      store(to, v);
  }
};

// Floats that a panel of k weights takes once it is split; 0 of weights that aren't.
template <int precision>
int64_t split_panel(int64_t k) {
  using O = Operand<precision>;
  return kSplit<typename O::Weight> ? ceil_div(k, O::kStepK) * O::kParts * kBlock : 0;
}

// put(row, column, register) for all rows and the part's columns, which run on to the end of the
// last panel. `a` starts at the part's k0; the bias is added with the first k. panels: room for two
// that are split.
template <int precision, class Put>
void linear(const Linear<precision>& w, const Operand<precision>& a, int64_t rows, const Part& part,
            float* panels, const Put& put) {
  using Weight = typename Format<precision>::Weight;
  [[maybe_unused]] const std::conditional_t<kMatrixUnit<Weight>, AmxScope, int> scope{};
  alignas(64) float tiles[2][kMaxTileRows * NR];
  const int64_t count = tile_count<Weight>(rows);
  // A tile's results are put while the next one is computed.
  int64_t panel = 0, row = 0, end = 0;  // of those still to put
  const float* from = nullptr;
  const auto finish = [&](int64_t most) {
    for (const int64_t stop = min(row + most, end); row < stop; ++row, from += NR)
#pragma GCC unroll 2
      for (int j = 0; j < NV; ++j) {
        const int64_t n = panel * NR + j * W;
        vf v = load(from + j * W);
        if constexpr (kSumsInt32<Weight>) {
          v = __builtin_convertvector((vi)v, vf) * (load(w.scale + n) * a.scale[row]) +
              load(w.sum + n) * a.low[row];
        } else if constexpr (std::is_same_v<Weight, int8_t>) {
          v *= load(w.scale + n);
        }
        put(row, n, part.k0 ? v : v + load(w.bias + n));
      }
  };
  constexpr Dot dot = precision < 2 ? Dot::bf16 : Dot::uint8;
  constexpr int64_t parts = Operand<precision>::kParts;
  const int64_t steps = ceil_div(part.k, Operand<precision>::kStepK);
  [[maybe_unused]] const int64_t pauses = steps * kPauses<parts>;
  // A panel is split while the one before it is multiplied.
  [[maybe_unused]] const int64_t panel_floats = split_panel<precision>(part.k);
  Splitter splitter{nullptr, panels, 0, 0};
  const auto split = [&](int64_t p) {
    if (kSplit<Weight> && p < part.p1)
      splitter = {reinterpret_cast<const float*>(w.panel(p)) + part.k0 * NR,
                  panels + (p - part.p0) % 2 * panel_floats, 0, steps * kStep * 2};
  };
  split(part.p0);
  int current = 0;
  for (int64_t p = part.p0; p < part.p1; ++p) {
    splitter.take(splitter.end);
    const float* b = kSplit<Weight> ? splitter.to : reinterpret_cast<const float*>(w.panel(p));
    split(p + 1);
    [[maybe_unused]] const int64_t share = ceil_div(splitter.end, pauses * count);
    for (int64_t t = 0; t < count; ++t) {
      const int64_t m = tile_begin<Weight>(rows, t);
      float* tile = tiles[current ^= 1];
      const float* lhs = reinterpret_cast<const float*>(a.at(m, 0));
      const int64_t valid = tile_begin<Weight>(rows, t + 1) - m;
      if constexpr (kMatrixUnit<Weight>)
        amx_multiply<dot, parts>({lhs, kStep, parts * kBlock}, valid, b, steps, tile, NR, false,
                                 [&] {
                                   finish(ceil_div(kAmxRows, pauses));
                                   splitter.take(share);
                                 });
      else
        multiply(lhs, a.row / kPer<typename Format<precision>::A>, valid,
                 reinterpret_cast<const Weight*>(b), int64_t(NR), w.units, tile, NR,
                 {reinterpret_cast<const char*>(w.panel(p + 1)) + w.panel_bytes() * m / rows,
                  w.panel_bytes() * valid / (rows * w.units)});
      finish(kMaxTileRows);
      panel = p, row = m, end = m + valid, from = tile;
    }
  }
  finish(kMaxTileRows);
}

// Row m of the operand from n floats or bf16; as bytes, 0 is its least value and 255 its largest.
template <int precision, class T>
void put_row(const Operand<precision>& to, int64_t m, const T* from, int64_t n) {
  using A = typename Operand<precision>::A;
  if constexpr (std::is_integral_v<A>) {
    const vf first = splat(to_float(from[0]));
    vf most = first, negated = -first, poison = {};  // inf and NaN make the row NaN
    for (int64_t j = 0; j < n; j += W) {
      const vf v = only(load(from + j), n - j, first);
      most = max(v, most);
      negated = max(-v, negated);
      poison += v * 0.f;
    }
    const float low = -max_of(negated), range = max_of(most) - low;
    const float inverse = range > 0 ? 255 / range : 1;
    to.scale[m] = 1 / inverse;
    to.low[m] = low + sum(poison);
    for (int64_t j = 0; j < to.row; j += W) {
      const vf v = j < n ? (load(from + j) - low) * inverse : vf{};
      // Adding 1.5 * 2^23 rounds to an integer in the low bits.
      store(to.at(m, j), (vi)(v + 12582912.f) - 0x4B400000);
    }
  } else {
    for (int64_t j = 0; j < to.row; j += W)
      to.put(m, j, j < n ? only(load(from + j), n - j) : vf{});
  }
}

}  // namespace
}  // namespace bertfast::BERTFAST_ISA
