"""`bertfast verify`: what changed in a run's folder, or a frozen model's, is found and named."""

import json
import os
import shutil

import pytest
import tiny
import tiny_pretrain
import transformers
from helpers import refused

import bertfast
from bertfast.cli import main
from bertfast.files import sha256
from bertfast.ops.extension import C
from bertfast.saved import MANIFEST as FROZEN
from bertfast.train import ClassifyConfig, PretrainConfig, finetune, pretrain
from bertfast.verify import MANIFEST, Bad, read, verify

needs_kernels = pytest.mark.skipif(C is None, reason="no compiled extension")


def flip(path, place=-1):
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("verify")
    finetune(ClassifyConfig(**tiny.settings(folder, max_steps=2)))
    return folder


@pytest.fixture
def run(trained, tmp_path):
    """A copy of a run's folder."""
    return shutil.copytree(trained / "out", tmp_path / "out")


def test_a_run_is_whole(run, trained, capsys):
    made = read(run)
    there = {p.name for p in run.iterdir() if p.is_file() and not p.name.startswith(".")}
    assert made["files"].keys() == there - {MANIFEST}
    assert {"README.md", "model.safetensors", "tokenizer.json", "config.json"} <= there
    for name, one in made["files"].items():
        assert one == {"sha256": sha256(run / name), "bytes": (run / name).stat().st_size}
    inputs = {(one["role"], one["path"]): one["sha256"] for one in made["inputs"]}
    for role, path in (("train", "train.jsonl"), ("valid", "valid.jsonl")):
        assert inputs[role, str(trained / path)] == sha256(trained / path)
    for path in (trained / "model").iterdir():
        assert inputs["model", str(path)] == sha256(path)
    card = (run / "README.md").read_text()
    assert all(digest in card for digest in inputs.values())
    assert main(["verify", str(run), "--inputs"]) == 0
    said = capsys.readouterr()
    assert said.out == f"{len(made['files']) + len(inputs)} files are as they were recorded\n"
    assert said.err == f"{MANIFEST}: {sha256(run / MANIFEST)}\n"
    shutil.rmtree(run / "checkpoints")
    (run / "notes.txt").write_text("mine")
    assert verify(run).bad == [] and verify(run).unknown == ["notes.txt"]


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "README.md"])
def test_a_flipped_byte(run, capsys, name):
    before = sha256(run / name)
    flip(run / name, 100)
    assert main(["verify", str(run)]) == 1
    said = capsys.readouterr()
    assert said.out == f"{name}: expected {before}, found {sha256(run / name)}\n"
    assert f"{run}: 1 files are not as they were recorded" in said.err


def test_missing_and_added(run, capsys):
    """Two at once; weights and what configures a model count, whoever added them."""
    before = sha256(run / "config.json")
    (run / "config.json").unlink()
    added = ["pytorch_model.bin", "model-00002.safetensors", "added_tokens.json", "decision.json"]
    for name in added:
        (run / name).write_text(name)
    (run / "plan.txt").write_text("mine")
    assert main(["verify", str(run)]) == 1
    out = capsys.readouterr().out.splitlines()
    assert out[0] == f"config.json: expected {before}, found no file"
    assert out[1:] == [
        f"{name}: expected no such file, found {sha256(run / name)}" for name in sorted(added)
    ]


def test_inputs(run, trained, tmp_path, capsys):
    """A changed one is bad, one that is gone is said; without the option nobody looks."""
    made = read(run)
    for one in made["inputs"]:
        copied = tmp_path / f"{one['role']}-{os.path.basename(one['path'])}"
        shutil.copy(one["path"], copied)
        one["path"] = str(copied)
    (run / MANIFEST).write_text(json.dumps(made))
    assert verify(run, inputs=True).bad == []
    path = tmp_path / "train-train.jsonl"
    before = sha256(path)
    flip(path)
    (tmp_path / "valid-valid.jsonl").unlink()
    assert verify(run).bad == []
    found = verify(run, inputs=True)
    assert found.bad == [Bad(str(path), before, sha256(path))]
    assert found.unknown == [str(tmp_path / "valid-valid.jsonl")]
    assert main(["verify", str(run), "--inputs"]) == 1
    said = capsys.readouterr()
    assert before in said.out and "not compared: " in said.err


def test_without_a_record(run, tmp_path, capsys):
    (run / MANIFEST).unlink()
    for folder, text in (
        (run, f"has neither {MANIFEST} nor {FROZEN}"),
        (tmp_path / "none", "is no folder"),
        (run / "config.json", "is no folder"),
    ):
        assert main(["verify", str(folder)]) == 1
        said = capsys.readouterr()
        assert text in said.err and not said.out


@pytest.mark.parametrize(
    "change, text",
    [
        (lambda made: made | {"format": 9}, "another version"),
        (lambda made: [], "another version"),
        (lambda made: made | {"files": []}, "is damaged"),
        (lambda made: made | {"files": {"config.json": {}}}, "is damaged"),
        (lambda made: made | {"inputs": [{"role": "train"}]}, "is damaged"),
        (lambda made: made | {"files": {"../x": {"sha256": "0"}}}, "outside its folder"),
        (lambda made: made | {"files": {"/etc/x": {"sha256": "0"}}}, "outside its folder"),
    ],
)
def test_a_damaged_record(run, change, text):
    (run / MANIFEST).write_text(json.dumps(change(read(run))))
    refused(ValueError, text, verify, run)
    (run / MANIFEST).write_text("{")
    refused(ValueError, "is no JSON", verify, run)


@pytest.mark.seconds
def test_seeds_resumed_and_overwritten(tmp_path):
    """Of several seeds each folder has its own; what is trained over, or on, has the new one."""
    given, out = tiny.settings(tmp_path, max_steps=2), tmp_path / "out"
    finetune(ClassifyConfig(**given | {"seeds": 2}))
    for folder in (out, out / "seed-0", out / "seed-1"):
        found = verify(folder, inputs=True)
        assert found.bad == [] and found.unknown == [], folder
    assert "seeds.json" in read(out)["files"]
    spent = json.loads((out / "seeds.json").read_text())["cost"]
    assert spent["steps"] == 4 and spent["flops"] > 0  # of both
    first = read(out)["files"]["model.safetensors"]["sha256"]
    finetune(ClassifyConfig(**given | {"seed": 5}))  # over it
    assert verify(out).bad == [] and "seeds.json" not in read(out)["files"]
    assert read(out)["files"]["model.safetensors"]["sha256"] != first
    flip(out / "model.safetensors")
    assert len(verify(out).bad) == 1
    finetune(ClassifyConfig(**given | {"seed": 5}))  # goes on, and saves it anew
    assert verify(out).bad == []


def test_a_card_of_someone_else(tmp_path):
    """It is no file of the run."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "README.md").write_text("my notes")
    finetune(ClassifyConfig(**tiny.settings(tmp_path, max_steps=1)))
    (out / "README.md").write_text("other notes")
    assert verify(out).bad == [] and verify(out).unknown == ["README.md"]


def test_pretraining(tmp_path):
    """The corpus is an input, each of its files; transformers reads the folder as ever."""
    pretrain(PretrainConfig(**tiny_pretrain.settings(tmp_path, max_steps=2, eval_steps=2)))
    out, data = tmp_path / "out", tmp_path / "data"
    assert verify(out, inputs=True).bad == []
    roles = {one["role"] for one in read(out)["inputs"]}
    assert roles == {"data", "tokenizer", "train", "valid"}
    of = {os.path.relpath(one["path"], data) for one in read(out)["inputs"]}
    assert {"index.json", "tokenizer/tokenizer.json"} <= of and len(of) > 6
    transformers.AutoModelForPreTraining.from_pretrained(out)
    transformers.AutoTokenizer.from_pretrained(out)
    shard = next(data.glob("train-*.tokens.npy"))
    flip(shard)
    assert [bad.path for bad in verify(out, inputs=True).bad] == [str(shard)]


@needs_kernels
@pytest.mark.filterwarnings("ignore:int8")
def test_a_frozen_model(saved, tmp_path, capsys):
    """Its own hashes, of weights and configuration."""
    model = transformers.AutoModel.from_pretrained(saved())
    folder = bertfast.save_frozen(bertfast.freeze(model, "fp32"), tmp_path / "frozen")
    assert main(["verify", str(folder)]) == 0 and "3 files are" in capsys.readouterr().out
    refused(ValueError, "has no record of inputs", verify, folder, inputs=True)
    (folder / "tokenizer.json").write_text("its user's")
    assert verify(folder).bad == [] and verify(folder).unknown == ["tokenizer.json"]
    (packed,) = folder.glob("packed.*")
    flip(packed)
    (folder / "config.json").unlink()
    (folder / "packed.other.safetensors").write_text("x")
    assert main(["verify", str(folder)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in lines] == [
        "config.json",
        packed.name,
        "packed.other.safetensors",
    ]


@needs_kernels
@pytest.mark.filterwarnings("ignore:int8")
def test_a_frozen_sentence_transformer(saved, tmp_path):
    """All of its modules' files."""
    st = pytest.importorskip("sentence_transformers")
    model = bertfast.freeze(st.SentenceTransformer(saved(), device="cpu"), "fp32")
    folder = bertfast.save_frozen(model, tmp_path / "frozen")
    found = verify(folder)
    assert found.bad == [] and found.unknown == [] and MANIFEST in found.manifests
    assert {"modules.json", "config.json", "tokenizer.json"} <= {*found.checked}
    bertfast.load_frozen(folder)
    model.save_pretrained(str(tmp_path / "theirs"))  # which is told of nothing else
    assert verify(tmp_path / "theirs").bad == [] and verify(tmp_path / "theirs").unknown
    pooling = next(path for path in folder.rglob("config.json") if path.parent != folder)
    flip(pooling, 5)
    (folder / "model.safetensors").write_text("x")
    names = [bad.path for bad in verify(folder).bad]
    assert names == [pooling.relative_to(folder).as_posix(), "model.safetensors"]


@needs_kernels
def test_a_quantized_classifier(trained, tmp_path):
    """Its tokenizer, too, which save_frozen doesn't know."""
    out = tmp_path / "frozen"
    command = ["quantize", "--model", str(trained / "out"), "--precision", "fp32"]
    assert main([*command, "--out", str(out)]) == 0
    assert {"tokenizer.json", "run_config.yaml", "config.json"} <= {*verify(out).checked}
    assert verify(out).bad == [] and verify(out).unknown == []
    flip(out / "tokenizer.json", 100)
    assert [bad.path for bad in verify(out).bad] == ["tokenizer.json"]
