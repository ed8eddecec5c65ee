// The C++ kernels' arguments and the table of them that each instruction set fills.
#pragma once
#include <cstdint>

namespace bertfast {

// c[m, n] = activation(sum_k a[m, k] b[n, k] + bias[n]); all strides in elements.
struct GemmArgs {
  int64_t m, n, k;
  const void* a;
  int64_t a_row, a_k;
  bool a_bf16;
  const void* b[3];  // parts of equal size, stacked along n, or along k if split_k
  int parts;
  int64_t b_row, b_k;
  bool b_bf16;
  bool split_k;
  const void* bias[3];  // null, or one per part
  bool bias_bf16;
  void* c;
  int64_t c_row;
  bool c_bf16;
  void* z;          // null, or the pre-activation, laid out as c
  int activation;   // 0 none, 1 GELU (erf), 2 GELU (tanh), 3 ReLU
  bool accumulate;  // c = activation(... + c)
};

// dz = grad * activation'(z); column_sum = sum of dz's (grad's without activation) rows.
struct ActivationBackwardArgs {
  const void* grad;
  int64_t grad_row;
  const void* z;
  void* dz;
  float* column_sum;
  int64_t m, n;
  bool bf16;
  int activation;
};

struct Dropout {
  const int64_t* seed;  // (seed, offset), null for no dropout
  float scale;          // 1 / (1 - p)
  uint32_t threshold;   // kept where the random bits are >= this
};

struct AttentionArgs {
  const void* qkv;
  int64_t token, part, head;  // strides of qkv
  const int32_t* cu_seqlens;
  int64_t batch, tokens, heads, dim;
  float scale;
  const void* bias;  // null, or additive, by batch, head and query strides
  int64_t bias_batch, bias_head, bias_query;
  bool bias_bf16;
  Dropout dropout;
  bool causal, bf16;
  // forward: out [tokens, heads, dim]; lse [heads, tokens] is +inf where a row is fully masked
  void* out;
  float* lse;
  // backward: dqkv [tokens, 3, heads, dim]; dbias null or [batch, heads, dbias_rows, dbias_cols]
  const void* grad;
  void* dqkv;
  float* dbias;
  int64_t dbias_rows, dbias_cols;
};

struct AddLayerNormArgs {
  const void *x, *residual, *weight, *bias, *x_bias;
  Dropout dropout;
  int64_t tokens, hidden;
  float eps;
  bool bf16, weight_bf16, bias_bf16, x_bias_bf16;
  void* y;
  float *mean, *rstd;
  const void* grad;
  void *dx, *dresidual;  // dresidual is null where it is dx's
  float* columns;        // [3, hidden]: dweight, dbias, dx_bias
};

struct EmbeddingArgs {
  const int64_t *ids, *positions, *types;  // types may be null
  const void *word, *position, *type, *weight, *bias;
  Dropout dropout;
  int64_t tokens, hidden;
  float eps;
  bool bf16;
  void* y;
  float *mean, *rstd;
  const void* grad;
  float* ds;       // [tokens, hidden]: gradient of the sum that is normalised
  float* columns;  // [2, hidden]: dweight, dbias
};

// loss[r] = log sum exp(logits[r]) - logits[r][label], 0 where the label is ignore_index.
struct CrossEntropyArgs {
  float* logits;  // [rows, vocabulary]; softmax - onehot in its place, as bf16 in a row's front
  const int64_t* labels;
  float* loss;
  int64_t rows, vocabulary, ignore_index;
  bool gradient, bf16;
};

struct Kernels {
  const char* isa;
  void (*gemm)(const GemmArgs&);
  void (*activation_backward)(const ActivationBackwardArgs&);
  void (*attention)(const AttentionArgs&);
  void (*attention_backward)(const AttentionArgs&);
  void (*add_layer_norm)(const AddLayerNormArgs&);
  void (*add_layer_norm_backward)(const AddLayerNormArgs&);
  void (*embedding_layer_norm)(const EmbeddingArgs&);
  void (*embedding_layer_norm_backward)(const EmbeddingArgs&);
  // out[rows[i]] += x[i]; out [table, hidden] is overwritten
  void (*scatter_add)(const float* x, const int64_t* rows, float* out, int64_t tokens,
                      int64_t hidden, int64_t table);
  void (*cross_entropy_rows)(const CrossEntropyArgs&);
  void (*gather_rows)(const char* x, const int64_t* rows, char* out, int64_t tokens,
                      int64_t row_bytes);
  void (*scatter_rows)(const char* x, const int64_t* rows, char* out, int64_t tokens,
                       int64_t out_rows, int64_t row_bytes);
};

}  // namespace bertfast
