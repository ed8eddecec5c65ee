// softmax(q k^T) v of one head of one sequence, for the operator and for the encoder: keys and
// values are packed once, and a tile of query rows meets all keys that it sees at once, so that the
// softmax takes a single pass.
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

struct Span {
  int64_t first, end;
  int64_t count() const { return end - first; }
  int64_t panels() const { return round_up(count(), NR); }  // its size in whole panels
};

// The keys that a query sees: from so many before its own position to so many after it.
struct Reach {
  int64_t before = int64_t(1) << 40, after = int64_t(1) << 40;

  // Of n keys those that any of `rows` queries sees.
  Span of(int64_t query, int64_t rows, int64_t n) const {
    return {min(max(query - before, 0), n), min(query + rows + after, n)};
  }
  // The same from the start of a panel.
  Span tile(int64_t query, int64_t rows, int64_t n) const {
    const Span span = of(query, rows, n);
    return {span.first / NR * NR, span.end};
  }
  // The most panels() of such a tile.
  int64_t width(int64_t rows, int64_t n) const {
    return min(round_up(n, NR), round_up(rows + before + after, NR) + NR);
  }
};

// Of a row of scores, those of the keys in `tile`, all but `seen` become -inf.
inline void hide(float* s, Span seen, Span tile) {
  const int64_t low = seen.first - tile.first, high = seen.end - tile.first;
  for (int64_t j = 0; j < low; j += W) store(s + j, only(splat(-kInf), low - j, load(s + j)));
  for (int64_t j = high / W * W; j < tile.panels(); j += W)
    store(s + j, only(load(s + j), high - j, splat(-kInf)));
}

template <Unit u>  // fp32, or bf16: of queries, keys, values and probabilities
class Head {
 public:
  // Of a row of queries or keys.
  static int64_t units(int64_t dim) { return round_up(ceil_div(dim, kPer<u>), kUnitMultiple<u>); }
  // Of memory that n keys take.
  static int64_t floats(int64_t n, int64_t dim, Reach reach = {}) {
    const Head head(n, dim, reach);
    return head.row_ * head.dim_units_ + head.key_units_ * round_up(dim, NR) +
           kMaxTileRows * (2 * head.width_ + NR);
  }
  // k and v [n, dim], rows `stride` elements apart; padded: they can be read on to whole panels of
  // dim, as those in bf16 must.
  template <class T>
  Head(const T* k, const T* v, int64_t stride, int64_t n, int64_t dim, bool padded, float* memory,
       Reach reach = {})
      : Head(n, dim, reach) {
    keys_ = memory;
    float* values = keys_ + row_ * dim_units_;
    scores_ = values + key_units_ * round_up(dim, NR);
    probabilities_ = scores_ + kMaxTileRows * width_;
    tile_ = probabilities_ + kMaxTileRows * width_;
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

  // Of `queries`, rows q_row units apart, those of one of several parts. factor(scores, query,
  // keys) makes a row, of these keys, ready and says what it is still to be multiplied with;
  // done(numerators, query, keys, shift, sum) sees what the softmax has made of it. Writes
  // out[query, dim].
  template <class Out, class Factor, class Done>
  void attend(const float* q, int64_t q_row, int64_t queries, int64_t part, int64_t parts,
              const Factor& factor, const Done& done, Out* out, int64_t out_row) const {
    const int64_t tiles = tile_count<u>(queries);
    const int64_t tile0 = tiles * part / parts, tile1 = tiles * (part + 1) / parts;
    [[maybe_unused]] const MatrixScope<u> scope{};
    for (int64_t t = tile0; t < tile1; ++t) {
      const int64_t m0 = tile_begin<u>(queries, t), rows = tile_begin<u>(queries, t + 1) - m0;
      const Span keys = reach_.tile(m0, rows, n_);
      for (int64_t j = 0; j < keys.count(); j += NR)
        multiply<u>(q + m0 * q_row, q_row, rows, keys_ + (keys.first + j) * dim_units_, int64_t(NR),
                    dim_units_, scores_ + j, width_);
      float inverse[kMaxTileRows];
      for (int64_t i = 0; i < rows; ++i) {
        float* s = scores_ + i * width_;
        const float scale = factor(s, m0 + i, keys);
        hide(s, reach_.of(m0 + i, 1, n_), keys);
        inverse[i] =
            softmax(i, keys, scale, [&](float shift, float z) { done(s, m0 + i, keys, shift, z); });
      }
      const float* values = values_ + keys.first / kPer<u> * value_row_;
      const int64_t units = kPer<u> == 2 ? keys.panels() / 2 : keys.count();
      for (int64_t p = 0; p * NR < dim_; ++p) {
        multiply<u>(kPer<u> == 2 ? probabilities_ : scores_, width_, rows,
                    values + p * value_panel_, value_row_, units, tile_, NR);
        Out* to = out + m0 * out_row + p * NR;
        for (int64_t i = 0; i < rows; ++i)
          for (int64_t j = 0; j < min(NR, dim_ - p * NR); j += W)
            store_upto(to + i * out_row + j, load(tile_ + i * NR + j) * inverse[i],
                       dim_ - p * NR - j);
      }
    }
  }

 private:
  Head(int64_t n, int64_t dim, Reach reach)
      : reach_(reach),
        n_(n),
        dim_(dim),
        row_(round_up(n, NR)),
        width_(reach.width(kMaxTileRows, n)),
        dim_units_(units(dim)),
        key_units_(u == Unit::fp32 ? n : row_ / kPer<u>) {}

  // Row i of the tile's scores become numerators; one over their sum.
  template <class Done>
  float softmax(int64_t i, Span keys, float factor, const Done& done) const {
    float* s = scores_ + i * width_;
    vf top = splat(-kInf), total = {};
    const int64_t row = keys.panels();
    for (int64_t j = 0; j < row; j += W) top = max(load(s + j), top);
    const float peak = max_of(top), from = peak == -kInf ? 0 : peak;
    const float in_twos = factor * 1.44269504f;  // log2(e)
    for (int64_t j = 0; j < row; j += W) {
      const vf p = exp2_down((load(s + j) - from) * in_twos);
      total += p;
      if constexpr (kPer<u> == 2)
        store(reinterpret_cast<bf16*>(probabilities_ + i * width_) + j, p);
      else
        store(s + j, p);
    }
    const float z = sum(total);
    done(from * factor, z);
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

  Reach reach_;
  int64_t n_, dim_, row_, width_, dim_units_, key_units_;  // row: keys in whole panels
  float *keys_, *scores_, *probabilities_, *tile_;  // [tile rows, width], the same, [tile rows, NR]
  const float* values_;
  int64_t value_row_, value_panel_;
};

}  // namespace
}  // namespace bertfast::BERTFAST_ISA
