"""Where whole_cpu's time goes: an encoder's layers by part, beside the rate of registers alone."""

from collections.abc import Callable
from typing import TYPE_CHECKING

from ..encoder.packed import PRECISIONS
from ..ops.extension import C

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

CALLS = 3


def layer_parts(
    call: Callable[[], object], config: "PreTrainedConfig", lengths: list[int], precision: str
) -> list[dict]:
    """Of CALLS calls of `call`, which runs an encoder of `config` on sequences of `lengths` tokens:
    a row for each part with the milliseconds of a call, as one of the threads sees them; of
    products GFLOP, GFLOP/s, and the share of what all threads reach with operands in their L1
    caches. Time in which threads wait for others is in none of the rows."""
    tokens, pairs = sum(lengths), sum(n * n for n in lengths)
    hidden, inner = config.hidden_size, config.intermediate_size
    flop = {
        "qkv": 6 * tokens * hidden**2,
        "attention": 4 * hidden * pairs,
        "out": 2 * tokens * hidden**2,
        "up": 2 * tokens * hidden * inner,
        "down": 2 * tokens * hidden * inner,
    }
    code = PRECISIONS.index(precision)
    codes = {"qkv": C.qkv_precision(code), "out": code, "up": code, "down": code}
    rates = {code: C.register_rate(code) for code in {*codes.values()}}
    call()
    C.watch_parts(True)
    for _ in range(CALLS):
        call()
    rows = []
    for part, seconds in C.watch_parts(False):
        row = {"part": part, "milliseconds": round(1e3 * seconds / CALLS, 4)}
        if part in flop and seconds:
            work = flop[part] * config.num_hidden_layers
            row |= {"gflop": round(work / 1e9, 4), "gflops": round(CALLS * work / seconds / 1e9, 1)}
            if part in codes:
                row["share_of_registers"] = round(CALLS * work / seconds / rates[codes[part]], 3)
        rows.append(row)
    return rows
