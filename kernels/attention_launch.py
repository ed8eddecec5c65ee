"""How attention's kernels are started: tiles, work items, arguments."""

import functools
import itertools
import math
from typing import NamedTuple

import torch

from ..ops.dropout import threshold
from .jit import power_of_2
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
    stages: int = 1


LONG = math.inf
# By kernel and architecture, then by bytes of an element and head dim (rounded up): the tile for
# sequences up to a length; of keys for "forward" and "queries", of queries for "keys", of both for
# "whole", which is "keys" where a tile holds every sequence. Where forward's n reaches the length,
# the softmax is a single pass. None of these spills registers; benchmarks/gpu_tune_attention.py
# times others.
TILES = {
    ("forward", 80): {
        (2, 32): {
            32: Tile(32, 32, 2), 64: Tile(64, 64, 4), 128: Tile(64, 128, 4),
            256: Tile(64, 64, 4, 2), LONG: Tile(128, 64, 8, 3),
        },
        (2, 64): {
            32: Tile(32, 32, 4), 64: Tile(64, 64, 4), 128: Tile(64, 128, 4),
            256: Tile(64, 64, 4, 2), LONG: Tile(128, 64, 8, 3),
        },
        (2, 128): {
            32: Tile(32, 32, 2), 64: Tile(32, 64, 4), 128: Tile(64, 128, 8),
            LONG: Tile(64, 32, 8, 2),
        },
        (4, 32): {LONG: Tile(32, 32, 8)},
        (4, 64): {LONG: Tile(32, 32, 4)},
        (4, 128): {LONG: Tile(32, 32, 8)},
    },
    ("forward", 90): {
        (2, 32): {
            32: Tile(32, 32, 2), 64: Tile(64, 64, 4), 128: Tile(64, 128, 4),
            256: Tile(64, 64, 4, 2), LONG: Tile(128, 64, 8, 3),
        },
        (2, 64): {
            32: Tile(32, 32, 4), 64: Tile(64, 64, 4), 128: Tile(64, 128, 4),
            LONG: Tile(64, 64, 4, 3),
        },
        (2, 128): {
            32: Tile(32, 32, 4), 64: Tile(64, 64, 4), 128: Tile(64, 128, 8),
            LONG: Tile(128, 64, 8, 2),
        },
        (4, 32): {LONG: Tile(32, 32, 8)},
        (4, 64): {LONG: Tile(32, 32, 4)},
        (4, 128): {LONG: Tile(32, 32, 8)},
    },
    ("whole", 80): {
        (2, 32): {32: Tile(32, 32, 2), 64: Tile(64, 64, 4), 128: Tile(64, 128, 8)},
        (2, 64): {32: Tile(32, 32, 4), 64: Tile(32, 64, 4), 128: Tile(32, 128, 8)},
        (2, 128): {32: Tile(16, 32, 4), 64: Tile(16, 64, 8)},
        (4, 32): {32: Tile(32, 32, 8)},
        (4, 64): {32: Tile(16, 32, 8)},
        (4, 128): {},
    },
    ("whole", 90): {
        (2, 32): {32: Tile(32, 32, 2), 64: Tile(64, 64, 4), 128: Tile(64, 128, 8, 2)},
        (2, 64): {32: Tile(32, 32, 4), 64: Tile(32, 64, 4), 128: Tile(64, 128, 8, 1)},
        (2, 128): {32: Tile(32, 32, 4), 64: Tile(32, 64, 8)},
        (4, 32): {32: Tile(32, 32, 4)},
        (4, 64): {32: Tile(16, 32, 8)},
        (4, 128): {},
    },
    ("queries", 80): {
        (2, 32): {LONG: Tile(128, 64, 8, 2)},
        (2, 64): {LONG: Tile(128, 32, 8, 2)},
        (2, 128): {LONG: Tile(64, 32, 8, 2)},
        (4, 32): {LONG: Tile(32, 32, 4)},
        (4, 64): {LONG: Tile(32, 32, 8)},
        (4, 128): {LONG: Tile(32, 16, 8, 2)},
    },
    ("queries", 90): {
        (2, 32): {LONG: Tile(128, 64, 8, 2)},
        (2, 64): {LONG: Tile(64, 64, 4, 2)},
        (2, 128): {LONG: Tile(128, 32, 8, 2)},
        (4, 32): {LONG: Tile(32, 32, 4)},
        (4, 64): {LONG: Tile(32, 32, 8)},
        (4, 128): {LONG: Tile(32, 32, 8, 2)},
    },
    ("keys", 80): {
        (2, 32): {LONG: Tile(64, 128, 8, 2)},
        (2, 64): {LONG: Tile(32, 128, 8, 2)},
        (2, 128): {LONG: Tile(32, 64, 8, 2)},
        (4, 32): {LONG: Tile(16, 32, 8)},
        (4, 64): {LONG: Tile(16, 32, 8)},
        (4, 128): {LONG: Tile(16, 16, 8)},
    },
    ("keys", 90): {
        (2, 32): {LONG: Tile(64, 128, 8, 2)},
        (2, 64): {LONG: Tile(32, 64, 4, 2)},
        (2, 128): {LONG: Tile(32, 64, 8, 2)},
        (4, 32): {LONG: Tile(16, 32, 4)},
        (4, 64): {LONG: Tile(16, 32, 8)},
        (4, 128): {LONG: Tile(16, 16, 8)},
    },
    # Where there is a bias, its tile takes the registers; instead of the above.
    ("forward", "bias"): {
        (2, 32): {LONG: Tile(64, 32, 4, 2)},
        (2, 64): {LONG: Tile(64, 64, 4, 2)},
        (2, 128): {LONG: Tile(32, 32, 8, 2)},
        (4, 64): {LONG: Tile(32, 32, 8)},
        (4, 128): {LONG: Tile(16, 16, 8)},
    },
    ("whole", "bias"): {
        (2, 32): {32: Tile(32, 32, 4)},
        (2, 64): {32: Tile(32, 32, 4)},
        (2, 128): {},
        (4, 32): {},
        (4, 64): {},
    },
    ("queries", "bias"): {
        (2, 32): {LONG: Tile(64, 32, 8, 2)},
        (2, 64): {LONG: Tile(64, 32, 8, 2)},
        (2, 128): {LONG: Tile(32, 32, 8, 2)},
        (4, 32): {LONG: Tile(32, 32, 8)},
        (4, 128): {LONG: Tile(16, 16, 8, 2)},
    },
    ("keys", "bias"): {
        (2, 32): {LONG: Tile(16, 64, 4, 2)},
        (2, 64): {LONG: Tile(16, 64, 4, 2)},
        (2, 128): {LONG: Tile(32, 32, 8, 2)},
    },
    # With a window a few of the above spill.
    ("forward", "window"): {
        (2, 32): {LONG: Tile(64, 64, 4)},
        (4, 64): {LONG: Tile(32, 32, 8)},
    },
    ("queries", "window"): {(4, 32): {LONG: Tile(32, 32, 8)}},
    ("keys", "window"): {(4, 32): {LONG: Tile(16, 32, 4)}},
}  # fmt: skip
# With relative positions, whose tiles are square; "distances" sums their gradients.
_RELATIVE = {
    "forward": {
        (2, 32): {32: Tile(32, 32, 4), LONG: Tile(64, 64, 8, 2)},
        (2, 64): {LONG: Tile(32, 32, 8)},
        (2, 128): {LONG: Tile(32, 32, 8)},
        (4, 32): {LONG: Tile(32, 32, 8)},
        (4, 64): {LONG: Tile(16, 16, 8)},
        (4, 128): {LONG: Tile(16, 16, 8, 2)},
    },
    "queries": {
        (2, 32): {LONG: Tile(32, 32, 4)},
        (2, 64): {LONG: Tile(32, 32, 8)},
        (2, 128): {LONG: Tile(32, 32, 8)},
        (4, 32): {LONG: Tile(32, 32, 8)},
        (4, 64): {LONG: Tile(16, 16, 8)},
        (4, 128): {LONG: Tile(16, 16, 8, 2)},
    },
    "keys": {
        (2, 32): {LONG: Tile(32, 32, 8)},
        (2, 64): {LONG: Tile(32, 32, 4)},
        (2, 128): {LONG: Tile(32, 32, 8, 2)},
        (4, 32): {LONG: Tile(32, 32, 8)},
        (4, 64): {LONG: Tile(16, 16, 4, 2)},
        (4, 128): {LONG: Tile(16, 16, 8, 2)},
    },
    "distances": {
        (2, 32): {LONG: Tile(32, 32, 8)},
        (2, 64): {LONG: Tile(32, 32, 4)},
        (2, 128): {LONG: Tile(16, 16, 4)},
        (4, 32): {LONG: Tile(32, 32, 8)},
        (4, 64): {LONG: Tile(16, 16, 8, 2)},
        (4, 128): {LONG: Tile(16, 16, 8)},
    },
}  # fmt: skip
_HOPPER = {(2, 64): {32: Tile(32, 32, 4), LONG: Tile(64, 64, 8, 2)}}
for _kernel, _tiles in _RELATIVE.items():
    TILES[f"{_kernel} relative", 80] = TILES[f"{_kernel} relative", 90] = _tiles
TILES["forward relative", 90] = _RELATIVE["forward"] | _HOPPER
BUCKETS = Tile(16, 16, 4)  # buckets and distances


def choose(kernel, arch, q, longest, bias, window=None):
    """The tile for sequences up to `longest`, None where the table has none."""
    key = q.element_size(), max(power_of_2(q.shape[2]), 32)
    # Of the rest, sm_86, 89 and 120 have an A100's registers and less shared memory.
    tiles = TILES[kernel, 90 if arch in (90, 100, 103) else 80][key]
    if window is not None:
        tiles = TILES.get((kernel, "window"), {}).get(key, tiles)
    if bias is not None:
        tiles = TILES.get((kernel, "bias"), {}).get(key, tiles)
    return next((tile for limit, tile in tiles.items() if longest <= limit), None)


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


def arguments(
    q, k, v, starts_q, starts_k, scale, dropout_p, seed, causal, bias, seqused_k, window=None,
    rel_key=None, rel_query=None, rel_index=None,
):  # fmt: skip
    """What all of attention's kernels take. Strides are constants: a model has one set of them,
    and the compiler sees how the rows are aligned. rel_index begins with the distance of 0."""
    if rel_index is not None:
        rel_index = rel_index.contiguous()[rel_index.shape[0] // 2 :]
    bias = None if bias is None else dense_last(bias)
    steps = (0, 0, 0) if bias is None else bias.stride()[:3]
    dim = q.shape[2]
    return dict(
        q=q,
        k=k,
        v=v,
        starts_q=starts_q.contiguous(),
        starts_k=starts_k.contiguous(),
        seqused_k=None if seqused_k is None else seqused_k.contiguous(),
        bias=bias,
        seed=None if seed is None else seed.contiguous(),
        window=window,
        rel_key=None if rel_key is None else rel_key.contiguous(),
        rel_query=None if rel_query is None else rel_query.contiguous(),
        rel_index=rel_index,
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
        D=max(power_of_2(dim), 16),
        CAUSAL=causal,
        PRECISION=precision(),
    )


def bounded(window, longest):
    """The window, None where every key of a sequence is within."""
    return None if window is None or window >= longest - 1 else window


def precision():
    """Of fp32 products, as torch's own: TF32 only where the user asked for it."""
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


class Launch:
    """Starts kernels. `Record` only writes down which."""

    @staticmethod
    @functools.cache
    def arch(device):
        """90 for an H100; of the interpreter 80."""
        if device.type != "cuda":
            return 80
        major, minor = torch.cuda.get_device_capability(device)
        return 10 * major + minor

    def __call__(self, kernel, programs, tile, arguments):
        if programs:
            arguments |= {"M": tile.m, "N": tile.n}
            kernel[(programs,)](
                *[arguments[name] for name in kernel.names],
                num_warps=tile.warps,
                num_stages=tile.stages,
            )


class Record(Launch):
    def __init__(self, arch):
        self.specs, self.arch = [], lambda device: arch

    def __call__(self, kernel, programs, tile, arguments):
        types, constants = {}, {}
        arguments = arguments | dict(M=tile.m, N=tile.n)
        for parameter in kernel.params:
            name, value = parameter.name, arguments[parameter.name]
            if parameter.is_constexpr or value is None or (name == "blocks" and value == 1):
                constants[name] = value
            elif isinstance(value, torch.Tensor):
                types[name] = "*" + _TYPES[value.dtype]
            else:
                types[name] = "fp32" if isinstance(value, float) else "i32"
        arch = self.arch(None)
        self.specs.append(Spec(kernel, types, constants, tile.warps, tile.stages, arch))


launch = Launch()


# What a call has beside the table's dimensions.
_MORE = (
    "", "dropout", "causal, bias and dropout", "window", "window, dropout and unused keys",
    "relative", "relative, dropout and unused keys",
)  # fmt: skip


def variants(run):
    """Every `Spec` of run(launch, qkv, starts, longest, *options), once: by the table, and with
    what is in `_MORE`."""
    empty = functools.partial(torch.empty, device="meta")
    starts = empty(33, dtype=torch.int32)
    seed, heads, seen = empty(2, dtype=torch.int64), 12, set()
    for arch, (dtype, longests), dim, more in itertools.product(
        (80, 90),
        {torch.bfloat16: (32, 64, 128, 256, 512), torch.float32: (32, 512)}.items(),
        (32, 64, 128),
        _MORE,
    ):
        for longest in longests:
            bias = empty(1, heads, longest, longest, dtype=dtype) if "bias" in more else None
            record, drop = Record(arch), "dropout" in more
            used = starts[1:] if "bias" in more or "unused" in more else None
            rel, index = None, None
            if "relative" in more:
                rel = empty(512, heads, dim, dtype=dtype)
                index = empty(1023, dtype=torch.int32)
            call = (0.125, 0.1 if drop else 0.0, seed if drop else None, "causal" in more, bias)
            call += (used, 64 if "window" in more else None, rel, rel, index)
            run(record, empty(4096, 3, heads, dim, dtype=dtype), starts, longest, *call)
            for spec in record.specs:
                key = repr(spec._replace(arch=80))
                if key not in seen:
                    seen.add(key)
                    yield spec
