// This instruction set's kernels.
#include "operators.h"
#include "vec.h"

#define BERTFAST_STRING_(x) #x
#define BERTFAST_STRING(x) BERTFAST_STRING_(x)

namespace bertfast::BERTFAST_ISA {

extern const Kernels table;
const Kernels table = {
    BERTFAST_STRING(BERTFAST_ISA),
    unit_of(Precision::bf16) == Unit::bf16,
    Isa::kSums16,
    gemm,
    activation_backward,
    attention,
    attention_backward,
    add_layer_norm,
    add_layer_norm_backward,
    gated_act,
    gated_act_backward,
    rotary,
    embedding_layer_norm,
    embedding_layer_norm_backward,
    scatter_add,
    cross_entropy_rows,
    gather_rows,
    scatter_rows,
    packed_bytes,
    qkv_precision,
    pack_weights,
    encoder,
    decode,
    register_rate,
};

}  // namespace bertfast::BERTFAST_ISA
