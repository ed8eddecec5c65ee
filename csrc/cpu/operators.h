// The operators of one instruction set, a .cpp each; arguments in kernels.h.
#pragma once
#include "../kernels.h"

namespace bertfast::BERTFAST_ISA {

void gemm(const GemmArgs&);
void activation_backward(const ActivationBackwardArgs&);
void attention(const AttentionArgs&);
void attention_backward(const AttentionArgs&);
void add_layer_norm(const AddLayerNormArgs&);
void add_layer_norm_backward(const AddLayerNormArgs&);
void gated_act(const GatedActArgs&);
void gated_act_backward(const GatedActArgs&);
void rotary(const RotaryArgs&);
void embedding_layer_norm(const EmbeddingArgs&);
void embedding_layer_norm_backward(const EmbeddingArgs&);
void scatter_add(const float*, const int64_t*, float*, int64_t, int64_t, int64_t);
void cross_entropy_rows(const CrossEntropyArgs&);
void gather_rows(const char*, const int64_t*, char*, int64_t, int64_t);
void scatter_rows(const char*, const int64_t*, char*, int64_t, int64_t, int64_t);
int64_t packed_bytes(const PackArgs&);
Precision qkv_precision(Precision);
void pack_weights(const PackArgs&);
void encoder(const EncoderArgs&);
void decode(const DecodeArgs&);
double register_rate(Precision);

}  // namespace bertfast::BERTFAST_ISA
