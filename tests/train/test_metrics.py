"""Metrics beside scikit-learn's; those that are no number: told, never the best, null in JSON."""

import json
import math

import numpy as np
import pytest
import tiny
import torch
from sklearn.metrics import f1_score

from bertfast.train import ClassifyConfig, finetune, metrics, networks
from bertfast.train.config import METRICS
from bertfast.train.tasks.classify import ClassificationTask

STRICT = {"parse_constant": lambda name: pytest.fail(f"{name} is no JSON")}


@pytest.mark.parametrize("task", METRICS)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_of_logits_that_are_not_finite(task, bad):
    logits = np.array([[0.5, 1.0], [bad, 0.0]], np.float32)
    targets = {"regression": np.zeros(2, np.float32), "multi_label": np.eye(2)}.get(task, [0, 1])
    found = metrics.full(logits, targets, task, ("a", "b"), math.nan)
    assert found.pop("examples") == 2
    assert found.keys() == {*METRICS[task]} and all(map(math.isnan, found.values()))


@pytest.mark.parametrize("targets", [[2.0], [2.0, 2.0]])
def test_of_equal_numbers(targets):
    logits = np.arange(len(targets), dtype=np.float32)[:, None]
    found = metrics.summary(logits, np.array(targets, np.float32), "regression", 1.0)
    assert math.isnan(found["r2"]) and math.isnan(found["pearson"]) and found["mae"] > 0
    varied = metrics.summary(logits * 0, np.arange(len(targets)), "regression", 1.0)
    assert len(targets) == 1 or varied["pearson"] == 0


def test_macro_f1_is_over_the_classes_that_occur():
    """In truth or prediction, as scikit-learn's default; over all in a multi-label task."""
    logits = np.eye(4, dtype=np.float32)[[0, 0, 1, 2]]  # of four classes, the last never
    found = metrics.summary(logits, np.array([0, 0, 1, 1]), "single_label", 0.0)
    assert found["macro_f1"] == pytest.approx((1 + 2 / 3 + 0) / 3)
    flags = np.array([[1, 0, 0], [1, 1, 0]])
    assert metrics.summary(flags - 0.5, flags, "multi_label", 0.0)["macro_f1"] == 2 / 3


def run(folder, **options):
    settings = tiny.settings(folder, max_steps=4, eval_steps=1, metric="accuracy", **options)
    return finetune(ClassifyConfig(**settings))


@pytest.mark.parametrize("found, best", [
    ([math.nan, 0.5, math.nan, 0.4], 2),
    ([0.5, math.nan, math.nan, 0.6], 4),
    ([math.inf, math.nan, math.nan, math.nan], None),
])  # fmt: skip
def test_never_the_best(tmp_path, monkeypatch, capfd, found, best):
    values = iter(found)
    monkeypatch.setattr(
        ClassificationTask, "evaluate",
        lambda *_: {"loss": 1.0, "accuracy": next(values), "macro_f1": 0.0},
    )  # fmt: skip
    outcome = run(tmp_path)["train"]
    assert (outcome["best"] or {}).get("step") == best
    bad = [v for v in found if not math.isfinite(v)]
    assert capfd.readouterr().err.count("these weights don't count as the best") == len(bad)
    out = tmp_path / "out"
    records = [json.loads(t, **STRICT) for t in (out / "metrics.jsonl").read_text().splitlines()]
    accuracy = [r["valid_accuracy"] for r in records if "valid_loss" in r]
    assert accuracy == [v if math.isfinite(v) else None for v in found]
    for state in (out / "checkpoints").glob("*/state.json"):
        json.loads(state.read_text().partition("\n")[2], **STRICT)
    json.loads((out / "eval_results.json").read_text(), **STRICT)
    assert (out / "training_curve.png").exists()


def test_stops_without_a_better_one(tmp_path, monkeypatch):
    monkeypatch.setattr(
        ClassificationTask, "evaluate", lambda *_: {"loss": 1.0, "accuracy": math.nan}
    )
    outcome = run(tmp_path, patience=2)["train"]
    assert outcome["stopped_early"] and outcome["step"] == 2 and outcome["best"] is None


def test_a_metric_that_the_data_have_not(tmp_path, capfd):
    """One validation row: the loss picks, and says so; what is printed is JSON."""
    settings = tiny.settings(tmp_path, task="regression", metric="r2", max_steps=2)
    tiny.write(tmp_path / "train.jsonl", [{"text": "red cat", "label": i} for i in range(9)])
    tiny.write(tmp_path / "valid.jsonl", [{"text": "red", "label": 0.5}])
    results = finetune(ClassifyConfig(**settings))
    assert results["train"]["best"] and math.isnan(results["valid"]["r2"])
    err = capfd.readouterr().err
    assert "no r2 of validation labels that are all 0.5 (rows: 1): the loss picks" in err
    assert "no number, null in JSON: r2, pearson (of 1 rows)" in err
    saved = json.loads((tmp_path / "out" / "eval_results.json").read_text(), **STRICT)
    assert saved["valid"]["r2"] is None and saved["valid"]["mse"] > 0


def test_macro_is_over_the_classes_that_occur():
    targets, y = np.array([0, 0, 0, 1, 1, 3]), np.array([0, 0, 1, 1, 1, 0])
    logits = np.eye(6, dtype=np.float32)[y]  # classes 2, 4 and 5 are in neither
    found = metrics.full(logits, targets, "single_label", list("abcdef"), 0.5)
    macro, micro = (f1_score(targets, y, average=a, zero_division=0) for a in ("macro", "micro"))
    assert found["macro_f1"] == found["macro"]["f1"] == pytest.approx(macro)
    assert found["micro_f1"] == found["micro"]["f1"] == pytest.approx(micro) != macro
    assert found["per_class"]["c"]["support"] == 0 and found["loss"] == 0.5


def test_multi_label_takes_what_is_likelier_than_not():
    logits = np.array([[0.2, -0.2, 3.0], [-0.1, 0.4, -2.0]], np.float32)
    assert metrics.predicted(logits, "multi_label").tolist() == [[1, 0, 1], [0, 1, 0]]
    assert (metrics.probabilities(logits, "multi_label") > 0.5).tolist() == [[1, 0, 1], [0, 1, 0]]


def test_regression_and_probabilities():
    targets, y = np.array([1.0, 2.0, 4.0, 5.0]), np.array([4.0, 3.5, 1.0, 0.5])
    found = metrics.summary(y[:, None].astype(np.float32), targets, "regression", 0.5)
    residual, total = ((targets - y) ** 2).sum(), ((targets - targets.mean()) ** 2).sum()
    deviations = (targets - targets.mean()) * (y - y.mean())
    expected = {"mse": residual / 4, "r2": 1 - residual / total, "mae": abs(targets - y).mean()}
    expected["pearson"] = deviations.sum() / np.sqrt(total * ((y - y.mean()) ** 2).sum())
    assert found == pytest.approx(expected | {"loss": 0.5}) and found["pearson"] < 0
    logits = np.array([[1.0, 3.0, -2.0], [900.0, 0.0, 0.0]], np.float32)
    truth = torch.from_numpy(logits).double().softmax(1).numpy()
    np.testing.assert_allclose(metrics.probabilities(logits, "single_label"), truth, rtol=1e-12)


def test_logits_are_in_the_order_of_the_rows():
    """Whatever order of length they were computed in."""

    class Model:
        device, num_labels = torch.device("cpu"), 2

        config = type("Config", (), {})

        def forward(self, input_ids, attention_mask):  # DistilBERT takes no types either
            sums = (input_ids * attention_mask).sum(1).float()
            return type("Output", (), {"logits": torch.stack([sums, -sums], 1)})

        __call__ = forward

    r = np.random.default_rng(0)
    rows = [{"input_ids": r.integers(1, 99, n).tolist()} for n in r.integers(1, 30, 50)]
    found = networks.outputs(Model(), rows, pad=7, tokens=99)
    assert [int(values[0]) for values in found] == [sum(row["input_ids"]) for row in rows]
