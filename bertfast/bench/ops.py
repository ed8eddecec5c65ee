"""The operators' inputs, calls and checks, and the same by plain PyTorch on padded tensors.

"forward" is inference; "training" is forward and backward.
"""

from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from .. import ops
from ..progress import Say
from .encoder import first_line
from .measure import copy, product, take_turns
from .rivals import torch_dtype
from .shape import Shape

STEPS = ("forward", "training")
PLAIN = "torch"  # what transformers' layers run: plain PyTorch, padding included
DROPOUT = 0.1


class Case(NamedTuple):
    leaves: list  # what is differentiated, in fp64
    call: Callable  # (*leaves, **dropout) -> output
    plain: Callable  # (*leaves, p) -> the same; leaves and output padded where `rows` says
    rows: int | None  # so many first leaves, and the output, have a row a token; None: not even it
    flop: int  # of the products of a forward; 0 where memory decides
    elements: int | None = None  # read and written by a forward; None for all leaves and the output


def draw(*shape: int, scale: float = 1.0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64) * scale


def weight(out: int, into: int) -> torch.Tensor:
    return draw(out, into, scale=into**-0.5)


def attention(s: Shape) -> Case:
    mask = None if min(s.lengths) == s.longest else s.mask.bool()[:, None, None, :]

    def plain(qkv, p):
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=p)
        return out.transpose(1, 2)

    return Case(
        [draw(s.tokens, 3, s.heads, s.hidden // s.heads)],
        lambda qkv, **dropout: ops.attention(qkv, s.cu_seqlens, s.longest, **dropout),
        *(plain, 1, s.attention_flop()),
    )


def qkv_linear(s: Shape) -> Case:
    parts = [p for _ in range(3) for p in (weight(s.hidden, s.hidden), draw(s.hidden))]

    def plain(x, wq, bq, wk, bk, wv, bv, p):
        return torch.cat([F.linear(x, wq, bq), F.linear(x, wk, bk), F.linear(x, wv, bv)], -1)

    return Case(
        [draw(s.tokens, s.hidden), *parts],
        lambda *leaves, **_: ops.qkv_linear(*leaves),
        plain,
        1,
        s.linear_flop(s.hidden, 3 * s.hidden),
    )


def linear(s: Shape) -> Case:
    return Case(
        [draw(s.tokens, s.hidden), weight(s.hidden, s.hidden)],
        lambda x, w, **_: ops.linear_act(x, w),
        lambda x, w, p: F.linear(x, w),
        1,
        s.linear_flop(s.hidden, s.hidden),
    )


def linear_act(s: Shape) -> Case:
    return Case(
        [draw(s.tokens, s.hidden), weight(s.inner, s.hidden), draw(s.inner)],
        lambda x, w, b, **_: ops.linear_act(x, w, b, "gelu"),
        lambda x, w, b, p: F.gelu(F.linear(x, w, b)),
        1,
        s.linear_flop(s.hidden, s.inner),
    )


def feed_forward(s: Shape) -> Case:
    up = weight(s.inner, s.hidden), draw(s.inner)
    down = weight(s.hidden, s.inner), draw(s.hidden)
    return Case(
        [draw(s.tokens, s.hidden), *up, *down],
        lambda *leaves, **_: ops.feed_forward(*leaves),
        lambda x, w1, b1, w2, b2, p: F.linear(F.gelu(F.linear(x, w1, b1)), w2, b2),
        1,
        2 * s.linear_flop(s.hidden, s.inner),
    )


def add_layer_norm(s: Shape) -> Case:
    def plain(x, residual, w, b, x_bias, p):
        x = residual + F.dropout(x + x_bias, p)
        return F.layer_norm(x, x.shape[-1:], w, b, 1e-12)

    return Case(
        [*(draw(s.tokens, s.hidden) for _ in range(2)), *(draw(s.hidden) for _ in range(3))],
        lambda x, residual, w, b, x_bias, **dropout: ops.add_layer_norm(
            x, residual, w, b, 1e-12, x_bias=x_bias, **dropout
        ),
        plain,
        2,
        0,
    )


def gated_act(s: Shape) -> Case:
    leaves = [draw(s.tokens, s.inner) for _ in range(2)]
    return Case(leaves, ops.gated_act, lambda up, gate, p: F.dropout(F.gelu(up) * gate, p), 2, 0)


def rotary(s: Shape) -> Case:
    dim = s.hidden // s.heads
    angles = torch.outer(s.positions, 1e4 ** (-torch.arange(0, dim, 2) / dim)).to(s.device)
    angles = torch.stack([angles.cos(), angles.sin()], 1)
    cos, sin = s.pad(torch.cat([angles, angles], -1))[..., None, None, :].unbind(2)

    def plain(qkv, p):
        turned, values = qkv.split([2, 1], 2)
        a, b = turned.chunk(2, -1)
        turned = turned * cos.to(a.dtype) + torch.cat([-b, a], -1) * sin.to(a.dtype)
        return torch.cat([turned, values], 2)

    leaves = [draw(s.tokens, 3, s.heads, dim)]
    return Case(leaves, lambda qkv, **_: ops.rotary(qkv, angles), plain, 1, 0)


def embedding_layer_norm(s: Shape) -> Case:
    ids = torch.randint(s.vocabulary, (s.tokens,)).to(s.device)
    positions, types = s.positions.to(s.device), torch.zeros_like(ids)
    padded = [s.pad(x) for x in (ids, positions, types)]

    def plain(*leaves, p):
        *tables, w, b = leaves
        x = sum(F.embedding(i, table) for i, table in zip(padded, tables, strict=True))
        return F.dropout(F.layer_norm(x, x.shape[-1:], w, b, 1e-12), p)

    rows = (s.vocabulary, max(512, s.longest), 2)
    return Case(
        [*(draw(n, s.hidden) for n in rows), draw(s.hidden), draw(s.hidden)],
        lambda *leaves, **dropout: ops.embedding_layer_norm(
            ids, positions, types, *leaves, 1e-12, **dropout
        ),
        plain,
        0,
        0,
        4 * s.tokens * s.hidden,
    )


def masked_cross_entropy(s: Shape) -> Case:
    labels = torch.randint(s.vocabulary, (s.tokens,))
    labels[torch.rand(s.tokens) > 0.15] = -100
    labels[0] = 0  # there is always one
    labels = labels.to(s.device)
    padded = s.pad(labels + 100) - 100
    return Case(
        [draw(s.tokens, s.hidden), weight(s.vocabulary, s.hidden), draw(s.vocabulary)],
        lambda *leaves, **_: ops.masked_cross_entropy(*leaves, labels),
        lambda x, w, b, p: F.cross_entropy(
            F.linear(x, w, b).flatten(0, 1).float(), padded.flatten(), ignore_index=-100
        ),
        1,
        2 * int((labels >= 0).sum()) * s.hidden * s.vocabulary,
    )


def pack(s: Shape) -> Case:
    real = s.mask.bool()
    return Case(
        [draw(*s.mask.shape, s.hidden)],
        lambda x, **_: ops.pack(x, s.mask)[0],
        lambda x, p: x[real],
        *(None, 0, 2 * s.tokens * s.hidden),
    )


def unpack(s: Shape) -> Case:
    indices = s.mask.flatten().nonzero()[:, 0]
    return Case(
        [draw(s.tokens, s.hidden)],
        lambda x, **_: ops.unpack(x, indices, *s.mask.shape),
        lambda x, p: s.pad(x),
        *(None, 0),
    )


OPERATORS = {
    f.__name__: f
    for f in (
        *(attention, qkv_linear, linear, linear_act, feed_forward, add_layer_norm),
        *(gated_act, rotary, embedding_layer_norm, masked_cross_entropy, pack, unpack),
    )
}


def make(operator: str, shape: Shape) -> Case:
    torch.manual_seed(0)
    assert len(shape.mask) == len(shape.cu_seqlens) - 1  # made here, outside of inference mode
    return OPERATORS[operator](shape)


def build(
    case: Case,
    shape: Shape,
    step: str,
    dtype: torch.dtype,
    dropout: float = 0.0,
    plain: bool = False,
) -> Callable[[], Any]:
    """A call without arguments that gives the output and, in training, every gradient; of the
    real tokens alone. `.raw` is the same without that last selection, for timing."""
    training, padded = step == "training", plain and case.rows is not None
    leaves = [x.to(shape.device, dtype) for x in case.leaves]
    leaves = [shape.pad(x) if padded and i < case.rows else x for i, x in enumerate(leaves)]
    leaves = [x.requires_grad_(training) for x in leaves]
    options = {}
    if dropout and not plain:
        options = {"dropout_p": dropout, "seed": torch.tensor([3, 5], device=shape.device)}
    forward = (
        (lambda: case.plain(*leaves, p=dropout)) if plain else lambda: case.call(*leaves, **options)
    )
    with torch.inference_mode():
        example = forward()
    has_rows = padded and example.dim() > 1
    generator = torch.Generator().manual_seed(1)
    size = (shape.tokens, *example.shape[2:]) if has_rows else example.shape
    grad = torch.randn(size, generator=generator, dtype=torch.float64).to(shape.device, dtype)
    grad = (shape.pad(grad) if has_rows else grad).to(example.dtype).view(example.shape)

    def raw():
        with nullcontext() if training else torch.inference_mode():
            out = forward()
            return [out, *torch.autograd.grad(out, leaves, grad)] if training else [out]

    def run():
        results, real = raw(), shape.mask.bool()
        if has_rows:
            results[0] = results[0][real]
        if padded:
            results[1 : 1 + case.rows] = [g[real] for g in results[1 : 1 + case.rows]]
        return results

    run.raw = raw
    return run


def errors(got: Iterable[torch.Tensor], exact: Iterable[torch.Tensor]) -> list[float]:
    """Of each tensor the largest error, relative to its largest value."""
    return [
        ((g.double() - e.view_as(g)).abs().max() / e.abs().max()).item()
        for g, e in zip(got, exact, strict=True)
    ]


def bounds(dtype: torch.dtype, plain: Iterable[float]) -> list[float]:
    """DESIGN's: fp32 within 1e-5, bf16 within twice the error of PyTorch's own kernels."""
    return [max(1e-5, 2 * e) if dtype == torch.bfloat16 else 1e-5 for e in plain]


def cosine(got: Iterable[torch.Tensor], exact: Iterable[torch.Tensor]) -> float:
    a, b = (torch.cat([t.double().flatten() for t in parts]) for parts in (got, exact))
    return torch.cosine_similarity(a, b, dim=0).item()


def cell(
    operator: str,
    step: str,
    precision: str,
    implementations: Sequence[str],
    shape: Shape,
    rounds: int,
    say: Say = lambda text: None,
) -> dict:
    """One operator in one precision: each implementation (a backend's name, or "torch") held
    against the reference in fp64, then timed in turns.

    Raises: RuntimeError where a backend is wrong.
    """
    case, dtype = make(operator, shape), torch_dtype(precision)
    say(f"checking {operator}, {step}, {precision}")
    with ops.backend("reference"):
        exact = build(case, shape, step, torch.float64)()
        limits = bounds(dtype, errors(build(case, shape, step, dtype)(), exact))
    runs, found, rows = {}, {}, []
    for name in implementations:
        force = nullcontext() if name == PLAIN else ops.backend(name)
        try:
            with force:
                got = build(case, shape, step, dtype, plain=name == PLAIN)()
        except RuntimeError as error:
            if "can't serve" not in str(error):
                raise
            rows.append({"name": name, "note": first_line(error)})
            continue
        worst = errors(got, exact)
        if name != PLAIN and any(not e <= b for e, b in zip(worst, limits, strict=True)):
            raise RuntimeError(
                f"{operator}, {step}, {precision} on {name}: relative errors {worst}, at most "
                f"{limits} expected"
            )
        found[name] = {
            "max_error": float(f"{max(worst):.2e}"),
            "cosine": round(cosine(got, exact), 6),
        }
        del got
        dropout = DROPOUT if step == "training" else 0.0
        run = build(case, shape, step, dtype, dropout, plain=name == PLAIN).raw

        def timed(run=run, name=name):
            with nullcontext() if name == PLAIN else ops.backend(name):
                run()

        runs[name] = timed
    elements = case.elements
    if elements is None:
        elements = sum(x.numel() for x in case.leaves) + exact[0].numel()
    multiply, product_flop = product(precision, shape.device)
    move, moved = copy(shape.device)
    say(f"timing {len(runs)} implementations, {rounds} rounds")
    runs |= {"product": multiply, "copy": move}
    seconds = take_turns(runs, rounds, shape.device, 0.05, one_openmp=True)
    peak, bandwidth = product_flop / seconds.pop("product"), moved / seconds.pop("copy")
    passes = 3 if step == "training" else 1
    flop, size = case.flop * passes, elements * dtype.itemsize * passes
    ours = [t for name, t in seconds.items() if name not in (PLAIN, "reference")]
    timed = [
        {
            "name": name,
            "milliseconds": round(1e3 * t, 4),
            "tokens_per_second": round(shape.tokens / t),
            "useful_gflops": round(flop / t / 1e9, 1),
            "share_of_peak": round(flop / t / peak, 3),
            "share_of_bandwidth": round(size / t / bandwidth, 3),
            "bertfast_speedup": round(t / min(ours), 3) if ours else None,
            **found[name],
        }
        for name, t in sorted(seconds.items(), key=lambda pair: pair[1])
    ]
    return {
        "tokens": shape.tokens,
        "padded_tokens": shape.mask.numel(),
        "flop": flop,
        "bytes": size,
        "rounds": rounds,
        "matmul_peak_gflops": round(peak / 1e9, 1),
        "copy_gb_per_second": round(bandwidth / 1e9, 1),
        "rows": timed + rows,
    }
