// Gradients through relative positions. A tile of the scores' gradient, read along its diagonals,
// is one of distances: nothing is copied to turn one into the other.
#pragma once
#include "attention_relative.h"

namespace bertfast::BERTFAST_ISA {
namespace {

// Zeros around a block's scores: a last tile may reach past them, and one of distances to each
// side.
constexpr int64_t kMargin = (MR + W - 1) / W * W;

// out[valid, columns] (+)= a b, tile by tile; b's panels are `panel` apart.
inline void product(const float* a, int64_t a_row, int64_t a_k, int64_t valid, const float* b,
                    int64_t panel, int64_t k, int64_t columns, float* out, int64_t out_row,
                    bool accumulate) {
  for (int64_t j = 0; j < columns; j += NR)
    tile_strided(a, a_row, a_k, valid, b + j / NR * panel, k, out + j, out_row, accumulate);
}

inline void zero(float* from, float* to) {
  if (to > from) std::memset(from, 0, (to - from) * sizeof(float));
}

// The scores' gradient of a block as rows of x by rows of the others, see attention_relative.h.
struct BlockGradient {
  const float* at;     // that of rows.first and others.first
  int64_t row, other;  // strides
  Span rows, others;   // MR - 1 others to either side of these it is zero
  const float* x;      // the rows as b of g^T x: panels [dim / NR][rows][NR]
  int64_t x_panel;

  const float* of(int64_t i, int64_t j) const {
    return at + (i - rows.first) * row + (j - others.first) * other;
  }
};

// For one head, the sums of the embeddings' gradients by distance, [columns + MR, dim_row] of each
// side; and the way back to x.
class RelativeGradients {
 public:
  static int64_t floats(const Distances& distances, int64_t dim_row) {
    return 2 * (distances.columns() + MR) * dim_row;
  }
  RelativeGradients(const Distances& distances, int64_t head, int64_t dim_row, float* sums)
      : distances_(distances), head_(head), dim_row_(dim_row), sums_(sums) {}

  float* of(Side side) const { return sums_ + side * (distances_.columns() + MR) * dim_row_; }

  // dx[valid, dim_row] += g e, for rows from i on and these others.
  void add_to_rows(Side side, const BlockGradient& g, int64_t i, int64_t valid, Span others,
                   float* dx) const {
    const int64_t j = others.first - (valid - 1);  // what the first row has in the first column
    product(g.of(i, j), g.row + g.other, g.other, valid,
            distances_.by_row(side, head_) + distances_.column(i, j) * NR,
            distances_.columns() * NR, others.count() + valid - 1, dim_row_, dx, dim_row_, true);
  }

  // de += g^T x.
  void add(Side side, const BlockGradient& g) const {
    const int64_t last = distances_.column(g.rows.first, g.others.end - 1);
    for (int64_t c = distances_.column(g.rows.end - 1, g.others.first); c <= last; c += MR) {
      const int64_t apart = distances_.column(0, 0) - c;  // rows i and i - apart meet in column c
      // The rows that meet some of the others in the tile's columns.
      const int64_t i = max(g.rows.first, g.others.first + apart - (MR - 1));
      const int64_t end = min(g.rows.end, g.others.end + apart);
      if (i < end)
        product(g.of(i, i - apart), g.other, g.row + g.other, MR, g.x + (i - g.rows.first) * NR,
                g.x_panel, end - i, dim_row_, of(side) + c * dim_row_, dim_row_, true);
    }
  }

 private:
  const Distances& distances_;
  int64_t head_, dim_row_;
  float* sums_;
};

// An embedding's gradient is the sum of its distances', over the parts of the batch.
inline void fold(const AttentionArgs& g, const Distances& distances, float* sums, int64_t of_task,
                 int64_t parts) {
  const int64_t dim_row = round_up(g.dim, NR);
#pragma omp parallel for
  for (int64_t n = 0; n < 2 * g.heads; ++n) {
    const Side side = Side(n / g.heads);
    const int64_t head = n % g.heads;
    float* all = side == kQueries ? g.drel_key : g.drel_query;
    if (!all || !distances.has(side)) continue;
    for (int64_t part = 0; part < parts; ++part) {
      float* of_part = sums + (part * g.heads + head) * of_task;
      const float* from = RelativeGradients(distances, head, dim_row, of_part).of(side);
      for (int64_t c = 0; c < distances.columns(); ++c, from += dim_row) {
        float* to = all + (distances.bucket(side, c) * g.heads + head) * g.dim;
        for (int64_t j = 0; j < g.dim; j += W)
          store_upto(to + j, load_upto(to + j, g.dim - j) + load(from + j) * g.scale, g.dim - j);
      }
    }
  }
}

}  // namespace
}  // namespace bertfast::BERTFAST_ISA
