"""The types that the package tells: of every public callable, and as a user's checker sees them."""

import ast
import importlib
import inspect
import pkgutil
import re
import subprocess
import sys
from functools import cached_property
from pathlib import Path

import pytest

import bertfast

ROOT = Path(bertfast.__file__).parents[1]
NO_MODULES = {"bertfast._C", "bertfast.__main__", "bertfast.kernels"}  # Triton's kernels: no Python


def modules():
    found = pkgutil.walk_packages(bertfast.__path__, "bertfast.", onerror=lambda name: None)
    names = [m.name for m in found if not any(m.name.startswith(n) for n in NO_MODULES)]
    return [bertfast, *map(importlib.import_module, names)]


def functions_of(cls):
    """A class's own methods and properties; what it inherits is of another class."""
    for name, value in vars(cls).items():
        if name.startswith("_") and not (name.startswith("__") and name.endswith("__")):
            continue
        if isinstance(value, property):
            value = value.fget
        elif isinstance(value, cached_property):
            value = value.func
        elif isinstance(value, staticmethod | classmethod):
            value = value.__func__
        if inspect.isclass(value) and value.__qualname__ == f"{cls.__qualname__}.{name}":
            yield from functions_of(value)
        elif inspect.isfunction(value := inspect.unwrap(value)) and value.__name__ != "<lambda>":
            yield value


def public_functions():
    """Those that are written in the package: not what a NamedTuple or a dataclass is given."""
    for module in modules():
        for name, value in vars(module).items():
            if name.startswith("_") or getattr(value, "__module__", None) != module.__name__:
                continue
            found = functions_of(value) if inspect.isclass(value) else [value]
            for function in map(inspect.unwrap, found):
                code = getattr(function, "__code__", None)
                if code is not None and code.co_filename == module.__file__:
                    yield function


def unannotated(function) -> list[str]:
    signature = inspect.signature(function)
    arguments = list(signature.parameters.values())
    if "." in function.__qualname__ and arguments and arguments[0].name in ("self", "cls"):
        del arguments[0]
    found = [a.name for a in arguments if a.annotation is inspect.Parameter.empty]
    return found + ["return"] * (signature.return_annotation is inspect.Signature.empty)


def test_every_public_callable_is_annotated():
    found = {f"{f.__module__}.{f.__qualname__}": f for f in public_functions()}
    assert len(found) > 1000
    some = ("freeze.freeze", "ops.attention.attention", "model.bert.BertModel.forward")
    assert {f"bertfast.{name}" for name in some} <= found.keys()
    bare = {name: missing for name, f in found.items() if (missing := unannotated(f))}
    assert not bare


def test_unannotated_arguments_are_found():
    def bare(x, *y: int, z: int = 0, **more) -> int: ...
    def whole(x: int, *y: int, **more: int) -> None: ...

    assert unannotated(bare) == ["x", "more"]
    assert unannotated(lambda: 0) == ["return"]
    assert unannotated(whole) == []


def test_marker_is_installed(tmp_path):
    """In what setup.py would put into a wheel."""
    out = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_py", "--build-lib", str(tmp_path)],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert out.returncode == 0, out.stderr
    assert (tmp_path / "bertfast" / "py.typed").is_file()
    assert (tmp_path / "bertfast" / "freeze.py").is_file()


def test_checkers_see_what_is_served():
    """The names that come when asked for: those under TYPE_CHECKING, from the same modules."""
    tree = ast.parse(Path(bertfast.__file__).read_text())
    (block,) = [n for n in tree.body if isinstance(n, ast.If) and "CHECKING" in ast.unparse(n.test)]
    imports = [n for n in block.body if isinstance(n, ast.ImportFrom)]
    seen = {alias.name: n.module.split(".")[0] for n in imports for alias in n.names}
    assert seen == bertfast._MODULE_OF and len(seen) > 10
    assert seen.keys() <= set(bertfast.__all__)
    for name in bertfast.__all__:
        assert callable(getattr(bertfast, name)), name


CONSUMER = """
import torch
import bertfast
from bertfast import ops

def run(module: torch.nn.Linear, x: torch.Tensor) -> None:
    reveal_type(bertfast.freeze(module))
    reveal_type(bertfast.accelerate(module))
    reveal_type(bertfast.BertModel.from_pretrained("folder"))
    reveal_type(ops.linear_act(x, x))
    with bertfast.accelerated(module) as report:
        reveal_type(report.layers)
    with bertfast.backend("cpu"):
        pass
    bertfast.freeze(module, precision="fp8")
    bertfast.accelerate(module, strict="yes")
    bertfast.embed("model", "in", "out", dtype="fp64")
    ops.linear_act(x, 1)
    bertfast.no_such_name
"""
REVEALED = [
    "torch.nn.modules.linear.Linear",
    "bertfast.dropin.accelerate.Report",
    "bertfast.model.bert.BertModel",
    "torch._tensor.Tensor",
    "dict[str, str | None]",
]
WRONG = {15: "arg-type", 16: "arg-type", 17: "arg-type", 18: "arg-type", 19: "attr-defined"}


@pytest.mark.slow  # a minute, where mypy has no cache
def test_a_users_checker(tmp_path):
    pytest.importorskip("mypy")
    (tmp_path / "consumer.py").write_text(CONSUMER)
    (tmp_path / "mypy.ini").write_text("[mypy]\nstrict = true\n")
    out = subprocess.run(
        [sys.executable, "-m", "mypy", "--follow-imports=silent", "--ignore-missing-imports",
         "--cache-dir", str(ROOT / ".mypy_cache" / "consumer"), "consumer.py"],
        cwd=tmp_path, capture_output=True, text=True, env={"MYPYPATH": str(ROOT), "PATH": ""},
    ).stdout  # fmt: skip
    said = re.findall(r'consumer.py:\d+: note: Revealed type is "(.*)"', out)
    assert [t.replace("builtins.", "") for t in said] == REVEALED, out
    errors = re.findall(r"consumer.py:(\d+): error: .*\[([a-z-]+)\]", out)
    assert {int(line): code for line, code in errors} == WRONG, out
