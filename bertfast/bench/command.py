"""`bertfast bench`: the table to stdout, progress to stderr, all of it to a JSON file."""

import argparse
import itertools
import os
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..files import json_text
from ..model.presets import PRESETS, bert_config
from ..ops.registry import BACKENDS
from ..progress import Say
from ..train.config import ConfigError
from ..train.outputs import check_result, write_result
from . import encoder, memory, ops, train
from .measure import aligned, origin, padded_lengths, random_batch
from .rivals import IMPLEMENTATIONS, Rival

if TYPE_CHECKING:
    from ..model.bert import BertModel

KINDS = ("encoder", "train", "ops")
CHOICES = {
    "encoder": list(IMPLEMENTATIONS),
    "train": list(train.IMPLEMENTATIONS),
    "ops": [*BACKENDS, ops.PLAIN],
}
DEFAULTS = {  # without the compiled ones, which take minutes to begin
    "encoder": ["bertfast", "frozen", "sdpa", "eager"],
    "train": ["bertfast", "sdpa", "eager"],
    "ops": CHOICES["ops"],
}
COLUMNS = {  # of the table: the rows' key, its title, the format
    "milliseconds": ("ms", "{:.3f}"),
    "tokens_per_second": ("tokens/s", "{:d}"),
    "useful_gflops": ("GFLOP/s", "{:.1f}"),
    "gb_per_second": ("GB/s", "{:.0f}"),
    "share_of_peak": ("of matmul peak", "{:.0%}"),
    "share_of_bandwidth": ("of copy rate", "{:.0%}"),
    "bertfast_speedup": ("bertfast's best", "{:.2f}x"),
    "scaling": ("one thread's speed", "{:.2f}x"),
    "max_error": ("error", "{:.1e}"),
    "relative_error": ("relative error", "{:.1e}"),
    "cosine": ("cosine", "{:.5f}"),
    "imports_mb": ("imports, MB", "{:d}"),
    "load_peak_mb": ("loading, MB", "{:d}"),
    "inference_peak_mb": ("inference, MB", "{:d}"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("kind", nargs="?", choices=KINDS, default="encoder")
    kinds = "; ".join(f"{kind}: {' '.join(names)}" for kind, names in CHOICES.items())
    parser.add_argument("--impl", nargs="+", metavar="NAME", help=f"of {kinds}")
    parser.add_argument("--batch", nargs="+", type=int, default=[8], metavar="N")
    parser.add_argument("--seq", nargs="+", type=int, default=[128], metavar="N", help="tokens")
    text = "shares of the positions that are padding (default: 0)"
    parser.add_argument("--pad-ratio", nargs="+", type=float, default=[0.0], metavar="R", help=text)
    parser.add_argument("--dtype", nargs="+", choices=encoder.PRECISIONS, default=["fp32"])
    text = f"a checkpoint's folder, or random weights: {', '.join(PRESETS)} (default: base)"
    parser.add_argument("--model", default="base", metavar="FOLDER", help=text)
    parser.add_argument("--task", choices=train.TASKS, default="classify", help="of train")
    parser.add_argument("--op", nargs="+", choices=ops.OPERATORS, default=list(ops.OPERATORS))
    parser.add_argument("--rounds", type=int, default=7, help="a time is their median (default: 7)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    text = "encoder's peak memory in processes of their own, instead of times"
    parser.add_argument("--memory", action="store_true", help=text)
    parser.add_argument("--json", metavar="FILE", help="write rows, settings and versions here")


def check(args: argparse.Namespace) -> None:
    """Raises ConfigError for settings that don't go together."""
    args.impl = args.impl or DEFAULTS[args.kind]
    for name in args.impl:
        if name not in CHOICES[args.kind]:
            known = ", ".join(CHOICES[args.kind])
            raise ConfigError(f"--impl {name!r} of {args.kind}: expected some of {known}")
    for name in ("batch", "seq", "rounds", "threads"):
        value = getattr(args, name)
        if min(value if isinstance(value, list) else [value]) < 1:
            raise ConfigError(f"--{name} is {value}, expected 1 or more")
    for batch, seq, ratio in itertools.product(args.batch, args.seq, args.pad_ratio):
        try:
            padded_lengths(batch, seq, ratio)
        except ValueError as error:
            raise ConfigError(f"--{str(error).replace(' ', '-', 1)}") from None
    if args.kind != "encoder" and "int8" in args.dtype:
        raise ConfigError(f"{args.kind} has no int8: --dtype fp32 or bf16")
    if args.memory and (args.kind != "encoder" or args.device != "cpu"):
        raise ConfigError("--memory goes with `bertfast bench encoder` on the CPU")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("torch sees no GPU here: --device cpu")
    if args.json and not Path(args.json).resolve().parent.is_dir():
        raise ConfigError(f"--json {args.json}: no such folder")
    if args.json:
        check_result(args.json, args.model or "")
    config = bert_config(args.model)
    if max(args.seq) > config.max_position_embeddings:
        raise ConfigError(
            f"--seq is {max(args.seq)}, expected at most {config.max_position_embeddings}, the "
            f"positions of {args.model}"
        )


def say(text: str) -> None:
    print(f"bertfast bench: {text}", file=sys.stderr, flush=True)


def load(model: str, head: str) -> "BertModel":
    """transformers' model with this head, of a folder or of a preset with random weights."""
    import transformers

    torch.manual_seed(0)
    cls = getattr(transformers, head)
    if model in PRESETS:
        return cls(bert_config(model)).eval()
    return cls.from_pretrained(model, dtype=torch.float32).eval()


@contextmanager
def checkpoint(model: str) -> Iterator[str]:
    """The model's folder; a preset's is temporary."""
    if model not in PRESETS:
        yield model
        return
    with tempfile.TemporaryDirectory() as folder:
        say(f"writing a BERT-{model} with random weights")
        load(model, "BertModel").save_pretrained(folder)
        yield folder


def on(device: str, batch: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value.to(device) for name, value in batch.items()}


def shapes(args: argparse.Namespace) -> Iterator[tuple[str, list[int], int]]:
    """Each title, lengths and seqlen that is asked for."""
    for batch, seq, ratio in itertools.product(args.batch, args.seq, args.pad_ratio):
        title = f"{batch} x {seq}, {ratio:.0%} padding"
        yield title, padded_lengths(batch, seq, ratio), seq


@torch.inference_mode()
def encoder_cells(args: argparse.Namespace) -> Iterator[tuple[str, dict]]:
    classes = [IMPLEMENTATIONS[name] for name in args.impl]
    with checkpoint(args.model) as folder:
        reference = load(folder, "BertModel")
        for precision in args.dtype:
            if args.memory:
                for title, lengths, seq in shapes(args):
                    rows = memory_rows(args, classes, folder, precision, lengths, seq, reference)
                    yield f"memory, {title}, {precision}", {"rows": rows}
                continue
            rivals, rows = encoder.build(classes, folder, precision, args.threads, args.device, say)
            for title, lengths, seq in shapes(args):
                say(f"{title}, {precision}")
                batch = random_batch(lengths, seq, reference.config.vocab_size)
                expected = reference.to(args.device)(**on(args.device, batch)).last_hidden_state
                yield (
                    f"inference, {title}, {precision}",
                    encoder.cell(
                        *(rivals, rows, [on(args.device, batch)], [expected], precision),
                        *(reference.config, args.rounds, args.device, say),
                    ),
                )


def memory_rows(
    args: argparse.Namespace,
    classes: Iterable[type[Rival]],
    folder: str,
    precision: str,
    lengths: Sequence[int],
    seq: int,
    reference: Any,
) -> list[dict]:
    rows = []
    for cls in classes:
        note = cls.available()
        if note is None and precision not in cls.precisions:
            note = f"has no {precision}"
        if note is None:
            say(f"memory of {cls.name}, {precision}")
            sizes = (lengths, seq, reference.config.vocab_size)
            try:
                found = memory.measure(cls, folder, precision, args.threads, *sizes)
            except RuntimeError as error:
                note = str(error)
        rows.append({"name": cls.name, **({"note": note} if note else found)})
    return rows


def train_cells(args: argparse.Namespace) -> Iterator[tuple[str, dict]]:
    reference = load(args.model, train.TASKS[args.task]).to(args.device)
    for precision in args.dtype:
        for title, lengths, seq in shapes(args):
            say(f"{title}, {precision}")
            batch = on(args.device, random_batch(lengths, seq, reference.config.vocab_size))
            batch["labels"] = train.labels_of(args.task, batch, reference.config.vocab_size)
            yield (
                f"training step, {args.task}, {title}, {precision}",
                train.cell(reference, args.task, args.impl, batch, precision, args.rounds, say),
            )


def ops_cells(args: argparse.Namespace) -> Iterator[tuple[str, dict]]:
    config = bert_config(args.model)
    for title, lengths, seq in shapes(args):
        shape = ops.Shape.of(config, lengths, seq, args.device)
        for operator, step, dtype in itertools.product(args.op, ops.STEPS, args.dtype):
            yield (
                f"{operator} {step}, {title}, {dtype}",
                ops.cell(operator, step, dtype, args.impl, shape, args.rounds, say),
            )


def table(title: str, found: dict) -> str:
    """A cell as text: an aligned column for each figure that any row has."""
    rows = found["rows"]
    columns = [key for key in COLUMNS if any(row.get(key) is not None for row in rows)]
    lines = [["", *(COLUMNS[key][0] for key in columns)]]
    for row in rows:
        if "note" in row:
            continue
        values = [row.get(key) for key in columns]
        formats = (COLUMNS[key][1] for key in columns)
        shown = ["" if v is None else f.format(v) for f, v in zip(formats, values, strict=True)]
        lines.append([row["name"], *shown])
    out = [title]
    if "tokens" in found:
        out[0] += f": {found['tokens']} tokens in {found['padded_tokens']} positions"
    if len(lines) > 1:
        out += aligned(lines)
    out += [f"{row['name']}: {row['note']}" for row in rows if "note" in row]
    return "\n".join(out)


def run(args: argparse.Namespace, say: Say = say) -> dict:
    """All cells that `add_arguments`' arguments ask for, printed as they come; the result."""
    check(args)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    before = torch.get_num_threads()
    torch.set_num_threads(args.threads)
    cells = []
    try:
        about = origin(args.device)
        for title, found in {
            "encoder": encoder_cells,
            "train": train_cells,
            "ops": ops_cells,
        }[args.kind](args):
            print(("\n" if cells else "") + table(title, found), flush=True)
            cells.append({"task": title, **found})
    finally:
        torch.set_num_threads(before)
    result = {"benchmark": f"bench {args.kind}", **about, "model": args.model, "cells": cells}
    if args.json:
        write_result(args.json, json_text(result, indent=2) + "\n")
        say(f"wrote {args.json}")
    return result
