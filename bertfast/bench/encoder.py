"""A cell of encoder inference: rivals checked against transformers in fp32, then timed in turns."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from ..progress import Say
from .measure import emulated, encoder_flop, product, take_turns

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from .rivals import Rival

PRECISIONS = ("fp32", "bf16", "int8")
# Least cosine of mean-pooled sequences to fp32's: of ours in int8 what random ids, which are no
# text, leave of it, and of rivals sense.
COSINE = {"fp32": 0.99999, "bf16": 0.999, "int8": 0.9}
OURS_COSINE = COSINE | {"int8": 0.99}


def agreement(
    run: Callable[[dict[str, torch.Tensor]], torch.Tensor],
    batches: Sequence[dict[str, torch.Tensor]],
    expected: Sequence[torch.Tensor],
) -> dict:
    """Largest error over real tokens, mean and least cosine of mean-pooled sentences."""
    error, cosines = 0.0, []
    for batch, states in zip(batches, expected, strict=True):
        out = run(batch).float()
        real = batch["attention_mask"].bool()
        error = max(error, (out - states)[real].abs().nan_to_num(math.inf).max().item())
        pooled = [x.masked_fill(~real[..., None], 0).sum(1) for x in (out, states)]
        cosines.append(torch.cosine_similarity(*pooled))
    cosines = torch.cat(cosines)
    return {
        "max_error": float(f"{error:.2e}"),
        "cosine": round(cosines.mean().item(), 6),
        "least_cosine": round(cosines.min().item(), 6),
    }


def wrong(cls: "type[Rival]", precision: str, found: Mapping[str, float]) -> str | None:
    """Why these outputs aren't the model's, if so."""
    bounds = OURS_COSINE if cls.ours else COSINE
    if precision == "fp32" and not found["max_error"] <= cls.tolerance:
        return f"outputs differ by {found['max_error']}, more than {cls.tolerance}"
    if not found["cosine"] >= bounds[precision]:
        return f"cosine {found['cosine']} to fp32, less than {bounds[precision]}"
    return None


def build(
    classes: "Iterable[type[Rival]]",
    folder: str,
    precision: str,
    threads: int,
    device: str = "cpu",
    say: Say = lambda text: None,
) -> "tuple[dict[type[Rival], Rival], list[dict]]":
    """The rivals that can run here, and rows for those that can't."""
    rivals, rows = {}, []
    for cls in classes:
        reason = cls.available()
        if precision not in cls.precisions:
            reason = f"has no {precision}"
        elif device not in cls.devices:
            reason = f"doesn't run on {device}"
        elif cls.on_torch and device == "cpu":
            reason = reason or emulated(precision)
        if reason:
            rows.append({"name": cls.name, "note": reason})
            continue
        say(f"loading {cls.name}, {precision}")
        where = () if device == "cpu" else (device,)
        rivals[cls] = cls(folder, precision, threads, *where)
    return rivals, rows


def first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200] if lines else ''}"


def cell(
    rivals: "dict[type[Rival], Rival]",
    rows: list[dict],
    batches: Sequence[dict[str, torch.Tensor]],
    expected: Sequence[torch.Tensor],
    precision: str,
    config: "PreTrainedConfig",
    rounds: int,
    device: str = "cpu",
    say: Say | None = None,
) -> dict:
    """Every rival checked, then timed over all `batches`: `rows` with times added, best first.

    Raises: RuntimeError where an implementation of ours is wrong; a rival's row says so.
    """
    say = say or (lambda text: None)
    runs, found, rows = {}, {}, list(rows)
    for cls, rival in rivals.items():
        say(f"checking {cls.name}, {precision}")
        try:
            found[cls.name] = agreement(rival, batches, expected)
        except Exception as error:
            if cls.ours:
                raise
            rows.append({"name": cls.name, "note": first_line(error)})
            continue
        note = wrong(cls, precision, found[cls.name])
        if note and cls.ours:
            raise RuntimeError(f"{cls.name}, {precision}: {note}")
        if note:
            rows.append({"name": cls.name, "note": note, **found[cls.name]})
        else:
            runs[cls.name] = lambda rival=rival: [rival(batch) for batch in batches]
    multiply, flop = product(precision, device)
    say(f"timing {len(runs)} implementations, {rounds} rounds")
    multiply()  # the others ran when they were checked
    torch_alone = not any(cls.packages for cls in rivals)
    runs |= {"product": multiply}
    seconds = take_turns(runs, rounds, device, warm=True, one_openmp=torch_alone)
    peak = flop / seconds.pop("product")
    lengths = [batch["attention_mask"].sum(1).tolist() for batch in batches]
    tokens, flop = sum(map(sum, lengths)), sum(encoder_flop(config, drawn) for drawn in lengths)
    ours = [seconds[cls.name] for cls in rivals if cls.ours and cls.name in seconds]
    best = min(ours or seconds.values(), default=None)
    timed = [
        {
            "name": name,
            "milliseconds": round(1e3 * t / len(batches), 4),
            "tokens_per_second": round(tokens / t),
            "useful_gflops": round(flop / t / 1e9, 1),
            "share_of_peak": round(flop / t / peak, 3),
            "bertfast_speedup": round(t / best, 3) if ours else None,
            **found[name],
        }
        for name, t in sorted(seconds.items(), key=lambda pair: pair[1])
    ]
    return {
        "batches": len(batches),
        "tokens": tokens,
        "padded_tokens": sum(batch["input_ids"].numel() for batch in batches),
        "rounds": rounds,
        "matmul_peak_gflops": round(peak / 1e9, 1),
        "rows": timed + rows,
    }
