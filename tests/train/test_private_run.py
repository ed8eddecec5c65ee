"""Runs with --dp-epsilon: what they refuse, spend, report and resume."""

import json
import random
import shutil
import sys

import numpy as np
import pytest
import tiny
import torch
from helpers import refused
from tiny_classify import task_of

from bertfast.train import ClassifyConfig, ConfigError, checkpoint, finetune
from bertfast.train.loop import _Loss
from bertfast.train.private.accounts import Budget
from bertfast.train.private.membership import membership_auc
from bertfast.train.private.step import Noise, PrivateStep
from bertfast.train.tasks import of

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
    refused(ConfigError, "batch_size is 61, expected at most 60", finetune, config(tmp_path, batch_size=61))
    other = config(tmp_path, model=str(saved("Roberta")))
    refused(ConfigError, "takes BERT", finetune, other)
    with monkeypatch.context() as m:
        m.setitem(sys.modules, "opacus", None)
        m.setitem(sys.modules, "opacus.accountants.utils", None)
        refused(RuntimeError, r"pip install 'bertfast\[private\]'", finetune, config(tmp_path))
    monkeypatch.setenv("WORLD_SIZE", "2")
    refused(ConfigError, "WORLD_SIZE is 2", finetune, config(tmp_path))


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


def stepper(folder, monkeypatch, **options):
    """(task, step, gradients of each update)."""
    given = config(folder, **options)
    task = of(given)(given, torch.device("cpu"), lambda text: None)
    task.budget = Budget(4.0, 1e-3, 0.5, 60, 8, 16, 1.5)
    other = task_of(ClassifyConfig(), None, None, "cpu")
    del other
    from bertfast.model import BertForSequenceClassification

    task.model = BertForSequenceClassification.from_pretrained(given.model, num_labels=3).eval()
    from bertfast.train.optimizer import make_optimizer
    from bertfast.train.ranks import Ranks

    optimizer, seen = make_optimizer(task.model, given), []
    monkeypatch.setattr(
        optimizer, "step", lambda: seen.append([p.grad.clone() for p in task.model.parameters()])
    )
    import contextlib

    settings = 1, 1.0, contextlib.nullcontext, Ranks(), lambda text: None
    return task, task.step(_Loss(task.model, task), optimizer, *settings), seen
