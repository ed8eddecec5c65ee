// Disentangled relative positions: what x_i.e[r] adds to the score of query and key, r the bucket
// of their distance, where x is the queries and e rel_key, or x is the keys and e rel_query; and
// the gradients.
//
// Once a call the embeddings are laid out by distance: row i of x and row j of the others' meet in
// column `longest - 1 - i + j`. So a run of others is a run of columns, no embedding is looked up
// by score, and a tile of x is multiplied by the distances that it has and no more.
#pragma once
#include "attention_head.h"

namespace bertfast::BERTFAST_ISA {
namespace {

enum Side { kQueries, kKeys };  // whose rows are x

// The embeddings of every distance of two of `longest` positions, for each side and head.
class Distances {
 public:
  Distances() = default;
  // by_row: for gradients.
  template <class T>
  Distances(const AttentionArgs& g, int64_t longest, bool by_row, const T*)
      : embeddings_{g.rel_key, g.rel_query},
        index_(g.rel_index),
        heads_(g.heads),
        longest_(longest),
        dim_(g.dim),
        copies_(by_row ? 2 : 1) {
    if (!index_ || longest == 0) return;
    static thread_local Buffer buffer, rows;
    const int64_t dim_row = round_up(dim_, NR);
    laid_out_ = buffer.get<float>(2 * heads_ * of_head());
    const PerThread<float> scratch(rows, columns() * dim_row);
#pragma omp parallel for
    for (int64_t n = 0; n < 2 * heads_; ++n) {
      const Side side = Side(n / heads_);
      if (!has(side)) continue;
      const T* from = static_cast<const T*>(embeddings_[side]) + n % heads_ * dim_;
      float* row = scratch.mine();
      for (int64_t c = 0; c < columns(); ++c)
        for (int64_t j = 0; j < dim_; j += W)
          store(row + c * dim_row + j,
                load_upto(from + bucket(side, c) * heads_ * dim_ + j, dim_ - j));
      float* to = laid_out_ + n * of_head();
      pack_keys(to, row, dim_row, columns(), dim_);
      if (by_row) pack_values(to + of_copy(), row, dim_row, columns(), dim_);
    }
  }

  bool has(Side side) const { return laid_out_ && embeddings_[side]; }
  int64_t columns() const { return 2 * longest_ - 1; }
  int64_t bucket(Side side, int64_t column) const {
    const int64_t distance = longest_ - 1 - column;
    return index_[side == kQueries ? distance : -distance];
  }
  // Where x's row i meets the others' row j.
  int64_t column(int64_t i, int64_t j) const { return longest_ - 1 - i + j; }
  // b of x e^T: panels [column / NR][dim][NR].
  const float* by_column(Side side, int64_t head) const {
    return laid_out_ + (side * heads_ + head) * of_head();
  }
  // b of g e: panels [dim / NR][column][NR].
  const float* by_row(Side side, int64_t head) const { return by_column(side, head) + of_copy(); }

 private:
  int64_t of_copy() const { return round_up(columns(), NR) * round_up(dim_, NR); }
  int64_t of_head() const { return copies_ * of_copy(); }

  const void* embeddings_[2] = {};
  const int32_t* index_ = nullptr;
  int64_t heads_ = 0, longest_ = 0, dim_ = 0, copies_ = 0;
  float* laid_out_ = nullptr;
};

// What both sides add to the scores of one head of one sequence.
class RelativeScores {
 public:
  // Of memory, for blocks of so many queries of a sequence with n keys.
  static int64_t floats(int64_t block, int64_t n, Reach reach) {
    return kMaxTileRows * tile_row(n, reach) + NR * group_row(block) +
           round_up(block, W) * reach.width(block, n);
  }
  // q and k: fp32 rows `row` apart.
  RelativeScores(const Distances& distances, int64_t head, const float* q, const float* k,
                 int64_t row, int64_t block, int64_t n, int64_t dim, Reach reach, float* memory)
      : distances_(distances),
        head_(head),
        q_(q),
        k_(k),
        row_(row),
        n_(n),
        dim_(dim),
        reach_(reach),
        tile_row_(tile_row(n, reach)),
        group_row_(group_row(block)),
        block_row_(reach.width(block, n)),
        tile_(memory),
        group_(tile_ + kMaxTileRows * tile_row_),
        block_(group_ + NR * group_row_) {}

  // Before the tiles of a block of queries.
  void start_block(int64_t query, int64_t rows) {
    if (!distances_.has(kKeys)) return;
    block0_ = query, block_keys_ = reach_.tile(query, rows, n_);
    for (int64_t j = block_keys_.first; j < block_keys_.end; j += NR)
      turn(j, multiply_group(j, min(NR, n_ - j), query, rows), query, rows);
  }
  // Before add() of a tile's rows.
  void start_tile(int64_t query, int64_t rows) {
    if (!distances_.has(kQueries)) return;
    const Span keys = reach_.tile(query, rows, n_);
    tile0_ = query, tile_column_ = distances_.column(query + rows - 1, keys.first) / NR * NR;
    if (keys.count() > 0)
      multiply_tile(kQueries, q_ + query * row_, rows, tile_column_,
                    distances_.column(query, keys.end - 1), tile_, tile_row_);
  }
  // To a row of scores of these keys.
  void add(float* s, int64_t query, Span keys) const {
    if (distances_.has(kQueries)) {
      const float* more = tile_ + (query - tile0_) * tile_row_ +
                          distances_.column(query, keys.first) - tile_column_;
      for (int64_t j = 0; j < keys.count(); j += W) store(s + j, load(s + j) + load(more + j));
    }
    if (distances_.has(kKeys)) {
      const float* more = block_ + (query - block0_) * block_row_ + keys.first - block_keys_.first;
      for (int64_t j = 0; j < keys.count(); j += W) store(s + j, load(s + j) + load(more + j));
    }
  }

 private:
  static int64_t tile_row(int64_t n, Reach reach) {
    return reach.width(kMaxTileRows, n) + round_up(kMaxTileRows, NR) + NR;
  }
  static int64_t group_row(int64_t block) { return round_up(block, NR) + 3 * NR; }

  // out[rows, column - first] of the columns to `last`; first starts a panel.
  void multiply_tile(Side side, const float* x, int64_t rows, int64_t first, int64_t last,
                     float* out, int64_t out_row) const {
    const float* e = distances_.by_column(side, head_);
    for (int64_t c = first; c <= last; c += NR)
      multiply<Unit::fp32>(x, row_, rows, e + c * dim_, int64_t(NR), dim_, out + c - first,
                           out_row);
  }
  // group[key - j, column - first] for the block's queries; -> first
  int64_t multiply_group(int64_t j, int64_t keys, int64_t query, int64_t rows) const {
    const int64_t first = distances_.column(j + keys - 1, query) / NR * NR;
    const int64_t tiles = tile_count<Unit::fp32>(keys);
    for (int64_t t = 0; t < tiles; ++t) {
      const int64_t k0 = tile_begin<Unit::fp32>(keys, t), k1 = tile_begin<Unit::fp32>(keys, t + 1);
      const int64_t from = distances_.column(j + k1 - 1, query) / NR * NR;
      multiply_tile(kKeys, k_ + (j + k0) * row_, k1 - k0, from,
                    distances_.column(j + k0, query + rows - 1),
                    group_ + k0 * group_row_ + from - first, group_row_);
    }
    return first;
  }
  // A group's rows of keys become columns of the block. What lies past the keys or the queries is
  // whatever was there.
  void turn(int64_t j, int64_t first, int64_t query, int64_t rows) const {
    for (int64_t i = 0; i < rows; i += W)
      for (int64_t lane = 0; lane < NR; lane += W) {
        vf r[W];
#pragma GCC unroll 16
        for (int64_t x = 0; x < W; ++x)
          r[x] = load(group_ + (lane + x) * group_row_ +
                      distances_.column(j + lane + x, query + i) - first);
        transpose(r);
        float* to = block_ + i * block_row_ + j - block_keys_.first + lane;
#pragma GCC unroll 16
        for (int64_t y = 0; y < W; ++y) store(to + y * block_row_, r[y]);
      }
  }

  const Distances& distances_;
  const int64_t head_;
  const float *q_, *k_;
  const int64_t row_, n_, dim_;
  const Reach reach_;
  const int64_t tile_row_, group_row_, block_row_;
  float *tile_, *group_, *block_;  // [tile rows, tile_row], [NR, group_row], [block, block_row]
  int64_t block0_ = 0, tile0_ = 0, tile_column_ = 0;
  Span block_keys_ = {};
};

}  // namespace
}  // namespace bertfast::BERTFAST_ISA
