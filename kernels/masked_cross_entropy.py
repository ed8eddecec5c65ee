"""Softmax cross-entropy of logits, between the products of `by_chunks`."""

import triton.language as tl

from bertfast.ops.masked_cross_entropy import by_chunks

from .jit import jit
from .spec import Spec

_BLOCK, _WARPS = 4096, 8


@jit
def _cross_entropy_rows(
    logits, bias, labels, loss, vocabulary, pitch, ignore_index,
    GRADIENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """logits [rows, vocabulary], rows `pitch` apart; bias [vocabulary] or None; loss fp32 [rows].
    A label outside the vocabulary makes its loss NaN."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * pitch
    label = tl.load(labels + row)
    labelled = label != ignore_index
    inside = (label >= 0) & (label < vocabulary)
    at_label = tl.load(logits + label, inside, other=0).to(tl.float32)
    if bias is not None:
        at_label += tl.load(bias + label, inside, other=0).to(tl.float32)
    top = -float("inf")
    total = 0.0
    for start in range(0, vocabulary, BLOCK):
        j = start + tl.arange(0, BLOCK)
        z = tl.load(logits + j, j < vocabulary, other=-float("inf")).to(tl.float32)
        if bias is not None:
            z += tl.load(bias + j, j < vocabulary, other=0).to(tl.float32)
        above = tl.maximum(top, tl.max(z, 0))
        total = total * tl.exp(top - above) + tl.sum(tl.exp(z - above), 0)
        top = above
    # Never top + log(total): where the logits are large, its rounding is.
    value = tl.where(inside, tl.log(total) + (top - at_label), float("nan"))
    tl.store(loss + row, tl.where(labelled, value, 0.0))
    if GRADIENT:
        for start in range(0, vocabulary, BLOCK):
            j = start + tl.arange(0, BLOCK)
            z = tl.load(logits + j, j < vocabulary, other=-float("inf")).to(tl.float32)
            if bias is not None:
                z += tl.load(bias + j, j < vocabulary, other=0).to(tl.float32)
            p = tl.exp(z - top) / total
            dz = tl.where(labelled, p - tl.where(j == label, 1.0, 0.0), 0.0)
            # Zeros in the padding too: products that read pairs of bf16 look one column further.
            tl.store(logits + j, dz.to(logits.dtype.element_ty), j < pitch)


def _launch(logits, bias, labels, losses, pitch, ignore_index, gradient):
    _cross_entropy_rows[(logits.shape[0],)](
        *(logits, bias, labels, losses, logits.shape[1], pitch, ignore_index, gradient, _BLOCK),
        num_warps=_WARPS,
    )


def masked_cross_entropy(*arguments):
    return by_chunks(_launch, *arguments)


def shipped():
    for x, parameter in (("fp32", "fp32"), ("bf16", "bf16"), ("bf16", "fp32"), ("fp16", "fp16")):
        for gradient in (False, True):
            types = {"logits": f"*{x}", "bias": f"*{parameter}", "labels": "*i64"}
            types |= {"loss": "*fp32", "vocabulary": "i32", "pitch": "i32", "ignore_index": "i32"}
            yield Spec(_cross_entropy_rows, types, {"GRADIENT": gradient, "BLOCK": _BLOCK}, _WARPS)
