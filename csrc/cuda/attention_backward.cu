// Attention's gradients. The probabilities are made again from the log-sum-exp (Dao et al.,
// arXiv:2205.14135), once by queries for dq and once by keys for dk and dv: two matrix products
// more than with dq summed up by atomics, but the same bits at every run.
#include "attention.h"

namespace bertfast::cuda {
namespace {

constexpr int kMaxWarps = 4;

struct Gradients {
  const void *grad, *out;
  const float* lse;
  float* delta;  // [heads, tokens]: sum of grad * out over a row
  void *dq, *dkv;
  int64_t dq_token, dkv_token;  // strides in values; what is a token's lies side by side
  float* dbias;                 // null, or [batch, heads, rows, columns]
  int64_t dbias_rows, dbias_columns;
};

// Rows of the other side at a time: what of scores and their gradient fits in registers.
template <int D>
constexpr int kStep = D == 128 ? 16 : 32;

// dq, by queries; also delta, for the keys' kernel, and dbias.
template <class T, int D, Kind kind>
__global__ void __launch_bounds__(32 * kMaxWarps, 1)
    query_gradient(Attention g, Gradients b, int stages) {
  const Task task(g);
  const int rows = blockDim.x / 32 * 16;
  if (int(blockIdx.z) * rows >= task.n_q) return;
  const int64_t row_stride = int64_t(g.heads) * D;
  Ring<T, D> ring(task.key<T>(g), g.kv_token, task.value<T>(g), g.kv_token, task.n_k, stages);
  for (int first = blockIdx.z * rows; first < task.n_q; first += gridDim.z * rows) {
    const int query = first + threadIdx.x / 32 * 16;
    const int keys = is_causal<kind>(g) ? min(task.n_k, first + rows) : task.n_k;
    const int end = (keys + kStage<T, D> - 1) / kStage<T, D>;
    const Operand<T, D> q(task.query<T>(g), g.q_token, query, task.n_q);
    const Operand<T, D> grad(static_cast<const T*>(b.grad) + task.packed(g, D), row_stride, query,
                             task.n_q);
    float lse[2], delta[2] = {0, 0};
    grad.dot(Operand<T, D>(static_cast<const T*>(b.out) + task.packed(g, D), row_stride, query,
                           task.n_q),
             delta);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = query + row_of(2 * half);
      const int64_t at = task.statistic(g) + row;
      delta[half] = quad_sum(delta[half]);
      lse[half] = row < task.n_q ? b.lse[at] * kLog2e : INFINITY;
      if (threadIdx.x % 4 == 0 && row < task.n_q) b.delta[at] = delta[half];
    }
    float dq[D / 8][4] = {};
    ring.begin(0, end);
    for (int j = 0; j < end; ++j) {
      ring.await(j, end);
      if (query < task.n_q)
        for (int row = 0; row < kStage<T, D>; row += kStep<D>) {
          constexpr int tiles = kStep<D> / 8;
          const int key = j * kStage<T, D> + row;
          if (key >= keys) break;
          float s[tiles][4], ds[tiles][4];
          rows_product<T, D>(s, q, ring.a(j), row);
          rows_product<T, D>(ds, grad, ring.b(j), row);
          to_scores<T, kind, false>(g, task, s, query, key);
          if (has_dropout<kind>(g)) {
            const KeepByQuery<tiles> keep(g, task, query, key);
#pragma unroll
            for (int i = 0; i < tiles; ++i)
#pragma unroll
              for (int e = 0; e < 4; ++e) ds[i][e] = keep(i, e) ? ds[i][e] * g.dropout.scale : 0;
          }
#pragma unroll
          for (int i = 0; i < tiles; ++i)
#pragma unroll
            for (int e = 0; e < 4; ++e) {
              ds[i][e] = exp2f(s[i][e] - lse[e / 2]) * (ds[i][e] - delta[e / 2]);
              const int y = query + row_of(e), x = key + column_of(i, e);
              if (kind == kGeneral && b.dbias && y < task.n_q && x < task.n_k)
                b.dbias[((int64_t(task.b) * g.heads + task.h) * b.dbias_rows + y) *
                            b.dbias_columns +
                        x] = ds[i][e];
            }
          columns_product<T, D>(dq, ds, ring.a(j), row);
        }
      ring.release(j, end);
    }
    store_rows<T, D>(static_cast<T*>(b.dq) + task.start_q * b.dq_token + task.h * D, b.dq_token, dq,
                     g.scale, g.scale, query, task.n_q);
  }
}

// dk and dv, by keys: the products are those of query_gradient, transposed.
template <class T, int D, Kind kind>
__global__ void __launch_bounds__(32 * kMaxWarps, 1)
    key_gradients(Attention g, Gradients b, int stages) {
  const Task task(g);
  const int rows = blockDim.x / 32 * 16;
  if (int(blockIdx.z) * rows >= task.n_k) return;
  const int64_t row_stride = int64_t(g.heads) * D;
  Ring<T, D> ring(task.query<T>(g), g.q_token, static_cast<const T*>(b.grad) + task.packed(g, D),
                  row_stride, task.n_q, stages);
  const int end = (task.n_q + kStage<T, D> - 1) / kStage<T, D>;
  for (int first = blockIdx.z * rows; first < task.n_k; first += gridDim.z * rows) {
    const int key = first + threadIdx.x / 32 * 16;
    const Operand<T, D> k(task.key<T>(g), g.kv_token, key, task.n_k);
    const Operand<T, D> v(task.value<T>(g), g.kv_token, key, task.n_k);
    float dk[D / 8][4] = {}, dv[D / 8][4] = {};
    const int begin = is_causal<kind>(g) ? first / kStage<T, D> : 0;
    ring.begin(begin, end);
    for (int j = begin; j < end; ++j) {
      ring.await(j, end);
      if (key < task.n_k)
        for (int row = 0; row < kStage<T, D>; row += kStep<D>) {
          constexpr int tiles = kStep<D> / 8;
          const int query = j * kStage<T, D> + row;
          if (query >= task.n_q) break;
          float p[tiles][4], ds[tiles][4];
          rows_product<T, D>(p, k, ring.a(j), row);
          rows_product<T, D>(ds, v, ring.b(j), row);
          to_scores<T, kind, true>(g, task, p, key, query);
          uint32_t kept[tiles];
          if (has_dropout<kind>(g)) {
            const KeepByKey<tiles> keep(g, task, key, query);
#pragma unroll
            for (int i = 0; i < tiles; ++i)
              kept[i] = keep(i, 0) | keep(i, 1) << 1 | keep(i, 2) << 2 | keep(i, 3) << 3;
          }
#pragma unroll
          for (int i = 0; i < tiles; ++i)
#pragma unroll
            for (int e = 0; e < 4; ++e) {
              const int x = query + column_of(i, e);
              const int64_t at = task.statistic(g) + min(x, task.n_q - 1);  // past it p is 0
              p[i][e] = exp2f(p[i][e] - b.lse[at] * kLog2e);
              const bool keep = !has_dropout<kind>(g) || kept[i] >> e & 1;
              if (has_dropout<kind>(g)) ds[i][e] = keep ? ds[i][e] * g.dropout.scale : 0;
              ds[i][e] = p[i][e] * (ds[i][e] - b.delta[at]);
              if (!keep) p[i][e] = 0;
            }
          columns_product<T, D>(dv, p, ring.b(j), row);
          columns_product<T, D>(dk, ds, ring.a(j), row);
        }
      ring.release(j, end);
    }
    const float kept = has_dropout<kind>(g) ? g.dropout.scale : 1;
    T* to = static_cast<T*>(b.dkv) + task.start_k * b.dkv_token + task.h * D;
    store_rows<T, D>(to, b.dkv_token, dk, g.scale, g.scale, key, task.n_k);
    store_rows<T, D>(to + row_stride, b.dkv_token, dv, kept, kept, key, task.n_k);
  }
}

}  // namespace

void attention_backward(int dtype, const void* q, const void* kv, int64_t q_token, int64_t q_head,
                        int64_t kv_token, int64_t kv_part, int64_t kv_head, const int32_t* starts_q,
                        const int32_t* starts_k, const int32_t* seqused_k, int64_t batch,
                        int64_t tokens, int64_t heads, int64_t dim, int64_t max_seqlen_q,
                        int64_t max_seqlen_k, float scale, const void* bias, bool bias_fp32,
                        int64_t bias_batch, int64_t bias_head, int64_t bias_query,
                        const int64_t* seed, float keep_scale, uint32_t threshold, bool causal,
                        const void* grad, const void* out, const float* lse, float* delta, void* dq,
                        void* dkv, int64_t dq_token, int64_t dkv_token, float* dbias,
                        int64_t dbias_rows, int64_t dbias_columns, int device, void* stream) {
  if (batch == 0 || heads == 0) return;
  const DeviceGuard guard(device);
  const Dropout dropout{seed, keep_scale, threshold};
  const Attention g{q,          kv,        q_token,    q_head,    kv_token,   kv_part, kv_head,
                    starts_q,   starts_k,  seqused_k,  tokens,    int(heads), scale,   bias,
                    bias_batch, bias_head, bias_query, bias_fp32, causal,     dropout};
  const Gradients b{grad,     out,       lse,   delta,      dq,           dkv,
                    dq_token, dkv_token, dbias, dbias_rows, dbias_columns};
  by_dtype(dtype, [&](auto type) {
    by_dim(dim, [&](auto size) {
      using T = decltype(type);
      by_kind<T>(g, [&](auto which) {
        constexpr int D = decltype(size)::value;
        constexpr Kind kind = decltype(which)::value;
        const auto go = [&](const char* name, auto kernel, int64_t rows, int64_t others) {
          if (rows == 0) return;
          const Shape s = shape<T, D>(rows, others, batch * heads, kMaxWarps);
          launch(name, kernel, dim3(unsigned(batch), unsigned(heads), unsigned(s.groups)),
                 32 * s.warps, s.stages * kStageBytes<T, D>, stream, g, b, s.stages);
        };
        go("attention_backward, queries", query_gradient<T, D, kind>, max_seqlen_q, max_seqlen_k);
        go("attention_backward, keys", key_gradients<T, D, kind>, max_seqlen_k, max_seqlen_q);
      });
    });
  });
}

}  // namespace bertfast::cuda
