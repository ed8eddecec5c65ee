"""The mean cross-entropy of softmax(hidden @ weight.T + bias) at the labelled rows.

Logits exist for one chunk of rows at a time, and the gradients are made from them on the spot,
as in Liger (Hsu et al., arXiv:2410.10989). For R labelled rows, V words and hidden size H:

    same pass                       2 RVH for the logits + 4 RVH for dhidden and dweight = 6 RVH
    recomputed in backward          2 RVH more: a third more work in the head
    logits kept for backward        6 RVH, and R V values from forward to backward

BERT-base labels 15% of 16k tokens: R = 2458, V = 30522, H = 768. Logits and their gradient in
full are 0.6 GB in fp32; a chunk has at most 64 MB (CPU) or 128 MB (GPU, bf16). The price is
dweight, alive from forward on: V H values, 94 MB in fp32, as large as the gradient it becomes.
Without gradients (evaluation) none of that is computed.

What forward saves is not yet divided by the number of labels or multiplied by the incoming
gradient: backward does both in fp32, so that fp16 with a loss scale keeps small probabilities,
and may run twice.
"""

from collections.abc import Callable
from typing import Any

import torch

from .declare import FLOATS, Below, Number, Tensor
from .extension import C
from .library import (
    autograd,
    call,
    cpu_limit,
    define,
    dense,
    ptr,
    register_triton,
    wide,
)
from .linear_act import _column_sum, _gemm
from .registry import register

_DHIDDEN, _DWEIGHT, _DBIAS = 1, 2, 4  # which gradients are asked for


def masked_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    labels: torch.Tensor,
    *,
    ignore_index: int = -100,
    labelled_only: bool = False,
) -> torch.Tensor:
    """Mean of -log softmax(hidden @ weight.T + bias)[label] over the rows that have a label.

    Args:
        hidden: [rows, hidden]. Rows without a label are neither read nor computed.
        weight: [vocabulary, hidden], hidden's dtype, or fp32 beside bf16 or fp16 hidden.
        bias: [vocabulary] or None, like weight.
        labels: int64 [rows]; ignore_index where there is none.
        labelled_only: hidden holds the labelled rows and hardly any other, so none are picked
            out. On a GPU picking waits for the device; where the data loader knows the positions,
            pass `hidden[positions]` and True. Labels equal to ignore_index still count for nothing.

    Returns: the loss, a scalar in fp32 (fp64 for fp64). Without any label it is 0 and so are its
    gradients, where F.cross_entropy gives NaN: a batch in which nothing was masked must not end
    a training run.

    Raises: ValueError or TypeError for arguments that don't fit together; IndexError for a label
    outside the vocabulary on a CPU (on a GPU, where the check would wait for the device, the loss
    becomes NaN).
    """
    _CROSS_ENTROPY.check((hidden, weight, bias, labels, ignore_index), values=False)
    if not labelled_only:
        rows, _ = call("pack_indices", (labels != ignore_index).unsqueeze(0), None)
        hidden = call("gather_rows", hidden, rows)
        labels = call("gather_rows", labels, rows)
    need = 0
    if torch.is_grad_enabled():
        need = _DHIDDEN * hidden.requires_grad | _DWEIGHT * weight.requires_grad
        need |= _DBIAS * (bias is not None and bias.requires_grad)
    return torch.ops.bertfast.masked_cross_entropy(
        hidden, weight, bias, labels, ignore_index, need
    )[0]


def _shapes(hidden, weight, bias, need):
    """(shape, dtype) of dhidden, dweight and dbias; shape [0] for what nobody needs."""
    like = weight if bias is None else bias
    return (
        (hidden.shape if need & _DHIDDEN else (0,), hidden.dtype),
        (weight.shape if need & _DWEIGHT else (0,), weight.dtype),
        (like.shape[:1] if need & _DBIAS else (0,), like.dtype),
    )


def _fake(hidden, weight, bias, labels, ignore_index, need):
    loss = hidden.new_empty((), dtype=wide(hidden.dtype))
    gradients = (hidden.new_empty(s, dtype=d) for s, d in _shapes(hidden, weight, bias, need))
    return loss, loss.clone(), *gradients


_CROSS_ENTROPY = define(
    "masked_cross_entropy(Tensor hidden, Tensor weight, Tensor? bias, Tensor labels, "
    "int ignore_index, int need) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _fake,
    hidden=Tensor("rows, hidden", FLOATS),
    weight=Tensor("vocabulary, hidden", "as hidden or float32"),
    bias=Tensor("vocabulary", "as hidden or float32"),
    labels=Tensor("rows", torch.int64, Below("vocabulary", unless="ignore_index")),
    ignore_index=Number(),
)


def _inverse_count(labels, ignore_index, dtype):
    """1 / the number of labels, on the device."""
    return (labels != ignore_index).sum().clamp(min=1).to(dtype).reciprocal()


def row_chunks(rows: int, vocabulary: int, most: int, values: int) -> list[tuple[int, int]]:
    """(start, stop) of chunks alike in size, at most `most` rows and about `values` logits each."""
    most = max(1, min(most, max(64, values // max(1, vocabulary))))
    n = -(-rows // most)
    return [(rows * i // n, rows * (i + 1) // n) for i in range(n)]


def _product(a, b):
    """a @ b; into a buffer, because products that return a tensor are cast where autocast is on."""
    return torch.mm(a, b, out=a.new_empty(a.shape[0], b.shape[1]))


@register("masked_cross_entropy", "reference")
def _reference(hidden, weight, bias, labels, ignore_index, need):
    dtype = wide(hidden.dtype)
    x, w = hidden.to(dtype), weight.to(dtype)
    z = _product(x, w.T) if bias is None else _product(x, w.T) + bias
    labelled = labels != ignore_index
    target = torch.where(labelled, labels, 0).unsqueeze(1)
    losses = -torch.log_softmax(z, 1).gather(1, target).squeeze(1)
    dz = torch.softmax(z, 1).scatter_add(1, target, -torch.ones_like(z[:, :1]))
    dz = torch.where(labelled.unsqueeze(1), dz, 0)
    scale = _inverse_count(labels, ignore_index, dtype)
    (s, d), (sw, dw), (sb, db) = _shapes(hidden, weight, bias, need)
    return (
        torch.where(labelled, losses, 0).sum() * scale,
        scale,
        _product(dz, w).to(d) if need & _DHIDDEN else hidden.new_empty(s),
        _product(dz.T, x).to(dw) if need & _DWEIGHT else weight.new_empty(sw),
        dz.sum(0).to(db) if need & _DBIAS else weight.new_empty(sb, dtype=db),
    )


@register("masked_cross_entropy", "cpu", limit=cpu_limit)
def _cpu(hidden, weight, bias, labels, ignore_index, need):
    vocabulary, labels, bias = weight.shape[0], dense(labels), dense(bias)
    dhidden, dweight, dbias = (
        torch.empty(s, dtype=d) for s, d in _shapes(hidden, weight, bias, need)
    )
    losses = torch.empty(labels.shape[0])
    # 512 rows: dweight's sum over a chunk is then one block of the product, without scratch.
    chunks = row_chunks(labels.shape[0], vocabulary, 512, 2**24)
    # Sums over several chunks in fp32.
    dw = torch.empty(dweight.shape) if len(chunks) > 1 else dweight
    db = torch.zeros(dbias.shape)
    if not chunks:
        dweight.zero_()
    logits = torch.empty((max((j - i for i, j in chunks), default=0), vocabulary))
    for i, j in chunks:
        x, z = hidden[i:j], logits[: j - i]
        for v in range(0, vocabulary, 8192):  # bounds the packed copy of the weight
            words = slice(v, v + 8192)
            _gemm(x, (weight[words],), z[:, words], (None if bias is None else bias[words],))
        low = hidden.dtype == torch.bfloat16
        C.cross_entropy_rows(
            *(ptr(z), ptr(labels[i:]), ptr(losses[i:]), j - i, vocabulary, ignore_index),
            *(need != 0, low),
        )
        dz = z.view(torch.bfloat16)[:, :vocabulary] if low else z  # in the front half of each row
        if need & _DHIDDEN:
            _gemm(dz, (weight,), dhidden[i:j], b_t=False)
        if need & _DWEIGHT:
            _gemm(dz, (x,), dw, a_t=True, b_t=False, accumulate=i > 0)
        if need & _DBIAS:
            db += _column_sum(dz)
    if dw is not dweight:
        dweight = dw.to(weight.dtype)
    scale = _inverse_count(labels, ignore_index, torch.float32)
    return losses.sum() * scale, scale, dhidden, dweight, db.to(dbias.dtype)


_LOGITS = 2**26  # of a chunk on a GPU: 128 MB in bf16


def by_chunks(
    cross_entropy: Callable[..., Any],
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    labels: torch.Tensor,
    ignore_index: int,
    need: int,
) -> tuple[torch.Tensor, ...]:
    """The operator on a GPU: cuBLAS for the three products, a backend's kernel between.

    Per chunk of rows: logits = x @ weight.T; the kernel makes them softmax - onehot in their
    place; dhidden = that @ weight; dweight += that.T @ x. The logits are in x's dtype, as
    PyTorch's are, and everything that is computed from them in fp32.

    cross_entropy(logits [rows, vocabulary], bias, labels, losses fp32 [rows], pitch, ignore_index,
    gradient): fills losses, NaN for a label outside the vocabulary; with `gradient` the logits
    become it, with zeros up to the `pitch` of their rows.
    """
    rows, vocabulary, dtype, device = hidden.shape[0], weight.shape[0], hidden.dtype, hidden.device
    w, labels, bias = weight.to(dtype), dense(labels), dense(bias)
    chunks = row_chunks(rows, vocabulary, rows, _LOGITS)
    most = max((j - i for i, j in chunks), default=0)
    pitch = -(-vocabulary // 64) * 64  # rows aligned for tensor cores and wide loads
    logits = torch.empty((most, pitch), dtype=dtype, device=device)[:, :vocabulary]
    losses = torch.empty(rows, dtype=torch.float32, device=device)
    dhidden, dweight, dbias = (
        torch.empty(s, dtype=d, device=device) for s, d in _shapes(hidden, weight, bias, need)
    )
    sums = {"dtype": torch.float32, "device": device}
    # Products into buffers: those that return a tensor are cast where autocast is on.
    part = torch.empty(dweight.shape, dtype=dtype, device=device)
    dw = part if len(chunks) == 1 else torch.zeros(dweight.shape, **sums)
    db = torch.zeros(dbias.shape, **sums)
    for i, j in chunks:
        x, z = hidden[i:j], logits[: j - i]
        torch.mm(x, w.T, out=z)
        cross_entropy(z, bias, labels[i:j], losses[i:j], pitch, ignore_index, need != 0)
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


register_triton("masked_cross_entropy", "masked_cross_entropy.masked_cross_entropy")


def _setup(ctx, inputs, output):
    ctx.need = inputs[5]
    ctx.save_for_backward(*output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx, grad, *_):
    if grad is None:
        return (None,) * 6
    scale, *gradients = ctx.saved_tensors
    factor = grad * scale
    gradients = (
        g * factor if ctx.need & bit else None
        for g, bit in zip(gradients, (_DHIDDEN, _DWEIGHT, _DBIAS), strict=True)
    )
    return *gradients, None, None, None


autograd("masked_cross_entropy", _backward, _setup)
