// Attention over packed sequences: a task is one head of one sequence, see attention_head.h.
#include "attention_head.h"
#include "operators.h"
#include "philox.h"
#include "rows.h"

namespace bertfast::BERTFAST_ISA {
namespace {

constexpr int64_t kQueryBlock = 8 * MR;  // query rows whose probabilities backward holds

struct Task {
  const AttentionArgs& g;
  int64_t b, h;
  int64_t start, queries;   // the sequence's first query token, and how many it has
  int64_t first_key, keys;  // the same for its keys
  int64_t row;              // keys in whole panels: a row of scores

  Task(const AttentionArgs& args, int64_t index)
      : g(args),
        b(index / args.heads),
        h(index % args.heads),
        start(args.starts_q[b]),
        queries(args.starts_q[b + 1] - start),
        first_key(args.starts_k[b]),
        keys(args.seqused_k ? args.seqused_k[b] : args.starts_k[b + 1] - first_key),
        row(ceil_div(keys, NR) * NR) {}

  int64_t dim_row() const { return ceil_div(g.dim, NR) * NR; }

  template <class T>
  const T* query() const {
    return static_cast<const T*>(g.q) + start * g.q_token + h * g.q_head;
  }
  template <class T>
  const T* of_key(const void* x) const {  // x is k or v
    return static_cast<const T*>(x) + first_key * g.k_token + h * g.k_head;
  }

  // Scores of one query row become bias- and mask-adjusted; keys past the row's end get -inf.
  void adjust(float* s, int64_t query) const {
    const int64_t visible = g.causal ? min(query + 1, keys) : keys;
    const Vector bias{g.bias.data, g.bias.dtype == kBf16};
    const int64_t offset = g.bias.row(b, h, query);
    for (int64_t j = 0; j < row; j += W) {
      vf v = load(s + j) * g.scale;
      if (g.bias.data && keys > j) v += bias.at(offset + j, offset + keys);
      store(s + j, visible - j < W ? only(v, visible - j, splat(-kInf)) : v);
    }
  }
};

// The largest of size(task).
template <class Size>
int64_t most(const AttentionArgs& g, const Size& size) {
  int64_t found = 0;
  for (int64_t b = 0; b < g.batch; ++b) found = max(found, size(Task(g, b * g.heads)));
  return found;
}

// x [n, dim] with a row stride as fp32 [n, dim_row], zeros in the padding.
template <class T>
void widen(float* to, const T* x, int64_t stride, int64_t n, int64_t dim, int64_t dim_row) {
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = 0; j < dim_row; j += W)
      store(to + i * dim_row + j, j < dim ? load_upto(x + i * stride + j, dim - j) : vf{});
}

// out[valid, panels * NR] (+)= a b, tile by tile.
inline void product(const float* a, int64_t a_row, int64_t a_k, int64_t valid, const float* b,
                    int64_t k, int64_t columns, float* out, int64_t out_row,
                    bool accumulate = false) {
  for (int64_t j = 0; j < columns; j += NR)
    tile_strided(a, a_row, a_k, valid, b + j * k, k, out + j, out_row, accumulate);
}

template <class T>
void forward(const AttentionArgs& g) {
  const int64_t tasks = g.batch * g.heads;
  if (tasks == 0) return;
  static thread_local Buffer buffer;
  const PerThread<float> scratch(buffer, most(g, [&](const Task& t) {
                                   return t.queries * t.dim_row() + t.row + 64 +
                                          Head<Unit::fp32>::floats(t.keys, g.dim);
                                 }));
#pragma omp parallel for schedule(dynamic) if (g.tokens * g.heads > 64)
  for (int64_t index = 0; index < tasks; ++index) {
    const Task task(g, index);
    const int64_t m = task.queries, n = task.keys, dim_row = task.dim_row();
    if (m == 0) continue;
    float* q = scratch.mine();
    float* memory = q + m * dim_row;
    uint32_t* bits = reinterpret_cast<uint32_t*>(memory + Head<Unit::fp32>::floats(n, g.dim));
    widen(q, task.query<T>(), g.q_token, m, g.dim, dim_row);
    const Head<Unit::fp32> head(task.of_key<T>(g.k), task.of_key<T>(g.v), g.k_token, n, g.dim,
                                false, memory);
    const auto done = [&](float* p, int64_t query, Span, float shift, float z) {
      const int64_t token = task.start + query;
      // A row without a key sums to 0; +inf makes its probabilities 0 in backward too.
      g.lse[task.h * g.tokens + token] = z == 0 ? kInf : shift + __builtin_logf(z);
      if (!g.dropout.seed) return;
      philox_row(g.dropout.seed, token * g.heads + task.h, n, bits);
      for (int64_t j = 0; j < n; j += W) store(p + j, drop(load(p + j), bits + j, g.dropout));
    };
    head.attend(
        q, dim_row, m, 0, 1,
        [&](float* s, int64_t query, Span) { return task.adjust(s, query), 1.f; }, done,
        static_cast<T*>(g.out) + (task.start * g.heads + task.h) * g.dim, g.heads * g.dim);
  }
}

template <class T>
void backward(const AttentionArgs& g) {
  const int64_t tasks = g.batch * g.heads;
  if (tasks == 0) return;
  static thread_local Buffer buffer;
  // A last tile may write past the sequence.
  const PerThread<float> scratch(buffer, most(g, [&](const Task& t) {
                                   const int64_t of_q = (t.queries + MR) * t.dim_row();
                                   const int64_t of_k = (t.keys + MR) * t.dim_row();
                                   return 4 * of_q + 3 * of_k + 2 * t.row * (g.dim + kQueryBlock) +
                                          MR * t.dim_row() + 2 * t.row + 64;
                                 }));
#pragma omp parallel for schedule(dynamic) if (g.tokens * g.heads > 64)
  for (int64_t index = 0; index < tasks; ++index) {
    const Task task(g, index);
    const int64_t m = task.queries, n = task.keys, row = task.row, dim_row = task.dim_row();
    const int64_t dim = g.dim;
    if (m + n == 0) continue;
    const int64_t grad_token = g.heads * dim;
    const T* grad = static_cast<const T*>(g.grad) + task.start * grad_token + task.h * dim;
    const int64_t of_q = (m + MR) * dim_row, of_k = (n + MR) * dim_row;
    float* q = scratch.mine();
    float* dout = q + of_q;         // [m, dim_row]
    float* q_panels = dout + of_q;  // b of ds^T q
    float* dout_panels = q_panels + of_q;
    float* k_panels = dout_panels + of_q;
    float* dk = k_panels + of_k;  // [n, dim_row]
    float* dv = dk + of_k;
    float* keys = dv + of_k;               // b of q k^T
    float* values = keys + row * dim;      // b of dout v^T
    float* p = values + row * dim;         // [kQueryBlock, row]: probabilities after dropout
    float* ds = p + kQueryBlock * row;     // [kQueryBlock, row]: the scores' gradient
    float* tile = ds + kQueryBlock * row;  // [MR, dim_row]
    float* probability = tile + MR * dim_row;
    uint32_t* bits = reinterpret_cast<uint32_t*>(probability + row);
    widen(q, task.query<T>(), g.q_token, m, dim, dim_row);
    widen(dout, grad, grad_token, m, dim, dim_row);
    pack_keys(keys, task.of_key<T>(g.k), g.k_token, n, dim);
    pack_keys(values, task.of_key<T>(g.v), g.k_token, n, dim);
    pack_values(k_panels, task.of_key<T>(g.k), g.k_token, n, dim);
    const auto put = [&](const float* from, int64_t rows, void* to, int64_t first, int64_t token,
                         float scale) {
      for (int64_t i = 0; i < rows; ++i)
        for (int64_t j = 0; j < dim; j += W)
          store_upto(static_cast<T*>(to) + (first + i) * token + task.h * dim + j,
                     load(from + i * dim_row + j) * scale, dim - j);
    };
    if (m == 0) std::memset(dk, 0, 2 * of_k * sizeof(float));

    for (int64_t block = 0; block < m; block += kQueryBlock) {
      const int64_t queries = min(kQueryBlock, m - block);
      pack_values(q_panels, q + block * dim_row, dim_row, queries, dim);
      pack_values(dout_panels, dout + block * dim_row, dim_row, queries, dim);
      for (int64_t i0 = 0; i0 < queries; i0 += MR) {
        const int64_t valid = min(MR, queries - i0), query0 = block + i0;
        product(q + query0 * dim_row, dim_row, 1, valid, keys, dim, row, p + i0 * row, row);
        product(dout + query0 * dim_row, dim_row, 1, valid, values, dim, row, ds + i0 * row, row);
        for (int64_t i = i0; i < i0 + valid; ++i) {
          const int64_t query = block + i;
          float *pi = p + i * row, *dsi = ds + i * row;
          task.adjust(pi, query);
          const float lse = g.lse[task.h * g.tokens + task.start + query];
          if (g.dropout.seed)
            philox_row(g.dropout.seed, (task.start + query) * g.heads + task.h, n, bits);
          vf total = {}, delta = {};
          for (int64_t j = 0; j < row; j += W) {
            const vf prob = exp(load(pi + j) - lse);
            vf dp = load(dsi + j), kept = prob;
            if (g.dropout.seed && j < n) {
              dp = drop(dp, bits + j, g.dropout);
              kept = drop(prob, bits + j, g.dropout);
            }
            total += prob;
            delta += prob * dp;
            store(probability + j, prob);
            store(pi + j, kept);
            store(dsi + j, dp);
          }
          // lse is rounded, so that these sum to 1 + eps, where eps grows with the scores.
          const float z = sum(total), inverse = z == 0 ? 0 : 1 / z, mean = sum(delta) * inverse;
          for (int64_t j = 0; j < row; j += W) {
            store(dsi + j, load(probability + j) * inverse * (load(dsi + j) - mean));
            store(pi + j, load(pi + j) * inverse);
          }
          if (g.dbias)
            std::memcpy(
                g.dbias + ((task.b * g.heads + task.h) * g.dbias_rows + query) * g.dbias_cols, dsi,
                n * sizeof(float));
        }
        product(ds + i0 * row, row, 1, valid, k_panels, n, dim_row, tile, dim_row);
        put(tile, valid, g.dq, task.start + query0, g.dq_token, g.scale);
      }
      for (int64_t j0 = 0; j0 < n; j0 += MR) {
        const int64_t valid = min(MR, n - j0), at = j0 * dim_row;
        product(ds + j0, 1, row, valid, q_panels, queries, dim_row, dk + at, dim_row, block > 0);
        product(p + j0, 1, row, valid, dout_panels, queries, dim_row, dv + at, dim_row, block > 0);
      }
    }
    put(dk, n, g.dk, task.first_key, g.dk_token, g.scale);
    put(dv, n, g.dv, task.first_key, g.dk_token, 1);
  }
}

}  // namespace

void attention(const AttentionArgs& g) {
  if (g.bf16)
    forward<bf16>(g);
  else
    forward<float>(g);
}

void attention_backward(const AttentionArgs& g) {
  if (g.bf16)
    backward<bf16>(g);
  else
    backward<float>(g);
}

}  // namespace bertfast::BERTFAST_ISA
