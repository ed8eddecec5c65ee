"""The structure of the package: what may import what, and sizes."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import bertfast

PACKAGE = Path(bertfast.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))


def name_of(path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in FILES}


def imported(path) -> set[str]:
    """Our modules that a file imports at its top level."""
    own, found = name_of(path), set()
    package = own if path.name == "__init__.py" else own.rpartition(".")[0]
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ImportFrom) and node.level:
            base = ".".join(package.split(".")[: package.count(".") + 2 - node.level])
            base = f"{base}.{node.module}" if node.module else base
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                found.add(inner if inner in MODULES else base)
    # A package's own file imports its parts; who asks for a part doesn't wait for all of it.
    return {n for n in found & MODULES.keys() if n != own}


def test_no_import_circle():
    files = {n: imported(p) for n, p in MODULES.items() if p.name != "__init__.py"}
    graph = {n: {m for m in found if m in files} for n, found in files.items()}
    assert sum(map(len, graph.values())) > 200
    TopologicalSorter(graph).prepare()  # CycleError names one


LAYERS = {"ops": set(), "encoder": {"ops"}, "families": {"ops", "encoder"}}


@pytest.mark.parametrize("name", LAYERS)
def test_who_imports_whom(name):
    allowed = {name, *LAYERS[name]}
    for path in (PACKAGE / name).rglob("*.py"):
        parts = {n.split(".")[1] for n in imported(path) if "." in n}
        assert parts <= allowed, path


def test_no_two_test_files_of_a_name():
    """pytest imports them without their folders' names, into one table."""
    names = [path.name for path in Path(__file__).parent.rglob("test_*.py")]
    assert len(names) > 100
    assert not {n for n in names if names.count(n) > 1}


def test_no_transformers_below_the_families():
    code = "import sys, bertfast.encoder, bertfast.freeze; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_no_long_file():
    assert max(len(p.read_text().splitlines()) for p in FILES) <= 400


def test_one_place_knows_the_roles():
    """The weights' order; everyone else goes by names."""
    roles = '"up"', '"down"', '"norm1"', '"norm2"'
    text = {p: p.read_text() for p in FILES if p.parent.name not in ("families",)}
    listing = [
        p.name
        for p, t in text.items()
        if all(r in t or f"{r[1:-1]}: Parameters" in t for r in roles)
    ]
    assert listing == ["weights.py"], listing
