"""Each operator on each backend: MiniLM's shapes, 32 natural-length sequences, dropout 0.1.

    pytest benchmarks/test_ops.py          (`make bench`)

"forward" is inference; "training" is forward and backward. Before it is timed, a backend's
output and gradients are held against the reference in fp64, with DESIGN's bound: fp32 within
1e-5 relative, bf16 within twice the error of PyTorch's own kernels in bf16.
"""

from contextlib import nullcontext
from functools import cache

import pytest
import torch
from harness import natural_lengths, origin

from bertfast import ops

HEADS, HEAD_DIM, INNER, VOCABULARY = 12, 32, 1536, 30522
HIDDEN = HEADS * HEAD_DIM
LENGTHS = natural_lengths(32)
TOKENS, LONGEST = sum(LENGTHS), max(LENGTHS)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def draw(*shape, scale=1.0):
    return torch.randn(*shape, dtype=torch.float64) * scale


def weight(out, into):
    return draw(out, into, scale=into**-0.5)


def cu_seqlens():
    return torch.tensor([0, *LENGTHS]).cumsum(0).int().to(DEVICE)


def padded():
    mask = torch.zeros(len(LENGTHS), LONGEST, dtype=torch.int64)
    for row, n in zip(mask, LENGTHS, strict=True):
        row[:n] = 1
    return mask.to(DEVICE)


# Each: what is differentiated, in fp64, and the call; `dropout` goes to the operators that have it.
def attention():
    cu = cu_seqlens()
    return [draw(TOKENS, 3, HEADS, HEAD_DIM)], lambda qkv, **dropout: ops.attention(
        qkv, cu, LONGEST, **dropout
    )


def qkv_linear():
    parts = [p for _ in range(3) for p in (weight(HIDDEN, HIDDEN), draw(HIDDEN))]
    return [draw(TOKENS, HIDDEN), *parts], lambda *leaves, **_: ops.qkv_linear(*leaves)


def linear_act():
    leaves = [draw(TOKENS, HIDDEN), weight(INNER, HIDDEN), draw(INNER)]
    return leaves, lambda x, w, b, **_: ops.linear_act(x, w, b, "gelu")


def feed_forward():
    leaves = [
        draw(TOKENS, HIDDEN),
        *(weight(INNER, HIDDEN), draw(INNER)),
        *(weight(HIDDEN, INNER), draw(HIDDEN)),
    ]
    return leaves, lambda *leaves, **_: ops.feed_forward(*leaves)


def add_layer_norm():
    leaves = [draw(TOKENS, HIDDEN), draw(TOKENS, HIDDEN), *(draw(HIDDEN) for _ in range(3))]
    return leaves, lambda x, residual, w, b, x_bias, **dropout: ops.add_layer_norm(
        x, residual, w, b, 1e-12, x_bias=x_bias, **dropout
    )


def embedding_layer_norm():
    ids = torch.randint(VOCABULARY, (TOKENS,)).to(DEVICE)
    positions = torch.cat([torch.arange(n) for n in LENGTHS]).to(DEVICE)
    types = torch.zeros_like(ids)
    rows = (VOCABULARY, 512, 2)
    leaves = [*(draw(n, HIDDEN) for n in rows), draw(HIDDEN), draw(HIDDEN)]
    return leaves, lambda *leaves, **dropout: ops.embedding_layer_norm(
        ids, positions, types, *leaves, 1e-12, **dropout
    )


def masked_cross_entropy():
    labels = torch.randint(VOCABULARY, (TOKENS,))
    labels[torch.rand(TOKENS) > 0.15] = -100
    labels = labels.to(DEVICE)
    leaves = [draw(TOKENS, HIDDEN), weight(VOCABULARY, HIDDEN), draw(VOCABULARY)]
    return leaves, lambda *leaves, **_: ops.masked_cross_entropy(*leaves, labels)


def pack():
    mask = padded()
    return [draw(len(LENGTHS), LONGEST, HIDDEN)], lambda x, **_: ops.pack(x, mask)[0]


def unpack():
    indices = padded().flatten().nonzero()[:, 0]
    return [draw(TOKENS, HIDDEN)], lambda x, **_: ops.unpack(x, indices, len(LENGTHS), LONGEST)


OPERATORS = {
    f.__name__: f
    for f in (
        *(attention, qkv_linear, linear_act, feed_forward, add_layer_norm),
        *(embedding_layer_norm, masked_cross_entropy, pack, unpack),
    )
}


@cache
def case(operator):
    torch.manual_seed(0)
    leaves, call = OPERATORS[operator]()
    grad = torch.randn_like(call(*(x.to(DEVICE) for x in leaves)))
    return leaves, grad, call


def build(operator, step, dtype):
    """A call without arguments that gives the output and, in training, every gradient."""
    leaves, grad, call = case(operator)
    leaves = [x.to(DEVICE, dtype).requires_grad_(step == "training") for x in leaves]
    grad = grad.to(DEVICE, dtype)
    seed = torch.tensor([3, 5], device=DEVICE)

    def run():
        with nullcontext() if step == "training" else torch.inference_mode():
            dropout = {"dropout_p": 0.1, "seed": seed} if step == "training" else {}
            out = call(*leaves, **dropout)
            return [out, *torch.autograd.grad(out, leaves, grad)] if dropout else [out]

    return run


def errors(got, exact):
    return [
        ((g.double() - e).abs().max() / e.abs().max()).item()
        for g, e in zip(got, exact, strict=True)
    ]


@pytest.mark.parametrize("backend", ops.registry.BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("step", ["forward", "training"])
@pytest.mark.parametrize("operator", OPERATORS)
def test_operator(benchmark, operator, step, dtype, backend):
    with ops.backend("reference"):
        exact = build(operator, step, torch.float64)()
        plain = errors(build(operator, step, DTYPES[dtype])(), exact)
    run = build(operator, step, DTYPES[dtype])
    with ops.backend(backend):
        try:
            got = run()
        except RuntimeError as error:
            if "can't serve" not in str(error):
                raise
            pytest.skip(str(error))
        found = errors(got, exact)
        bounds = [max(1e-5, 2 * e) if dtype == "bf16" else 1e-5 for e in plain]
        assert all(e <= bound for e, bound in zip(found, bounds, strict=True)), (found, bounds)

        def timed():
            run()
            if DEVICE == "cuda":
                torch.cuda.synchronize()

        benchmark.group = f"{operator} {step} {dtype}"
        benchmark.extra_info |= {**origin(), "backend": backend, "max_relative_error": max(found)}
        benchmark(timed)
