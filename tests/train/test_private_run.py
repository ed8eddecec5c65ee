"""Runs with --dp-epsilon: what they refuse, spend, report and resume."""

import json
import math
import random
import shutil
import sys
from contextlib import nullcontext

import pytest
import tiny
import torch
from helpers import refused
from sklearn.metrics import roc_auc_score
from tiny_classify import classification

from bertfast.train import ClassifyConfig, ConfigError, TrainingError, checkpoint, finetune, predict
from bertfast.train.loop import _Loss
from bertfast.train.optimizer import make_optimizer
from bertfast.train.packed import Packed
from bertfast.train.private.accounts import Budget
from bertfast.train.private.step import Noise
from bertfast.train.private.task import PrivateClassification
from bertfast.train.ranks import Ranks
from bertfast.train.tasks.classify import ClassificationTask

pytest.importorskip("opacus")
DP = {"dp_epsilon": 4.0, "dp_delta": 1e-3}


def config(folder, **options):
    return ClassifyConfig(**tiny.settings(folder, **DP | {"epochs": 2} | options))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dp_delta": None}, "dp_delta is None, expected below 1 / examples"),
        ({"dp_delta": 1.0}, "dp_delta is 1.0"),
        ({"dp_epsilon": 0.0}, "dp_epsilon is 0.0, expected above 0"),
        ({"dp_epsilon": float("nan")}, "dp_epsilon is nan"),
        ({"dp_epsilon": 21.0}, "at most 20"),
        ({"dp_epsilon": None}, "dp_delta is 0.001, expected nothing without dp_epsilon"),
        ({"dp_epsilon": None, "dp_delta": None, "dp_clip": 1.0}, "dp_clip is 1.0"),
        ({"dp_clip": 0.0}, "dp_clip is 0.0, expected above 0"),
        ({"precision": "bf16"}, "precision is 'bf16', expected fp32"),
        ({"batch_tokens": 64}, "batch_tokens is 64"),
        ({"accumulation": 2}, "accumulation is 2, expected 1: give the expected batch"),
        ({"seeds": 2}, "seeds is 2, expected 1: each run would spend the budget"),
        ({"dedup": True}, "dedup is True, expected False"),
        ({"clip": 0.5}, "clip is 0.5, expected 1"),
        ({"gradient_checkpointing": True}, "gradient_checkpointing is True"),
        ({"valid": None, "metric": "accuracy"}, "metric is 'accuracy', expected none with"),
        ({"valid": None, "patience": 1}, "patience is 1, expected none with"),
        (
            {"valid": None, "task": "multi_label", "thresholds": True},
            "thresholds is True, expected False with",
        ),
    ],
)
def test_refusals(tmp_path, options, message):
    refused(ConfigError, message, config, tmp_path, **options)


def test_more_refusals(tmp_path, monkeypatch, saved):
    refused(
        ConfigError,
        "batch_size is 61, expected at most 60",
        finetune,
        config(tmp_path, batch_size=61),
    )
    other = config(tmp_path, model=str(saved("Roberta")))
    refused(ConfigError, "takes BERT", finetune, other)
    with monkeypatch.context() as m:
        m.setitem(sys.modules, "opacus", None)
        m.setitem(sys.modules, "opacus.accountants.utils", None)
        refused(RuntimeError, r"pip install 'bertfast\[private\]'", finetune, config(tmp_path))
    monkeypatch.setenv("WORLD_SIZE", "2")
    refused(ConfigError, "WORLD_SIZE is 2", finetune, config(tmp_path))


@pytest.mark.seconds
def test_epsilon_is_opacus(tmp_path):
    """Stepped as a loop of training steps would."""
    from opacus.accountants import PRVAccountant

    budget = Budget.of(config(tmp_path), 60, 16)
    accountant = PRVAccountant()
    for done in range(16):
        if done == 5:
            assert budget.spent(5) == accountant.get_epsilon(1e-3)
        accountant.step(noise_multiplier=budget.sigma, sample_rate=8 / 60)
    spent = accountant.get_epsilon(1e-3)
    assert budget.spent(16) == spent and 3.9 < spent <= 4.0 and budget.spent(0) == 0


def test_noise():
    noise = Noise(torch.device("cpu"))
    x = noise((300, 400), 2.5).double()
    assert x.std().item() == pytest.approx(2.5, rel=0.02) and abs(x.mean().item()) < 0.04
    assert ((x / 2.5) ** 4).mean().item() == pytest.approx(3, rel=0.05)
    assert not torch.equal(noise((9,), 1.0), Noise(torch.device("cpu"))((9,), 1.0))


def stepper(monkeypatch, sigma=1.5, **options):
    """(task, a step of it, the gradients of each of its updates)"""
    model, task, given = classification(**DP | {"device": "cpu"} | options)
    private = PrivateClassification(given, torch.device("cpu"), print)
    private.__dict__ |= task.__dict__ | {"parts": {"train": task.rows["train"]}}
    private.budget = Budget(4.0, 1e-3, given.dp_clip, 40, 8, 16, sigma)
    optimizer, seen = make_optimizer(model.train(), given), []
    keep = lambda: seen.append({n: p.grad.clone() for n, p in model.named_parameters()})
    monkeypatch.setattr(optimizer, "step", keep)
    settings = 1, given.clip, nullcontext, Ranks(), print
    return private, private.step(_Loss(model, private), optimizer, *settings), seen


def take(task, step, batch):
    loaded = task.load(batch)
    step.begin([task.weight(loaded)], 1e-3)
    step.add(step.ready(loaded))
    return step.update().read()


def test_a_step_where_nobody_was_drawn_is_noise(monkeypatch):
    """Of Opacus' size: sigma * clip, over the expected batch."""
    task, step, seen = stepper(monkeypatch)
    assert take(task, step, [])[0] == [0.0]
    assert take(task, step, [])[0] == [0.0]
    noise = [torch.cat([g.flatten() for g in found.values()]) for found in seen]
    for one in noise:
        assert one.std().item() == pytest.approx(1.5 * 0.1 / 8, rel=0.02)
    assert abs(torch.corrcoef(torch.stack(noise))[0, 1]) < 0.03


@pytest.mark.parametrize("kind", ["single_label", "multi_label", "regression"])
def test_a_step_is_the_clipped_sum_over_the_expected_batch(monkeypatch, kind):
    task, step, seen = stepper(monkeypatch, 0.0, task=kind, dropout=0.0, dp_clip=0.3)
    loss, _ = take(task, step, range(11))
    total = dict.fromkeys(seen[0], 0)
    for i in range(11):
        one = Packed.of_rows([task.rows["train"][i]])
        task.model.zero_grad()
        (
            ClassificationTask.loss(task, task.model, one) / ClassificationTask.weight(task, one)
        ).backward()
        grads = {n: p.grad for n, p in task.model.named_parameters()}
        norm = torch.stack([g.norm() for g in grads.values()]).norm()
        total = {n: total[n] + g * min(1.0, 0.3 / norm.item()) / 8 for n, g in grads.items()}
    whole = torch.cat([g.flatten() for g in total.values()]).norm()
    for name, g in total.items():
        assert (seen[0][name] - g).norm() <= 1e-5 * max(g.norm(), 1e-3 * whole), name
    batch = Packed.of_rows(task.rows["train"][:11])
    assert loss[0] == pytest.approx(
        ClassificationTask.loss(task, task.model, batch).item()
        / 8
        / (3 if kind == "multi_label" else 1),
        rel=1e-5,
    )


def test_class_weights_count(monkeypatch):
    task, step, seen = stepper(monkeypatch, 0.0, class_weights={"a": 0.0}, dropout=0.0)
    chosen = [i for i, row in enumerate(task.rows["train"]) if row["labels"] == 0]
    assert len(chosen) > 3 and take(task, step, chosen)[0] == [0.0]
    assert not any(g.any() for g in seen[0].values())


def test_dropout_has_other_masks_each_step(monkeypatch):
    """From the operating system, whatever the seed: where they fall depends on who else is there."""
    task, step, _ = stepper(monkeypatch, 0.0, dropout=0.5)
    found = []
    for _ in range(2):
        torch.manual_seed(0)
        before = torch.get_rng_state()
        found.append(take(task, step, range(8))[0])
        assert torch.equal(torch.get_rng_state(), before)  # which checkpoints have
    assert found[0] != found[1]


def test_a_run(tmp_path):
    results = finetune(config(tmp_path))
    out = tmp_path / "out"
    privacy = json.loads((out / "eval_results.json").read_text())["privacy"]
    assert privacy == results["privacy"] and 3.9 < privacy["epsilon"] <= 4.0
    assert privacy["steps"] == 16 and privacy["sampling_rate"] == 8 / 60
    assert 0 <= privacy["membership_auc"] <= 1
    card = (out / "README.md").read_text()
    assert f"({privacy['epsilon']:.3g}, 0.001)-differentially private" in card
    assert f"AUC of {privacy['membership_auc']:.3f}" in card
    assert "dp_epsilon: 4.0" in (out / "run_config.yaml").read_text()
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert not any({"loss", "gradient_norm"} & {*r} and r.get("loss") for r in records)
    assert (out / "training_curve.png").exists()


@pytest.mark.seconds
def test_without_a_validation_file_the_last_weights_stay(tmp_path, capsys):
    results = finetune(config(tmp_path, valid=None, epochs=3))
    assert results["train"]["best"] is None
    assert "validation rows are split off the private file" in capsys.readouterr().err


@pytest.mark.seconds
def test_resume_spends_no_noise_twice(tmp_path, monkeypatch):
    """A resumed run draws other noise and other examples, and counts its steps once."""
    drawn, call, load = [], Noise.__call__, PrivateClassification.load
    batches = []

    def watched(self, shape, std):
        found = call(self, shape, std)
        drawn.append(found.flatten()[:2].tolist())
        return found

    def loaded(self, batch):
        batches.append(tuple(batch))
        return load(self, batch)

    monkeypatch.setattr(Noise, "__call__", watched)
    monkeypatch.setattr(PrivateClassification, "load", loaded)
    whole = finetune(config(tmp_path, save_steps=4, keep=9))
    first, own, drawn[:], batches[:] = [*drawn], [*batches], [], []
    folder = tmp_path / "out" / "checkpoints"
    for newest in checkpoint.checkpoints(folder):
        if int(newest.name[5:]) > 4:
            shutil.rmtree(newest)
    again = finetune(config(tmp_path, save_steps=4, keep=9))
    assert len(drawn) == len(first) * 12 // 16 and len(batches) == 12
    assert not {*map(tuple, drawn)} & {*map(tuple, first)}
    assert batches != own[4:]
    assert again["privacy"]["epsilon"] == whole["privacy"]["epsilon"]
    assert again["train"]["step"] == 16
    refused(TrainingError, r"\(dp_epsilon\)", finetune, config(tmp_path, dp_epsilon=5.0))


@pytest.mark.seconds
def test_membership(tmp_path):
    """Labels by chance can only be learnt by heart: then a loss tells who was trained on, and no
    longer with privacy."""
    r, tables = random.Random(0), {}
    options = {"lr": 5e-3, "epochs": 50, "batch_size": 20, "eval_steps": 10**6}
    settings = tiny.settings(tmp_path, **options)
    for name, seed in (("train", 0), ("valid", 1)):
        tables[name] = [row | {"label": r.choice(["a", "b"])} for row in tiny.rows(60, seed)]
        tiny.write(tmp_path / f"{name}.jsonl", tables[name])
    found = {}
    for name, more in (("open", {}), ("private", DP | {"dp_epsilon": 1.0})):
        results = finetune(ClassifyConfig(**settings | {"out": str(tmp_path / name)} | more))
        found[name] = auc(tmp_path / name, tables)
    assert found["private"] == pytest.approx(results["privacy"]["membership_auc"], abs=1e-3)
    assert found["open"] > 0.85 and abs(found["private"] - 0.5) < 0.17


def auc(model, tables):
    """scikit-learn's, of the losses of what `predict` says."""
    losses, truth = [], []
    for name, table in tables.items():
        told = predict(str(model), [row["text"] for row in table], device="cpu")
        both = zip(told, table, strict=True)
        losses += [math.log(p["probabilities"][row["label"]]) for p, row in both]
        truth += [name == "train"] * len(table)
    return roc_auc_score(truth, losses)
