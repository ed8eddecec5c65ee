import copy
import errno
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
import transformers
from helpers import close_to_truth, exact, refused
from safetensors.torch import load_file
from tiny_classify import task_of

from bertfast.data import DataError, batches
from bertfast.train import ClassifyConfig, ConfigError, TrainingError, evaluate, finetune, predict
from bertfast.train import checkpoint as state
from bertfast.train.loop import learning_rate
from bertfast.train.tasks.classify import ClassificationTask


def run(folder, **options):
    return finetune(ClassifyConfig(**tiny.settings(folder, **options)))


def weights(folder):
    return load_file(folder / "out" / "model.safetensors")


def test_learns_and_writes(tmp_path):
    results = run(tmp_path, epochs=8)
    assert results["valid"]["accuracy"] > 0.9
    out = tmp_path / "out"
    for name in ["config.json", "model.safetensors", "tokenizer.json", "README.md", "run_config.yaml", "metrics.jsonl", "eval_results.json", "confusion_matrix.csv", "confusion_matrix.png", "training_curve.png"]:  # fmt: skip
        assert (out / name).stat().st_size > 0, name
    assert list((out / "tensorboard").iterdir())
    saved = json.loads((out / "eval_results.json").read_text())["valid"]
    assert set(saved["per_class"]) == {"red", "green", "blue"} and saved["macro"]["f1"] > 0.9
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert (
        sum("loss" in r for r in records) == 8 * 8 and sum("valid_loss" in r for r in records) == 8
    )

    texts = [row["text"] for row in tiny.rows(9, 2)]
    ours = predict(str(out), texts)
    assert [p["label"] for p in ours][:3] == ["red", "green", "blue"]
    assert evaluate(str(out), str(tmp_path / "valid.jsonl"))["accuracy"] == saved["accuracy"]
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(out).eval()
    tokens = transformers.AutoTokenizer.from_pretrained(out)(
        texts, padding=True, return_tensors="pt"
    )
    with torch.no_grad():
        expected = [f.logits.softmax(-1) for f in (exact(theirs, tokens), theirs(**tokens))]
    actual = torch.tensor(
        [[p["probabilities"][theirs.config.id2label[i]] for i in range(3)] for p in ours]
    )
    close_to_truth(actual, *expected)


@pytest.mark.seconds
def test_accumulation_changes_nothing(tmp_path):
    """The same examples in a step give the same weights, however they are cut up."""
    no_dropout = tiny.checkpoint(
        tmp_path / "m", hidden_dropout_prob=0, attention_probs_dropout_prob=0
    )
    results = []
    for i, accumulation in enumerate((1, 2, 4)):
        run(tmp_path, model=str(no_dropout), out=str(tmp_path / f"o{i}"), accumulation=accumulation,
            batch_size=8 // accumulation, max_steps=4, lr=1e-3)  # fmt: skip
        results.append(load_file(tmp_path / f"o{i}" / "model.safetensors"))
    start = load_file(no_dropout / "model.safetensors")
    for other in results[1:]:
        for name, expected in results[0].items():
            if "key.bias" in name:  # softmax ignores it: its gradient is rounding, nothing else
                continue
            # Adam's first steps turn a gradient's rounding into a step where it is nearly zero.
            moved = expected - start.get(name.removeprefix("bert."), 0)
            assert (other[name] - expected).norm() <= 1e-3 * moved.norm(), name


def test_accumulated_gradient():
    """Sums over micro-batches of unequal weight: the gradient of the mean over all targets."""
    import bertfast

    torch.manual_seed(0)
    model = bertfast.BertForSequenceClassification(
        transformers.BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                                intermediate_size=16, vocab_size=20, num_labels=3)
    ).eval()  # fmt: skip
    r = np.random.default_rng(0)
    data = [{"input_ids": r.integers(5, 20, n).tolist(), "labels": n % 3} for n in range(3, 19)]
    task = task_of(ClassifyConfig(class_weights={"a": 5.0}), model, data, "cpu")
    grads = []
    for size, dtype in ((16, torch.float64), (16, None), (8, None), (3, None), (1, None)):
        one = copy.deepcopy(model).to(dtype)
        parts = [list(range(i, min(i + size, 16))) for i in range(0, 16, size)]
        parts = [task.load(b) for b in parts]
        total = sum(task.weight(b) for b in parts)
        for b in parts:
            (task.loss(one, b) / total).backward()
        grads.append(torch.cat([p.grad.flatten() for p in one.parameters()]))
    for g in grads[1:]:
        close_to_truth(g, grads[0])


def test_batches_by_tokens(tmp_path):
    """Epochs differ in their batches: all of them are counted, and a run goes on in any."""
    options = {"batch_tokens": 40, "save_steps": 5, "epochs": 4, "keep": 9}
    whole = run(tmp_path, **options)["train"]
    config = ClassifyConfig(**tiny.settings(tmp_path, **options))
    lengths = [len(row["text"].split()) + 2 for row in tiny.rows(60)]
    counts = [len(batches(lengths, 32, config.seed, e, 40)) for e in range(4)]
    assert whole["step"] == sum(counts) and len({*counts}) > 1 and whole["epoch"] == 4
    expected, out = weights(tmp_path), tmp_path / "out"
    assert "up to 40 tokens" in (out / "README.md").read_text()
    for newest in state.checkpoints(out / "checkpoints"):
        if int(newest.name[5:]) > 30:
            shutil.rmtree(newest)
    run(tmp_path, **options)
    assert all(torch.equal(v, expected[name]) for name, v in weights(tmp_path).items())
    refused(TrainingError, r"\(batch_tokens\)", run, tmp_path, **options | {"batch_tokens": 41})
    message = "batch_tokens is 64, expected none beside batch_size 8"
    refused(ConfigError, message, ClassifyConfig, batch_tokens=64, batch_size=8)
    refused(ConfigError, "batch_tokens is 0", ClassifyConfig, batch_tokens=0)


@pytest.mark.seconds
def test_bf16(tmp_path):
    assert run(tmp_path, precision="bf16", epochs=8)["valid"]["accuracy"] > 0.9
    assert all(t.dtype == torch.float32 for t in weights(tmp_path).values())


@pytest.mark.seconds
def test_multi_label(tmp_path):
    base = tiny.settings(tmp_path)
    for name, n, seed in (("train", 90, 0), ("valid", 30, 1)):
        table = [
            row | {"label": [row["label"]] + (["cat"] if "cat" in row["text"] else [])}
            for row in tiny.rows(n, seed)
        ]
        tiny.write(tmp_path / f"{name}.jsonl", table)
    results = finetune(ClassifyConfig(**base | {"task": "multi_label", "epochs": 20}))
    assert results["valid"]["micro_f1"] > 0.8
    row = predict(base["out"], ["cat red"])[0]
    assert isinstance(row["labels"], list) and set(row["probabilities"]) == {
        "red",
        "green",
        "blue",
        "cat",
    }


@pytest.mark.seconds
def test_regression(tmp_path):
    base = tiny.settings(tmp_path)
    for name, n, seed in (("train", 120, 0), ("valid", 30, 1)):
        table = [row | {"label": len(row["text"].split()) / 10} for row in tiny.rows(n, seed)]
        tiny.write(tmp_path / f"{name}.jsonl", table)
    results = finetune(ClassifyConfig(**base | {"task": "regression", "epochs": 12}))
    assert results["valid"]["pearson"] > 0.8
    assert set(predict(base["out"], ["red cat"])[0]) == {"value"}


def test_pairs_and_split(tmp_path):
    """Pairs, and one file that is split in three."""
    base = tiny.settings(tmp_path, valid=None, text_pair_column="other")
    table = [row | {"other": "cat dog", "label": str(i % 2)} for i, row in enumerate(tiny.rows(80))]
    tiny.write(tmp_path / "train.jsonl", table)
    results = finetune(ClassifyConfig(**base | {"epochs": 1}))
    assert results["valid"]["examples"] == 8 and results["test"]["examples"] == 8


@pytest.mark.seconds
def test_early_stopping_keeps_the_best(tmp_path):
    results = run(tmp_path, epochs=30, patience=2, metric="accuracy", lr=5e-3)
    outcome = results["train"]
    assert outcome["stopped_early"] and outcome["epoch"] < 30
    assert outcome["best"]["epoch"] == outcome["epoch"] - 3
    assert results["valid"]["accuracy"] == outcome["best"]["metrics"]["accuracy"]


def test_freezing(tmp_path):
    before = load_file(tiny.checkpoint(tmp_path / "model") / "model.safetensors")
    tiny.write(tmp_path / "train.jsonl", tiny.rows(60))
    tiny.write(tmp_path / "valid.jsonl", tiny.rows(21, 1))
    run(tmp_path, freeze_layers=1, epochs=1)
    for name, old in before.items():
        frozen = name.startswith(("embeddings.", "encoder.layer.0."))
        same = torch.equal(weights(tmp_path)["bert." + name], old)
        assert same == frozen or name.endswith("key.bias"), name
    refused(ConfigError, "freeze_layers is 3, the model has 2", run, tmp_path, freeze_layers=3)


@pytest.mark.seconds
def test_class_weights(tmp_path):
    """A weight makes its class more likely; an unknown class is named."""
    mean = lambda: np.mean(
        [p["probabilities"]["red"] for p in predict(str(tmp_path / "out"), ["cat"] * 3)]
    )
    run(tmp_path, epochs=1)
    plain = mean()
    run(tmp_path, epochs=1, resume="no", class_weights={"red": 30.0})
    assert mean() > plain + 0.03
    refused(ConfigError, "class_weights names pink", run, tmp_path, class_weights={"pink": 2.0})


@pytest.mark.seconds
def test_gradient_checkpointing_is_equal(tmp_path):
    run(tmp_path, epochs=1)
    first = weights(tmp_path)
    run(tmp_path, epochs=1, resume="no", gradient_checkpointing=True)
    assert all(torch.equal(first[n], t) for n, t in weights(tmp_path).items())


def test_schedules():
    c = lambda schedule: ClassifyConfig(lr=1.0, warmup=0.1, schedule=schedule)
    for name, last in (
        ("linear", 1 / 90),
        ("cosine", 0.5 * (1 + np.cos(np.pi * 89 / 90))),
        ("constant", 1.0),
    ):
        rates = [learning_rate(i, 100, c(name)) for i in range(100)]
        assert (
            rates[0] == 0
            and rates[5] == 0.5
            and rates[10] == 1
            and rates[-1] == pytest.approx(last)
        )


def test_nan_stops(tmp_path, monkeypatch):
    monkeypatch.setattr(
        ClassificationTask, "summed_loss", lambda self, logits, *_: logits.sum() * float("nan")
    )
    refused(TrainingError, "the loss is nan at step 1", run, tmp_path)


@pytest.mark.seconds
def test_settings_clash_on_resume(tmp_path):
    run(tmp_path, epochs=1)
    settings = tmp_path / "out" / "run_config.yaml"
    own = settings.read_text()
    refused(TrainingError, r"other settings \(lr\)", run, tmp_path, epochs=1, lr=1e-4)
    assert settings.read_text() == own  # by which the model that is there reads texts
    run(tmp_path, epochs=1, lr=1e-4, resume="no")
    assert settings.read_text() != own


def test_full_disk_keeps_the_checkpoint_before(tmp_path, monkeypatch):
    real, calls = state.save_file, []

    def full(tensors, path, **rest):
        calls.append(path)
        if len(calls) > 4:
            Path(path).write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        real(tensors, path, **rest)

    monkeypatch.setattr(state, "save_file", full)
    refused(OSError, "No space", run, tmp_path, save_steps=3)
    folder = tmp_path / "out" / "checkpoints"
    assert [p.name for p in state.checkpoints(folder)] == ["step-00000003", "step-00000006"]
    assert state.latest(folder, print)[1]["step"] == 6 and not list(folder.glob(".*"))


@pytest.mark.seconds
@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.safetensors", "state.json"])
def test_flipped_bit_is_found(tmp_path, file):
    run(tmp_path, epochs=2)
    folder = tmp_path / "out" / "checkpoints"
    newest = state.checkpoints(folder)[-1] / file
    data = bytearray(newest.read_bytes())
    data[-20] ^= 4
    newest.write_bytes(data)
    said = []
    assert state.latest(folder, said.append)[1]["step"] == 8
    assert "checksum" in said[0] and file in said[0]


def test_bad_data(tmp_path):
    tiny.settings(tmp_path)
    tiny.write(tmp_path / "one.jsonl", [{"text": "red", "label": "a"}] * 5)
    refused(DataError, "2 or more classes", run, tmp_path, train=str(tmp_path / "one.jsonl"))
    tiny.write(tmp_path / "new.jsonl", [{"text": "red", "label": "pink"}])
    refused(
        DataError,
        r"new.jsonl: row 1 \(line 1\): unknown label 'pink'",
        run,
        tmp_path,
        valid=str(tmp_path / "new.jsonl"),
    )
    refused(ConfigError, "max_length is 99, the model takes up to 32", run, tmp_path, max_length=99)
    refused(ConfigError, "out is not set", finetune, ClassifyConfig(model="x", train="y"))
    for name, value in (
        ("lr", 0),
        ("epochs", 0),
        ("warmup", 2),
        ("schedule", "x"),
        ("metric", "mse"),
        ("precision", "fp8"),
    ):
        refused(ConfigError, f"{name} is {value!r}", ClassifyConfig, **{name: value})
