"""Every variant of every Triton kernel that is launched compiles for sm_80 and sm_90, no GPU asked,
and none spills; docs/triton.md lists the kernels that there are."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

SHARE = os.environ.get("BERTFAST_SHARE", "0/1")  # of the variants, as of mutants
ROOT = Path(__file__).resolve().parents[2]
LINE = re.compile(r"^\| `(\w+)` \| `(\w+)` \| sm_(\d+) \| .* \| (\S+) \|$", re.MULTILINE)


@pytest.fixture(scope="module")
def figures():
    """What a process without the interpreter, which conftest turns on, compiles."""
    pytest.importorskip("triton")
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "triton_table.py", "--json", "--share", SHARE],
        env=env,
        capture_output=True,
        text=True,
    )
    assert done.stdout, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.mark.slow
def test_all_compile_without_spills(figures):
    assert {r["architecture"] for r in figures} == {80, 90}
    files = {r["file"] for r in figures}
    for path in (ROOT / "kernels").glob("*.py"):
        assert ("def shipped" in path.read_text()) == (path.stem in files), path.name
    assert [r for r in figures if r["spills"]] == []
    limits = {80: 163 * 1024, 90: 227 * 1024}
    assert [r for r in figures if r["shared"] > limits[r["architecture"]]] == []


@pytest.mark.slow
def test_docs_list_the_kernels(figures):
    document = LINE.findall((ROOT / "docs" / "triton.md").read_text())
    listed = {(file, kernel, int(architecture)) for file, kernel, architecture, _ in document}
    found = {(r["file"], r["kernel"], r["architecture"]) for r in figures}
    assert found <= listed and (SHARE != "0/1" or found == listed), "run benchmarks/triton_table.py"
    assert all(spills == "0" for *_, spills in document)
