// The C++ kernels' arguments and the table of them that each instruction set fills.
#pragma once
#include <cstdint>

#include "layer.h"

namespace bertfast {

// Up to three tensors of equal size.
struct Parts {
  const void* data[3];
  int count;
  const void* operator[](int64_t i) const { return data[i]; }
};

// c[m, n] = activation(sum_k a[m, k] b[n, k] + bias[n]); all strides in elements.
struct GemmArgs {
  int64_t m, n, k;
  const void* a;
  int64_t a_row, a_k;
  bool a_bf16;
  Parts b;  // stacked along n, or along k if split_k
  int64_t b_row, b_k;
  bool b_bf16;
  bool split_k;
  Parts bias;  // none, or one for each of b
  bool bias_bf16;
  void* c;
  int64_t c_row;
  bool c_bf16;
  void* z;          // null, or the pre-activation, laid out as c
  int activation;   // 0 none, 1 GELU (erf), 2 GELU (tanh), 3 ReLU, 4 SiLU
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
  const void *q, *k, *v;
  int64_t q_token, q_head, k_token, k_head;  // strides; v's are k's
  const int32_t *starts_q, *starts_k;
  const int32_t* seqused_k;           // null, or how many of each sequence's keys are used
  int64_t batch, tokens, heads, dim;  // tokens of q
  float scale;
  Bias bias;
  Dropout dropout;
  bool causal, bf16;
  int64_t window;  // keys that a query sees to either side, or negative for all
  // Embeddings of relative positions, [buckets, heads, dim] or null: see ops/attention.py.
  const void *rel_key, *rel_query;
  const int32_t* rel_index;  // of the distance 0: the bucket of (query position - key position)
  // forward: out [tokens, heads, dim]; lse [heads, tokens] is +inf where a row is fully masked
  void* out;
  float* lse;
  // backward: the strides of dq's and of dk's and dv's tokens, their heads are dense; dbias null
  // or [batch, heads, dbias_rows, dbias_cols]
  const void* grad;
  void *dq, *dk, *dv;
  int64_t dq_token, dk_token;
  float* dbias;
  int64_t dbias_rows, dbias_cols;
  float *drel_key, *drel_query;  // null or [buckets, heads, dim], zeros
};

struct AddLayerNormArgs {
  const void *x, *residual, *weight, *bias, *x_bias;  // all but x may be null
  Dropout dropout;
  int64_t tokens, hidden;
  float eps;
  bool bf16, weight_bf16, bias_bf16, x_bias_bf16;
  bool rms;  // no mean is taken off
  void* y;
  float *mean, *rstd;  // mean is 0 where rms; null where there is no norm at all
  const void* grad;
  void *dx, *dresidual;  // dresidual is null where it is dx's
  float* columns;        // [3, hidden]: dweight, dbias, dx_bias
};

// y = dropout(activation(up) * gate), all [rows, n]; what is read has rows of any stride.
struct GatedActArgs {
  const void *up, *gate;
  int64_t up_row, gate_row, rows, n;
  int activation;
  Dropout dropout;
  bool bf16;
  void* y;
  const void* grad;
  int64_t grad_row;
  void *dup, *dgate;
};

// out = qkv [tokens, 3, heads, dim], in its queries and keys each pair (x[j], x[j + dim / 2])
// turned by angles [tokens, 2, dim / 2], cosines and sines; the other way if inverse.
struct RotaryArgs {
  const void* qkv;
  const float* angles;
  int64_t tokens, heads, dim;
  bool inverse, bf16;
  void* out;
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

// Linear layers side by side, to be packed for inference.
struct LinearWeights {
  Parameter part[3];  // weight [rows[i], k]; bias fp32 [rows[i]] or null
  int64_t rows[3];
  int parts;
  bool gated;  // of the two, a register of the first's columns, then one of the second's, ...
  bool bf16;   // the weights
};

enum class Precision : int { fp32, bf16, int8 };  // of weights packed; as Python's PRECISIONS

struct PackArgs {
  LinearWeights from;
  int64_t k;
  Precision precision;
  void* out;  // packed_bytes of it, 64-byte aligned
};

struct PackedLayer {
  const void *qkv, *out, *up, *down;  // packed; qkv in qkv_precision, a gate with up
  Parameter norm1, norm2;             // fp32
  const float* smooth;  // [hidden], of int8: what qkv's input is multiplied by; or null
};

// A layer's embeddings of relative positions, fp32 [buckets, heads, head_dim] or null: keys' that
// queries meet, and the other way round.
struct RelativeTables {
  const float *key, *query;
};

struct EncoderArgs {
  const LayerSpec* specs;  // of each layer; they differ in window and rotary alone
  int64_t layers;
  const PackedLayer* packed;  // null where weights are live
  const LayerWeights* live;   // null, or weights that may change, packed at every call; no int8
  bool live_bf16;             // the live matrices; biases and norms are fp32
  const RelativeTables* relative;  // of each layer, or null
  Precision precision;
  // int8 weights after a norm take its result less its bias, which their own bias has taken in:
  // most of an outlier's size is there. center: that of the norm before the first layer, or null;
  // unused by pre-norm layers, whose first matrices have a norm of their own, or none.
  const float* center;
  Batch batch;
  double* seconds;  // null, or what each EncoderPart gains, as one of the threads sees it
};
enum class EncoderPart : int { pack, qkv, attention, out, norm, up, down };
constexpr const char* kEncoderParts[] = {"pack", "qkv", "attention", "out", "norm", "up", "down"};

// A decoder's layer, packed in fp32: queries, keys and values of what it has seen, their output,
// the query for the sources and its output, feed-forward; a norm after each of the three.
struct DecoderLayer {
  const void *qkv, *out, *query, *cross, *up, *down;
  Parameter norm1, norm2, norm3;
  const float* keys;  // and values of the sources, [tokens, 2, hidden]
};
constexpr const char* kDecoderParts[] = {"qkv",          "out",        "query",        "cross",
                                         "up",           "down",       "norm1.weight", "norm1.bias",
                                         "norm2.weight", "norm2.bias", "norm3.weight", "norm3.bias",
                                         "keys"};
static_assert(sizeof(DecoderLayer) == std::size(kDecoderParts) * sizeof(int64_t));

// One more token of every row. All in fp32.
struct DecodeArgs {
  const DecoderLayer* layers;
  int64_t count;
  LayerSpec spec;
  int64_t rows;
  const float* hidden;  // [rows, hidden], embedded
  float* cache;         // [layers, room, slots, 2, hidden], keys and values; gains [:, done]
  int64_t room, slots, done;
  const int32_t* origin;  // [rows, origin_row]: in which slot the row's tokens before are, by step
  int64_t origin_row;
  const int32_t* source;      // [rows]
  const int32_t* cu_seqlens;  // of the sources, of which the longest has
  int64_t longest;
  const void *transform, *words;  // the head's, packed
  Parameter norm;
  int64_t vocabulary;
  float* logits;  // [rows, vocabulary], or null where
  int64_t* best;  // [rows] is wanted: the first of the largest
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
  bool bf16;    // whether it multiplies bf16, or floats that bf16 is widened to
  bool sums16;  // whether it adds products of int8 in 16 bits, for which weights have fewer
  void (*gemm)(const GemmArgs&);
  void (*activation_backward)(const ActivationBackwardArgs&);
  void (*attention)(const AttentionArgs&);
  void (*attention_backward)(const AttentionArgs&);
  void (*add_layer_norm)(const AddLayerNormArgs&);
  void (*add_layer_norm_backward)(const AddLayerNormArgs&);
  void (*gated_act)(const GatedActArgs&);
  void (*gated_act_backward)(const GatedActArgs&);
  void (*rotary)(const RotaryArgs&);
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
  int64_t (*packed_bytes)(const PackArgs&);
  Precision (*qkv_precision)(Precision precision);  // of the weights for queries, keys and values
  void (*pack_weights)(const PackArgs&);
  void (*encoder)(const EncoderArgs&);
  void (*decode)(const DecodeArgs&);
  // Operations a second, two a product, of all threads with all operands in their L1 caches.
  double (*register_rate)(Precision precision);
};

}  // namespace bertfast
