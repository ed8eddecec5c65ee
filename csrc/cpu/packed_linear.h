// A linear layer on weights packed once, and its operand.
#pragma once
#include "../kernels.h"
#include "rows_tile.h"

namespace bertfast::BERTFAST_ISA {
namespace {

// Of the projection to queries, keys and values where the other weights are in u.
constexpr Unit kBf16Unit = unit_of(Precision::bf16);
constexpr Unit qkv_unit(Unit u) { return u == Unit::wide_int8 ? kBf16Unit : u; }

// f(a constant: the unit of the weights)
template <class F>
auto by_precision(Precision p, const F& f) {
  constexpr auto unit = [](auto precision) {
    return std::integral_constant<Unit, unit_of(decltype(precision)::value)>();
  };
  if (p == Precision::fp32) return f(unit(std::integral_constant<Precision, Precision::fp32>()));
  if (p == Precision::bf16) return f(unit(std::integral_constant<Precision, Precision::bf16>()));
  return f(unit(std::integral_constant<Precision, Precision::int8>()));
}

// What a call multiplies: the columns of panels [p0, p1) and k of [k0, k0 + k), k0 > 0 only where
// weights are split.
struct Part {
  int64_t p0, p1, k0, k;
};

// The view of a block of packed weights: panels, then bias, scale and sum by output.
template <Unit u>
struct Linear {
  static constexpr int kPerUnit = u == Unit::split ? 1 : kPer<u>;
  int64_t n, k, panels, units;  // units: of a column
  const Stored<u>* data;
  const float *bias, *scale, *sum;  // of int8 weights: their scale, and the sum of an output's

  Linear(const void* packed, int64_t n_, int64_t k_)
      : n(n_),
        k(k_),
        panels(ceil_div(n_, NR)),
        units(round_up(ceil_div(k_, kPerUnit), kUnitMultiple<u>)),
        data(static_cast<const Stored<u>*>(packed)) {
    const char* end = static_cast<const char*>(packed) + round_up(panel_bytes() * panels, 64);
    bias = reinterpret_cast<const float*>(end);
    scale = bias + panels * NR;
    sum = scale + panels * NR;
  }
  int64_t panel_bytes() const { return units * NR * int64_t(sizeof(Stored<u>)); }
  int64_t bytes() const {
    return reinterpret_cast<const char*>(sum + panels * NR) - reinterpret_cast<const char*>(data);
  }
  const Stored<u>* panel(int64_t p) const { return data + p * units * NR; }
  Part whole() const { return {0, panels, 0, k}; }
};

// Rows of a; for int8, byte q of a row stands for low + q * scale. `row` elements stand for k of
// them, a multiple of what a tile reads; weights behind k are 0, and so is a but for bytes. For the
// matrix unit, 32 rows follow each other step by step.
template <Unit u>
struct Operand {
  using A = Element<u>;
  static constexpr int64_t kStepK = kStep * kPer<u>;
  A* data;
  int64_t row;
  float *scale, *low;

  static int64_t elements(int64_t rows, int64_t row) { return rows * row * kParts<u>; }
  A* at(int64_t m, int64_t n) const {  // of the first part
    if constexpr (!kMatrix<u>) return data + m * row + n;
    const int64_t step = m / kMatrixRows * (row / kStepK) + n / kStepK;
    return data + (step * kParts<u> * kMatrixRows + m % kMatrixRows) * kStepK + n % kStepK;
  }
  // W elements from n on, a multiple of W.
  void put(int64_t m, int64_t n, vf v) const {
    A* to = at(m, n);
    if constexpr (u == Unit::split)
      for (int part = 0; part < kParts<u>; ++part)
        store(to + part * kBlock * kPer<u>, take_bf16(v));
    else if constexpr (!std::is_integral_v<A>)
      store(to, v);
  }
};

// Floats that a panel of k weights takes once it is split; 0 of weights that aren't.
template <Unit u>
int64_t split_panel(int64_t k) {
  return u == Unit::split ? ceil_div(k, kStep * kPer<u>) * kParts<u> * kBlock : 0;
}

// Memory that is read soon.
struct Stretch {
  const char* data;
  int64_t bytes;
};

// Where a product finds panel p of its packed weights, and what the panel comes from.
template <Unit u>
struct Panels {
  const Linear<u>& w;
  const Stored<u>* panel(int64_t p) const { return w.panel(p); }
  Stretch from(int64_t p) const {
    return {reinterpret_cast<const char*>(w.panel(p)), w.panel_bytes()};
  }
};

// put(row, column, register) for all rows and the part's columns, which run on to the end of the
// last panel. `a` starts at the part's k0; the bias is added with the first k. scratch: room for
// two panels that are split. panels: `Panels`, or what has its functions.
template <Unit u, class From, class Put>
void linear(const Linear<u>& w, const Operand<u>& a, int64_t rows, const Part& part, float* scratch,
            const From& panels, const Put& put) {
  [[maybe_unused]] const MatrixScope<u> scope{};
  alignas(64) float tiles[2][kMaxTileRows * NR];
  const int64_t count = tile_count<u>(rows);
  // A tile's results are put while the next one is computed.
  int64_t panel = 0, row = 0, end = 0;  // of those still to put
  const float* from = nullptr;
  const auto finish = [&](int64_t most) {
    for (const int64_t stop = min(row + most, end); row < stop; ++row, from += NR)
#pragma GCC unroll 2
      for (int j = 0; j < NV; ++j) {
        const int64_t n = panel * NR + j * W;
        vf v = load(from + j * W);
        if constexpr (u == Unit::int8) {
          v = __builtin_convertvector((vi)v, vf) * (load(w.scale + n) * a.scale[row]) +
              load(w.sum + n) * a.low[row];
        } else if constexpr (u == Unit::wide_int8) {
          v *= load(w.scale + n);
        }
        put(row, n, part.k0 ? v : v + load(w.bias + n));
      }
  };
  const int64_t steps = ceil_div(part.k, Operand<u>::kStepK);
  [[maybe_unused]] const int64_t pauses = steps * kPauses<u>;
  // A panel is split while the one before it is multiplied.
  [[maybe_unused]] const int64_t panel_floats = split_panel<u>(part.k);
  Splitter splitter{nullptr, scratch, 0, 0};
  const auto split = [&](int64_t p) {
    if (u == Unit::split && p < part.p1)
      splitter = {reinterpret_cast<const float*>(w.panel(p)) + part.k0 * NR,
                  scratch + (p - part.p0) % 2 * panel_floats, 0, steps * kStep * 2};
  };
  split(part.p0);
  int current = 0;
  for (int64_t p = part.p0; p < part.p1; ++p) {
    splitter.take(splitter.end);
    const Stored<u>* weights = panels.panel(p);
    const float* b = u == Unit::split ? splitter.to : reinterpret_cast<const float*>(weights);
    split(p + 1);
    // Never of what isn't there: a prefetch of no memory costs a walk through the page tables.
    [[maybe_unused]] const Stretch next =
        p + 1 < part.p1 ? panels.from(p + 1) : Stretch{reinterpret_cast<const char*>(a.data), 0};
    [[maybe_unused]] const int64_t share = ceil_div(splitter.end, pauses * count);
    for (int64_t t = 0; t < count; ++t) {
      const int64_t m = tile_begin<u>(rows, t);
      float* tile = tiles[current ^= 1];
      const float* lhs = reinterpret_cast<const float*>(a.at(m, 0));
      const int64_t valid = tile_begin<u>(rows, t + 1) - m;
      if constexpr (kMatrix<u>)
        Isa::matrix_product<u>({lhs, kStep, kParts<u> * kBlock}, valid, b, steps, tile, NR, false,
                               [&] {
                                 finish(ceil_div(kMatrixRows, pauses));
                                 splitter.take(share);
                               });
      else
        multiply<u>(lhs, a.row / kPer<u>, valid, weights, int64_t(NR), w.units, tile, NR,
                    {next.data + next.bytes * m / rows, next.bytes * valid / (rows * w.units)});
      finish(kMaxTileRows);
      panel = p, row = m, end = m + valid, from = tile;
    }
  }
  finish(kMaxTileRows);
}

// Row m of the operand from n floats or bf16; as bytes, 0 is its least value and 255 its largest,
// less Isa::kByteZero.
template <Unit u, class T>
void put_row(const Operand<u>& to, int64_t m, const T* from, int64_t n) {
  using A = typename Operand<u>::A;
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
    to.low[m] = low + to.scale[m] * Isa::kByteZero + sum(poison);
    for (int64_t j = 0; j < to.row; j += W) {
      const vf v = j < n ? (only(load(from + j), n - j, first) - low) * inverse : vf{};
      // Adding 1.5 * 2^23 rounds to an integer in the low bits.
      Isa::store_bytes(to.at(m, j), (vi)(v + 12582912.f) - (0x4B400000 + Isa::kByteZero));
    }
  } else {
    for (int64_t j = 0; j < to.row; j += W)
      to.put(m, j, j < n ? only(load(from + j), n - j) : vf{});
  }
}

}  // namespace
}  // namespace bertfast::BERTFAST_ISA
