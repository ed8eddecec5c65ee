import os
import subprocess
import sys
import threading
from contextlib import nullcontext

import pytest
import torch
from helpers import close_to_truth, offsets, refused

from bertfast import ops
from bertfast.ops import registry

cu = offsets([3, 5])


def leaf(*shape):
    return torch.randn(*shape, requires_grad=True)


def samples():
    """Arguments for every operator that is registered."""
    seed, x, w, b = torch.tensor([3, 1]), leaf(8, 6), leaf(4, 6), leaf(4)
    g, h, square = leaf(6), leaf(6), [leaf(6, 6), leaf(6)] * 3
    qkv, ids = leaf(8, 3, 2, 4), torch.arange(8)
    bias, none = leaf(1, 2, 5, 5), (None,) * 5
    rel, index = leaf(3, 2, 4), torch.arange(11, dtype=torch.int32) % 3
    out, lse = (
        t.detach()
        for t in torch.ops.bertfast.attention(qkv, cu, 5, 0.5, 0.0, None, False, None, *none)
    )
    used, saved = torch.tensor([2, 1], dtype=torch.int32), (out, qkv.detach(), out, lse, cu, 5, 0.5)
    kv, cross_bias = leaf(9, 2, 2, 4), leaf(1, 2, 5, 6)
    cross = (cu, torch.tensor([0, 3, 9], dtype=torch.int32), 5, 6, 0.5)
    d = lambda *ts: [t.detach() for t in ts]
    stats = torch.zeros(8), torch.ones(8)
    return {
        "attention": [
            (qkv, cu, 5, 0.5, 0.0, None, False, None, *none),
            (qkv, cu, 5, 0.5, 0.1, seed, True, bias, used, *none[1:]),
            (qkv, cu, 5, 0.5, 0.1, seed, False, None, used, 2, rel, leaf(3, 2, 4), index),
        ],
        "attention_backward": [
            (*saved, 0.1, seed, False, None, *none, False, False),
            (*saved, 0.0, None, False, *d(bias), *none, True, False),
            (*saved, 0.1, seed, False, None, used, 2, None, *d(rel), index, False, True),
        ],
        "cross_attention": [
            (leaf(8, 2, 4), kv, *cross, 0.0, None, False, None),
            (leaf(8, 2, 4), kv, *cross, 0.1, seed, True, cross_bias),
        ],
        "cross_attention_backward": [
            (out, *d(qkv[:, 0], kv), out, lse, *cross, 0.1, seed, False, None, False),
            (out, *d(qkv[:, 0], kv), out, lse, *cross, 0.0, None, False, *d(cross_bias), True),
        ],
        "linear_act": [(x, w, b, 1, True), (x, w, None, 0, False)],
        "linear_act_backward": [(torch.ones(8, 4), *d(x, w, b), torch.ones(8, 4), 1, 7)],
        "qkv_linear": [(x, *square)],
        "qkv_linear_backward": [(torch.ones(8, 18), *d(x, *square[::2]), torch.ones(6), 7)],
        "add_layer_norm": [
            (x, leaf(8, 6), g, h, 1e-5, leaf(6), 0.1, seed),
            (x, None, g, h, 1e-5, None, 0.0, None),
        ],
        "add_layer_norm_backward": [(torch.ones(8, 6), *d(x, x, g), *stats, None, 0.0, None)],
        "embedding_layer_norm": [
            (leaf(9, 6), ids, ids, ids % 2, leaf(8, 6), leaf(2, 6), g, h, 1e-5, 0.1, seed)
        ],
        "embedding_layer_norm_backward": [
            (
                torch.ones(8, 6),
                ids,
                ids,
                ids % 2,
                *d(leaf(9, 6), leaf(8, 6), leaf(2, 6), g),
                *stats,
                0.1,
                seed,
            )
        ],
        "masked_cross_entropy": [
            (leaf(8, 6), leaf(9, 6), leaf(9), ids, -100, 7),
            (leaf(8, 6), leaf(9, 6).detach(), None, ids - 1, -1, 1),
            (*d(leaf(8, 6), leaf(9, 6), leaf(9)), ids, 3, 0),
        ],
        "pack_indices": [(torch.tensor([[1, 0], [1, 1]]),), (torch.tensor([[1, 0], [1, 1]]), 3)],
        "gather_rows": [(x, torch.tensor([1, 5]))],
        "scatter_rows": [(leaf(2, 6), torch.tensor([1, 5]), 8)],
    }


@pytest.mark.seconds
@pytest.mark.parametrize("name", sorted(registry._table))
def test_opcheck(name):
    for arguments in samples()[name]:
        torch.library.opcheck(getattr(torch.ops.bertfast, name).default, arguments)


def public():
    x, mask = leaf(2, 5, 6), torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])

    def packed(x, mask):
        p, indices, _, _ = ops.pack(x, mask)
        return ops.unpack(p * 2, indices, 2, 5)

    ids = torch.arange(8)
    labels = torch.where(ids % 3 == 0, ids, -100)
    return {
        "attention": (lambda q: ops.attention(q, cu, 5, dropout_p=0.1, seed=3), [leaf(8, 3, 2, 4)]),
        "cross_attention": (
            lambda q, kv: ops.cross_attention(q, kv, cu, cu, 5, 5, dropout_p=0.1, seed=3),
            [leaf(8, 2, 4), leaf(8, 2, 2, 4)],
        ),
        "linear_act": (
            lambda x, w, b: ops.linear_act(x, w, b, "gelu"),
            [leaf(8, 6), leaf(4, 6), leaf(4)],
        ),
        "qkv_linear": (
            lambda x, w: ops.qkv_linear(x, w, None, w, None, w, None),
            [leaf(8, 6), leaf(6, 6)],
        ),
        "add_layer_norm": (
            lambda x, w: ops.add_layer_norm(x, x, w, w, 1e-5),
            [leaf(8, 6), leaf(6)],
        ),
        "embedding_layer_norm": (
            lambda t, w: ops.embedding_layer_norm(ids, ids, ids, t, t, t, w, w, 1e-5),
            [leaf(8, 6), leaf(6)],
        ),
        "masked_cross_entropy": (
            lambda x, w: ops.masked_cross_entropy(x, w, None, labels),
            [leaf(8, 6), leaf(9, 6)],
        ),
        "pack": (lambda x: packed(x, mask), [x]),
    }


def compiled(name, backend):
    function, tensors = public()[name]
    grads = []
    for f in (function, torch.compile(function, fullgraph=True, backend=backend)):
        y = f(*tensors)
        grads.append([y, *torch.autograd.grad(y.square().sum(), tensors)])
    for eager, graph in zip(*grads, strict=True):
        close_to_truth(graph, eager, floor=1e-5)


@pytest.mark.parametrize("name", sorted(public()))
def test_compile_full_graph(name):
    compiled(name, "aot_eager")


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(public()))
def test_compile_inductor(name):
    compiled(name, "inductor")


def test_forced_backend_says_why():
    x, w = torch.randn(3, 4).double(), torch.randn(5, 4).double()
    with ops.backend("cpu"):
        refused(RuntimeError, "'cpu' can't serve linear_act: .*float64", ops.linear_act, x, w)
    with ops.backend("triton"):
        refused(RuntimeError, "'triton' can't serve linear_act", ops.linear_act, x, w)
    ops.linear_act(x, w)  # unforced: the reference takes fp64


def test_nesting_and_names():
    refused(
        ValueError,
        "unknown backend 'tpu'; expected one of reference, cpu",
        ops.backend("tpu").__enter__,
    )
    with ops.backend("reference"):
        with pytest.raises(KeyError), ops.backend("cpu"):
            assert registry.forced() == "cpu"
            raise KeyError
        assert registry.forced() == "reference"
    assert registry.forced() == (os.environ.get("BERTFAST_BACKEND") or None)


@pytest.mark.parametrize("name", sorted(set(public()) - {"masked_cross_entropy"}))
def test_backward_keeps_the_backend(name, monkeypatch):
    """What the forward was forced to serves the backward too, behind the block; others as ever.
    (masked_cross_entropy's gradients are its forward's.)"""
    function, tensors = public()[name]
    with ops.backend("reference"):
        y = function(*tensors)
    used, find = [], registry.find

    def spy(operator, *rest):
        used.append((operator, registry.forced()))
        return find(operator, *rest)

    monkeypatch.setattr(registry, "find", spy)
    y.sum().backward()
    assert used and {forced for _, forced in used} == {"reference"}
    used.clear()
    function(*tensors).sum().backward()
    assert used and {f for _, f in used} == {os.environ.get("BERTFAST_BACKEND") or None}


def test_threads_force_their_own():
    """Also where blocks begin and end in another order than they are nested in."""
    names = ("reference", "cpu", None)
    together, seen = threading.Barrier(len(names), timeout=30), {}

    def work(name):
        with ops.backend(name) if name else nullcontext():
            together.wait()  # all are in their blocks
            seen[name] = [registry.forced()]
            with ops.backend("reference"):
                together.wait()
            seen[name].append(registry.forced())
            together.wait()
        seen[name].append(registry.forced())

    threads = [threading.Thread(target=work, args=(name,)) for name in names]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    everywhere = os.environ.get("BERTFAST_BACKEND")
    assert seen == {n: [n or everywhere, n or everywhere, everywhere] for n in names}


def test_default_is_cpu_and_serves_all():
    assert all(names[0] == "cpu" for names in registry.served().values())


def run_python(code, **env):
    return subprocess.run(
        [sys.executable, "-c", code], env=os.environ | env, capture_output=True, text=True
    )


@pytest.mark.seconds
def test_environment():
    code = (
        "import torch; from bertfast import ops; ops.linear_act(torch.ones(1, 1), torch.ones(1, 1))"
    )
    assert run_python(code, BERTFAST_BACKEND="reference").returncode == 0
    assert "unknown backend 'x'" in run_python(code, BERTFAST_BACKEND="x").stderr
    assert (
        "expected one of the instruction sets built"
        in run_python(code, BERTFAST_CPU_ISA="x").stderr
    )
