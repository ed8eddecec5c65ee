// What an encoder layer is and one call of its layers, for the CPU and CUDA alike: C++'s side of
// the descriptions of the same names in Python.
#pragma once
#include <cstdint>
#include <iterator>

namespace bertfast {

enum DType : int { kFp32, kBf16, kFp16 };  // as GPU_DTYPES in bertfast/ops/library.py

struct Parameter {  // of a linear layer or a norm, as torch has it: weight [out, in] or [in]
  const void *weight, *bias;
};

// The parameters' roles, in C++ named and ordered here alone; Python hands over an array of these.
struct LayerWeights {
  Parameter query, key, value, out, norm1, up, down, norm2, gate, pos_key, pos_query;
};
constexpr const char* kRoles[] = {"query", "key",   "value", "out",     "norm1",    "up",
                                  "down",  "norm2", "gate",  "pos_key", "pos_query"};
constexpr int kParameters = 2 * std::size(kRoles);
static_assert(sizeof(LayerWeights) == kParameters * sizeof(void*));

struct LayerSpec {
  int64_t hidden, heads, inner;
  int activation;  // see GemmArgs
  float eps;
  float scale;  // of the scores
  bool pre_norm, rms, gated;
  int64_t groups;  // heads of queries to one of keys and values
  int64_t window;  // how far from itself a token sees, negative for all
  int rotary;      // which of the batch's angles turn queries and keys, negative for none

  int64_t dim() const { return hidden / heads; }
  int64_t keys() const { return hidden / groups; }  // the width of keys, and of values
};

// Of angles, one for each kind of rotary positions.
struct Angles {
  const float* data[3];  // [tokens, 2, head_dim / 2]: cosines and sines
  int count;
};

// Added to scaled scores, -inf masks: [batch, heads, longest, longest] by strides of elements, 0
// where it is broadcast; its last dimension is dense.
struct Bias {
  const void* data;  // null for none
  int64_t batch, head, query;
  int dtype;

  int64_t row(int64_t b, int64_t h, int64_t q) const { return b * batch + h * head + q * query; }
};

// One call: sequences side by side, without padding.
struct Batch {
  const void* hidden;  // [tokens, hidden]
  int dtype;
  void* out;  // [tokens or count, hidden]
  int out_dtype;
  const int32_t* cu_seqlens;  // [batch + 1]
  const int32_t* seqused_k;   // null, or how many of each sequence's keys are used
  int64_t batch, tokens, longest;
  const int64_t* rows;  // null, or those of the last layer's result that are wanted
  int64_t count;        // of rows
  Bias bias;
  Angles angles;
  const int32_t* rel_index;  // of the distance 0: the bucket of (query position - key position)
  // null, or of each sequence, whose last row stands for padding that sees all places alike, the
  // share of these that it stands for besides its own: see Even in bertfast/encoder/batch.py
  const float* even;

  int64_t results() const { return rows ? count : tokens; }
};

}  // namespace bertfast
