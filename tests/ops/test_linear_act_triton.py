"""What only the Triton backend of linear_act has: several products, and their choice."""

import math

import pytest
import torch
from helpers import DEVICES, check, close_to_truth, refused
from torch.nn import functional as F

from bertfast import ops

pytest.importorskip("triton")
from bertfast.kernels import linear_act as kernel
from bertfast.kernels import linear_act_table as table

pytestmark = pytest.mark.usefixtures("guarded")
DEVICE = DEVICES["triton"]
ARCH = kernel._arch(torch.device(DEVICE))
PRODUCTS = [
    (name, dtype)
    for dtype in (torch.float32, torch.bfloat16, torch.float16)
    for name in sorted(
        {*table.candidates(dtype, ARCH, 128, True), *table.candidates(dtype, ARCH, 128, False)}
    )
]
TMA = [name for name, tile in table.TILES.items() if tile.tma]  # for one weight


def draw(*shape, seed=0):
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return (values / math.sqrt(shape[-1])).bfloat16().float()


@pytest.fixture
def force(monkeypatch):
    """Every choice is `name`; it returns a list that grows with each."""

    def apply(name):
        ran = []
        monkeypatch.setattr(table, "choose", lambda *_: ran.append(name) or name)
        return ran

    return apply


# More rows of tiles than one group has, tiles that end inside, sums with a tail.
@pytest.mark.parametrize("m, n, k", [(150, 264, 72), (1200, 72, 16)])
@pytest.mark.parametrize("name, dtype", PRODUCTS)
def test_every_product(force, name, dtype, m, n, k):
    ran = force(name)
    check(
        "triton",
        dtype,
        lambda *t: ops.linear_act(*t, "gelu"),
        lambda *t: F.gelu(F.linear(*t)),
        [draw(m, k), draw(n, k) * 3, draw(n)],
    )
    assert ran


@pytest.mark.parametrize("name, dtype", [p for p in PRODUCTS if p[0] not in TMA])
def test_scattered_weights(force, name, dtype):
    ran = force(name)
    check(
        "triton",
        dtype,
        lambda x, *t: ops.qkv_linear(x, *t),
        lambda x, *t: torch.cat([F.linear(x, *t[i : i + 2]) for i in (0, 2, 4)], 1),
        [draw(140, 72), *(draw(*s, seed=i) for i in (1, 2, 3) for s in ((136, 72), (136,)))],
    )
    assert ran


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adjacent_weights_are_never_stale(dtype, bias):
    """Views of one buffer serve as they are; a change to one of them shows at the next call."""
    buffer = draw(3 * 40, 24).to(DEVICE, dtype)
    parts, x = buffer.chunk(3), draw(50, 24, seed=1).to(DEVICE, dtype)
    biases = draw(3, 40, seed=2).to(DEVICE, dtype).unbind() if bias else (None,) * 3
    assert kernel._together(parts).data_ptr() == buffer.data_ptr()
    assert kernel._together(parts[::-1]).data_ptr() not in [p.data_ptr() for p in parts]
    assert not kernel._adjacent([p.clone() for p in parts])
    for _ in range(2):
        parts[1].mul_(-2)
        with ops.backend("triton"):
            y = ops.qkv_linear(x, *(t for pair in zip(parts, biases, strict=True) for t in pair))
        exact = [
            F.linear(x.double(), w.double(), None if b is None else b.double())
            for w, b in zip(parts, biases, strict=True)
        ]
        floor = 1e-5 if dtype == torch.float32 else 5e-3
        close_to_truth(y, torch.cat(exact, 1), floor=floor)


@pytest.mark.parametrize("save", [False, True])
@pytest.mark.parametrize("activation", [0, 1, 2, 3])
def test_backward_recomputes(activation, save):
    """The same gradients with and without the stored pre-activation; many rows, whose sums take
    two stages."""
    x, w, b = (t.to(DEVICE) for t in (draw(300, 20), draw(30, 20) * 4, draw(30)))
    grad = draw(300, 30, seed=5).to(DEVICE)
    with ops.backend("triton"):
        z = torch.ops.bertfast.linear_act(x, w, b, activation, True)[1] if save else None
        got = torch.ops.bertfast.linear_act_backward(grad, x, w, b, z, activation, 7)
    with ops.backend("reference"):
        wide = [t.double() for t in (grad, x, w, b)]
        exact = torch.ops.bertfast.linear_act_backward(*wide, None, activation, 7)
    for a, e in zip(got, exact, strict=True):
        assert (a.double() - e).norm() <= 1e-5 * e.norm()


@pytest.mark.parametrize("activation", [1, 2, 3])
def test_gradient_at_infinity(activation):
    """The derivative's limits 0 and 1; NaN stays with its own row."""
    z = torch.tensor([-math.inf, -1e30, -40, 0.5, 40, 1e30, math.inf, math.nan], device=DEVICE)
    x, w = torch.ones(8, 1, device=DEVICE), torch.ones(1, 1, device=DEVICE)
    with ops.backend("triton"):
        dx = torch.ops.bertfast.linear_act_backward(x, x, w, None, z[:, None], activation, 1)[0]
    dx = dx[:, 0].tolist()
    assert dx[:3] == [0, 0, 0] and dx[4:7] == [1, 1, 1]
    assert math.isnan(dx[7]) if activation != 3 else dx[7] == 0


@pytest.mark.seconds
def test_gelu_in_16_bits():
    """Computed without erf: its error beside fp16's rounding, its limits, NaN."""
    ends = [-math.inf, -6e4, -40, 40, 6e4, math.inf, math.nan]
    z = torch.cat([torch.linspace(-9, 9, 4001), torch.tensor(ends)]).half()
    z = z[:, None].to(DEVICE)
    one = torch.ones(1, 1, device=DEVICE).half()
    wide = z[:-7].double().requires_grad_()
    exact = F.gelu(wide)
    exact.sum().backward()
    with ops.backend("triton"):
        y = torch.ops.bertfast.linear_act(z, one, None, 1, False)[0]
        grad = torch.ones_like(z)
        dx = torch.ops.bertfast.linear_act_backward(grad, z, one, None, z, 1, 1)[0]
    for found, true in ((y, exact.detach()), (dx, wide.grad)):
        torch.testing.assert_close(found[:-7].double(), true, rtol=1e-3, atol=3e-6)
    assert y[-7:-1, 0].tolist() == [0, 0, 0, 40, *z[-3:-1, 0].tolist()]
    assert dx[-7:-1, 0].tolist() == [0, 0, 0, 1, 1, 1]
    assert y[-1].isnan() and dx[-1].isnan()


def test_autocast_changes_no_dtype():
    x, w, b = (t.to(DEVICE) for t in (draw(30, 20), draw(24, 20), draw(24)))
    exact = F.gelu(F.linear(x.double(), w.double(), b.double()))
    with torch.autocast(DEVICE, torch.bfloat16), ops.backend("triton"):
        y = ops.linear_act(x, w, b, "gelu")
    assert y.dtype == torch.float32
    close_to_truth(y, exact, floor=1e-5)


def test_tf32_only_when_asked():
    switch = torch.backends.cuda.matmul
    before = switch.fp32_precision
    try:
        for setting, expected in (("ieee", "ieee"), ("tf32", "tf32")):
            switch.fp32_precision = setting
            assert kernel._precision(torch.float32) == expected
            assert kernel._precision(torch.bfloat16) == "ieee"
    finally:
        switch.fp32_precision = before


def test_choice(monkeypatch):
    shape = (90, torch.bfloat16, 5000, 3072, 768)
    assert table.choose(*shape, 0, False, True) == table.CUBLAS
    assert table.choose(*shape, 1, False, True) == "pair"
    assert table.choose(80, *shape[1:], 1, False, True) == "medium"
    assert table.choose(*shape[:4], 64, 1, False, True) == "medium"  # one step
    assert table.choose(*shape, 1, False, False) == "narrow"  # rows that vectors can't read
    assert table.choose(90, torch.float32, *shape[2:], 1, False, True) == table.CUBLAS
    assert table.choose(90, torch.bfloat16, 128, 2304, 768, 0, False, True, 3) == "small"
    assert table.choose(90, torch.bfloat16, 5000, 2304, 768, 0, False, True, 3) == table.CUBLAS
    key = (90, torch.bfloat16, table.bucket(5000), 3072, 768, 1, False, 1)
    monkeypatch.setitem(table.MEASURED, key, "medium")
    assert table.choose(*shape, 1, False, True) == "medium"
    assert table.choose(*shape, 1, True, True) == "pair"  # another key
    assert table.choose(*shape, 1, False, False) == "narrow"  # the measured one can't serve
    assert [table.bucket(m) for m in (1, 16, 17, 4096, 4097, 10**6)] == [
        *(16, 16, 32, 4096, 8192, 65536)
    ]


def test_refuses_other_dtypes():
    x = torch.ones(2, 4, device=DEVICE, dtype=torch.float64)
    with ops.backend("triton"):
        refused(RuntimeError, "not torch.float64", ops.linear_act, x, x)


@pytest.mark.slow
def test_opcheck(monkeypatch):
    """Shapes, strides and aliasing as the operators declare them."""
    monkeypatch.undo()  # tensors between guard bytes have storage offsets
    flat = [t.to(DEVICE) for t in (draw(8, 6), draw(4, 6), draw(4), draw(8, 4), draw(8, 12))]
    fx, fw, fb, y, q = flat
    x, w, b = (t.clone().requires_grad_() for t in flat[:3])
    with ops.backend("triton"):
        for name, arguments in {
            "linear_act": [(x, w, b, 1, True), (x, w, None, 0, False)],
            "linear_act_backward": [(y, fx, fw, fb, y, 1, 7), (y, fx, fw, None, None, 0, 2)],
            "qkv_linear": [(x, w, b, w, b, w, b)],
            "qkv_linear_backward": [(q, fx, fw, fw, fw, fb, 7), (q, fx, fw, fw, fw, None, 1)],
        }.items():
            for a in arguments:
                torch.library.opcheck(getattr(torch.ops.bertfast, name).default, a)
