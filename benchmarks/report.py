"""Writes what is generated from benchmarks/results/*/*.json: each device's report.md and plots, the
README's two tables, and those of docs/performance.md and docs/finetuning.md.

    python benchmarks/report.py            (tests/test_readme.py fails where they disagree)
"""

import argparse
import fnmatch
import json
from pathlib import Path

import plots

from bertfast.bench.command import COLUMNS

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- benchmarks/report.py -->", "<!-- end -->"
BEGIN_TASKS = "<!-- benchmarks/report.py, tasks -->"
GENERATED = ("README.md", "docs/performance.md", "docs/finetuning.md")  # in part
HEADLINES = {  # what a reader has, and the task (a pattern) of the newest result that has it
    "a `SentenceTransformer`, accelerated, fp32": "drop-in MiniLM, fp32: SentenceTransformer.*",
    "the same, frozen to int8": "SentenceTransformer.encode, MiniLM, *(bertfast frozen, int8)",
    "one short text, int8": "MiniLM inference, 1 x 32 tokens, int8",
    "a batch of sentences, BERT-base, int8": "BERT-base inference, 16 natural-length *, int8",
    "full batches of 128 tokens, BERT-base, fp32": "BERT-base inference, 8 x 128 tokens, fp32",
    "ModernBERT, a batch of texts, fp32": "ModernBERT-base inference, 16 *(bertfast frozen, fp32)",
    "fine-tuning by transformers' Trainer, fp32": "drop-in MiniLM, fp32: transformers Trainer, *",
    "inference on a GPU, texts of up to 512": "BERT-base inference, 32 natural to 512, bf16*",
    "fine-tuning on a GPU, the same": "BERT-base training (classify), 32 natural to 512, bf16*",
    "pre-training on a GPU, the same": "BERT-base training (mlm), 32 natural to 512, bf16*",
}
TASKS = ("sections", "quality", "tokens", "qa", "pairs", "translate")  # of finetune_*.json
KINDS = {  # finetune's kinds: where their time stands, where their figure, and how its row begins
    "classify": ("sections", "quality", "test macro F1"),
    "tokens": ("tokens", "tokens", "test micro F1"),
    "qa": ("qa", "qa", "test F1"),
    "pairs --goal ranking": ("pairs", "pairs", "test MRR@10"),
    "translate": ("translate", "translate", "test bleu"),
}
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


def figures(row: dict) -> list[str]:
    """What bertfast, the rival and the ratio between them come to."""
    ours, rival = (f"{plots.short(row[k])} {row['unit']}".strip() for k in ("bertfast", "rival"))
    return [ours, rival, f"{row['ratio']:.2f}x" if row["ratio"] is not None else ""]


def headlines(found: list[dict]) -> str:
    """A row for each thing that a reader may have, for the README."""
    rows = []
    for have, pattern in HEADLINES.items():
        of = [(r, row) for r in newest(found) for row in r["summary"] if fits(row, pattern)]
        for result, row in of[:1]:
            ours, rival, ratio = figures(row)
            shown = f"{row['rival_name']}: {rival}"
            rows.append([have, ours, shown, ratio, plots.device(result)])
    return grid(["", "bertfast", "rival", "ratio", "device"], rows)


def newest(found: list[dict]) -> list[dict]:
    return sorted(found, key=lambda result: result["date"], reverse=True)


def fits(row: dict, pattern: str) -> bool:
    return fnmatch.fnmatchcase(row["task"], pattern)


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
                rows += [
                    [row["task"], *figures(row), plots.device(result)] for row in result["summary"]
                ]
    return grid(["", "bertfast", "stock", "ratio", "device"], rows)


def kind_table(found: list[dict]) -> str:
    """A row for each kind, of the newest results: training, and a figure of quality after it."""
    rows = []
    for kind, (times, scores, start) in KINDS.items():
        timed, scored = (
            [
                row
                for r in newest(found)
                if r["benchmark"] == f"finetune_{n}"
                for row in r["summary"]
            ]
            for n in (times, scores)
        )
        timed = [row for row in timed if row["ratio"] is not None]
        scored = [row for row in scored if row["task"].startswith(start)]
        if timed and scored:
            name = start.removeprefix("test ")
            rows.append([f"`{kind}`", *figures(timed[0]), name, *figures(scored[0])[:2]])
    titles = ["`finetune`", "training", "stock", "ratio", "test figure", "bertfast", "stock"]
    return grid(titles, rows)


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


def generated(folder: Path, texts: dict[str, str]) -> dict[str, str]:
    """Every text that follows from the results in `folder`: name to content. texts: what the files
    in GENERATED hold now."""
    every = results(folder)
    readme = replace(texts["README.md"], kind_table(every), BEGIN_TASKS)
    made = {"README.md": replace(readme, headlines(every))}
    made["docs/performance.md"] = replace(texts["docs/performance.md"], layers(every))
    made["docs/finetuning.md"] = replace(texts["docs/finetuning.md"], task_table(every))
    for device in sorted({path.parent for path in folder.glob("*/*.json")}):
        found = {r["benchmark"]: r for r in results_of(device)}
        made[f"benchmarks/results/{device.name}/report.md"] = report(found)
    return made


def results_of(device: Path) -> list[dict]:
    return [json.loads(path.read_text()) for path in sorted(device.glob("*.json"))]


def main():
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    folder = ROOT / "benchmarks" / "results"
    texts = {name: (ROOT / name).read_text() for name in GENERATED}
    for name, text in generated(folder, texts).items():
        (ROOT / name).write_text(text)
        print(f"wrote {name}")
    for device in sorted({path.parent for path in folder.glob("*/*.json")}):
        for path in plots.draw({r["benchmark"]: r for r in results_of(device)}, device):
            print(f"wrote {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
