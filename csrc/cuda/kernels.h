// Launchers of the CUDA kernels: raw device pointers, sizes and a stream; no torch header.
//
// Each works on `device`, queues its kernels on `stream` and throws std::runtime_error with CUDA's
// own message where a launch fails. dtype is 0 fp32, 1 bf16, 2 fp16; pointers of void are of that
// type, or of fp32 where a flag says so. Pointers that may be null are named optional.
#pragma once
#include <cstdint>
#include <string>

#include "../layer.h"

namespace bertfast::cuda {

// How many devices the driver shows, and why there are none.
int device_count(std::string& why);

void gather_rows(const void* x, const int64_t* rows, void* out, int64_t tokens, int64_t row_bytes,
                 int device, void* stream);
void scatter_rows(const void* x, const int64_t* rows, void* out, int64_t tokens, int64_t out_rows,
                  int64_t row_bytes, int device, void* stream);

// x, residual (optional), y [tokens, hidden]; weight, bias, x_bias (optional) [hidden]; seed
// (optional) [2]; mean, rstd [tokens]
void add_layer_norm(int dtype, const void* x, const void* residual, const void* weight,
                    bool weight_fp32, const void* bias, bool bias_fp32, const void* x_bias,
                    bool x_bias_fp32, const int64_t* seed, float keep_scale, uint32_t threshold,
                    float eps, int64_t tokens, int64_t hidden, void* y, float* mean, float* rstd,
                    int device, void* stream);
// partial [blocks, 3, hidden] is scratch; columns [3, hidden]: dweight, dbias, dx_bias
void add_layer_norm_backward(int dtype, const void* grad, const void* x, const void* residual,
                             const void* weight, bool weight_fp32, const void* x_bias,
                             bool x_bias_fp32, const int64_t* seed, float keep_scale,
                             uint32_t threshold, const float* mean, const float* rstd,
                             int64_t tokens, int64_t hidden, void* dx, void* dresidual,
                             float* partial, int64_t blocks, float* columns, int device,
                             void* stream);

// dropout(LN(word[ids] + position[positions] + type[types])); types and type optional; the tables
// and y are of dtype; ids, positions, types [tokens]
void embedding_layer_norm(int dtype, const int64_t* ids, const int64_t* positions,
                          const int64_t* types, const void* word, const void* position,
                          const void* type, const void* weight, const void* bias,
                          const int64_t* seed, float keep_scale, uint32_t threshold, float eps,
                          int64_t tokens, int64_t hidden, void* y, float* mean, float* rstd,
                          int device, void* stream);
// ds [tokens, hidden]: gradient of the sum that is normalised; partial [blocks, 2, hidden] is
// scratch; columns [2, hidden]: dweight, dbias
void embedding_layer_norm_backward(int dtype, const void* grad, const int64_t* ids,
                                   const int64_t* positions, const int64_t* types, const void* word,
                                   const void* position, const void* type, const void* weight,
                                   const int64_t* seed, float keep_scale, uint32_t threshold,
                                   const float* mean, const float* rstd, int64_t tokens,
                                   int64_t hidden, float* ds, float* partial, int64_t blocks,
                                   float* columns, int device, void* stream);

// activation: 1 GELU (erf), 2 GELU (tanh), 3 ReLU; y = activation(z), n values, y may be z
void activate(int dtype, const void* z, void* y, int64_t n, int activation, int device,
              void* stream);
// dz = grad * activation'(z), all [m, n]; partial [blocks, n] is scratch; column_sum [n]: of dz, or
// of grad with activation 0, which leaves z and dz alone
void activation_backward(int dtype, const void* grad, const void* z, void* dz, int64_t m, int64_t n,
                         int activation, float* partial, int64_t blocks, float* column_sum,
                         int device, void* stream);

// y = activation(x weight^T + bias) on tensor cores, for few rows. dtype 1 or 2; x [m, k]; weights
// [n, k], `parts` of them (1 to 3), biases [n] (all or none); y [m, parts * n]; z (optional) as y,
// takes what the activation gets. k is a multiple of 8, x and weights are 16-byte aligned. partial
// [splits, m, parts * n] is scratch, needed where splits, a function of the sizes, is above 1
int64_t linear_splits(int64_t m, int64_t n, int64_t k, int64_t parts);
void linear(int dtype, const void* x, int64_t m, int64_t n, int64_t k, int64_t parts,
            const void* w0, const void* w1, const void* w2, const void* b0, const void* b1,
            const void* b2, bool bias_fp32, int activation, void* y, void* z, float* partial,
            int device, void* stream);

// logits [rows, vocabulary], rows `pitch` values apart, without their bias [vocabulary] (optional);
// labels [rows]; loss [rows], NaN for a label outside the vocabulary, 0 for ignore_index. With
// `gradient` the loss's gradient replaces the logits, zeros up to `pitch`
void cross_entropy_rows(int dtype, void* logits, const void* bias, bool bias_fp32,
                        const int64_t* labels, float* loss, int64_t rows, int64_t vocabulary,
                        int64_t pitch, int64_t ignore_index, bool gradient, int device,
                        void* stream);

// dim 32, 64 or 128. q [tokens, heads, dim] and kv [tokens of its own, 2, heads, dim] by strides in
// values, 16-byte aligned throughout, the last dimension dense; starts_q and starts_k [batch + 1],
// for self-attention the same; seqused_k (optional) [batch]; bias (optional) by strides, its last
// dimension dense; seed (optional); out [tokens, heads, dim]; lse [heads, tokens], +inf where a row
// is fully masked
void attention(int dtype, const void* q, const void* kv, int64_t q_token, int64_t q_head,
               int64_t kv_token, int64_t kv_part, int64_t kv_head, const int32_t* starts_q,
               const int32_t* starts_k, const int32_t* seqused_k, int64_t batch, int64_t tokens,
               int64_t heads, int64_t dim, int64_t max_seqlen_q, int64_t max_seqlen_k, float scale,
               const void* bias, bool bias_fp32, int64_t bias_batch, int64_t bias_head,
               int64_t bias_query, const int64_t* seed, float keep_scale, uint32_t threshold,
               bool causal, void* out, float* lse, int device, void* stream);
// grad and out [tokens, heads, dim]; dq as q and dkv as kv, dense but for the strides from token to
// token; delta [heads, tokens] is scratch; dbias (optional) [batch, heads, dbias_rows,
// dbias_columns] is written where there are scores
void attention_backward(int dtype, const void* q, const void* kv, int64_t q_token, int64_t q_head,
                        int64_t kv_token, int64_t kv_part, int64_t kv_head, const int32_t* starts_q,
                        const int32_t* starts_k, const int32_t* seqused_k, int64_t batch,
                        int64_t tokens, int64_t heads, int64_t dim, int64_t max_seqlen_q,
                        int64_t max_seqlen_k, float scale, const void* bias, bool bias_fp32,
                        int64_t bias_batch, int64_t bias_head, int64_t bias_query,
                        const int64_t* seed, float keep_scale, uint32_t threshold, bool causal,
                        const void* grad, const void* out, const float* lse, float* delta, void* dq,
                        void* dkv, int64_t dq_token, int64_t dkv_token, float* dbias,
                        int64_t dbias_rows, int64_t dbias_columns, int device, void* stream);

// Post-norm encoder layers for inference, for few tokens. Everything of them in the batch's dtype,
// bf16 or fp16, but for its bias, which may be fp32; hidden, inner multiples of 8, head dims as in
// attention; weights [layers] are read on the host, what they point to is on the device; workspace:
// as many bytes as encoder_workspace says, 16-byte aligned
int64_t encoder_workspace(const LayerSpec& spec, const Batch& batch);
void encoder(const LayerSpec& spec, const LayerWeights* weights, int64_t layers, const Batch& batch,
             void* workspace, int device, void* stream);

}  // namespace bertfast::cuda
