"""Compiles every shipped variant of every Triton kernel for sm_80 and sm_90, without a GPU.

    python benchmarks/triton_table.py           the table in docs/triton.md; 1 where one spills
    python benchmarks/triton_table.py --json        the figures on stdout instead
    python benchmarks/triton_table.py --variants    of benchmarks/variants: its README.md

A kernel's file in kernels/ names its variants by `shipped()`, one in benchmarks/variants what it
tries by `specs()`. Registers and spills are ptxas's, shared memory is Triton's.
"""

import argparse
import contextlib
import importlib
import io
import json
import os
import pkgutil
import re
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from multiprocessing import get_context
from pathlib import Path

DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "triton.md"
VARIANTS = Path(__file__).resolve().parent / "variants"
BEGIN, END = "<!-- benchmarks/triton_table.py -->\n", "<!-- end -->\n"
# Compute capability: the shared memory that a program may have there, in bytes (CUDA C++
# programming guide, technical specifications per compute capability).
ARCHITECTURES = {80: 163 * 1024, 90: 227 * 1024}


@cache
def shipped(name: str) -> list:
    """(what it is, `Spec`) of a module's variants."""
    module = importlib.import_module(name)
    if hasattr(module, "specs"):
        return list(module.specs())
    return [
        (f"{spec.types} {spec.constants} warps {spec.num_warps}", spec)
        for spec in getattr(module, "shipped", list)()
    ]


def modules(package: str) -> list[str]:
    path = importlib.import_module(package).__path__
    return [f"{package}.{m.name}" for m in sorted(pkgutil.iter_modules(path))]


def figures(job) -> dict:
    """Compile variant `index` of a module for an architecture."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    module, index, architecture = job
    variant, spec = shipped(module)[index]
    names = spec.kernel.names
    source = ASTSource(
        spec.kernel.function,
        {name: spec.types.get(name, "constexpr") for name in names},
        {(names.index(name),): value for name, value in spec.constants.items()},
        {
            (names.index(name),): [["tt.divisibility", 16]]
            for name, kind in spec.types.items()
            if kind.startswith("*")
        },
    )
    row = {
        "file": module.rsplit(".", 1)[1],
        "kernel": spec.kernel.function.__name__.lstrip("_"),
        "variant": variant,
        "architecture": architecture,
    }
    log = io.StringIO()
    try:
        with contextlib.redirect_stdout(log):  # ptxas -v, by TRITON_DUMP_PTXAS_LOG
            compiled = triton.compile(
                source,
                target=GPUTarget("cuda", architecture, 32),
                options={"num_warps": spec.num_warps, "num_stages": spec.num_stages},
            )
    except Exception as error:
        raise RuntimeError(f"{row} does not compile: {error}") from error

    def number(pattern):
        found = re.search(pattern, log.getvalue())
        if found is None:
            raise RuntimeError(f"{row}: no {pattern!r} in ptxas's log {log.getvalue()[:500]!r}")
        return int(found[1])

    return row | {
        "registers": number(r"Used (\d+) registers"),
        "shared": compiled.metadata.shared,
        "spills": number(r"(\d+) bytes spill stores") + number(r"(\d+) bytes spill loads"),
    }


def compile_all(package: str, workers: int, share: str) -> list[dict]:
    first, step = map(int, share.split("/"))
    jobs = [
        (module, i, architecture)
        for module in modules(package)
        for i, (_, spec) in enumerate(shipped(module))
        for architecture in ARCHITECTURES
        if architecture >= spec.arch
    ][first::step]
    # Spawned, not forked: torch has threads by now.
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        rows = []
        for row in pool.map(figures, jobs):
            rows.append(row)
            if sys.stderr.isatty() or len(rows) % 20 == 0 or len(rows) == len(jobs):
                print(f"{len(rows)} of {len(jobs)} compiled", file=sys.stderr)
    return rows


def table(rows: list[dict]) -> str:
    """A line for each kernel and architecture: the range over its variants."""
    lines = [
        "| file | kernel | GPU | variants | registers | shared memory, bytes | spills, bytes |",
        "| --- | --- | --- | ---: | ---: | ---: | ---: |",
    ]
    span = lambda values: f"{min(values)}-{max(values)}" if len(set(values)) > 1 else values[0]
    for file, kernel, architecture in sorted(
        {(r["file"], r["kernel"], r["architecture"]) for r in rows}
    ):
        mine = [
            r
            for r in rows
            if (r["file"], r["kernel"], r["architecture"]) == (file, kernel, architecture)
        ]
        cells = [span([r[key] for r in mine]) for key in ("registers", "shared", "spills")]
        cells = [f"`{file}`", f"`{kernel}`", f"sm_{architecture}", len(mine), *cells]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines) + "\n"


def every(rows: list[dict]) -> str:
    """benchmarks/variants/README.md: the ranges, and what spills."""
    from importlib.metadata import version

    spilled = [
        f"- {r['file']}, sm_{r['architecture']}: {r['variant']}: {r['spills']} bytes"
        for r in rows
        if r["spills"]
    ]
    return (
        "# Variants, compiled\n"
        f"By `benchmarks/triton_table.py --variants`, Triton {version('triton')} and its ptxas. No "
        "time is known of any:\n`benchmarks/gpu_tune_*.py` measure them. With tensor descriptors "
        "they need sm_90.\n\n" + table(rows) + "\nThese spill:\n\n" + "\n".join(spilled) + "\n"
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="figures to stdout, docs untouched")
    parser.add_argument("--variants", action="store_true", help="those of benchmarks/variants")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--share", default="0/1", help="I/N: every Nth variant, from the Ith on")
    options = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET is 1: interpreted kernels can't be compiled; unset it")
    with tempfile.TemporaryDirectory() as cache_folder:
        # Always compile: a variant that equals another would come from the cache, without a log.
        os.environ |= {"TRITON_ALWAYS_COMPILE": "1", "TRITON_DUMP_PTXAS_LOG": "1"}
        os.environ["TRITON_CACHE_DIR"] = cache_folder
        package = "variants" if options.variants else "bertfast.kernels"
        rows = compile_all(package, options.workers, options.share)
    if options.json:
        json.dump(rows, sys.stdout)
    elif options.variants:
        (VARIANTS / "README.md").write_text(every(rows))
    else:
        before, rest = DOCUMENT.read_text().split(BEGIN)
        DOCUMENT.write_text(before + BEGIN + table(rows) + END + rest.split(END, 1)[1])
        print(f"wrote {DOCUMENT}")
    if options.variants:
        return
    bad = [r for r in rows if r["spills"] or r["shared"] > ARCHITECTURES[r["architecture"]]]
    for r in bad:
        print(f"spills, or has too much shared memory: {r}", file=sys.stderr)
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()
