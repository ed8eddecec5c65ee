// Attention over packed sequences: a task is one head of one sequence, its keys and values packed
// once; a tile of query rows sees all keys at once, so the softmax is a single pass.
#include "operators.h"
#include "philox.h"
#include "tile.h"

namespace bertfast::BERTFAST_ISA {
namespace {

constexpr int64_t kQueryBlock = 8 * MR;  // query rows whose probabilities backward holds

struct Task {
  const AttentionArgs& g;
  int64_t b, h, start, n;  // the sequence's first token and length
  int64_t row;             // n in whole panels: a row of scores

  Task(const AttentionArgs& args, int64_t index)
      : g(args),
        b(index / args.heads),
        h(index % args.heads),
        start(args.cu_seqlens[b]),
        n(args.cu_seqlens[b + 1] - start),
        row(ceil_div(n, NR) * NR) {}

  int64_t dim_row() const { return ceil_div(g.dim, NR) * NR; }

  template <class T>
  const T* qkv(int part) const {
    return static_cast<const T*>(g.qkv) + start * g.token + part * g.part + h * g.head;
  }

  // Scores of one query row become bias- and mask-adjusted; keys past the row's end get -inf.
  void adjust(float* s, int64_t query) const {
    const int64_t keys = g.causal ? query + 1 : n;
    const int64_t offset = b * g.bias_batch + h * g.bias_head + query * g.bias_query;
    for (int64_t j = 0; j < row; j += W) {
      vf v = load(s + j) * g.scale;
      if (g.bias && n > j)
        v += g.bias_bf16 ? load_upto(static_cast<const bf16*>(g.bias) + offset + j, n - j)
                         : load_upto(static_cast<const float*>(g.bias) + offset + j, n - j);
      store(s + j, keys - j < W ? only(v, keys - j, splat(-kInf)) : v);
    }
  }
};

// x [n, dim] with a row stride as fp32 [n, dim_row], zeros in the padding.
template <class T>
void widen(float* to, const T* x, int64_t stride, int64_t n, int64_t dim, int64_t dim_row) {
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = 0; j < dim_row; j += W)
      store(to + i * dim_row + j, j < dim ? load_upto(x + i * stride + j, dim - j) : vf{});
}

// Panels of b with rows n and k = dim (for x y^T), and with rows dim and k = n (for p y).
template <class T>
void pack_keys(float* to, const T* x, int64_t stride, int64_t n, int64_t dim) {
  for (int64_t p = 0; p * NR < n; ++p)
    pack_panel<Math::fp32, NR>(to + p * dim * NR, x + p * NR * stride, stride, 1,
                               min(NR, n - p * NR), dim);
}
template <class T>
void pack_values(float* to, const T* x, int64_t stride, int64_t n, int64_t dim) {
  for (int64_t p = 0; p * NR < dim; ++p)
    pack_panel<Math::fp32, NR>(to + p * n * NR, x + p * NR, 1, stride, min(NR, dim - p * NR), n);
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
#pragma omp parallel for schedule(dynamic) if (g.tokens * g.heads > 64)
  for (int64_t index = 0; index < tasks; ++index) {
    const Task task(g, index);
    const int64_t n = task.n, row = task.row, dim_row = task.dim_row();
    if (n == 0) continue;
    static thread_local Buffer buffer;
    float* q = buffer.get<float>((n + MR) * dim_row * 2 + row * g.dim + MR * (2 * row + 64));
    float* keys = q + n * dim_row;       // [row / NR][dim][NR]
    float* values = keys + row * g.dim;  // [dim_row / NR][n][NR]
    float* out = values + n * dim_row;   // [MR, dim_row]
    float* scores = out + MR * dim_row;  // [MR, row]
    uint32_t* bits = reinterpret_cast<uint32_t*>(scores + MR * row);
    widen(q, task.qkv<T>(0), g.token, n, g.dim, dim_row);
    pack_keys(keys, task.qkv<T>(1), g.token, n, g.dim);
    pack_values(values, task.qkv<T>(2), g.token, n, g.dim);
    for (int64_t i0 = 0; i0 < n; i0 += MR) {
      const int64_t valid = min(MR, n - i0);
      product(q + i0 * dim_row, dim_row, 1, valid, keys, g.dim, row, scores, row);
      float inverse[MR];
      for (int64_t i = 0; i < valid; ++i) {
        float* s = scores + i * row;
        task.adjust(s, i0 + i);
        vf top = splat(-kInf);
        for (int64_t j = 0; j < row; j += W) top = max(load(s + j), top);
        const float m = max_of(top), shift = m == -kInf ? 0 : m;
        vf total = {};
        for (int64_t j = 0; j < row; j += W) {
          const vf p = exp(load(s + j) - shift);
          total += p;
          store(s + j, p);
        }
        const float z = sum(total);
        // A row without a key sums to 0; +inf makes its probabilities 0 in backward too.
        inverse[i] = z == 0 ? 0 : 1 / z;
        g.lse[task.h * g.tokens + task.start + i0 + i] = z == 0 ? kInf : shift + __builtin_logf(z);
        if (g.dropout.seed) {
          philox_row(g.dropout.seed, (task.start + i0 + i) * g.heads + task.h, n, bits);
          for (int64_t j = 0; j < n; j += W) store(s + j, drop(load(s + j), bits + j, g.dropout));
        }
      }
      product(scores, row, 1, valid, values, n, dim_row, out, dim_row);
      T* to = static_cast<T*>(g.out) + ((task.start + i0) * g.heads + task.h) * g.dim;
      for (int64_t i = 0; i < valid; ++i)
        for (int64_t j = 0; j < g.dim; j += W)
          store_upto(to + i * g.heads * g.dim + j, load(out + i * dim_row + j) * inverse[i],
                     g.dim - j);
    }
  }
}

template <class T>
void backward(const AttentionArgs& g) {
  const int64_t tasks = g.batch * g.heads;
#pragma omp parallel for schedule(dynamic) if (g.tokens * g.heads > 64)
  for (int64_t index = 0; index < tasks; ++index) {
    const Task task(g, index);
    const int64_t n = task.n, row = task.row, dim_row = task.dim_row(), dim = g.dim;
    if (n == 0) continue;
    const int64_t grad_token = g.heads * dim;
    const T* grad = static_cast<const T*>(g.grad) + task.start * grad_token + task.h * dim;
    static thread_local Buffer buffer;
    const int64_t whole = (n + MR) * dim_row;  // a last tile may write past the sequence
    float* q = buffer.get<float>(7 * whole + 2 * row * dim + 2 * kQueryBlock * row + MR * dim_row +
                                 2 * row + 64);
    float* dout = q + whole;         // [n, dim_row]
    float* q_panels = dout + whole;  // b of ds^T q
    float* dout_panels = q_panels + whole;
    float* k_panels = dout_panels + whole;
    float* dk = k_panels + whole;  // [n, dim_row]
    float* dv = dk + whole;
    float* keys = dv + whole;              // b of q k^T
    float* values = keys + row * dim;      // b of dout v^T
    float* p = values + row * dim;         // [kQueryBlock, row]: probabilities after dropout
    float* ds = p + kQueryBlock * row;     // [kQueryBlock, row]: the scores' gradient
    float* tile = ds + kQueryBlock * row;  // [MR, dim_row]
    float* probability = tile + MR * dim_row;
    uint32_t* bits = reinterpret_cast<uint32_t*>(probability + row);
    widen(q, task.qkv<T>(0), g.token, n, dim, dim_row);
    widen(dout, grad, grad_token, n, dim, dim_row);
    pack_keys(keys, task.qkv<T>(1), g.token, n, dim);
    pack_keys(values, task.qkv<T>(2), g.token, n, dim);
    pack_values(k_panels, task.qkv<T>(1), g.token, n, dim);
    T* dqkv = static_cast<T*>(g.dqkv) + (task.start * 3 * g.heads + task.h) * dim;
    const auto put = [&](const float* from, int64_t rows, int64_t first, int part, float scale) {
      for (int64_t i = 0; i < rows; ++i)
        for (int64_t j = 0; j < dim; j += W)
          store_upto(dqkv + (first + i) * 3 * grad_token + part * grad_token + j,
                     load(from + i * dim_row + j) * scale, dim - j);
    };

    for (int64_t block = 0; block < n; block += kQueryBlock) {
      const int64_t queries = min(kQueryBlock, n - block);
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
          vf delta = {};
          for (int64_t j = 0; j < row; j += W) {
            const vf prob = exp(load(pi + j) - lse);
            vf dp = load(dsi + j), kept = prob;
            if (g.dropout.seed && j < n) {
              dp = drop(dp, bits + j, g.dropout);
              kept = drop(prob, bits + j, g.dropout);
            }
            delta += prob * dp;
            store(probability + j, prob);
            store(pi + j, kept);
            store(dsi + j, dp);
          }
          const float total = sum(delta);
          for (int64_t j = 0; j < row; j += W)
            store(dsi + j, load(probability + j) * (load(dsi + j) - total));
          if (g.dbias)
            std::memcpy(
                g.dbias + ((task.b * g.heads + task.h) * g.dbias_rows + query) * g.dbias_cols, dsi,
                n * sizeof(float));
        }
        product(ds + i0 * row, row, 1, valid, k_panels, n, dim_row, tile, dim_row);
        put(tile, valid, query0, 0, g.scale);
      }
      for (int64_t j0 = 0; j0 < n; j0 += MR) {
        const int64_t valid = min(MR, n - j0), at = j0 * dim_row;
        product(ds + j0, 1, row, valid, q_panels, queries, dim_row, dk + at, dim_row, block > 0);
        product(p + j0, 1, row, valid, dout_panels, queries, dim_row, dv + at, dim_row, block > 0);
      }
    }
    put(dk, n, 0, 1, g.scale);
    put(dv, n, 0, 2, 1);
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
