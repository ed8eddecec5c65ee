// Backward of attention over packed sequences. The probabilities are computed again, for a block of
// queries at a time.
#include "attention_relative_backward.h"
#include "attention_task.h"
#include "operators.h"
#include "philox.h"

namespace bertfast::BERTFAST_ISA {
namespace {

constexpr int64_t kQueryBlock = 8 * MR;

// One head of one sequence.
template <class T>
class HeadBackward {
 public:
  static int64_t floats(const Task& t) {
    const int64_t of_q = (t.queries + MR) * t.dim_row(), of_k = (t.keys + MR) * t.dim_row();
    const int64_t block = kQueryBlock + 2 * MR, row = t.reach.width(kQueryBlock, t.keys);
    return 4 * of_q + 4 * of_k + 2 * t.row * t.g.dim + 2 * block * (row + 2 * kMargin) +
           MR * t.dim_row() + 2 * (row + 2 * kMargin) + 64 +
           (t.g.rel_index ? RelativeScores<>::floats(kQueryBlock, t.keys, t.reach) : 0);
  }
  HeadBackward(const Task& t, const Distances& distances, float* memory)
      : t_(t),
        g_(t.g),
        m_(t.queries),
        n_(t.keys),
        dim_(g_.dim),
        dim_row_(t.dim_row()),
        row_(t.reach.width(kQueryBlock, n_) + 2 * kMargin),
        distances_(distances) {
    const int64_t of_q = (m_ + MR) * dim_row_, of_k = (n_ + MR) * dim_row_;
    const auto take = [&](int64_t n) { return std::exchange(memory, memory + n); };
    q_ = take(of_q), dout_ = take(of_q), q_panels_ = take(of_q), dout_panels_ = take(of_q);
    k_ = take(of_k), k_panels_ = take(of_k), dk_ = take(of_k), dv_ = take(of_k);
    keys_ = take(t.row * dim_), values_ = take(t.row * dim_);
    const int64_t block = (kQueryBlock + 2 * MR) * row_, inside = MR * row_ + kMargin;
    p_ = take(block) + inside, ds_ = take(block) + inside;
    tile_ = take(MR * dim_row_), probability_ = take(row_);
    bits_ = reinterpret_cast<uint32_t*>(take(row_ + 64));
    relative_memory_ = memory;
  }

  void run(const RelativeGradients* relative) {
    const int64_t grad_token = g_.heads * dim_;
    const T* grad = static_cast<const T*>(g_.grad) + t_.start * grad_token + t_.h * dim_;
    widen(q_, t_.template query<T>(), g_.q_token, m_, dim_, dim_row_);
    widen(dout_, grad, grad_token, m_, dim_, dim_row_);
    const T *k = t_.template of_key<T>(g_.k), *v = t_.template of_key<T>(g_.v);
    pack_keys(keys_, k, g_.k_token, n_, dim_);
    pack_keys(values_, v, g_.k_token, n_, dim_);
    pack_values(k_panels_, k, g_.k_token, n_, dim_);
    if (distances_.has(kKeys)) widen(k_, k, g_.k_token, n_, dim_, dim_row_);
    std::memset(dk_, 0, 2 * (n_ + MR) * dim_row_ * sizeof(float));
    RelativeScores<> positions(distances_, t_.h, q_, k_, dim_row_, kQueryBlock, n_, dim_, t_.reach,
                               relative_memory_);
    for (int64_t query = 0; query < m_; query += kQueryBlock)
      block({query, min(query + kQueryBlock, m_)}, positions, relative);
    put(dk_, n_, g_.dk, t_.first_key, g_.dk_token, g_.scale);
    put(dv_, n_, g_.dv, t_.first_key, g_.dk_token, 1);
  }

 private:
  void block(Span queries, RelativeScores<>& positions, const RelativeGradients* relative) {
    const Span keys = t_.reach.tile(queries.first, queries.count(), n_);
    pack_values(q_panels_, q_ + queries.first * dim_row_, dim_row_, queries.count(), dim_);
    pack_values(dout_panels_, dout_ + queries.first * dim_row_, dim_row_, queries.count(), dim_);
    const BlockGradient of_queries{ds_, row_, 1, queries, keys, q_panels_, queries.count() * NR},
        of_keys{ds_, 1, row_, keys, queries, k_panels_ + keys.first * NR, n_ * NR};
    if (relative) positions.start_block(queries.first, queries.count());
    for (int64_t query = queries.first; query < queries.end; query += MR) {
      const int64_t valid = min(MR, queries.end - query);
      const Span seen = tile(queries, keys, query, valid, positions);
      product(ds_ + (query - queries.first) * row_ + seen.first - keys.first, row_, 1, valid,
              k_panels_ + seen.first * NR, n_ * NR, seen.count(), dim_row_, tile_, dim_row_, false);
      if (distances_.has(kQueries))
        relative->add_to_rows(kQueries, of_queries, query, valid, seen, tile_);
      put(tile_, valid, g_.dq, t_.start + query, g_.dq_token, g_.scale);
    }
    if (distances_.has(kKeys)) {  // a tile of distances looks past the block's queries
      zero(ds_ - MR * row_ - kMargin, ds_ - kMargin);
      zero(ds_ + queries.count() * row_ - kMargin, ds_ + (queries.count() + MR) * row_ - kMargin);
    }
    for (int64_t key = keys.first; key < keys.end; key += MR) {
      const int64_t valid = min(MR, n_ - key);
      const Span by{max(queries.first, key - t_.reach.after),  // the queries that see them
                    min(queries.end, key + valid + t_.reach.before)};
      if (by.count() <= 0) continue;
      const int64_t at = (by.first - queries.first) * row_ + key - keys.first;
      const int64_t panel = queries.count() * NR, skip = (by.first - queries.first) * NR;
      product(ds_ + at, 1, row_, valid, q_panels_ + skip, panel, by.count(), dim_row_,
              dk_ + key * dim_row_, dim_row_, true);
      product(p_ + at, 1, row_, valid, dout_panels_ + skip, panel, by.count(), dim_row_,
              dv_ + key * dim_row_, dim_row_, true);
      if (distances_.has(kKeys))
        relative->add_to_rows(kKeys, of_keys, key, valid, by, dk_ + key * dim_row_);
    }
    if (relative && distances_.has(kQueries) && g_.drel_key) relative->add(kQueries, of_queries);
    if (relative && distances_.has(kKeys) && g_.drel_query) relative->add(kKeys, of_keys);
  }

  // The block's rows of p and ds for a tile of its queries; -> the keys that these see.
  Span tile(Span queries, Span keys, int64_t query, int64_t valid, RelativeScores<>& positions) {
    const Span seen = t_.reach.tile(query, valid, n_);
    const int64_t first = (query - queries.first) * row_, skip = seen.first - keys.first;
    product(q_ + query * dim_row_, dim_row_, 1, valid, keys_ + seen.first * dim_, dim_ * NR, dim_,
            seen.panels(), p_ + first + skip, row_, false);
    product(dout_ + query * dim_row_, dim_row_, 1, valid, values_ + seen.first * dim_, dim_ * NR,
            dim_, seen.panels(), ds_ + first + skip, row_, false);
    if (g_.rel_index) positions.start_tile(query, valid);
    for (int64_t i = 0; i < valid; ++i) {
      float *p = p_ + first + i * row_, *ds = ds_ + first + i * row_;
      if (g_.rel_index) positions.add(p + skip, query + i, seen);
      probabilities(p + skip, ds + skip, query + i, seen);
      for (float* x : {p, ds}) {
        zero(x - kMargin, x + skip);
        zero(x + skip + seen.panels(), x + row_ - kMargin);
      }
    }
    return seen;
  }

  // A row of scores becomes probabilities after dropout, their gradient that of the scores.
  void probabilities(float* p, float* ds, int64_t query, Span keys) {
    const int64_t token = t_.start + query, row = keys.panels();
    t_.adjust(p, query, keys);
    hide(p, t_.reach.of(query, 1, n_), keys);
    const float lse = g_.lse[t_.h * g_.tokens + token];
    if (g_.dropout.seed)
      philox_row(g_.dropout.seed, token * g_.heads + t_.h, keys.end, bits_, keys.first);
    vf total = {}, delta = {};
    for (int64_t j = 0; j < row; j += W) {
      const vf prob = exp(load(p + j) - lse);
      vf dp = load(ds + j), kept = prob;
      if (g_.dropout.seed && j < keys.count()) {
        dp = drop(dp, bits_ + j, g_.dropout);
        kept = drop(prob, bits_ + j, g_.dropout);
      }
      total += prob;
      delta += prob * dp;
      store(probability_ + j, prob);
      store(p + j, kept);
      store(ds + j, dp);
    }
    // lse is rounded, so that these sum to 1 + eps, where eps grows with the scores.
    const float z = sum(total), inverse = z == 0 ? 0 : 1 / z, mean = sum(delta) * inverse;
    for (int64_t j = 0; j < row; j += W) {
      store(ds + j, load(probability_ + j) * inverse * (load(ds + j) - mean));
      store(p + j, load(p + j) * inverse);
    }
    if (g_.dbias)
      std::memcpy(g_.dbias + ((t_.b * g_.heads + t_.h) * g_.dbias_rows + query) * g_.dbias_cols +
                      keys.first,
                  ds, keys.count() * sizeof(float));
  }

  void put(const float* from, int64_t rows, void* to, int64_t first, int64_t token, float scale) {
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < dim_; j += W)
        store_upto(static_cast<T*>(to) + (first + i) * token + t_.h * dim_ + j,
                   load(from + i * dim_row_ + j) * scale, dim_ - j);
  }

  const Task& t_;
  const AttentionArgs& g_;
  const int64_t m_, n_, dim_, dim_row_, row_;
  const Distances& distances_;
  float *q_, *dout_, *k_, *dk_, *dv_;           // [rows + MR, dim_row]
  float *q_panels_, *dout_panels_, *k_panels_;  // b of ds^T q, p^T dout and ds k
  float *keys_, *values_;                       // b of q k^T and dout v^T
  float *p_, *ds_;                              // [block, row] within margins
  float *tile_, *probability_;                  // [MR, dim_row], [row]
  uint32_t* bits_;
  float* relative_memory_;
};

// How many parts of the batch sum up the embeddings' gradients, each head of each in a task.
int64_t parts_of(const AttentionArgs& g) {
  if (!g.drel_key && !g.drel_query) return g.batch;
  return min(g.batch, ceil_div(2 * omp_get_max_threads(), g.heads));
}

template <class T>
void backward(const AttentionArgs& g) {
  const int64_t parts = g.heads == 0 ? 0 : parts_of(g), tasks = parts * g.heads;
  if (tasks == 0) return;
  static thread_local Buffer buffer, sums;
  const PerThread<float> scratch(buffer, most(g, &HeadBackward<T>::floats));
  const Distances distances = distances_of<T>(g, true);
  const bool summed = g.drel_key || g.drel_query;
  const int64_t dim_row = round_up(g.dim, NR);
  const int64_t of_task = summed ? RelativeGradients::floats(distances, dim_row) : 0;
  float* gradients = sums.get<float>(tasks * of_task);
#pragma omp parallel for schedule(dynamic) if (g.tokens * g.heads > 64)
  for (int64_t index = 0; index < tasks; ++index) {
    const int64_t part = index / g.heads, head = index % g.heads;
    float* mine = gradients + index * of_task;
    zero(mine, mine + of_task);
    const RelativeGradients relative(distances, head, dim_row, mine);
    for (int64_t b = g.batch * part / parts; b < g.batch * (part + 1) / parts; ++b) {
      const Task task(g, b, head);
      if (task.queries + task.keys == 0) continue;
      HeadBackward<T>(task, distances, scratch.mine()).run(g.rel_index ? &relative : nullptr);
    }
  }
  if (summed) fold(g, distances, gradients, of_task, parts);
}

}  // namespace

void attention_backward(const AttentionArgs& g) {
  if (g.bf16)
    backward<bf16>(g);
  else
    backward<float>(g);
}

}  // namespace bertfast::BERTFAST_ISA
