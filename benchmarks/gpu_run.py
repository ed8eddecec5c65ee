"""All that a GPU machine without a network should show, what tells most first, in parts of under
three minutes.

    python benchmarks/gpu_run.py --out FOLDER [--parts build parity ...] [--again]
        [--total 700] [--archive FILE.tgz]

Each part writes FOLDER/<part>.log and its JSON, and once it succeeded FOLDER/<part>.done, so that
a second call goes on where the first stopped. Parts end by themselves in their time, with what they
have; of --total's seconds those begin that still fit. --archive is FOLDER, written anew after every
part. A speed is written only after the same run compared the outputs, and of training the
gradients, with PyTorch's in fp32. A line for each cell comes last on stdout.
"""

import argparse
import json
import os
import subprocess
import sys
import tarfile
import time
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import torch

ROOT = Path(__file__).resolve().parents[1]  # before bertfast is built there is no harness
GRACE = 25  # seconds that a part may take beyond those it is told
OPERATORS = "add_layer_norm attention cross_attention dropout embedding_layer_norm linear_act"
OPTIONS = "attention_window attention_relative"
OPERATORS += " gated_act rotary linear_act_triton masked_cross_entropy pack node families"
CUDA = "attention_cuda cuda_linear whole_cuda"
PARITY = "graphs replay replay_training replay_memory seen step node"
TAIL = 15  # lines of a failed part's log


class Part(NamedTuple):
    seconds: int  # that it may take
    command: list[str]


def tests(names):
    return [str(p) for name in names.split() for p in sorted(ROOT.glob(f"tests/**/test_{name}.py"))]


def parts_of(out: Path) -> dict[str, Part]:
    """By name, what tells most first."""
    python = [sys.executable]
    workers = ["-n", "12"] if find_spec("xdist") else []
    pytest = [
        *python,
        "-P",
        "-m",
        "pytest",
        "-q",
        "--tb=short",
        *workers,
    ]  # -P: no `import kernels`
    sanitizer = ["compute-sanitizer", "--error-exitcode", "9"]

    def script(seconds, name, *options, out=out):
        command = [*python, f"benchmarks/gpu_{name}.py", *options]
        return Part(seconds, [*command, "--out", str(out), "--seconds", str(seconds - GRACE)])

    def checker(seconds, *options):
        command = [*sanitizer, *options, *python, "benchmarks/gpu_sanitize.py"]
        return Part(seconds, [*command, "--seconds", str(seconds - GRACE)])

    install = [*python, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "-e", "."]
    return {
        "build": Part(170, install),
        "parity": Part(90, [*pytest, "-k", "not cpu", *tests(PARITY)]),
        "options": Part(120, [*pytest, "-k", "triton", *tests(OPTIONS)]),
        "inference_base": script(110, "inference"),
        "finetune_base": script(165, "training"),
        "checks": script(60, "training", "--what", "checks"),
        "threads": Part(85, [*python, "benchmarks/threads.py", "--out", str(out)]),  # of its CPU
        "pretrain_large": script(100, "training", "--what", "pretrain", "--config", "large"),
        "inference_large": script(100, "inference", "--config", "large"),
        "inference_modernbert": script(110, "inference", "--family", "ModernBERT-base"),
        "inference_deberta": script(110, "inference", "--family", "DeBERTa-v3-base"),
        "finetune_modernbert": script(165, "training", "--family", "ModernBERT-base"),
        "finetune_deberta": script(165, "training", "--family", "DeBERTa-v3-base"),
        "tune_attention": script(165, "tune_attention"),
        "tune_norm": script(70, "tune_norm"),
        "tune_linear": script(90, "tune_linear"),
        "memcheck": checker(70),
        "racecheck": checker(70, "--tool", "racecheck"),
        "compiled_inference": script(170, "inference", "--compiled"),
        "compiled_finetune": script(170, "training", "--what", "compiled"),
        "finetune_large": script(120, "training", "--config", "large"),
        "operators": Part(170, [*python, "benchmarks/gpu_ops.py", "--out", str(out)]),
        "tests": Part(170, [*pytest, "-k", "not cpu", *tests(f"{OPERATORS} {CUDA}")]),
        "linear_act": Part(170, [*python, "benchmarks/linear_act_table.py"]),
        "profile": Part(60, [*python, "benchmarks/gpu_profile.py", "--out", str(out)]),
    }


def run(name: str, part: Part, out: Path, limit: float) -> str:
    environment = os.environ | {"BERTFAST_CUDA": "on", "CUDAARCHS": "90a-real"}
    environment |= {"HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1", "TQDM_DISABLE": "1"}
    if name == "build":  # the CPU's kernels are no matter here
        environment["CMAKE_ARGS"] = "-DBERTFAST_ONE_ISA=ON"
    with open(out / f"{name}.log", "w") as log:
        try:
            done = subprocess.run(
                part.command, cwd=ROOT, env=environment, stdout=log, stderr=log, timeout=limit
            )
            return "ok" if done.returncode == 0 else "FAILED"
        except (OSError, subprocess.TimeoutExpired) as e:
            print(e, file=log)
            return "FAILED"


def archive(out: Path, file: Path | None) -> None:
    if file is not None:
        with tarfile.open(file, "w:gz") as tar:
            tar.add(out, arcname=out.name)


def summary(out: Path):
    """A line for each cell of the results, the quickest first, and what was checked beside them."""
    for path in sorted(out.glob("*.json")):
        result = json.loads(path.read_text())
        for cell in result["cells"]:
            rows = cell["rows"]
            if path.stem.startswith("tune"):  # the best, and whom they are to be held against
                timed = [r for r in rows if "note" not in r]
                rows = timed[:3] + [r for r in timed[3:] if "(" not in r["name"]]
            rows = [f"{r['name']} {r.get('milliseconds', r.get('note'))}" for r in rows]
            yield f"{cell['task']}: {'; '.join(rows)}"
        yield from (f"{key}: {value}" for key, value in result.get("notes", {}).items())


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--parts", nargs="+", help="only these, in this order")
    parser.add_argument("--again", action="store_true", help="parts that are done as well")
    parser.add_argument("--total", type=float, default=700, help="seconds that all may take")
    parser.add_argument("--archive", type=Path, help="a file for all of --out, for taking it away")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    made = parts_of(args.out.resolve())
    parts = args.parts or list(made)
    for name in parts:
        if name not in made:
            parser.error(f"--parts names {name!r}, expected some of {', '.join(made)}")
    if not torch.cuda.is_available():
        parser.error("torch sees no GPU here")
    states, began = {}, time.perf_counter()
    for name in parts:
        mark, start = args.out / f"{name}.done", time.perf_counter()
        left = args.total - (start - began)
        if mark.exists() and not args.again:
            states[name] = "done before"
        elif left < made[name].seconds:
            states[name] = "no time"
        else:
            states[name] = run(name, made[name], args.out, made[name].seconds)
            archive(args.out, args.archive)
        if states[name] == "ok":
            mark.touch()
        print(f"{name:18} {states[name]:12} {time.perf_counter() - start:6.0f} s", flush=True)
    print(*summary(args.out), sep="\n")
    for name in [name for name, state in states.items() if state == "FAILED"]:
        log = (args.out / f"{name}.log").read_text(errors="replace").splitlines()
        print(f"--- {name} FAILED", *log[-TAIL:], sep="\n")
    archive(args.out, args.archive)
    return int("FAILED" in states.values())


if __name__ == "__main__":
    sys.exit(main())
