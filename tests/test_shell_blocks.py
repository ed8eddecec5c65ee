"""Every block of the README and of docs/ is run: its commands by the real command line, its Python
in one session a page, in a folder where what the page takes as given is there, small
(placeholders.py). The tutorials, which bring their own data, are test_tutorials.py's."""

import ast
import importlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pages
import placeholders
import pytest

import bertfast
from bertfast import cli

TUTORIALS = pages.ROOT / "docs" / "tutorials"
PAGES = [pages.ROOT / "README.md", *sorted((pages.ROOT / "docs").rglob("*.md"))]

# What a line has, what stands there in the test, and why.
SMALLER = [
    (r"^(bertfast finetune .*)", r"\1 --epochs 1", "time"),
    (r"^(bertfast prepare .*)", r"\1 --vocab-size 200", "the corpus is small"),
    (r"--config (?:small|base|large|tiny)", "--config config.json --max-steps 2", "time, memory"),
    (r"--max-steps 100", "--max-steps 2", "time"),
    (r"(?<=--batch-size )256", "8", "the table has 64 rows"),
    (r"--batch 1 32 --seq 128", "--batch 1 2 --seq 16 --rounds 1", "time"),
    (r"--nproc-per-node 8", "--standalone --nproc-per-node 2", "two ranks on a CPU say the same"),
]  # fmt: skip
# How lines begin that aren't run, and why. What they name must be there all the same.
NOT_RUN = {
    "pip install": "changes the environment",
    "make ": "minutes; it makes an environment",
    ".venv/bin/python benchmarks/": "minutes; tests/bench runs them at small sizes",
    "python benchmarks/": "minutes; tests/bench runs them at small sizes",
    "torchrun --nnodes": "several machines",
}
WRITTEN = r'(?:\bout="|--out |save_frozen\(\w+, ")([\w.-]+)'


def shell_lines():
    """(page, line of the block, command), of every page."""
    return [
        (page, block.line, line)
        for page in PAGES
        for block in pages.blocks(page)
        if block.language in pages.SHELL
        for line in pages.commands(block.text)
    ]


LINES = shell_lines()
OWN = [page for page in PAGES if TUTORIALS not in page.parents]  # the pages run here


def why_not(line: str) -> str | None:
    return next((why for start, why in NOT_RUN.items() if line.startswith(start)), None)


def arguments(line: str) -> list[str] | None:
    """Of a line that calls `bertfast`, by itself or under torchrun, maybe in the background."""
    found = re.match(r"(?:torchrun .* -m )?bertfast (.*?)(?: &)?$", line)
    return shlex.split(found[1]) if found else None


def test_every_line_is_a_command():
    """`bertfast` accepts its arguments; the targets and scripts that others name are there."""
    parser, seen = cli._parser(), 0
    targets = re.findall(r"^([a-z-]+):", (pages.ROOT / "Makefile").read_text(), re.MULTILINE)
    for page, number, line in LINES:
        where = f"{page.relative_to(pages.ROOT)}:{number}: {line}"
        if line.startswith("make "):
            assert line.split()[1] in targets, where
        elif script := re.search(r"\S+/\S+\.py", line):
            assert (pages.ROOT / script[0].removeprefix(".venv/")).exists(), where
        elif words := arguments(line):
            seen += 1
            try:
                parser.parse_args(words)
            except SystemExit as stop:
                pytest.fail(f"{where}: exit {stop.code}")
    assert seen > 40


def test_python_names_what_is_there():
    """Blocks compile; what they import or take of bertfast exists."""
    python = [(p, b) for p in PAGES for b in pages.blocks(p) if b.language == "python"]
    for page, block in python:
        where = f"{page.relative_to(pages.ROOT)}:{block.line}"
        for node in ast.walk(ast.parse(block.text, where)):
            if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == "bertfast":
                module = importlib.import_module(node.module)
                assert all(hasattr(module, a.name) for a in node.names), where
            elif isinstance(node, ast.Attribute) and ast.unparse(node.value) == "bertfast":
                assert hasattr(bertfast, node.attr), f"{where}: bertfast.{node.attr}"
    assert len(python) > 20


def test_tables_are_of_lines():
    """No entry that stands for nothing any more; no placeholder that a page doesn't have."""
    lines = [line for page, _, line in LINES if page in OWN]
    for found, _, _ in SMALLER:
        assert any(re.search(found, line) for line in lines), found
    for start in NOT_RUN:
        assert any(line.startswith(start) for line in lines), start
    assert all(block.text.strip() for page in PAGES for block in pages.blocks(page))


def test_no_command_outside_a_block():
    for page in PAGES:
        for n, line in enumerate(page.read_text().splitlines(), 1):
            assert not re.match(r"( {4}|\t)(\$ )?bertfast ", line), f"{page.name}:{n}: fence it"


def smaller(line: str) -> str:
    for found, instead, _ in SMALLER:
        line = re.sub(found, instead, line)
    return line


def run(line: str, folder: Path) -> str | None:
    """What went wrong with a command."""
    words = shlex.split(line)
    written = {words[i + 1] for i, word in enumerate(words) if word in ("--out", "--output")}
    placeholders.given(folder, *(word for word in words if word not in written))
    words = [
        w
        for word in words
        for w in (sorted(map(str, folder.glob(word))) if "*" in word else [word])
    ]
    if words[0] == "bertfast":
        code = cli.main(words[1:])
        return f"exit {code}" if code else None
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", shlex.join(words)],
        env=os.environ | {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
        | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
        | {"PYTHONPATH": str(pages.ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )  # fmt: skip
    return f"exit {done.returncode}: {done.stderr[-3000:]}" if done.returncode else None


@pytest.mark.slow
@pytest.mark.parametrize("page", OWN, ids=lambda page: page.stem)
def test_page(page, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    session, count, left = {}, 0, []
    for block in pages.blocks(page):
        where = f"{page.relative_to(pages.ROOT)}:{block.line}"
        if block.skipped:
            left.append(f"line {block.line}: {block.skipped}")
            continue
        written = re.findall(WRITTEN, block.text)
        for name in written:  # another block may have written it, too
            shutil.rmtree(tmp_path / name, ignore_errors=True)
        if block.language == "python":
            named = re.findall(r'"([^"]+)"', block.text)
            placeholders.given(tmp_path, *(name for name in named if name not in written))
            exec(compile("\n" * block.line + block.text, page, "exec"), session)
            count += 1
        elif block.language in pages.SHELL:
            for line in pages.commands(block.text):
                if why := why_not(line):
                    left.append(f"{line}: {why}")
                    continue
                wrong = run(smaller(line), tmp_path)
                assert not wrong, f"{where}: {line}\n{wrong}\n{capfd.readouterr().err[-3000:]}"
                count += 1
    with capfd.disabled():
        print(f"\n{page.name}: {count} run, {len(left)} not", *left, sep="\n  ")
