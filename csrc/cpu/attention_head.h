// softmax(q k^T) v of one head of one sequence, for the operator and for the encoder: keys and
// values are packed once, and a tile of query rows sees all keys at once, so that the softmax takes
// a single pass.
#pragma once
#include "rows_tile.h"

namespace bertfast::BERTFAST_ISA {
namespace {

// Panels of b with rows n and k = dim (for x y^T), and with rows dim and k = n (for p y).
template <class T>
void pack_keys(float* to, const T* x, int64_t stride, int64_t n, int64_t dim) {
  for (int64_t p = 0; p * NR < n; ++p)
    pack_panel<Unit::fp32, NR>(to + p * dim * NR, x + p * NR * stride, stride, 1,
                               min(NR, n - p * NR), dim);
}
template <class T>
void pack_values(float* to, const T* x, int64_t stride, int64_t n, int64_t dim) {
  for (int64_t p = 0; p * NR < dim; ++p)
    pack_panel<Unit::fp32, NR>(to + p * n * NR, x + p * NR, 1, stride, min(NR, dim - p * NR), n);
}

template <Unit u>  // fp32, or bf16: of queries, keys, values and probabilities
class Head {
 public:
  // Of memory that n keys take.
  static int64_t floats(int64_t n, int64_t dim) {
    const Head head(n, dim);
    return head.row_ * head.dim_units_ + head.key_units_ * round_up(dim, NR) +
           kMaxTileRows * (2 * head.row_ + NR);
  }
  // k and v [n, dim], rows `stride` elements apart; padded: they can be read on to whole panels of
  // dim, as those in bf16 must.
  template <class T>
  Head(const T* k, const T* v, int64_t stride, int64_t n, int64_t dim, bool padded, float* memory)
      : Head(n, dim) {
    keys_ = memory;
    float* values = keys_ + row_ * dim_units_;
    scores_ = values + key_units_ * round_up(dim, NR);
    probabilities_ = scores_ + kMaxTileRows * row_;
    tile_ = probabilities_ + kMaxTileRows * row_;
    values_ = values, value_row_ = NR, value_panel_ = key_units_ * NR;
    if constexpr (u == Unit::bf16) {
      pack_pairs(k, v, stride, values);
    } else {
      pack_keys(keys_, k, stride, n, dim);
      if constexpr (std::is_same_v<T, float>) {
        if (padded) {  // floats are read in place
          values_ = v, value_row_ = stride, value_panel_ = NR;
          return;
        }
      }
      pack_values(values, v, stride, n, dim);
    }
  }

  // Of `queries`, rows q_row units apart, those of one of several parts. factor(scores, query)
  // makes a row ready and says what it is still to be multiplied with; done(numerators, query,
  // shift, sum) sees what the softmax has made of it. Writes out[query, dim].
  template <class Out, class Factor, class Done>
  void attend(const float* q, int64_t q_row, int64_t queries, int64_t part, int64_t parts,
              const Factor& factor, const Done& done, Out* out, int64_t out_row) const {
    const int64_t tiles = tile_count<u>(queries);
    const int64_t tile0 = tiles * part / parts, tile1 = tiles * (part + 1) / parts;
    [[maybe_unused]] const MatrixScope<u> scope{};
    for (int64_t t = tile0; t < tile1; ++t) {
      const int64_t m0 = tile_begin<u>(queries, t), rows = tile_begin<u>(queries, t + 1) - m0;
      for (int64_t p = 0; p * NR < n_; ++p)
        multiply<u>(q + m0 * q_row, q_row, rows, keys_ + p * dim_units_ * NR, int64_t(NR),
                    dim_units_, scores_ + p * NR, row_);
      float inverse[kMaxTileRows];
      for (int64_t i = 0; i < rows; ++i)
        inverse[i] = softmax(i, factor(scores_ + i * row_, m0 + i), [&](float shift, float z) {
          done(scores_ + i * row_, m0 + i, shift, z);
        });
      for (int64_t p = 0; p * NR < dim_; ++p) {
        multiply<u>(kPer<u> == 2 ? probabilities_ : scores_, row_, rows, values_ + p * value_panel_,
                    value_row_, key_units_, tile_, NR);
        Out* to = out + m0 * out_row + p * NR;
        for (int64_t i = 0; i < rows; ++i)
          for (int64_t j = 0; j < min(NR, dim_ - p * NR); j += W)
            store_upto(to + i * out_row + j, load(tile_ + i * NR + j) * inverse[i],
                       dim_ - p * NR - j);
      }
    }
  }

 private:
  Head(int64_t n, int64_t dim)
      : n_(n),
        dim_(dim),
        row_(round_up(n, NR)),
        dim_units_(round_up(ceil_div(dim, kPer<u>), kUnitMultiple<u>)),
        key_units_(u == Unit::fp32 ? n : row_ / kPer<u>) {}

  // Row i of the tile's scores become numerators; one over their sum.
  template <class Done>
  float softmax(int64_t i, float factor, const Done& done) const {
    float* s = scores_ + i * row_;
    vf top = splat(-kInf), total = {};
    for (int64_t j = n_ / W * W; j < row_; j += W)  // past the last key
      store(s + j, only(load(s + j), n_ - j, splat(-kInf)));
    for (int64_t j = 0; j < row_; j += W) top = max(load(s + j), top);
    const float peak = max_of(top), shift = peak == -kInf ? 0 : peak * factor;
    for (int64_t j = 0; j < row_; j += W) {
      const vf p = exp(load(s + j) * factor - shift);
      total += p;
      if constexpr (kPer<u> == 2)
        store(reinterpret_cast<bf16*>(probabilities_ + i * row_) + j, p);
      else
        store(s + j, p);
    }
    const float z = sum(total);
    done(shift, z);
    return z == 0 ? 0 : 1 / z;  // a row without a key
  }

  void pack_pairs(const bf16* k, const bf16* v, int64_t stride, float* values) const {
    const int64_t used = ceil_div(dim_, 2);
    for (int64_t p = 0; p * NR < n_; ++p) {
      float* panel = keys_ + p * dim_units_ * NR;
      pack_panel<Unit::fp32, NR>(panel, reinterpret_cast<const float*>(k + p * NR * stride),
                                 stride / 2, 1, min(NR, n_ - p * NR), used);
      std::memset(panel + used * NR, 0, (dim_units_ - used) * NR * sizeof(float));
    }
    for (int64_t i = 0; i < key_units_; ++i)
      for (int64_t j = 0; j < round_up(dim_, NR); j += W) {
        const vf even = 2 * i < n_ ? load(v + 2 * i * stride + j) : vf{};
        const vf odd = 2 * i + 1 < n_ ? load(v + (2 * i + 1) * stride + j) : vf{};
        store(values + (j / NR * key_units_ + i) * NR + j % NR, pairs(even, odd));
      }
  }

  int64_t n_, dim_, row_, dim_units_, key_units_;   // row: keys in whole panels
  float *keys_, *scores_, *probabilities_, *tile_;  // [tile rows, row], the same, [tile rows, NR]
  const float* values_;
  int64_t value_row_, value_panel_;
};

}  // namespace
}  // namespace bertfast::BERTFAST_ISA
