"""Softmax cross-entropy over chunks of rows: cuBLAS for the three products, one kernel between.

Per chunk of rows: logits = x @ weight.T; the kernel makes them softmax - onehot in their place;
dhidden = that @ weight; dweight += that.T @ x. The logits are in x's dtype, as PyTorch's are, and
everything that is computed from them in fp32.
"""

import torch
import triton
import triton.language as tl

from bertfast.ops.masked_cross_entropy import (
    _DBIAS,
    _DHIDDEN,
    _DWEIGHT,
    _inverse_count,
    _shapes,
    row_chunks,
)

from .spec import Spec

_BLOCK, _WARPS = 4096, 8
_LOGITS = 2**26  # of a chunk: 128 MB in bf16


@triton.jit
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
    lse = top + tl.log(total)
    value = tl.where(inside, lse - at_label, float("nan"))
    tl.store(loss + row, tl.where(labelled, value, 0.0))
    if GRADIENT:
        for start in range(0, vocabulary, BLOCK):
            j = start + tl.arange(0, BLOCK)
            z = tl.load(logits + j, j < vocabulary, other=-float("inf")).to(tl.float32)
            if bias is not None:
                z += tl.load(bias + j, j < vocabulary, other=0).to(tl.float32)
            dz = tl.where(labelled, tl.exp(z - lse) - tl.where(j == label, 1.0, 0.0), 0.0)
            # Zeros in the padding too: products that read pairs of bf16 look one column further.
            tl.store(logits + j, dz.to(logits.dtype.element_ty), j < pitch)


def masked_cross_entropy(hidden, weight, bias, labels, ignore_index, need):
    rows, vocabulary, dtype, device = hidden.shape[0], weight.shape[0], hidden.dtype, hidden.device
    w = weight.to(dtype)
    labels = labels.contiguous()
    bias = None if bias is None else bias.contiguous()
    chunks = row_chunks(rows, vocabulary, rows, _LOGITS)
    most = max((j - i for i, j in chunks), default=0)
    pitch = triton.cdiv(vocabulary, 64) * 64  # rows aligned for tensor cores and wide loads
    logits = torch.empty((most, pitch), dtype=dtype, device=device)[:, :vocabulary]
    losses = torch.empty(rows, dtype=torch.float32, device=device)
    dhidden, dweight, dbias = (
        torch.empty(s, dtype=d, device=device) for s, d in _shapes(hidden, weight, bias, need)
    )
    wide = {"dtype": torch.float32, "device": device}
    # Products into buffers: those that return a tensor are cast where autocast is on.
    part = torch.empty(dweight.shape, dtype=dtype, device=device)
    dw = part if len(chunks) == 1 else torch.zeros(dweight.shape, **wide)
    db = torch.zeros(dbias.shape, **wide)
    for i, j in chunks:
        x, z = hidden[i:j], logits[: j - i]
        torch.mm(x, w.T, out=z)
        _cross_entropy_rows[(j - i,)](
            *(z, bias, labels[i:], losses[i:], vocabulary, pitch, ignore_index),
            *(need != 0, _BLOCK),
            num_warps=_WARPS,
        )
        if need & _DHIDDEN:
            torch.mm(z, w, out=dhidden[i:j])
        if need & _DWEIGHT:
            torch.mm(z.T, x, out=part)
            if dw is not part:
                dw += part
        if need & _DBIAS:
            db += z.sum(0, dtype=torch.float32)
    if need & _DWEIGHT:
        dweight.copy_(dw)
    scale = _inverse_count(labels, ignore_index, torch.float32)
    return losses.sum() * scale, scale, dhidden, dweight, dbias.copy_(db)


def shipped():
    for x, parameter in (("fp32", "fp32"), ("bf16", "bf16"), ("bf16", "fp32"), ("fp16", "fp16")):
        for gradient in (False, True):
            types = {"logits": f"*{x}", "bias": f"*{parameter}", "labels": "*i64"}
            types |= {"loss": "*fp32", "vocabulary": "i32", "pitch": "i32", "ignore_index": "i32"}
            yield Spec(_cross_entropy_rows, types, {"GRADIENT": gradient, "BLOCK": _BLOCK}, _WARPS)
