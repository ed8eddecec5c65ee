"""The benchmark's rivals run a checkpoint and agree; what isn't installed is skipped and said."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import tiny
import torch
import transformers
from untimed import untimed

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import rivals  # noqa: E402

PLUGINS = [(cls, p) for cls in (*rivals.OURS, *rivals.RIVALS) for p in cls.precisions]
SLOW = (
    rivals.Compiled,
    rivals.MaxAutotune,
    rivals.Calibrated,
)  # seconds of compiling and calibrating
COSINE = {"fp32": 0.999999, "bf16": 0.999, "int8": 0.98}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.checkpoint(tmp_path_factory.mktemp("rivals") / "model", initializer_range=0.1)


@pytest.fixture(autouse=True)
def build_folder(tmp_path_factory, monkeypatch):
    from rivals import export

    monkeypatch.setattr(export, "BUILD", tmp_path_factory.getbasetemp() / "exports")


@pytest.mark.parametrize(
    ("cls", "precision"),
    [
        pytest.param(cls, p, id=f"{cls.name}-{p}", marks=[pytest.mark.slow] if cls in SLOW else [])
        for cls, p in PLUGINS
    ],
)
def test_agrees_with_transformers(cls, precision, folder):
    if cls.available():
        pytest.skip(cls.available())
    mask = (torch.arange(20) < torch.tensor([20, 3, 11])[:, None]).long()
    ids = torch.randint(5, 17, mask.shape, generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids * mask, "attention_mask": mask}
    with torch.inference_mode():
        expected = transformers.BertModel.from_pretrained(folder).eval()(**batch)
        rival = cls(str(folder), precision, 1)
        try:
            actual = rival(batch).float().clone()  # the next call may overwrite it
        except RuntimeError as error:
            if "needs the cpu support" not in str(error):
                raise
            pytest.skip(str(error))
        shorter = rival({k: v[1:2, :3] for k, v in batch.items()}).float()
    real, expected = mask.bool(), expected.last_hidden_state
    assert actual.shape == expected.shape
    for a, e in ((actual[real], expected[real]), (shorter[0], expected[1, :3])):
        assert torch.cosine_similarity(a.flatten(), e.flatten(), dim=0) > COSINE[precision]
        if precision == "fp32":
            assert (a - e).abs().max() < cls.tolerance


def test_missing_packages_are_named():
    class Absent(rivals.Rival):
        packages = ("json", "no_such_package")

    assert "no_such_package" in Absent.available() and "json" not in Absent.available()


@pytest.fixture
def script():
    spec = importlib.util.spec_from_file_location("bench", BENCHMARKS / "encoder_inference.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.seconds
def test_cells_and_their_file(script, folder, tmp_path, monkeypatch, capsys):
    """Rows for a wrong and for an absent rival have no time; cells of one commit are merged."""

    class Wrong(rivals.Sdpa):
        name = "wrong"

        def __call__(self, batch):
            return super().__call__(batch) + 1e-3

    class Absent(rivals.Sdpa):
        name, packages = "absent", ("no_such_package",)

    monkeypatch.setattr(script, "RIVALS", (rivals.Sdpa, Wrong, Absent))
    monkeypatch.setattr(script, "checkpoint", lambda _: str(folder))
    monkeypatch.setattr(
        script, "WORKLOADS", {"a": ("tiny", "A", [5, 9, 3]), "b": ("tiny", "B", [4])}
    )
    untimed(monkeypatch)
    before = torch.get_num_threads()
    for workload in ("b", "a"):
        script.main(f"--workloads {workload} --precisions fp32 --rounds 1 --out {tmp_path}".split())
    assert torch.get_num_threads() == before
    found = json.loads((tmp_path / "encoder_inference.json").read_text())
    assert [c["workload"] for c in found["cells"]] == ["a", "b"]
    cell = found["cells"][0]
    assert cell["tokens"] == 17 and cell["padded_tokens"] == 27
    rows = {row["name"]: row for row in cell["rows"]}
    assert "milliseconds" in rows["transformers sdpa"] and rows["transformers sdpa"]["cosine"] == 1
    assert "more than 2e-05" in rows["wrong"]["note"] and "milliseconds" not in rows["wrong"]
    assert "no_such_package" in rows["absent"]["note"]
    for row in found["summary"]:
        assert row["rival_name"] == "transformers sdpa"

    monkeypatch.setattr(Wrong, "ours", True)
    with pytest.raises(RuntimeError, match="wrong, fp32"):
        script.main(f"--workloads a --precisions fp32 --rounds 1 --out {tmp_path}".split())
