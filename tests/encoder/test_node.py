"""A layer as one node of autograd against the operators one by one."""

import pytest
import torch
from helpers import DEVICES, cases, offsets, relative
from torch.utils._python_dispatch import TorchDispatchMode

from bertfast import ops
from bertfast.encoder import Batch, DropoutRates, Layer, LayerSpec, LayerWeights
from bertfast.encoder.executors import node, operators
from bertfast.encoder.spec import DROPOUTS
from bertfast.encoder.watch import dispatch_limit
from bertfast.encoder.weights import BERT, FLAT, NORMS, shapes

HEADS, SPEC = 2, LayerSpec(64, 2, 32, 96, "gelu", 1e-12)
LENGTHS = (5, 0, 17, 1)
BACKENDS = [name for name in ("cpu", "triton", "cuda") if name in DEVICES]
NAMES = [f"{role}.{part}" for role, part in FLAT[:BERT]]


def case(backend, dtype=torch.bfloat16, parameters=torch.float32, dropout=0.0, spec=SPEC):
    """A layer and a batch for it."""
    torch.manual_seed(0)
    device, flat = DEVICES[backend], []
    for name, shape in zip(NAMES, shapes(spec)[:BERT], strict=True):
        p = torch.randn(shape) * 0.3 + (name in [f"{norm}.weight" for norm in NORMS])
        flat.append(torch.nn.Parameter(p.to(device, parameters)))
    hidden = torch.randn(sum(LENGTHS), spec.hidden).to(device, dtype).requires_grad_()
    layer = Layer(spec, LayerWeights.of(flat), DropoutRates(*[dropout] * 3))
    starts, seeds = offsets(LENGTHS).to(device), ops.draw_seeds(DROPOUTS, device)
    return layer, Batch(hidden, starts, max(LENGTHS), seeds=seeds)


def results(executor, layer, batch):
    """The output and all gradients."""
    leaves = [batch.hidden, *layer.weights.present()]
    leaves += [] if batch.bias is None else [batch.bias]
    for t in leaves:
        t.grad = None
    y = executor.run([layer], batch)
    torch.manual_seed(1)
    y.backward(torch.randn(y.shape).to(y))
    return [y.detach(), *(t.grad for t in leaves)]


@pytest.mark.seconds
@pytest.mark.parametrize(
    "backend, dtypes, dropout, of_rows",
    cases(
        BACKENDS,
        [
            (torch.float32, torch.float32),
            (torch.bfloat16, torch.bfloat16),
            (torch.bfloat16, torch.float32),
        ],
        [0.0, 0.2],
        [(None, None), ((0, 6, 21, 22), None), (None, (2, 0, 17, 0))],
    ),
)
def test_same_as_the_operators(backend, dtypes, dropout, of_rows):
    """The same bits, but where weights are cast: once for all, so that another product may serve."""
    rows, used = of_rows
    layer, batch = case(backend, *dtypes, dropout)
    device = batch.hidden.device
    if rows is not None:
        batch = batch._replace(rows=torch.tensor(rows, device=device))
    if used is not None:
        batch = batch._replace(seqused_k=torch.tensor(used, dtype=torch.int32, device=device))
    with ops.backend(backend):
        expected = results(operators, layer, batch)
        assert node.limit([layer], batch) is None
        found = results(node, layer, batch)
        with torch.no_grad():
            y = node.run([layer], batch)
    assert torch.equal(y, found[0])
    for name, f, e in zip(("output", "hidden", *NAMES), found, expected, strict=True):
        assert f.dtype == e.dtype, name
        if dtypes[0] == dtypes[1] or backend == "cpu":
            assert torch.equal(f, e), name
        elif name != "key.bias":  # zero but for rounding
            assert relative(f, e.cpu()) < 5e-2, name


@pytest.mark.parametrize("bias_gradient", [True, False])
def test_bias_on_the_scores(bias_gradient):
    layer, batch = case("cpu", torch.float32, dropout=0.2)
    bias = torch.randn(1, HEADS, 17, 17, requires_grad=bias_gradient)
    batch = batch._replace(bias=bias)
    assert node.limit([layer], batch) is None
    expected, found = (results(executor, layer, batch) for executor in (operators, node))
    for f, e in zip(found, expected, strict=True):
        assert (f is None) == (e is None)
        assert f is None or torch.equal(f, e)


def test_only_the_bias_is_trained():
    layer, batch = case("cpu", torch.float32)
    for p in layer.weights.present():
        p.requires_grad_(False)
    bias = torch.randn(1, HEADS, 17, 17, requires_grad=True)
    batch = batch._replace(hidden=batch.hidden.detach(), bias=bias)
    *_, expected = results(operators, layer, batch)
    *_, found = results(node, layer, batch)
    assert expected.any() and torch.equal(found, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_gradients_that_are_wanted(backend):
    spec = SPEC._replace(activation="relu")
    layer, batch = case(backend, parameters=torch.bfloat16, spec=spec)
    batch = batch._replace(hidden=batch.hidden.detach())
    w = layer.weights
    for p in (w.query.weight, w.key.weight, w.value.weight, w.up.bias, w.norm2.weight, w.out.bias):
        p.requires_grad_(False)
    with ops.backend(backend):
        found, expected = (results(executor, layer, batch) for executor in (node, operators))
    for name, f, e in zip(("hidden", *NAMES), found[1:], expected[1:], strict=True):
        assert (f is None) == (e is None), name
        assert f is None or torch.equal(f, e), name


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_second_derivative(backend):
    layer, batch = case(backend)
    with ops.backend(backend):
        y = node.run([layer], batch)
        (g,) = torch.autograd.grad(y.float().sum(), batch.hidden, create_graph=True)
        with pytest.raises(RuntimeError, match="no second derivative"):
            g.float().sum().backward()


@pytest.mark.seconds
@pytest.mark.parametrize("backend", BACKENDS)
def test_batched_gradients(backend):
    layer, batch = case(backend, parameters=torch.bfloat16)
    batch = batch._replace(rows=torch.tensor([0, 6], device=batch.hidden.device))
    with ops.backend(backend):
        y = node.run([layer], batch)
        grads = torch.randn(2, *y.shape).to(y)
        leaves = batch.hidden, layer.weights.query.weight, layer.weights.up.bias
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
    layer, batch = case(backend)
    w, starts = layer.weights, batch.cu_seqlens

    def serves(role=None, change=None, **others):
        pair = {} if role is None else {role: change(getattr(w, role))}
        changed = layer._replace(weights=w._replace(**pair))
        return node.limit([changed], batch._replace(**others)) is None

    with ops.backend(backend):
        assert serves()
        assert serves(bias=torch.zeros(1)) == (backend == "cpu")
        assert not serves(hidden=batch.hidden.double())
        assert not serves(cu_seqlens=starts.long())
        assert not serves(cu_seqlens=starts[None])
        assert not serves(cu_seqlens=starts.to("meta"))
        assert not serves(longest=torch.tensor(17))
        assert not serves("up", lambda p: p._replace(weight=p.weight[:, :8]))
        assert not serves("up", lambda p: p._replace(bias=p.bias[:8]))
        assert not serves("out", lambda p: p._replace(weight=p.weight.double()))
        assert not serves("key", lambda p: p._replace(weight=p.weight.bfloat16()))
        with Watch():
            assert dispatch_limit(batch.hidden)
        assert dispatch_limit(batch.hidden.detach().as_subclass(Other))
    with ops.backend("reference"):
        assert not serves()
