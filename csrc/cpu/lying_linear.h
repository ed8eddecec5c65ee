// A linear layer on weights as they lie in memory, [n][k], for live ones that meet few rows, which
// would not pay for packing them. The rows are packed instead: their panel stands where a packed
// weight's does, and each weight is broadcast, so that sums are the same to the bit. Of a few
// rows, for which most lanes would be empty, vectors run along k.
#pragma once
#include "pack_weights.h"
#include "rows_dot.h"

namespace bertfast::BERTFAST_ISA {
namespace {

template <Unit u>
struct LyingLinear {
  static constexpr Unit kUnit = u == Unit::wide_bf16 ? Unit::fp32 : u;  // rows are widened first
  static constexpr int kPerUnit = kPer<kUnit>;
  static constexpr int64_t kMost = 128;  // rows

  const LinearWeights& live;
  const Linear<u>& packed;  // its bias is made, not its panels
  float* scratch;

  // Lanes past the last row are lost: as many rows more cost what packing does (Zen 5: 8). Of more
  // than two panels of rows packed weights are faster (Zen 5 held to AVX2: 100 rows 12% so).
  static bool worth(const LinearWeights& live, int64_t k, int64_t rows) {
    if (rows > kMost || !can_lie<u>(live, k)) return false;
    if (u == Unit::wide_bf16 || rows <= W) return true;
    return rows <= 2 * NR && round_up(rows, W) - rows < 8;
  }
  // Of scratch, besides [NR, k] for rows of weights.
  static int64_t floats(int64_t k, int64_t rows) {
    return round_up(min(rows, kMost), NR) * ceil_div(k, kPerUnit);
  }

  // As `linear` puts them.
  template <class Put>
  void multiply(const Operand<u>& a, int64_t rows, const Part& part, const Put& put) const {
    const int64_t k = packed.k, units = ceil_div(k, kPerUnit);
    const float* given = reinterpret_cast<const float*>(a.at(0, 0));
    const int64_t given_row = a.row / kPerUnit;
    const bool few = rows <= kDotRows<kUnit>;
    float* lanes = scratch + NR * k;
    for (int64_t m = 0; m < (few ? 0 : rows); m += NR)
      pack_panel<Unit::fp32, NR>(lanes + m * units, given + m * given_row, given_row, 1,
                                 min(NR, rows - m), units);
    alignas(64) float sums[kMost * NR];
    for (int64_t p = part.p0; p < part.p1; ++p) {
      pack_bias(live, packed, p);
      const float* weights = lying_rows<u>(live, k, p, scratch);
      const bool last = p + 1 == part.p1;
      const Stretch next =
          last ? Stretch{reinterpret_cast<const char*>(weights), 0} : rows_of(live, p + 1, k);
      if (few) {
        dot_tile<kUnit>(given, given_row, rows, weights, units, sums, next.data, next.bytes);
        for (int64_t m = 0; m < rows; ++m)
          for (int64_t n = 0; n < NR; n += W)
            put(m, p * NR + n, load(sums + m * NR + n) + load(packed.bias + p * NR + n));
        continue;
      }
      by_lanes(weights, lanes, rows, units, next, sums);
      for (int64_t m = 0; m < rows; m += W) put_lanes(sums, m, min(W, rows - m), p * NR, put);
    }
  }

 private:
  // sums[rows / NR][NR weights][NR rows]. Of weights in their place the next tile's are fetched
  // meanwhile, of copies a part of the next panel's.
  void by_lanes(const float* weights, const float* lanes, int64_t rows, int64_t units,
                const Stretch& next, float* sums) const {
    const bool copies = weights == scratch;
    const int64_t steps = ceil_div(rows, NR) * units;
    for (int64_t t = 0; t < tile_count<kUnit>(NR); ++t) {
      const int64_t n = tile_begin<kUnit>(NR, t), count = tile_begin<kUnit>(NR, t + 1) - n;
      Stretch soon{next.data + (copies ? next.bytes * n / NR : 0), next.bytes * count / NR};
      if (!copies && n + count < NR)
        soon = {reinterpret_cast<const char*>(weights + (n + count) * units), count * units * 4};
      Ahead ahead{soon.data, soon.bytes / steps};
      for (int64_t m = 0; m < rows; m += NR, ahead.from += ahead.step * units) {
        const float *from = weights + n * units, *with = lanes + m * units;
        float* to = sums + (m + n) * NR;
        if (rows - m > W)
          product<NV>(from, units, count, with, to, ahead);
        else
          product<1>(from, units, count, with, to, ahead);
      }
    }
  }
  template <int V>
  static void product(const float* from, int64_t units, int64_t count, const float* with, float* to,
                      const Ahead& ahead) {
    bertfast::BERTFAST_ISA::multiply<kUnit, V>(from, units, count, with, NR, units, to, NR, ahead);
  }
  // Rows [m, m + count) of panel n0's columns, whose lanes become rows.
  template <class Put>
  void put_lanes(const float* sums, int64_t m, int64_t count, int64_t n0, const Put& put) const {
    vf turned[NV][W];
    for (int j = 0; j < NV; ++j) {
      const float* from = sums + m / NR * NR * NR + j * W * NR + m % NR;
      for (int i = 0; i < W; ++i) turned[j][i] = load(from + i * NR);
      transpose(turned[j]);
    }
    for (int64_t i = 0; i < count; ++i)
      for (int j = 0; j < NV; ++j)
        put(m + i, n0 + j * W, turned[j][i] + load(packed.bias + n0 + j * W));
  }
};

}  // namespace
}  // namespace bertfast::BERTFAST_ISA
