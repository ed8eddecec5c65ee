"""What the README says is what the project does: figures, targets, files. Its blocks are
test_shell_blocks.py's."""

import importlib.util
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
RESULTS = sorted((ROOT / "benchmarks" / "results").glob("*/*.json"))


@pytest.fixture
def report(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))  # where its plots are
    spec = importlib.util.spec_from_file_location("report", ROOT / "benchmarks" / "report.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_generated_text_is_what_the_results_say(report):
    """The tables of the README and of docs/, and each device's report.md."""
    now = {name: (ROOT / name).read_text() for name in report.GENERATED}
    texts = report.generated(ROOT / "benchmarks" / "results", now)
    assert set(report.GENERATED) <= set(texts)
    for name, text in texts.items():
        assert (ROOT / name).read_text() == text, f"{name}: run `python benchmarks/report.py`"
        for link in re.findall(r"!\[\w+\]\(([^)]+)\)", text):
            picture = (ROOT / name).parent / link
            assert picture.exists(), f"{name} shows {link}: run `python benchmarks/report.py`"
            assert picture.stat().st_size < 100_000


@pytest.mark.parametrize("path", RESULTS, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_ratios_follow_from_the_times(path):
    result = json.loads(path.read_text())
    assert result["summary"] and result["commit"] and result["date"] and result["versions"]
    for row in result["summary"]:
        if row["ratio"] is not None:
            assert row["rival"] / row["bertfast"] == pytest.approx(row["ratio"], rel=0.01), row


def test_table_shows_every_summary_row(report):
    row = {"task": "t", "unit": "ms", "bertfast": 2.0, "rival": 5.0, "rival_name": "r"}
    result = {
        "device": {"name": "d", "threads": 2},
        "build": {"cpu_isa": "avx2"},
        "commit": "abc",
        "summary": [row | {"ratio": 2.5}, row | {"ratio": None}],
    }
    lines = report.table([result]).splitlines()
    assert lines[2:] == [
        "| t | d, avx2, 2 threads | 2 ms | r: 5 ms | 2.50x | abc |",
        "| t | d, avx2, 2 threads | 2 ms | r: 5 ms |  | abc |",
    ]


def test_first_table_has_a_row_for_each_reader(report):
    """All from results that are there, newest first, in at most ten rows."""
    found = report.results(ROOT / "benchmarks" / "results")
    lines = report.headlines(found).splitlines()[2:]
    assert len(lines) == len(report.HEADLINES) <= 10
    old, new = (
        {"benchmark": "b", "date": date, "device": {"name": date}, "summary": [row]}
        for date, row in (
            ("2026-01-01", {"task": "BERT-base training (mlm), 32 natural to 512, bf16 (x)"}),
            ("2026-01-02", {"task": "BERT-base training (mlm), 32 natural to 512, bf16"}),
        )
    )
    for result, ours in ((old, 1.0), (new, 2.0)):
        more = {"unit": "ms", "bertfast": ours, "rival": 5.0, "rival_name": "r", "ratio": 5 / ours}
        result["summary"][0] |= more
    (line,) = report.headlines([old, new]).splitlines()[2:]
    assert line == "| pre-training on a GPU, the same | 2 ms | r: 5 ms | 2.50x | 2026-01-02 |"


def test_make_targets_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    texts = README + (ROOT / "CONTRIBUTING.md").read_text()
    assert set(re.findall(r"`make ([a-z-]+)`", texts)) <= targets


def test_linked_files_exist():
    docs = [path.relative_to(ROOT) for path in (ROOT / "docs").rglob("*.md")]
    for name in ("README.md", "CONTRIBUTING.md", *docs):
        path = ROOT / name
        for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", path.read_text()):
            assert (path.parent / link).exists(), f"{name} links to {link}"
