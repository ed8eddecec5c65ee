"""`make bench`: what a CPU can show beside its rivals in about 20 minutes, and the report.

    python benchmarks/suite.py [--isa NAME] [PART ...]

--isa holds us and, where they can be told, our rivals to an instruction set, whose results have a
folder of their own.
Each part is a script of its own here, in a process of its own. All are forked from one that has
imported torch and transformers, which alone takes each of them nine seconds.
"""

import argparse
import multiprocessing
import os
import runpy
import sys
import time
from pathlib import Path

import bertfast
from bertfast.bench.command import say
from bertfast.bench.measure import held_to

OPERATORS = "--benchmark-group-by=group --benchmark-max-time=0.1 --benchmark-min-rounds=3"
OPERATORS += " --benchmark-columns=median,iqr,rounds --benchmark-json=build/ops.json"
PARTS = {
    "test_ops": OPERATORS,
    "encoder_inference": "--rounds 2",
    "dropin": "--rounds 2 --steps 4",
    "model_families": "--rounds 2",
    "frozen": "--rounds 2 --ranked 500",
    "training_step": "--rounds 3 --curve 0 --workloads base-8x128 base-natural",
    "memory": "--models BERT-base",
    "sweep": "--rounds 2",
    "threads": "--seconds 60",
    "breakdown": "--rounds 2",
    "rivals_memory": "--precisions fp32 int8",
    "report": "",
}
IMPORTED = ["bertfast", "transformers.models.bert.modeling_bert"]


def run(part: str) -> None:
    script = str(Path(__file__).with_name(f"{part}.py"))
    sys.argv = [script, *PARTS[part].split()]
    if part.startswith("test_"):
        sys.argv.insert(0, "pytest")
        runpy.run_module("pytest", run_name="__main__")
    else:
        runpy.run_path(script, run_name="__main__")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    text = f"of {', '.join(PARTS)} (default: all)"
    parser.add_argument("parts", nargs="*", metavar="PART", help=text)
    isas = bertfast.build_info()["isas_built"]
    parser.add_argument("--isa", choices=isas, help="an instruction set (default: the best)")
    args = parser.parse_args()
    parts, start = args.parts or list(PARTS), time.monotonic()
    os.environ.update(held_to(args.isa) if args.isa else {})
    if unknown := [part for part in parts if part not in PARTS]:
        parser.error(f"no part {', '.join(unknown)}, expected some {text}")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)
    for i, part in enumerate(parts, 1):
        say(f"part {i} of {len(parts)}, {part} {PARTS[part]}")
        began = time.monotonic()
        process = context.Process(target=run, args=(part,))
        process.start()
        process.join()
        if process.exitcode:
            sys.exit(f"{part} failed with {process.exitcode}")
        now = time.monotonic()
        say(f"{part} took {now - began:.0f} s, {now - start:.0f} s in all")


if __name__ == "__main__":
    main()
