"""A layer as one node of autograd against the operators one by one, on the kernels of a GPU."""

import pytest
import torch
from helpers import DEVICES, offsets, relative
from torch.utils._python_dispatch import TorchDispatchMode

from bertfast import ops
from bertfast.model import direct
from bertfast.model.layer import LayerOptions, LayerWeights, encoder_layer

HIDDEN, HEADS, INNER = 64, 2, 96
LENGTHS = (5, 0, 17, 1)
BACKENDS = [name for name in ("triton", "cuda") if name in DEVICES]


def case(backend, dtype=torch.bfloat16, parameters=torch.float32):
    """hidden, weights, seeds and what follows them, for `encoder_layer`."""
    torch.manual_seed(0)
    device, tokens = DEVICES[backend], sum(LENGTHS)
    shapes = {"w1": (INNER, HIDDEN), "b1": (INNER,), "w2": (HIDDEN, INNER)}
    shapes |= dict.fromkeys(("wq", "wk", "wv", "wo"), (HIDDEN, HIDDEN))
    w = []
    for name in LayerWeights._fields:
        p = torch.randn(shapes.get(name, (HIDDEN,))) * 0.3 + (name in ("norm1", "norm2"))
        w.append(torch.nn.Parameter(p.to(device, parameters)))
    hidden = torch.randn(tokens, HIDDEN).to(device, dtype).requires_grad_()
    seeds = ops.draw_seeds(3, device)
    return hidden, LayerWeights(*w), (offsets(LENGTHS).to(device), max(LENGTHS)), seeds


def results(hidden, w, options, batch, seeds, rows, keep_qkv, used=None):
    """The output and all gradients, by one node or, with keep_qkv, by the operators."""
    leaves = (hidden, *w)
    for t in leaves:
        t.grad = None
    y, qkv = encoder_layer(
        hidden, w, options, *batch, seeds, rows, keep_qkv=keep_qkv, seqused_k=used
    )
    assert (qkv is None) != keep_qkv
    torch.manual_seed(1)
    y.backward(torch.randn(y.shape).to(y))
    return [y.detach(), *(t.grad for t in leaves)]


@pytest.mark.parametrize(
    "rows, used", [(None, None), ((0, 6, 21, 22), None), (None, (2, 0, 17, 0))]
)
@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize(
    "dtypes",
    [
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, torch.float32),
    ],
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_same_as_the_operators(backend, dtypes, dropout, rows, used):
    """The same bits, but where weights are cast: once for all, so that another product may serve."""
    hidden, w, batch, seeds = case(backend, *dtypes)
    options = LayerOptions(HEADS, "gelu", 1e-12, dropout, dropout, dropout)
    rows = None if rows is None else torch.tensor(rows, device=hidden.device)
    if used is not None:
        used = torch.tensor(used, dtype=torch.int32, device=hidden.device)
    given = hidden, w, options, batch, seeds, rows
    with ops.backend(backend):
        expected = results(*given, keep_qkv=True, used=used)
        found = results(*given, keep_qkv=False, used=used)
        with torch.no_grad():
            (y, _) = encoder_layer(
                hidden, w, options, *batch, seeds, rows, keep_qkv=False, seqused_k=used
            )
    assert torch.equal(y, found[0])
    names = ("output", "hidden", *LayerWeights._fields)
    for name, f, e in zip(names, found, expected, strict=True):
        assert f.dtype == e.dtype, name
        if dtypes[0] == dtypes[1]:
            assert torch.equal(f, e), name
        elif name != "bk":  # zero but for rounding
            assert relative(f, e.cpu()) < 5e-2, name


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_gradients_that_are_wanted(backend):
    hidden, w, batch, seeds = case(backend, parameters=torch.bfloat16)
    hidden = hidden.detach()
    for name in ("wq", "wk", "wv", "b1", "norm2", "bo"):
        getattr(w, name).requires_grad_(False)
    with ops.backend(backend):
        options = LayerOptions(HEADS, "relu", 1e-12)
        found = results(hidden, w, options, batch, seeds, None, keep_qkv=False)
        expected = results(hidden, w, options, batch, seeds, None, keep_qkv=True)
    for name, f, e in zip(("hidden", *w._fields), found[1:], expected[1:], strict=True):
        assert (f is None) == (e is None), name
        assert f is None or torch.equal(f, e), name


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_second_derivative(backend):
    hidden, w, batch, seeds = case(backend)
    with ops.backend(backend):
        y, _ = encoder_layer(
            hidden, w, LayerOptions(HEADS, "gelu", 1e-12), *batch, seeds, keep_qkv=False
        )
        (g,) = torch.autograd.grad(y.float().sum(), hidden, create_graph=True)
        with pytest.raises(RuntimeError, match="no second derivative"):
            g.float().sum().backward()


@pytest.mark.seconds
@pytest.mark.parametrize("backend", BACKENDS)
def test_batched_gradients(backend):
    hidden, w, batch, seeds = case(backend, parameters=torch.bfloat16)
    options, rows = LayerOptions(HEADS, "gelu", 1e-12), torch.tensor([0, 6], device=hidden.device)
    with ops.backend(backend):
        y, _ = encoder_layer(hidden, w, options, *batch, seeds, rows, keep_qkv=False)
        grads = torch.randn(2, *y.shape).to(y)
        leaves = hidden, w.wq, w.b1
        batched = torch.autograd.grad(y, leaves, grads, is_grads_batched=True, retain_graph=True)
        each = [torch.autograd.grad(y, leaves, g, retain_graph=True) for g in grads]
    for b, e in zip(batched, zip(*each, strict=True), strict=True):
        assert relative(b, torch.stack(e).cpu()) < 1e-2


class Other(torch.Tensor):
    pass


class Watch(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **kwargs or {})


@pytest.mark.parametrize("backend", BACKENDS)
def test_where_it_serves(backend):
    hidden, w, _, _ = case(backend)
    options = LayerOptions(HEADS, "gelu", 1e-12)

    starts = offsets(LENGTHS).to(hidden.device)

    def serves(hidden=hidden, w=w, starts=starts, longest=17, bias=None):
        return direct.serves(hidden, w, options, starts, longest, bias)

    with ops.backend(backend):
        assert serves()
        assert not serves(bias=torch.zeros(1))
        assert not serves(hidden.double())
        assert not serves(starts=starts.long())
        assert not serves(starts=starts[None])
        assert not serves(starts=starts.to("meta"))
        assert not serves(longest=torch.tensor(17))
        assert not serves(w=w._replace(w1=w.w1[:, :8]))
        assert not serves(w=w._replace(b1=w.b1[:8]))
        assert not serves(w=w._replace(wo=w.wo.double()))
        assert not serves(w=w._replace(norm1=w.norm1.as_subclass(Other)))
        with Watch():
            assert not serves()
    if not hidden.is_cuda:
        assert not serves()
