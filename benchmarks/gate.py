"""The regression gate: ratios of times on this CPU, held against benchmarks/baseline.json.

    python benchmarks/gate.py            (exit 1 where a ratio fell: tests/bench/test_gate.py)
    python benchmarks/gate.py --write    (records this machine's ratios, by instruction set)

A ratio is of two medians in one interleaved run, so that another machine, or a busy one, changes it
little. One that fell below FLOOR of the baseline's is measured again, with more rounds, and fails
only if it is below once more.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
import transformers
from harness import minilm

import bertfast
from bertfast.bench import train
from bertfast.bench.encoder import agreement, wrong
from bertfast.bench.measure import commit, emulated, natural_lengths, random_batch, take_turns
from bertfast.bench.rivals import Frozen, Loaded, Sdpa

BASELINE = Path(__file__).with_name("baseline.json")
FLOOR = 0.6
ROUNDS, AGAIN = 7, 15


def isa() -> str | None:
    """What the baselines are keyed by; None without the extension."""
    return bertfast.build_info().get("cpu_isa")


@torch.inference_mode()
def inference(rounds) -> dict[str, float]:
    """MiniLM on 16 natural-length sentences; no ratios of what torch has no instructions for."""
    folder, threads = minilm(), torch.get_num_threads()
    config = transformers.BertConfig.from_pretrained(folder)
    lengths = natural_lengths(16)
    batch = random_batch(lengths, max(lengths), config.vocab_size)
    runs, expected = {}, None
    for cls, precision in (
        *((Sdpa, "fp32"), (Loaded, "fp32"), (Frozen, "fp32"), (Frozen, "bf16"), (Frozen, "int8")),
        (Sdpa, "bf16"),
    ):
        if cls is Sdpa and emulated(precision):
            continue
        rival = cls(folder, precision, threads)
        if expected is None:
            expected = rival(batch)
        note = wrong(cls, precision, agreement(rival, [batch], [expected]))
        if note:
            raise SystemExit(f"{cls.name}, {precision}: {note}")
        runs[f"{cls.name} {precision}"] = lambda rival=rival: rival(batch)
    t = take_turns(runs, rounds, seconds=0.05)
    ratios = {
        "inference fp32, transformers sdpa / bertfast": ("transformers sdpa fp32", "bertfast fp32"),
        "inference fp32, transformers sdpa / frozen": (
            "transformers sdpa fp32",
            "bertfast frozen fp32",
        ),
        "inference bf16, transformers sdpa / frozen": (
            "transformers sdpa bf16",
            "bertfast frozen bf16",
        ),
        "inference, frozen fp32 / bf16": ("bertfast frozen fp32", "bertfast frozen bf16"),
        "inference, frozen fp32 / int8": ("bertfast frozen fp32", "bertfast frozen int8"),
    }
    return {name: t[a] / t[b] for name, (a, b) in ratios.items() if a in t}


def training(rounds) -> dict[str, float]:
    """A step of MiniLM with a classifier on 8 natural-length sentences, fp32."""
    torch.manual_seed(0)
    model = transformers.BertForSequenceClassification.from_pretrained(minilm()).eval()
    lengths = natural_lengths(8)
    batch = random_batch(lengths, max(lengths), model.config.vocab_size)
    batch["labels"] = train.labels_of("classify", batch, 2)
    found = train.cell(model, "classify", ("bertfast", "sdpa"), batch, "fp32", rounds)
    t = {row["name"]: row["milliseconds"] for row in found["rows"]}
    return {"training fp32, transformers sdpa / bertfast": t["transformers sdpa"] / t["bertfast"]}


PARTS = {"inference": inference, "training": training}  # a ratio's first word is its part


def measure(rounds=ROUNDS, parts=PARTS) -> dict[str, float]:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    found = {}
    for part in parts:
        found |= PARTS[part](rounds)
    return {name: round(ratio, 3) for name, ratio in found.items()}


def fallen(found: dict, baseline: dict) -> list[str]:
    """The ratios below FLOOR of the baseline's; one that is missing has fallen too."""
    return [name for name, ratio in baseline.items() if not found.get(name, 0) >= FLOOR * ratio]


def check(baseline: dict) -> list[str]:
    """What is slower than the baseline allows, twice measured; a sentence each."""
    found = measure()
    again = fallen(found, baseline)
    if again:
        parts = [p for p in PARTS if any(name.startswith(p) for name in again)]
        found |= measure(AGAIN, parts)
    return [
        f"{name}: {found.get(name)}, less than {FLOOR} of the baseline's {baseline[name]}"
        for name in fallen(found, {name: baseline[name] for name in again})
    ]


def baselines() -> dict:
    return json.loads(BASELINE.read_text()) if BASELINE.exists() else {}


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="record this machine's ratios")
    args = parser.parse_args(argv)
    name = isa()
    if name is None:
        parser.error("the gate needs the compiled extension")
    if args.write:
        ratios = measure(AGAIN)
        entry = {"commit": commit(), "threads": torch.get_num_threads(), "ratios": ratios}
        BASELINE.write_text(json.dumps(baselines() | {name: entry}, indent=2) + "\n")
        print(json.dumps(ratios, indent=2))
        return 0
    if name not in baselines():
        print(f"no baseline for {name}: `python benchmarks/gate.py --write` records one")
        return 0
    slower = check(baselines()[name]["ratios"])
    print("\n".join(slower) or "as fast as the baseline")
    return 1 if slower else 0


if __name__ == "__main__":
    sys.exit(main())
