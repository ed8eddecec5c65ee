"""Runs replayed from graphs, which a tape stands in for: beside launched ones, bit for bit, and
beside what runs without fillers."""

import json
from contextlib import contextmanager

import numpy as np
import pytest
import tiny_pretrain
import torch
from helpers import GPU, close_to_truth, refused
from tape import Tape
from tiny_classify import classification, rows, run

from bertfast.encoder import graph
from bertfast.train import InterruptedRunError, TrainingError
from bertfast.train.replay import Replay
from bertfast.train.step import Step

KINDS = {
    "single_label": {},
    "class_weights": {"class_weights": {"b": 5.0}},
    "multi_label": {"task": "multi_label"},
    "regression": {"task": "regression"},
    # The head's dropout is torch's: with fillers it draws more, and the next seeds are others.
    "accumulation": {"accumulation": 3, "batch_size": 4, "dropout": 0.0},
    "lamb": {"optimizer": "lamb", "clip": 0.0},
    "bf16": {"precision": "bf16"},
    "checkpointing": {"gradient_checkpointing": True},
    "by_tokens": {"batch_tokens": 100, "batch_size": 32},
}
ON_TAPE = pytest.mark.skipif(GPU != "cpu", reason="it is the tape's")


def same(a, b):
    assert torch.equal(a[0].nan_to_num(), b[0].nan_to_num())
    assert all(torch.equal(a[1][name], b[1][name]) for name in a[1])


@contextmanager
def launched():
    """A block in which buckets are as they are, but nothing is recorded."""
    with pytest.MonkeyPatch.context() as m:
        m.setattr(Replay, "_record", lambda *_: None)
        yield


def three(tmp_path, make):
    """Runs of what `make` gives: without fillers, launched with them, and replayed."""
    found = []
    with pytest.MonkeyPatch.context() as m:
        m.setenv("BERTFAST_GRAPHS", "0")
        found.append(run(tmp_path / "plain", *make()))
    assert "graphs" not in found[0][2]
    with launched():
        found.append(run(tmp_path / "launched", *make()))
    found.append(run(tmp_path / "replayed", *make()))
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_classification(kind, tmp_path, tape):
    plain, with_fillers, replayed = three(
        tmp_path, lambda: classification(max_steps=8, **KINDS[kind])
    )
    same(replayed, with_fillers)
    if GPU == "cpu" or "dropout" in KINDS[kind]:  # torch's dropout there goes by the shape
        close_to_truth(replayed[0][:, 0], plain[0][:, 0], floor=3e-2 if kind == "bf16" else 1e-3)
    counts, steps = replayed[2]["graphs"], replayed[2]["step"]
    assert counts["launched"] == 0 and counts["captures"] > 1
    micros = 8 + 2 * steps if kind == "accumulation" else steps  # 40 rows: 10 of 4, the last step 1
    assert abs(sum(counts.values()) - steps - micros) <= 8
    assert counts["hits"] > counts["captures"]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    return tiny_pretrain.folder(tmp_path_factory.mktemp("prepared"))


@pytest.mark.parametrize("nsp", [True, False])
def test_pretraining(nsp, prepared, tmp_path, tape):
    """With fillers the last layer's dropout of masked tokens is that of other rows, behind those of
    the pairs: beside the plain run it is off there."""
    options = {"nsp": nsp, "max_steps": 8, "eval_steps": None, "accumulation": 2}
    options |= {
        "lr": 1e-3,
        "device": GPU,
        "config": str(prepared / ("still.json" if nsp else "config.json")),
    }

    def make():
        task, model = tiny_pretrain.task(prepared, **options)
        return model, task, task.config

    plain, with_fillers, replayed = three(tmp_path, make)
    same(replayed, with_fillers)
    close_to_truth(replayed[0], plain[0], floor=1e-4)
    assert replayed[2]["graphs"]["captures"] > 1
    if nsp:
        options["config"] = str(prepared / "config.json")
        with launched():
            with_fillers = run(tmp_path / "dropout", *make())
        same(run(tmp_path / "replays", *make()), with_fillers)


def test_frozen_layers(tmp_path, tape):
    start = classification()[0].state_dict()
    make = lambda: classification(frozen=1, max_steps=6)
    _, with_fillers, replayed = three(tmp_path, make)
    same(replayed, with_fillers)
    for name, value in replayed[1].items():
        kept = name.startswith(("bert.embeddings", "bert.encoder.layer.0"))
        assert torch.equal(value, start[name]) == kept or "key.bias" in name, name


@pytest.mark.parametrize("late", [1, 4, 7])
def test_resume(late, tmp_path, tape, monkeypatch):
    """Stopped before a step, where its graph is known or not: the same end, bit for bit."""
    options = {"max_steps": 8, "save_steps": 3}
    whole = run(tmp_path / "whole", *classification(**options))
    model, task, config = classification(**options)
    real, steps = Step.begin, []

    def begin(self, *args):
        steps.append(args)
        if len(steps) > late:
            raise InterruptedRunError("stop")
        real(self, *args)

    with monkeypatch.context() as m:
        m.setattr(Step, "begin", begin)
        refused(InterruptedRunError, "stop", run, tmp_path / "parts", model, task, config)
    again = run(tmp_path / "parts", *classification(**options))
    same(again, whole)


@ON_TAPE
@pytest.mark.parametrize("limit", [1, 100_000, 400_000])
def test_out_of_memory_in_a_recording(limit, tmp_path, tape, monkeypatch):
    """In any of a step's parts: nothing of it is lost, and the run says that it goes on launched."""
    make = lambda: classification(max_steps=8, accumulation=2, batch_size=4, dropout=0.0)
    with monkeypatch.context() as m:
        m.setenv("BERTFAST_GRAPHS", "0")
        plain = run(tmp_path / "plain", *make())
    monkeypatch.setattr(Tape, "limit", limit)
    said = []
    found = run(tmp_path / "found", *make(), said)
    close_to_truth(found[0][:, 0], plain[0][:, 0], floor=1e-3)
    counts = found[2]["graphs"]
    assert sum("out of memory" in text for text in said) == 1 and counts["launched"] > 8
    assert "launched" in said[-1]


@ON_TAPE
@pytest.mark.parametrize("number", [1, 2, 3])
def test_out_of_memory_beside_graphs(number, tmp_path, tape, monkeypatch):
    """In a backward, which leaves some gradients: the step is done anew without graphs."""
    make = lambda: classification(max_steps=8, accumulation=2, batch_size=4)
    with launched():
        expected = run(tmp_path / "expected", *make())
    real, calls = Step._micro, []

    def short(self, batch, factor=1.0):
        real(self, batch, factor)
        if not Tape.capturing():
            calls.append(1)
            if len(calls) == number:
                raise torch.OutOfMemoryError("out of memory, says the test")

    monkeypatch.setattr(Step, "_micro", short)
    monkeypatch.setattr(Step, "ready", lambda self, batch: batch.filled(False))
    said = []
    same(run(tmp_path / "found", *make(), said), expected)
    assert sum("out of memory" in text for text in said) == 1


@pytest.mark.parametrize("graphs", ["0", "1"])
def test_a_loss_that_is_not_finite(graphs, tmp_path, tape, monkeypatch):
    """The step is named, two steps later or at once; the weights are those before it."""
    monkeypatch.setenv("BERTFAST_GRAPHS", graphs)
    options = {"task": "regression", "epochs": 4, "schedule": "constant", "warmup": 0.0}
    data = rows(40, "regression")
    broken = [row | {"labels": np.inf} if i == 30 else row for i, row in enumerate(data)]
    _, task, config = classification(data, **options)
    in_epoch = next(i for i, batch in enumerate(task.batches(0)) if 30 in batch)
    assert 0 < in_epoch < 3
    kept = run(tmp_path / "a", *classification(data, **options, max_steps=in_epoch))[1]
    model, task, config = classification(broken, **options)
    message = f"the loss is inf at step {in_epoch + 1}: "
    refused(TrainingError, message, run, tmp_path / "b", model, task, config)
    assert all(torch.equal(v.cpu(), kept[name]) for name, v in model.state_dict().items())
    logged = (tmp_path / "b" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in logged] == list(range(1, in_epoch + 1))


def test_large_batches_are_launched(tmp_path, tape, monkeypatch):
    make = lambda: classification(max_steps=6)
    with monkeypatch.context() as m:
        m.setenv("BERTFAST_GRAPHS", "0")
        plain = run(tmp_path / "plain", *make())
    monkeypatch.setattr(graph, "MAX_TOKENS", 100)
    found = run(tmp_path / "found", *make())
    close_to_truth(found[0], plain[0], floor=1e-3)
    counts = found[2]["graphs"]
    assert counts["launched"] == 6 and counts["hits"] + counts["captures"] == 5  # the updates


def test_a_task_without_a_static_form(tmp_path, tape):
    model, task, config = classification(max_steps=5)
    load, loss = task.load, task.loss
    task.load, task.loss = lambda batch: {"it": load(batch)}, lambda m, b: loss(m, b["it"])
    for name in ("weight", "tokens"):
        real = getattr(task, name)
        setattr(task, name, lambda b, real=real: real(b["it"]))
    said = []
    counts = run(tmp_path, model, task, config, said)[2]["graphs"]
    assert counts == {"hits": 0, "captures": 0, "misses": 0, "launched": 10}
    assert sum("a batch is a dict" in text for text in said) == 1
