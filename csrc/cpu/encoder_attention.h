// Attention of the encoder for inference.
#pragma once
#include <cmath>

#include "../layer.h"
#include "packed_linear.h"
#include "rows.h"

namespace bertfast::BERTFAST_ISA {
namespace {

template <Unit u>  // fp32 or bf16
struct Heads {
  using T = Element<u>;

  const T* qkv;  // [tokens, row]: queries, keys and values, `hidden` each
  int64_t row, hidden, dim;
  T* out;  // [tokens, out_row]
  int64_t out_row;
  Bias bias;

  // Of memory that a sequence of n takes, at most.
  int64_t floats(int64_t n) const {
    const int64_t keys = round_up(n, NR), panels = ceil_div(dim, NR);
    return keys * round_up(dim, 64) + keys * panels * NR + kMaxTileRows * (2 * keys + NR);
  }
  // Scores of a query over n keys become scaled and biased.
  void add_bias(float* s, int64_t n, float scale, int64_t row) const {
    const Vector values{bias.data, bias.dtype == kBf16};
    for (int64_t j = 0; j < n; j += W)
      store(s + j, load(s + j) * scale + values.at(row + j, row + n));
  }
  // One head of sequence b, whose first n tokens are keys; of several parts of its queries, one.
  void attend(int64_t b, int64_t start, int64_t queries, int64_t n, int64_t head, int64_t part,
              int64_t parts, float* memory) const {
    constexpr int per = kPer<u>;
    const int64_t tiles = tile_count<u>(queries);
    const int64_t tile0 = tiles * part / parts, tile1 = tiles * (part + 1) / parts;
    if (n == 0) {  // whose queries, if any, see nothing
      for (int64_t i = part == 0 ? 0 : queries; i < queries; ++i)
        std::memset(out + (start + i) * out_row + head * dim, 0, dim * sizeof(T));
      return;
    }
    const T* q = qkv + start * row + head * dim;
    const T *k = q + hidden, *v = k + hidden;
    const int64_t keys = round_up(n, NR), row_units = row / per;
    const int64_t dim_units = round_up(ceil_div(dim, per), kUnitMultiple<u>);
    const int64_t key_units = u == Unit::fp32 ? n : keys / per;
    const int64_t dim_panels = ceil_div(dim, NR);
    float* key_panels = memory;
    float* value_panels = key_panels + keys * dim_units;
    float* scores = value_panels + key_units * dim_panels * NR;  // [tile rows, keys]
    float* probabilities = scores + kMaxTileRows * keys;         // of pairs
    float* tile = probabilities + kMaxTileRows * keys;           // [tile rows, NR]
    const float* values = reinterpret_cast<const float*>(v);     // floats are read in place
    int64_t value_row = row;

    for (int64_t p = 0; p * NR < n; ++p) {
      float* panel = key_panels + p * dim_units * NR;
      const int64_t used = ceil_div(dim, per);
      pack_panel<Unit::fp32, NR>(panel, reinterpret_cast<const float*>(k + p * NR * row), row_units,
                                 1, min(NR, n - p * NR), used);
      std::memset(panel + used * NR, 0, (dim_units - used) * NR * sizeof(float));
    }
    if constexpr (per == 2) {
      for (int64_t i = 0; i < key_units; ++i)
        for (int64_t j = 0; j < dim_panels * NR; j += W) {
          const vf even = 2 * i < n ? load(v + 2 * i * row + j) : vf{};
          const vf odd = 2 * i + 1 < n ? load(v + (2 * i + 1) * row + j) : vf{};
          const vf both = (vf)((bits(even) >> 16) | bits(odd));
          store(value_panels + (j / NR * key_units + i) * NR + j % NR, both);
        }
      values = value_panels;
      value_row = NR;
    }
    const float unbiased = 1 / std::sqrt(float(dim)), scale = bias.data ? 1 : unbiased;
    [[maybe_unused]] const MatrixScope<u> scope{};
    for (int64_t t = tile0; t < tile1; ++t) {
      const int64_t m0 = tile_begin<u>(queries, t), rows = tile_begin<u>(queries, t + 1) - m0;
      for (int64_t p = 0; p * NR < n; ++p)
        multiply<u>(reinterpret_cast<const float*>(q + m0 * row), row_units, rows,
                    key_panels + p * dim_units * NR, int64_t(NR), dim_units, scores + p * NR, keys);
      float inverse[kMaxTileRows];
      for (int64_t i = 0; i < rows; ++i) {
        float* s = scores + i * keys;
        if (bias.data) add_bias(s, n, unbiased, bias.row(b, head, m0 + i));
        vf top = splat(-kInf), total = {};
        for (int64_t j = 0; j < keys; j += W) {
          if (n - j < W) store(s + j, only(load(s + j), n - j, splat(-kInf)));
          top = max(load(s + j), top);
        }
        const float peak = max_of(top), shift = peak == -kInf ? 0 : peak * scale;
        for (int64_t j = 0; j < keys; j += W) {
          const vf p = exp(load(s + j) * scale - shift);
          total += p;
          if constexpr (per == 2)
            store(reinterpret_cast<bf16*>(probabilities + i * keys) + j, p);
          else
            store(s + j, p);
        }
        const float z = sum(total);
        inverse[i] = z == 0 ? 0 : 1 / z;  // a row without a key
      }
      const float* a = per == 2 ? probabilities : scores;
      T* to = out + (start + m0) * out_row + head * dim;
      for (int64_t p = 0; p < dim_panels; ++p) {
        const float* panel = per == 2 ? values + p * key_units * NR : values + p * NR;
        multiply<u>(a, keys, rows, panel, value_row, key_units, tile, NR);
        for (int64_t i = 0; i < rows; ++i)
          for (int64_t j = 0; j < min(NR, dim - p * NR); j += W)
            store_upto(to + i * out_row + p * NR + j, load(tile + i * NR + j) * inverse[i],
                       dim - p * NR - j);
      }
    }
  }
};

}  // namespace
}  // namespace bertfast::BERTFAST_ISA
