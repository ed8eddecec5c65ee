// softmax(q k^T * scale + bias) v over packed sequences on tensor cores, the softmax online
// (Milakov & Gimelshein, arXiv:1805.02867; Dao, arXiv:2307.08691).
#include "attention.h"

namespace bertfast::cuda {
namespace {

// Row sums and maxima of the lane's two rows while keys arrive.
struct Softmax {
  float max[2] = {-INFINITY, -INFINITY}, sum[2] = {0, 0};

  // s becomes the numerators of these keys; what was summed up before them, the output d too, is
  // rescaled to the new maximum.
  template <int tiles, int columns>
  __device__ __forceinline__ void add(float (&s)[tiles][4], float (&d)[columns][4]) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float top = max[half];
#pragma unroll
      for (int j = 0; j < tiles; ++j) top = fmaxf(top, fmaxf(s[j][2 * half], s[j][2 * half + 1]));
      top = quad_max(top);
      const float shift = top == -INFINITY ? 0 : top;  // a row without a key so far
      const float rescale = exp2f(max[half] - shift);
      max[half] = top;
      sum[half] *= rescale;
#pragma unroll
      for (int j = 0; j < tiles; ++j)
#pragma unroll
        for (int e = 2 * half; e < 2 * half + 2; ++e) {
          s[j][e] = exp2f(s[j][e] - shift);
          sum[half] += s[j][e];
        }
#pragma unroll
      for (int j = 0; j < columns; ++j) d[j][2 * half] *= rescale, d[j][2 * half + 1] *= rescale;
    }
  }
};

// Two blocks share a multiprocessor where their registers allow it without spills.
constexpr int kMaxWarps = 8;
template <int D, Kind kind>
constexpr int kBlocks = D < 128 && kind != kGeneral ? 2 : 1;
constexpr int kStep = 32;  // keys at a time: what of their scores fits in registers

template <class T, int D, Kind kind>
__global__ void __launch_bounds__(32 * kMaxWarps, kBlocks<D, kind>)
    forward(Attention g, int stages, T* out, float* lse) {
  start_next_kernel();
  await_last_kernel();
  const Task task(g);
  const int rows = blockDim.x / 32 * 16;  // queries of the block at a time
  if (int(blockIdx.z) * rows >= task.n_q) return;
  Ring<T, D> ring(task.key<T>(g), g.kv_token, task.value<T>(g), g.kv_token, task.n_k, stages);
  for (int first = blockIdx.z * rows; first < task.n_q; first += gridDim.z * rows) {
    const int query = first + threadIdx.x / 32 * 16;  // the warp's first
    const int keys = is_causal<kind>(g) ? min(task.n_k, first + rows) : task.n_k;
    const int end = (keys + kStage<T, D> - 1) / kStage<T, D>;
    const Operand<T, D> q(task.query<T>(g), g.q_token, query, task.n_q);
    float d[D / 8][4] = {};
    Softmax softmax;
    ring.begin(0, end);
    for (int j = 0; j < end; ++j) {
      ring.await(j, end);
      if (query < task.n_q)
        for (int row = 0; row < kStage<T, D>; row += kStep) {
          constexpr int tiles = kStep / 8;
          const int key = j * kStage<T, D> + row;
          if (key >= keys) break;
          float s[tiles][4];
          rows_product<T, D>(s, q, ring.a(j), row);
          to_scores<T, kind, false>(g, task, s, query, key);
          softmax.add(s, d);
          if (has_dropout<kind>(g)) {
            const KeepByQuery<tiles> keep(g, task, query, key);
#pragma unroll
            for (int i = 0; i < tiles; ++i)
#pragma unroll
              for (int e = 0; e < 4; ++e) s[i][e] = keep(i, e) ? s[i][e] : 0;
          }
          columns_product<T, D>(d, s, ring.b(j), row);
        }
      ring.release(j, end);
    }
    float factor[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = query + row_of(2 * half);
      const float sum = quad_sum(softmax.sum[half]);
      factor[half] = sum == 0 ? 0 : (has_dropout<kind>(g) ? g.dropout.scale : 1) / sum;
      // +inf makes a fully masked row's probabilities 0 in backward too
      if (threadIdx.x % 4 == 0 && row < task.n_q)
        lse[task.statistic(g) + row] =
            sum == 0 ? INFINITY : (softmax.max[half] + log2f(sum)) * kLn2;
    }
    store_rows<T, D>(out + task.packed(g, D), int64_t(g.heads) * D, d, factor[0], factor[1], query,
                     task.n_q);
  }
}

}  // namespace

void attention(int dtype, const void* q, const void* kv, int64_t q_token, int64_t q_head,
               int64_t kv_token, int64_t kv_part, int64_t kv_head, const int32_t* starts_q,
               const int32_t* starts_k, const int32_t* seqused_k, int64_t batch, int64_t tokens,
               int64_t heads, int64_t dim, int64_t max_seqlen_q, int64_t max_seqlen_k, float scale,
               const void* bias, bool bias_fp32, int64_t bias_batch, int64_t bias_head,
               int64_t bias_query, const int64_t* seed, float keep_scale, uint32_t threshold,
               bool causal, void* out, float* lse, int device, void* stream) {
  if (tokens == 0 || heads == 0 || max_seqlen_q == 0) return;
  const DeviceGuard guard(device);
  const Dropout dropout{seed, keep_scale, threshold};
  const Attention g{q,          kv,        q_token,    q_head,    kv_token,   kv_part, kv_head,
                    starts_q,   starts_k,  seqused_k,  tokens,    int(heads), scale,   bias,
                    bias_batch, bias_head, bias_query, bias_fp32, causal,     dropout};
  by_dtype(dtype, [&](auto type) {
    by_dim(dim, [&](auto size) {
      using T = decltype(type);
      by_kind<T>(g, [&](auto kind) {
        constexpr int D = decltype(size)::value;
        const Shape s = shape<T, D>(max_seqlen_q, max_seqlen_k, batch * heads, kMaxWarps);
        launch("attention", forward<T, D, decltype(kind)::value>,
               dim3(unsigned(batch), unsigned(heads), unsigned(s.groups)), 32 * s.warps,
               s.stages * kStageBytes<T, D>, stream, g, s.stages, static_cast<T*>(out), lse);
      });
    });
  });
}

}  // namespace bertfast::cuda
