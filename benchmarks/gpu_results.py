"""The form of a GPU benchmark's results: cells of rows, and each cell's best of ours beside the
best rival, as benchmarks/report.py reads them."""

import json
from pathlib import Path


def cells(rows: list[dict]) -> list[dict]:
    """Rows of {"task", "name", "milliseconds" or "note", ...} by task, the quickest first."""
    found: dict[str, list] = {}
    for row in rows:
        found.setdefault(row["task"], []).append({k: v for k, v in row.items() if k != "task"})
    return [
        {"task": task, "rows": sorted(mine, key=lambda r: r.get("milliseconds", float("inf")))}
        for task, mine in found.items()
    ]


def summary(cells: list[dict], ours) -> list[dict]:
    """ours(name): whether a row is of bertfast."""
    lines = []
    for cell in cells:
        timed = [row for row in cell["rows"] if "note" not in row]
        mine, rivals = ([r for r in timed if ours(r["name"]) is own] for own in (True, False))
        if mine and rivals:
            best, rival = mine[0], rivals[0]
            times = best["milliseconds"], rival["milliseconds"]
            line = {"task": f"{cell['task']} ({best['name']})", "unit": "ms"}
            line |= {"bertfast": times[0], "rival": times[1], "rival_name": rival["name"]}
            line["ratio"] = round(times[1] / times[0], 3)
            if "commit" in cell:  # measured by another commit than the rest
                line["commit"] = cell["commit"]
            lines.append(line)
    return lines


def write(path: Path, about: dict, rows: list[dict], ours) -> None:
    """Called after every row, so that a run that is stopped keeps what it has."""
    made = cells(rows)
    result = about | {"summary": summary(made, ours), "cells": made}
    path.write_text(json.dumps(result, indent=2) + "\n")
