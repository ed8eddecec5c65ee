// What attention's forward and backward kernels share.
//
// A thread block serves one head of one sequence; each warp owns 16 rows (queries, or keys for the
// gradients of keys and values) and walks over the other side's rows, which lie in shared memory
// by stages (fragments.h). See mma.h for what of a matrix a lane holds: g = lane / 4, t = lane % 4.
#pragma once
#include "fragments.h"
#include "kernels.h"
#include "math.h"

namespace bertfast::cuda {
namespace {

constexpr float kLog2e = 1.44269504f, kLn2 = 0.69314718f;
constexpr size_t kSharedLimit = 99 << 10;  // what sm_86 and sm_89 give a block

enum Kind { kPlain, kDropout, kGeneral };  // kGeneral: bias, causal mask, dropout as asked

struct Attention {
  const void *q, *kv;
  int64_t q_token, q_head, kv_token, kv_part, kv_head;  // strides in values
  const int32_t *starts_q, *starts_k;
  const int32_t* seqused_k;  // null, or how many of each sequence's keys are used
  int64_t tokens;            // of q
  int heads;
  float scale;
  const void* bias;  // null, or additive, by batch, head and query strides
  int64_t bias_batch, bias_head, bias_query;
  bool bias_fp32, causal;
  Dropout dropout;
};

template <Kind kind>
__device__ __forceinline__ bool has_dropout(const Attention& g) {
  return kind == kDropout || (kind == kGeneral && g.dropout.seed);
}
template <Kind kind>
__device__ __forceinline__ bool is_causal(const Attention& g) {
  return kind == kGeneral && g.causal;
}

// The sequence and head of this thread block: grid (batch, heads, ...).
struct Task {
  int b, h, start_q, start_k, n_q, n_k;  // either n may be 0

  __device__ __forceinline__ explicit Task(const Attention& g)
      : b(blockIdx.x),
        h(blockIdx.y),
        start_q(g.starts_q[b]),
        start_k(g.starts_k[b]),
        n_q(g.starts_q[b + 1] - start_q),
        n_k(g.seqused_k ? g.seqused_k[b] : g.starts_k[b + 1] - start_k) {}

  template <class T>
  __device__ __forceinline__ const T* query(const Attention& g) const {
    return static_cast<const T*>(g.q) + start_q * g.q_token + h * g.q_head;
  }
  template <class T>
  __device__ __forceinline__ const T* key(const Attention& g) const {
    return static_cast<const T*>(g.kv) + start_k * g.kv_token + h * g.kv_head;
  }
  template <class T>
  __device__ __forceinline__ const T* value(const Attention& g) const {
    return key<T>(g) + g.kv_part;
  }
  // Of the queries' [tokens, heads, D], and of [heads, tokens].
  __device__ __forceinline__ int64_t packed(const Attention& g, int dim) const {
    return (int64_t(start_q) * g.heads + h) * dim;
  }
  __device__ __forceinline__ int64_t statistic(const Attention& g) const {
    return h * g.tokens + start_q;
  }
  __device__ __forceinline__ int64_t dropout_row(const Attention& g, int query) const {
    return int64_t(start_q + query) * g.heads + h;
  }

  // A score in units of log 2: scaled, biased, -inf where the key is masked.
  template <class T, Kind kind>
  __device__ __forceinline__ float score(const Attention& g, float s, int query, int key) const {
    if (key >= n_k || query >= n_q || (is_causal<kind>(g) && key > query)) return -INFINITY;
    s *= g.scale * kLog2e;
    if (kind == kGeneral && g.bias) {
      const int64_t at = b * g.bias_batch + h * g.bias_head + query * g.bias_query + key;
      s += kLog2e * (g.bias_fp32 ? static_cast<const float*>(g.bias)[at]
                                 : to_float(static_cast<const T*>(g.bias)[at]));
    }
    return s;
  }
};

// The lane's e-th value of a tile of columns: how far below and right of the product's corner.
__device__ __forceinline__ int row_of(int e) { return threadIdx.x % 32 / 4 + e / 2 * 8; }
__device__ __forceinline__ int column_of(int tile, int e) {
  return 8 * tile + threadIdx.x % 4 * 2 + e % 2;
}

// A product q k^T from (row, column) on becomes scores; by_key: it is k q^T, keys in rows.
template <class T, Kind kind, bool by_key, int tiles>
__device__ __forceinline__ void to_scores(const Attention& g, const Task& task,
                                          float (&s)[tiles][4], int row, int column) {
  const int rows = by_key ? task.n_k : task.n_q, columns = by_key ? task.n_q : task.n_k;
  const bool whole = row + 16 <= rows && column + 8 * tiles <= columns;  // no edge inside
#pragma unroll
  for (int i = 0; i < tiles; ++i)
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int y = row + row_of(e), x = column + column_of(i, e);
      s[i][e] = kind != kGeneral && whole
                    ? s[i][e] * (g.scale * kLog2e)
                    : task.score<T, kind>(g, s[i][e], by_key ? x : y, by_key ? y : x);
    }
}

// --- what lanes share ---

// Sum and maximum over the four lanes that share rows.
__device__ __forceinline__ float quad_sum(float v) {
  v += __shfl_xor_sync(~0u, v, 1);
  return v + __shfl_xor_sync(~0u, v, 2);
}
__device__ __forceinline__ float quad_max(float v) {
  v = fmaxf(v, __shfl_xor_sync(~0u, v, 1));
  return fmaxf(v, __shfl_xor_sync(~0u, v, 2));
}

// Which probabilities dropout keeps, for queries [query, query + 16) in rows and keys
// [key, key + 8 * tiles) in columns. Philox gives four adjacent keys of a query at once, so two
// lanes that share them each do one of their two rows and exchange the bits.
template <int tiles>
class KeepByQuery {
 public:
  __device__ __forceinline__ KeepByQuery(const Attention& g, const Task& task, int query, int key) {
    const int lane = threadIdx.x % 32;
    odd_ = lane % 2;
    const int64_t row = task.dropout_row(g, query + lane / 4 + 8 * odd_);
    uint32_t mine = 0;
#pragma unroll
    for (int j = 0; j < tiles; ++j)
      mine |= keep4(g.dropout, row, uint32_t(key / 4 + 2 * j + lane % 4 / 2)) << 4 * j;
    const uint32_t other = __shfl_xor_sync(~0u, mine, 1);
    bits_[0] = odd_ ? other : mine;
    bits_[1] = odd_ ? mine : other;
  }
  __device__ __forceinline__ bool operator()(int tile, int e) const {
    return bits_[e / 2] >> (4 * tile + 2 * odd_ + e % 2) & 1;
  }

 private:
  uint32_t bits_[2];
  int odd_;
};

// The same with keys in rows and queries in columns: four lanes share four keys and do one each of
// their two queries and two groups of keys.
template <int tiles>
class KeepByKey {
 public:
  __device__ __forceinline__ KeepByKey(const Attention& g, const Task& task, int key, int query) {
    const int lane = threadIdx.x % 32, t = lane % 4;
    which_ = lane / 4 % 4;
    const uint32_t block = uint32_t(key / 4 + lane / 16 + 2 * (which_ / 2));
    uint32_t mine = 0;
#pragma unroll
    for (int j = 0; j < tiles; ++j)
      mine |= keep4(g.dropout, task.dropout_row(g, query + 8 * j + 2 * t + which_ % 2), block)
              << 4 * j;
#pragma unroll
    for (int e = 0; e < 4; ++e) bits_[e] = __shfl_sync(~0u, mine, lane / 16 * 16 + 4 * e + t);
  }
  __device__ __forceinline__ bool operator()(int tile, int e) const {
    return bits_[e] >> (4 * tile + which_) & 1;
  }

 private:
  uint32_t bits_[4];
  int which_;
};

// --- launches ---

// Stages in shared memory, warps and groups of rows for sequences of up to `rows` of the warps'
// side and `others` of that which they walk over.
struct Shape {
  int stages, warps, groups;
};

template <class T, int D>
Shape shape(int64_t rows, int64_t others, int64_t tasks, int max_warps) {
  constexpr int fit = int(kSharedLimit / kStageBytes<T, D>);
  const int all = int((others + kStage<T, D> - 1) / kStage<T, D>);
  Shape s;
  s.warps = rows <= 64 ? 4 : max_warps;
  s.stages = all <= fit ? all : 2;
  // What is resident serves all of a sequence's rows, unless that left the device idle.
  const int groups = int((rows + 16 * s.warps - 1) / (16 * s.warps));
  s.groups = all <= fit && tasks >= 256 ? 1 : groups;
  return s;
}

template <class F>
void by_dim(int64_t dim, const F& f) {
  if (dim == 32) return f(std::integral_constant<int, 32>());
  if (dim == 64) return f(std::integral_constant<int, 64>());
  if (dim == 128) return f(std::integral_constant<int, 128>());
  throw std::invalid_argument("head_dim is " + std::to_string(dim) + ", expected 32, 64 or 128");
}

// fp32 has the general kernel alone: its products dwarf what the others save.
template <class T, class F>
void by_kind(const Attention& g, const F& f) {
  const auto general = std::integral_constant<Kind, kGeneral>();
  if constexpr (sizeof(T) == 4) {
    return f(general);
  } else {
    if (g.bias || g.causal) return f(general);
    if (g.dropout.seed) return f(std::integral_constant<Kind, kDropout>());
    return f(std::integral_constant<Kind, kPlain>());
  }
}

}  // namespace
}  // namespace bertfast::cuda
