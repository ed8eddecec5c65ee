"""Writes what is generated from benchmarks/results/*/*.json: each device's report.md and plots,
the README's table and docs/performance.md's.

    python benchmarks/report.py            (tests/test_readme.py fails where they disagree)
"""

import argparse
import json
from pathlib import Path

import plots

from bertfast.bench.command import COLUMNS

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- benchmarks/report.py -->", "<!-- end -->"
BEGIN_TASKS = "<!-- benchmarks/report.py, tasks -->"
TASKS = ("sections", "quality", "tokens", "qa", "pairs", "translate")  # of finetune_*.json
DETAIL = (
    "sweep",
    "breakdown",
    "gpu_operators",
    "host_time",
)  # in report.md, and too much for the README
SECTIONS = {  # benchmark: its title in report.md, and its plots
    "encoder_inference": ("Encoder inference", ("speed", "latency")),
    "model_families": ("Other families", ()),
    "frozen": ("sentence-transformers' objects, frozen", ()),
    "sweep": ("Length and padding", ("sweep",)),
    "threads": ("Threads", ()),
    "rivals_memory": ("Memory", ("memory",)),
    "breakdown": ("One layer by operator", ("breakdown", "roofline")),
    "gpu_encoder_base": ("BERT-base", ()),
    "gpu_encoder_large": ("BERT-large", ()),
    "gpu_inference_base": ("BERT-base, inference", ()),
    "gpu_inference_base_compiled": ("BERT-base, inference under torch.compile", ()),
    "gpu_inference_large": ("BERT-large, inference", ()),
    "gpu_finetune_base": ("BERT-base, fine-tuning", ()),
    "gpu_compiled_base": ("BERT-base, fine-tuning under torch.compile", ()),
    "gpu_inference_modernbert": ("ModernBERT-base, inference", ()),
    "gpu_finetune_modernbert": ("ModernBERT-base, fine-tuning", ()),
    "gpu_inference_deberta": ("DeBERTa-v3-base, inference", ()),
    "gpu_finetune_deberta": ("DeBERTa-v3-base, fine-tuning", ()),
    "gpu_finetune_large": ("BERT-large, fine-tuning", ()),
    "gpu_pretrain_large": ("BERT-large, pre-training", ()),
    "gpu_checks_base": ("Replays against launches", ()),
    "gpu_operators": ("Operators", ()),
    "host_time": ("What a call costs the host, on graphs that do nothing", ()),
}


def results(folder: Path) -> list[dict]:
    return [json.loads(path.read_text()) for path in sorted(folder.glob("*/*.json"))]


def grid(titles, rows) -> str:
    """A Markdown table; all columns but the first are figures."""
    lines = [titles, ["---", *["---:"] * (len(titles) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def table(found: list[dict]) -> str:
    """A Markdown table: each result's summary rows (task, unit, bertfast, rival, ratio)."""
    if not found:
        return "No results are checked in yet: `make bench` measures your machine."
    lines = [
        "| task | device | bertfast | rival | ratio | commit |",
        "| --- | --- | ---: | ---: | ---: | --- |",
    ]
    for result in found:
        for row in result["summary"]:
            ours, rival = (f"{row[key]:.4g} {row['unit']}".strip() for key in ("bertfast", "rival"))
            ratio = f"{row['ratio']:.2f}x" if row["ratio"] is not None else ""
            lines.append(
                f"| {row['task']} | {plots.device(result)} | {ours} | {row['rival_name']}: {rival} "
                f"| {ratio} | {row.get('commit', result['commit'])} |"
            )
    return "\n".join(lines)


def readme_table(found: list[dict]) -> str:
    others = [r for r in found if not r["benchmark"].startswith("finetune_")]
    return table([result for result in others if result["benchmark"] not in DETAIL])


def replace(text: str, block: str, begin: str = BEGIN) -> str:
    """`text` with what stands between the markers replaced."""
    head, rest = text.split(begin)
    return f"{head}{begin}\n{block}\n{END}{rest.split(END, 1)[1]}"


def task_table(found: list[dict]) -> str:
    """Fine-tuning beside transformers' Trainer: how well the trained models do, and how fast."""
    rows = []
    for name in TASKS:
        for result in found:
            if result["benchmark"] == f"finetune_{name}":
                for row in result["summary"]:
                    ours, rival = (
                        f"{plots.short(row[key])} {row['unit']}".strip()
                        for key in ("bertfast", "rival")
                    )
                    ratio = f"{row['ratio']:.2f}x" if row["ratio"] is not None else ""
                    rows.append([row["task"], ours, rival, ratio, plots.device(result)])
    return grid(["", "bertfast", "stock", "ratio", "device"], rows)


def cell_table(cell: dict) -> str:
    """All rows of a cell, and below it those that have no time."""
    rows = [row for row in cell["rows"] if "note" not in row]
    keys = [key for key in COLUMNS if any(row.get(key) is not None for row in rows)]
    shown = [
        [row["name"], *("" if row.get(k) is None else COLUMNS[k][1].format(row[k]) for k in keys)]
        for row in rows
    ]
    notes = [f"\n{row['name']}: {row['note']}" for row in cell["rows"] if "note" in row]
    return "\n".join([grid(["", *(COLUMNS[k][0] for k in keys)], shown), *notes])


def parts_table(parts: dict[str, list[dict]]) -> str:
    """Where ours spend a call, and how near their products come to the registers' rate."""
    names = [row["part"] for row in next(iter(parts.values()))]
    shown = []
    for name, rows in parts.items():
        shown.append([f"{name}, ms", *(plots.short(row["milliseconds"]) for row in rows)])
        shares = [row.get("share_of_registers") for row in rows]
        shown.append(["of registers", *("" if s is None else f"{s:.0%}" for s in shares)])
    return grid(["", *names], shown)


def layer_table(cell: dict) -> str:
    """A layer's operators: work, the time that the roof allows, and what is taken."""
    titles = ["", "GFLOP", "MB", "roof, ms", "bertfast, ms", "of the roof", "PyTorch, ms", "ratio"]
    keys = ("gflop", "mb", "roof_ms", "bertfast_ms", "torch_ms")

    def line(name, figures, roof=""):
        gflop, mb, least, ours, theirs = figures
        shown = [name, *map(plots.short, (gflop, mb)), plots.short(least) + roof, plots.short(ours)]
        return [*shown, f"{least / ours:.0%}", plots.short(theirs), f"{theirs / ours:.2f}x"]

    rows = []
    for p in cell["parts"]:
        name = p["operator"] + (f" x {p['uses']}" if p["uses"] > 1 else "")
        rows.append(line(name, [p[key] for key in keys], f" ({p['roof']})"))
    total = [sum(p[key] for p in cell["parts"]) for key in keys]
    return grid(titles, [*rows, line("layer", total)])


def layers(found: list[dict]) -> str:
    """docs/performance.md's tables: every layer that was measured."""
    blocks = []
    for result in found:
        if result["benchmark"] == "breakdown":
            for cell in result["cells"]:
                first = cell["parts"][0]
                blocks.append(
                    f"**{cell['task'].removeprefix('a layer of ')}**: {cell['tokens']} tokens in "
                    f"{cell['padded_tokens']} positions; {plots.device(result)}, "
                    f"product {first['matmul_peak_gflops']:.0f} "
                    f"GFLOP/s, copy {first['copy_gb_per_second']:.0f} GB/s, {result['commit']}"
                )
                blocks.append(layer_table(cell))
    return "\n\n".join(blocks) or "`make bench` measures it: no breakdown is checked in yet."


def report(found: dict[str, dict]) -> str:
    """A device's report.md, from its results by benchmark."""
    first = next(iter(found.values()))
    blocks = [f"# {plots.device(first)}"]
    blocks.append(
        "Written by `benchmarks/report.py` from the JSON files beside it. A time is the median of "
        "interleaved rounds, after the outputs were checked in the same run."
    )
    origins = []
    for name, result in found.items():
        versions = ", ".join(f"{key} {value}" for key, value in result["versions"].items())
        origins.append([name, result["commit"], result["date"][:10], versions])
    titles = ["benchmark", "commit", "date", "versions"]
    blocks += [grid(titles, origins), "## Summary", table(list(found.values()))]
    for name, (title, pictures) in SECTIONS.items():
        if name not in found:
            continue
        blocks.append(f"## {title}")
        for picture in pictures:
            if plots.PLOTS[picture][1](found[name]) is not None:
                blocks.append(f"![{picture}]({picture}.png)")
        if name == "breakdown":
            blocks.append("Tables and arithmetic are in docs/performance.md.")
            continue
        blocks += [f"{key}: {value}" for key, value in found[name].get("notes", {}).items()]
        for cell in found[name]["cells"]:
            peak = cell.get("matmul_peak_gflops")
            blocks.append(f"### {cell['task']}")
            if peak:
                blocks.append(
                    f"{cell['tokens']} tokens in {cell['padded_tokens']} positions; torch's own "
                    f"product ran at {peak:.0f} GFLOP/s."
                )
            if "commit" in cell:
                blocks.append(f"Measured at {cell['commit']}.")
            blocks.append(cell_table(cell))
            if "parts" in cell:
                blocks.append(parts_table(cell["parts"]))
    return "\n\n".join(blocks) + "\n"


def generated(folder: Path, readme: str, performance: str) -> dict[str, str]:
    """Every text that follows from the results in `folder`: name, or path below it, to content."""
    every = results(folder)
    readme = replace(readme, task_table(every), BEGIN_TASKS)
    texts = {"README.md": replace(readme, readme_table(every))}
    texts["docs/performance.md"] = replace(performance, layers(every))
    for device in sorted({path.parent for path in folder.glob("*/*.json")}):
        found = {r["benchmark"]: r for r in results_of(device)}
        texts[f"benchmarks/results/{device.name}/report.md"] = report(found)
    return texts


def results_of(device: Path) -> list[dict]:
    return [json.loads(path.read_text()) for path in sorted(device.glob("*.json"))]


def main():
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    folder = ROOT / "benchmarks" / "results"
    texts = [(ROOT / name).read_text() for name in ("README.md", "docs/performance.md")]
    for name, text in generated(folder, *texts).items():
        (ROOT / name).write_text(text)
        print(f"wrote {name}")
    for device in sorted({path.parent for path in folder.glob("*/*.json")}):
        for path in plots.draw({r["benchmark"]: r for r in results_of(device)}, device):
            print(f"wrote {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
