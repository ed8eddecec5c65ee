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

// What is looked up by distance.
struct RelativeEmbeddings {
  const void* of[2];     // by side: [buckets, heads, dim], or null
  const int32_t* index;  // of the distance 0: the bucket of (query position - key position)
  int64_t heads, dim;
};

// The embeddings of every distance of two of `longest` positions, for each side and head.
class Distances {
 public:
  Distances() = default;
  // units: of a column. by_row: for gradients. Has memory to be placed and columns to be laid out.
  Distances(const RelativeEmbeddings& from, int64_t longest, int64_t units, bool by_row = false)
      : from_(from), longest_(longest), units_(units), copies_(by_row ? 2 : 1) {}
  int64_t floats() const { return 2 * from_.heads * of_head(); }
  int64_t scratch_floats() const { return columns() * round_up(from_.dim, NR); }
  void place(float* memory) { laid_out_ = memory; }

  // Side n / heads, head n % heads of embeddings in T.
  template <Unit u, class T>
  void lay_out(int64_t n, float* scratch) const {
    const int64_t dim = from_.dim, dim_row = round_up(dim, NR), heads = from_.heads;
    const Side side = Side(n / heads);
    if (!has(side)) return;
    const T* from = static_cast<const T*>(from_.of[side]) + n % heads * dim;
    for (int64_t c = 0; c < columns(); ++c)
      for (int64_t j = 0; j < dim; j += W)
        store(scratch + c * dim_row + j,
              load_upto(from + bucket(side, c) * heads * dim + j, dim - j));
    float* to = laid_out_ + n * of_head();
    const int64_t used = ceil_div(dim, kPer<u>);
    for (int64_t c = 0; c < columns(); c += NR) {
      float* panel = to + c * units_;
      pack_panel<u, NR>(panel, scratch + c * dim_row, dim_row, 1, min(NR, columns() - c), dim);
      std::memset(panel + used * NR, 0, (units_ - used) * NR * sizeof(float));
    }
    if (copies_ == 2) pack_values(to + of_copy(), scratch, dim_row, columns(), dim);
  }

  bool has(Side side) const { return laid_out_ && from_.of[side]; }
  int64_t columns() const { return 2 * longest_ - 1; }
  int64_t bucket(Side side, int64_t column) const {
    const int64_t distance = longest_ - 1 - column;
    return from_.index[side == kQueries ? distance : -distance];
  }
  // Where x's row i meets the others' row j.
  int64_t column(int64_t i, int64_t j) const { return longest_ - 1 - i + j; }
  // b of x e^T: panels [column / NR][units][NR].
  const float* by_column(Side side, int64_t head) const {
    return laid_out_ + (side * from_.heads + head) * of_head();
  }
  // b of g e: panels [dim / NR][column][NR].
  const float* by_row(Side side, int64_t head) const { return by_column(side, head) + of_copy(); }

 private:
  int64_t of_copy() const { return round_up(columns(), NR) * round_up(from_.dim, NR); }
  int64_t of_head() const { return copies_ * of_copy(); }

  RelativeEmbeddings from_ = {};
  int64_t longest_ = 0, units_ = 0, copies_ = 0;
  float* laid_out_ = nullptr;
};

// What both sides add to the scores of one head of one sequence.
template <Unit u = Unit::fp32>
class RelativeScores {
 public:
  // Of memory, for blocks of so many queries of a sequence with n keys.
  static int64_t floats(int64_t block, int64_t n, Reach reach) {
    return kMaxTileRows * tile_row(n, reach) + NR * group_row(block) +
           round_up(block, W) * reach.width(block, n);
  }
  // q and k: rows of `dim` units, `row` apart.
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
      multiply<u>(x, row_, rows, e + c * dim_, int64_t(NR), dim_, out + c - first, out_row);
  }
  // group[key - j, column - first] for the block's queries; -> first
  int64_t multiply_group(int64_t j, int64_t keys, int64_t query, int64_t rows) const {
    const int64_t first = distances_.column(j + keys - 1, query) / NR * NR;
    const int64_t tiles = tile_count<u>(keys);
    for (int64_t t = 0; t < tiles; ++t) {
      const int64_t k0 = tile_begin<u>(keys, t), k1 = tile_begin<u>(keys, t + 1);
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
