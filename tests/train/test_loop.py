"""What the loop does with a step's micro-batches, its dropout, its evaluations and checkpoints."""

import json
import shutil
from itertools import accumulate

import pytest
import torch
from helpers import close_to_truth, exact
from tiny_classify import classification, rows, run

from bertfast.data import collate
from bertfast.progress import Progress
from bertfast.train import checkpoint as state
from bertfast.train.optimizer import learning_rate
from bertfast.train.tasks.classify import ClassificationTask

STILL = {"lr": 1e-30, "weight_decay": 0.0}  # weights stay what they are


def log(out, key):
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [r[key] for r in records if key in r]


def test_losses_of_a_step(tmp_path):
    """The mean over all rows of its micro-batches by their weights; and the rate of that step."""
    options = {"accumulation": 2, "batch_size": 8, "epochs": 2, "class_weights": {"a": 5.0}}
    model, task, config = classification(rows(21), dropout=0.0, **STILL | options)
    curve, _, outcome = run(tmp_path, model, task, config)
    batches = [task.batches(e)[i : i + 2] for e in (0, 1) for i in (0, 2)]
    assert outcome["step"] == len(batches) == 4
    weights = torch.tensor([5.0, 1.0, 1.0], dtype=torch.float64)
    for (found, _), step in zip(curve, batches, strict=True):
        padded = collate([task.rows["train"][i] for batch in step for i in batch], 0)
        labels = padded.pop("labels")
        logits = exact(model.cpu(), padded).logits
        close_to_truth(found, torch.nn.functional.cross_entropy(logits, labels, weight=weights))
    assert log(tmp_path, "lr") == [learning_rate(i, 4, config) for i in range(4)]
    seen = [
        sum(len(task.rows["train"][i]["input_ids"]) for batch in s for i in batch) for s in batches
    ]
    assert log(tmp_path, "tokens_seen") == list(accumulate(seen))


def test_bf16_rounds(tmp_path):
    """In its forward passes alone: losses are others, but by little."""
    losses = []
    for precision in ("fp32", "bf16"):
        options = {"precision": precision, "dropout": 0.0, "epochs": 1}
        curve, weights, _ = run(tmp_path / precision, *classification(**options | STILL))
        losses.append(curve[:, 0])
        assert all(w.dtype == torch.float32 for w in weights.values())
    assert not torch.equal(*losses)
    torch.testing.assert_close(*losses, rtol=2e-2, atol=0)


def test_evaluations_every_so_many_steps_and_at_the_end(tmp_path):
    model, task, config = classification(eval_steps=4, **STILL)
    assert run(tmp_path, model, task, config)[2]["step"] == 10
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records if "valid_loss" in r] == [4, 8, 10]


def test_dropout_of_each_step_is_its_own(tmp_path):
    """All of them in training, also after an evaluation; none in evaluations; again the same."""
    same, curves = rows(1) * 8, []
    for out in (tmp_path / "a", tmp_path / "b"):
        model, task, config = classification(same, dropout=0.5, eval_steps=2, epochs=6, **STILL)
        curves.append(run(out, model, task, config)[0])
        assert len({*curves[-1][:, 0].tolist()}) == 6
        assert len(log(out, "valid_loss")) == 3 and len({*log(out, "valid_loss")}) == 1
    assert torch.equal(*curves)


@pytest.mark.parametrize(
    "metric, values, best, end",
    [
        ("loss", [0.5, 0.4, 0.4, 0.45, 0.1], 2, 4),  # lower is better, an equal one is not
        ("accuracy", [0.4, 0.5, 0.5, 0.45, 0.9], 2, 4),
        ("accuracy", [0.4, 0.3, 0.5, 0.4, 0.6], 5, 5),
    ],
)
def test_patience(tmp_path, monkeypatch, metric, values, best, end):
    """So many evaluations in a row without a better one end the run, with the best one's weights."""
    given, seen = iter(values), []

    def evaluate(self, model, score=None):
        seen.append([p.detach().clone() for p in model.parameters()])
        return {metric: next(given)}

    monkeypatch.setattr(ClassificationTask, "evaluate", evaluate)
    options = {"metric": metric, "patience": 2, "epochs": 5, "batch_size": 40}
    model, task, config = classification(**options)
    _, _, outcome = run(tmp_path, model, task, config)
    assert (outcome["best"]["step"], outcome["step"]) == (best, end)
    assert outcome["stopped_early"] == (end < 5)
    assert all(map(torch.equal, model.parameters(), seen[best - 1]))


@pytest.mark.parametrize("keep", [1, 3])
def test_keep_so_many(tmp_path, monkeypatch, keep):
    scores = iter([0.1, 0.9, 0.5, 0.4, 0.3])
    evaluate = lambda self, model, score=None: {"accuracy": next(scores)}
    monkeypatch.setattr(ClassificationTask, "evaluate", evaluate)
    options = {"metric": "accuracy", "keep": keep, "epochs": 5, "batch_size": 40}
    run(tmp_path, *classification(**options))
    found = [int(c.name[5:]) for c in state.checkpoints(tmp_path / "checkpoints")]
    assert found == ([2, 5] if keep == 1 else [2, 3, 4, 5])


@pytest.mark.parametrize("optimizer", ["adamw", "lamb"])
def test_goes_on_in_the_middle_of_an_epoch(tmp_path, optimizer):
    """With the weights, moments and place in the data of the checkpoint: bit for bit."""
    options = {"optimizer": optimizer, "save_steps": 3, "keep": 9, "device": "cpu"}
    curve, weights, outcome = run(tmp_path, *classification(**options))
    assert outcome["step"] == 10
    for checkpoint in state.checkpoints(tmp_path / "checkpoints"):
        if int(checkpoint.name[5:]) > 6:  # the second of the second epoch's five
            shutil.rmtree(checkpoint)
    again = run(tmp_path, *classification(**options))
    assert torch.equal(again[0], curve)
    assert all(torch.equal(again[1][name], value) for name, value in weights.items())


def test_lines_without_a_terminal(tmp_path, monkeypatch):
    """Every few seconds a line in place of a bar's frames; here after every step, or none."""
    for seconds, lines in ((0, 2), (1e9, 0)):
        monkeypatch.setattr(Progress, "EVERY", seconds)
        said = []
        run(tmp_path / str(seconds), *classification(epochs=2, batch_size=40), said)
        assert sum(text.startswith("step ") for text in said) == lines
