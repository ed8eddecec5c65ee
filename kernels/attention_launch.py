"""How attention's kernels are started: tiles, work items, arguments."""

import math
from typing import NamedTuple

import torch
import triton

from ..ops.dropout import threshold
from .spec import Spec

_TYPES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int32: "i32",
    torch.int64: "i64",
}


class Tile(NamedTuple):
    """m queries and n keys at a time."""

    m: int
    n: int
    warps: int
    stages: int = 2


# By bytes of an element and head dim (rounded up), the tiles by the longest sequence that each is
# for, of keys in forward and of both in backward.
LONG = math.inf
FORWARD = {
    (2, 32): {
        32: Tile(32, 32, 2),
        64: Tile(64, 64, 4),
        128: Tile(64, 128, 4),
        LONG: Tile(128, 64, 4, 3),
    },
    (2, 64): {
        32: Tile(32, 32, 2),
        64: Tile(64, 64, 4),
        128: Tile(64, 128, 4),
        LONG: Tile(128, 64, 4, 3),
    },
    (2, 128): {64: Tile(64, 64, 4), 128: Tile(64, 128, 4), LONG: Tile(128, 64, 8, 2)},
    (4, 32): {LONG: Tile(32, 32, 4)},
    (4, 64): {LONG: Tile(32, 32, 4)},
    (4, 128): {LONG: Tile(32, 32, 4)},
}
WHOLE = {
    (2, 32): {32: Tile(32, 32, 2), 64: Tile(64, 64, 4), 128: Tile(64, 128, 8)},
    (2, 64): {32: Tile(32, 32, 2), 64: Tile(64, 64, 4), 128: Tile(64, 128, 8)},
    (2, 128): {64: Tile(64, 64, 8), 128: Tile(32, 128, 8)},
    (4, 32): {32: Tile(32, 32, 4)},
    (4, 64): {32: Tile(32, 32, 4)},
    (4, 128): {},
}
KEYS = {
    (2, 32): {LONG: Tile(64, 128, 8)},
    (2, 64): {LONG: Tile(64, 128, 8)},
    (2, 128): {LONG: Tile(32, 128, 8)},
    (4, 32): {LONG: Tile(32, 32, 4)},
    (4, 64): {LONG: Tile(32, 32, 4)},
    (4, 128): {LONG: Tile(16, 32, 4)},
}
QUERIES = {
    (2, 32): {LONG: Tile(128, 64, 8)},
    (2, 64): {LONG: Tile(128, 64, 8)},
    (2, 128): {LONG: Tile(64, 64, 8)},
    (4, 32): {LONG: Tile(32, 32, 4)},
    (4, 64): {LONG: Tile(32, 32, 4)},
    (4, 128): {LONG: Tile(32, 32, 4)},
}


def choose(table, q, longest):
    """The tile for sequences up to `longest`, None where the table has none."""
    key = q.element_size(), min(max(triton.next_power_of_2(q.shape[2]), 32), 128)
    return next((tile for limit, tile in table[key].items() if longest <= limit), None)


def work(tokens, starts, longest, size):
    """Work items of `size` rows, and how many each sequence has; None: to be searched, see `place`.

    The host knows no lengths without waiting for the device, so both are bounds.
    """
    batch = starts.shape[0] - 1
    blocks, shared = -(-longest // size), tokens // size + batch
    return (batch * blocks, blocks) if batch * blocks <= shared else (shared, None)


def dense_last(t):
    """With a last dimension that the kernels can read in a row."""
    return t if t.stride(-1) == 1 else t.contiguous()


def arguments(q, k, v, starts_q, starts_k, scale, dropout_p, seed, causal, bias):
    """What all of attention's kernels take. Strides are constants: a model has one set of them,
    and the compiler sees how the rows are aligned."""
    bias = None if bias is None else dense_last(bias)
    steps = (0, 0, 0) if bias is None else bias.stride()[:3]
    dim = q.shape[2]
    return dict(
        q=q,
        k=k,
        v=v,
        starts_q=starts_q.contiguous(),
        starts_k=starts_k.contiguous(),
        bias=bias,
        seed=None if seed is None else seed.contiguous(),
        bias_batch=0 if bias is None or bias.shape[0] == 1 else steps[0],
        bias_head=0 if bias is None or bias.shape[1] == 1 else steps[1],
        bias_query=steps[2],
        batch=starts_q.shape[0] - 1,
        tokens=q.shape[0],
        scale=scale,
        keep_scale=1 / (1 - dropout_p),
        threshold=threshold(dropout_p),
        Q_TOKEN=q.stride(0),
        Q_HEAD=q.stride(1),
        K_TOKEN=k.stride(0),
        K_HEAD=k.stride(1),
        HEADS=q.shape[1],
        DIM=dim,
        D=max(triton.next_power_of_2(dim), 16),
        CAUSAL=causal,
        PRECISION=_precision(),
    )


def _precision():
    """Of fp32 products, as torch's own: TF32 only where the user asked for it."""
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def launch(kernel, programs, tile, arguments):
    if programs:
        kernel[(programs,)](
            **arguments, M=tile.m, N=tile.n, num_warps=tile.warps, num_stages=tile.stages
        )


def recorder(specs):
    """A `launch` that adds to a list what would have been started."""

    def record(kernel, programs, tile, arguments):
        types, constants = {}, {}
        for parameter in kernel.params:
            name = parameter.name
            value = (arguments | tile._asdict())[name.lower() if name in "MN" else name]
            if parameter.is_constexpr or value is None or (name == "blocks" and value == 1):
                constants[name] = value
            elif isinstance(value, torch.Tensor):
                types[name] = "*" + _TYPES[value.dtype]
            else:
                types[name] = "fp32" if isinstance(value, float) else "i32"
        specs.append(Spec(kernel, types, constants, tile.warps, tile.stages))

    return record
