"""Attention within a window of positions."""

import math
import time

import pytest
import torch
from attention_truth import few_tiles, inputs, masks_of, plain, starts, stay_apart
from helpers import (
    DEVICES,
    FLOATS,
    INTERPRETED,
    backends,
    cases,
    check,
    close_to_truth,
    offsets,
    refused,
    run,
)

from bertfast import ops

pytestmark = pytest.mark.usefixtures("guarded")
BACKENDS = [name for name in backends("attention") if name != "cuda"]
LENGTHS = [130, 0, 1, 40, 77]


@pytest.mark.parametrize("window", [0, 1, 5, 16, 64, 129, 10**9])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_forward_backward(backend, dtype, window):
    lengths = few_tiles(backend, LENGTHS, dtype)
    longest = max(lengths)
    window = min(window, longest - 1) if window < 10**9 else window
    check(
        backend,
        dtype,
        lambda qkv: ops.attention(qkv, starts(lengths, backend), longest, window=window),
        lambda qkv: plain(qkv, lengths, window=window),
        [inputs(32, 2, lengths)],
    )


@pytest.mark.parametrize(
    "backend, dim, lengths",
    cases(BACKENDS, [8, 20, 64, 128], [[300], [33, 31, 14, 15, 16, 17], [2] * 40]),
)
def test_sizes(backend, dim, lengths):
    lengths = few_tiles(backend, lengths)
    check(
        backend,
        torch.float32,
        lambda qkv: ops.attention(qkv, starts(lengths, backend), max(lengths), window=9),
        lambda qkv: plain(qkv, lengths, window=9),
        [inputs(dim, 2, lengths)],
    )


@pytest.mark.parametrize(
    "backend, dtype, shape, causal", cases(BACKENDS, FLOATS, [(1, 1), (5, 2)], [False, True])
)
def test_causal_bias_and_unused_keys(backend, dtype, shape, causal):
    used = [90, 0, 1, 40, 30]
    count = torch.tensor(used, dtype=torch.int32, device=DEVICES[backend])
    bias = torch.randn(*shape, 130, 130, generator=torch.Generator().manual_seed(5))
    check(
        backend,
        dtype,
        lambda qkv, b: ops.attention(
            *(qkv, starts(LENGTHS, backend), 130),
            **dict(causal=causal, bias=b, seqused_k=count, window=11),
        ),
        lambda qkv, b: plain(qkv, LENGTHS, causal=causal, bias=b, used=used, window=11),
        [inputs(32, 2, LENGTHS), bias.bfloat16().float()],
        fp32=2e-5,  # a shared bias sums thousands of terms of both signs
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_windows_without_keys_are_zero(backend):
    """Padded rows further than the window from the last key that is used."""
    lengths, used = [70, 5], torch.tensor([20, 0], dtype=torch.int32, device=DEVICES[backend])
    qkv = inputs(32, 2, lengths).to(used.device).requires_grad_()
    with ops.backend(backend):
        out = ops.attention(qkv, starts(lengths, backend), 70, seqused_k=used, window=8)
        out.square().sum().backward()
    assert (out[28:] == 0).all() and (qkv.grad[28:] == 0).all()
    assert (out[:28] != 0).any(-1).all() and (qkv.grad[:27, 0] != 0).any(-1).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_dropout(backend):
    """The mask is by key position, whatever the window: bit for bit."""
    lengths, heads, p = [9, 70], 2, 0.3
    masks = masks_of(lengths, heads, p)
    seed = torch.tensor([12345678901, 7], device=DEVICES[backend])
    check(
        backend,
        torch.float32,
        lambda qkv: ops.attention(
            qkv, starts(lengths, backend), 70, dropout_p=p, seed=seed, window=13
        ),
        lambda qkv: plain(qkv, lengths, window=13, masks=masks),
        [inputs(32, heads, lengths)],
    )


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, in Triton's interpreter
@pytest.mark.parametrize("value", [math.inf, math.nan])
@pytest.mark.parametrize("backend", BACKENDS)
def test_sequences_are_apart(backend, value):
    stay_apart(backend, value, window=6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_views_and_positions(backend):
    """Strided and misaligned inputs; far keys are not so much as read."""
    n, window = 200, 10
    cu, dense = starts([n], backend), inputs(24, 2, [n]).to(DEVICES[backend])
    misaligned = torch.zeros(dense.numel() + 1, device=cu.device)[1:].view_as(dense).copy_(dense)
    flipped = dense.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
    truth = plain(dense.double().cpu(), [n], window=window)
    with ops.backend(backend):
        for qkv in (dense, misaligned, flipped):
            close_to_truth(ops.attention(qkv, cu, n, window=window), truth, floor=1e-5)
        if backend == "reference":
            return
        far = dense.clone()
        far[150:, 1:] = math.nan
        out = ops.attention(far, cu, n, window=window)
    close_to_truth(out[:80], truth[:80], floor=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_repeat(backend):
    lengths = [40 if backend == INTERPRETED else 140, 5]
    qkv, cu = inputs(32, 2, lengths).to(DEVICES[backend]), starts(lengths, backend)
    grads = []
    for _ in range(2):
        leaf = qkv.clone().requires_grad_()
        with ops.backend(backend):
            out = ops.attention(leaf, cu, lengths[0], dropout_p=0.1, seed=3, window=20)
            grads.append([out, *torch.autograd.grad(out.square().sum(), leaf)])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.slow
def test_work_grows_with_the_window():
    """Of 4096 tokens a window of 64 to either side costs a small part of all, both ways."""
    n = 4096
    cu, grad = offsets([n]), torch.randn(n, 2, 64)

    def seconds(window):
        leaf = inputs(64, 2, [n]).requires_grad_()
        start = time.perf_counter()
        run_of = ops.attention(leaf, cu, n, window=window)
        forward = time.perf_counter() - start
        run_of.backward(grad)
        return forward, time.perf_counter() - start

    with ops.backend("cpu"):
        seconds(64)
        full, part = (min(seconds(w) for _ in range(3)) for w in (None, 64))
    assert all(p < f / 4 for p, f in zip(part, full, strict=True)), (part, full)


def test_refused():
    qkv, cu = inputs(8, 1, [3]), offsets([3])
    refused(ValueError, "window is -1, expected 0 <= window", ops.attention, qkv, cu, 3, window=-1)
    refused(RuntimeError, "window", ops.attention, qkv, cu, 3, window="x")


def test_fake():
    """Under `torch.compile`, too."""
    qkv = inputs(16, 2, [40]).requires_grad_()
    call = lambda qkv: ops.attention(qkv, offsets([40]), 40, window=5)
    compiled = torch.compile(call, backend="aot_eager", fullgraph=False)
    grad = torch.ones(40, 2, 16)
    for a, b in zip(run(compiled, [qkv], grad), run(call, [qkv], grad), strict=True):
        assert torch.equal(a, b)
