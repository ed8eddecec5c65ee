"""Writes the README's table of measurements from benchmarks/results/*/*.json.

python benchmarks/report.py            (tests/test_readme.py fails where the two disagree)
"""

import json
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- benchmarks/report.py -->", "<!-- end -->"


def results(folder: Path) -> list[dict]:
    return [json.loads(path.read_text()) for path in sorted(folder.glob("*/*.json"))]


def table(found: list[dict]) -> str:
    """A Markdown table: each result's summary rows (task, unit, bertfast, rival, ratio)."""
    if not found:
        return "No results are checked in yet: `make bench` measures your machine."
    lines = [
        "| task | device | bertfast | rival | ratio | commit |",
        "| --- | --- | ---: | ---: | ---: | --- |",
    ]
    for result in found:
        device = f"{result['device']['name']}, {result['device']['threads']} threads"
        for row in result["summary"]:
            ours, rival = (f"{row[key]:.4g} {row['unit']}".strip() for key in ("bertfast", "rival"))
            ratio = f"{row['ratio']:.2f}x" if row["ratio"] is not None else ""
            lines.append(
                f"| {row['task']} | {device} | {ours} | {row['rival_name']}: {rival} | {ratio} "
                f"| {result['commit']} |"
            )
    return "\n".join(lines)


def replace(readme: str, block: str) -> str:
    """`readme` with what stands between the markers replaced."""
    head, rest = readme.split(BEGIN)
    return f"{head}{BEGIN}\n{block}\n{END}{rest.split(END, 1)[1]}"


if __name__ == "__main__":
    path = ROOT / "README.md"
    path.write_text(replace(path.read_text(), table(results(ROOT / "benchmarks" / "results"))))
    print(f"wrote {path}")
