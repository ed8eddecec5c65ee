"""All that a GPU machine without a network should show, in parts that each fit in minutes.

    python benchmarks/gpu_run.py --out FOLDER [--parts build tests ...] [--again]

Each part writes FOLDER/<part>.log and its JSON, and once it succeeded FOLDER/<part>.done, so that
a second call goes on where the first stopped. The ends of the logs come last on stdout. A speed is
written only after the same run compared the outputs with PyTorch's in fp32.
"""

import argparse
import os
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]  # before bertfast is built there is no harness
LIMIT = 480  # seconds that a part may take
OPERATORS = "add_layer_norm attention cross_attention dropout embedding_layer_norm linear_act"
OPERATORS += " linear_act_triton masked_cross_entropy pack graphs node families"
CUDA = "attention_cuda cuda_linear whole_cuda"
TAIL = {"tests": 40, "memcheck": 8, "racecheck": 8}  # lines of a log to show


def tests(names):
    return [str(next(ROOT.glob(f"tests/**/test_{name}.py"))) for name in names.split()]


def commands(out: Path) -> dict[str, list[str]]:
    python = [sys.executable]
    pytest = [*python, "-P", "-m", "pytest", "-q", "--tb=short"]  # -P: no `import kernels`
    workers = ["-n", "12"] if find_spec("xdist") else []
    checked = [*pytest, "-x", "-k", "(triton or cuda) and forward_backward"]
    encoder = [*python, "benchmarks/gpu_encoder.py", "--out", str(out), "--config"]
    again = [*python, "benchmarks/gpu_encoder.py", "--out", str(out / "compiled")]
    return {
        "build": [*python, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "-e", "."],
        "tests": [*pytest, *workers, "-k", "not cpu", *tests(f"{OPERATORS} {CUDA}")],
        "operators": [*python, "benchmarks/gpu_ops.py", "--out", str(out)],
        "encoder_base": [*encoder, "base", "--profile"],
        "encoder_large": [*encoder, "large"],
        "linear_act": [*python, "benchmarks/linear_act_table.py"],
        "memcheck": [
            *("compute-sanitizer", "--error-exitcode", "9"),
            *(*checked, *tests("add_layer_norm attention")),
        ],
        "racecheck": [
            *("compute-sanitizer", "--tool", "racecheck", "--error-exitcode", "9"),
            *(*checked, *tests("attention_cuda cuda_linear")),
        ],
        "compiled": [*again, "--config", "base", "--compiled"],
    }


def run(part: str, command: list[str], out: Path, limit: float) -> str:
    environment = os.environ | {"BERTFAST_CUDA": "on", "CUDAARCHS": "90a-real"}
    environment |= {"HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    if part == "build":  # the CPU's kernels are no matter here
        environment["CMAKE_ARGS"] = "-DBERTFAST_ONE_ISA=ON"
    with open(out / f"{part}.log", "w") as log:
        try:
            done = subprocess.run(
                command, cwd=ROOT, env=environment, stdout=log, stderr=log, timeout=limit
            )
            return "ok" if done.returncode == 0 else "FAILED"
        except (OSError, subprocess.TimeoutExpired) as e:
            print(e, file=log)
            return "FAILED"


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--parts", nargs="+", help="only these, in this order")
    parser.add_argument("--again", action="store_true", help="parts that are done as well")
    parser.add_argument("--limit", type=float, default=LIMIT, help="seconds that a part may take")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    made = commands(args.out.resolve())
    parts = args.parts or list(made)
    for part in parts:
        if part not in made:
            parser.error(f"--parts names {part!r}, expected some of {', '.join(made)}")
    if not torch.cuda.is_available():
        parser.error("torch sees no GPU here")
    failed, lines = False, []
    for part in parts:
        mark, start = args.out / f"{part}.done", time.perf_counter()
        again = args.again or not mark.exists()
        state = run(part, made[part], args.out, args.limit) if again else "done before"
        if state == "ok":
            mark.touch()
        failed |= state == "FAILED"
        lines.append(f"{part:16} {state:12} {time.perf_counter() - start:6.0f} s")
        print(lines[-1], flush=True)
    for part in parts:
        log = (args.out / f"{part}.log").read_text(errors="replace").splitlines()
        print(f"--- {part}", *log[-TAIL.get(part, 30 if part != "build" else 3) :], sep="\n")
    print("---", *lines, sep="\n")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
