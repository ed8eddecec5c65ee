"""`ops.masked_cross_entropy` on csrc/cuda/masked_cross_entropy.cu, between torch's products."""

from ..extension import C
from ..library import cuda_float_limit, cuda_queue, ptr
from ..masked_cross_entropy import by_chunks
from ..registry import register
from .arguments import dtype_code, parameter


def _cross_entropy(logits, bias, labels, losses, pitch, ignore_index, gradient):
    C.cuda_cross_entropy_rows(
        *(dtype_code(logits), ptr(logits), *parameter(bias), ptr(labels), ptr(losses)),
        *(*logits.shape, pitch, ignore_index, gradient, *cuda_queue(logits)),
    )


@register("masked_cross_entropy", "cuda", limit=cuda_float_limit)
def _forward(*arguments):
    return by_chunks(_cross_entropy, *arguments)
