"""What a run keeps and what it goes on from: checkpoints, the best weights, the log, the folder."""

import json
import os
import resource
import shutil

import pytest
import tiny
import tiny_pretrain
import torch
from helpers import refused
from safetensors.torch import load_file

from bertfast.files import locked
from bertfast.train import ClassifyConfig, PretrainConfig, TrainingError, finetune, pretrain
from bertfast.train import checkpoint as state
from bertfast.train.tasks.classify import ClassificationTask

SHORT = {"save_steps": 2, "max_steps": 4, "eval_steps": 4}


class Kind:
    """Short runs of a task, all on the same data, into `out`."""

    def __init__(self, base, out, train, config, settings):
        self.out, self.folder = out, out / "checkpoints"
        self.run = lambda **options: train(
            config(**settings(base, **({"out": str(out)} | options)))
        )

    def names(self):
        return [c.name for c in state.checkpoints(self.folder)]

    def weights(self):
        return (self.out / "model.safetensors").read_bytes()


def tuning(base, out):
    return Kind(base / "tune", out, finetune, ClassifyConfig, tiny.settings)


def pretraining(base, out):
    return Kind(base / "pretrain", out, pretrain, PretrainConfig, tiny_pretrain.settings)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tmp_path_factory.mktemp("base")


@pytest.fixture(scope="module")
def whole(base):
    """A run with evaluations at steps 8, 16 and 24, and its results."""
    kind = tuning(base, base / "whole")
    kind.results = kind.run()
    return kind


@pytest.fixture
def fresh(base, tmp_path):
    return tuning(base, tmp_path / "out")


@pytest.fixture
def done(whole, base, tmp_path):
    """A copy of `whole`."""
    shutil.copytree(whole.out, tmp_path / "out")
    return tuning(base, tmp_path / "out")


BOTH = pytest.mark.parametrize("kind", [tuning, pretraining])


def scores(monkeypatch, values, then=lambda number: None):
    """Evaluations give these macro F1s, one after the other; `then(number)` comes before each."""
    given = iter(enumerate(values))

    def evaluate(self, model, score=None):
        number, value = next(given)
        then(number)
        return {"macro_f1": value, "loss": 1.0}

    monkeypatch.setattr(ClassificationTask, "evaluate", evaluate)


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 16
    path.write_bytes(data)


def test_what_stays(tmp_path):
    """The newest, the best ones of those, nothing of another run."""
    other = tmp_path / "step-00000099"
    other.mkdir()
    mine, best, weights = set(), None, None
    for step in range(1, 7):
        if step == 2:
            best = {"step": 2}
        values = {"best": best, "best_weights": weights}
        tensors = ({"x": torch.full((3,), float(step))}, {"x|step": torch.ones(1)})
        weights = state.save(tmp_path, step, tensors, values, 2, mine)["best_weights"]
        assert not other.exists()
    assert [c.name[-1] for c in state.checkpoints(tmp_path)] == ["2", "5", "6"]
    assert state.read_best(tmp_path, weights)["x"].tolist() == [2, 2, 2]
    flip(tmp_path / "step-00000002" / "model.safetensors")
    refused(ValueError, "does not match its checksum", state.read_best, tmp_path, weights)
    newest = tmp_path / "step-00000006"
    refused(ValueError, "step-00000002/model", state.check_best, newest, state.read_state(newest))
    refused(ValueError, f"--resume {newest}", state.latest, tmp_path, lambda text: None)
    assert newest.exists()


@pytest.mark.parametrize("failing", [1, 2])
def test_a_step_saved_again(tmp_path, monkeypatch, failing):
    """One of the two is there, whatever is interrupted."""
    values = {"best": None, "best_weights": None}
    tensors = ({"x": torch.ones(3)}, {"x|step": torch.ones(1)})
    state.save(tmp_path, 1, tensors, values, 2, set())
    rename, calls = os.rename, []

    def interrupted(*names):
        calls.append(names)
        if len(calls) == failing:
            raise KeyboardInterrupt
        rename(*names)

    monkeypatch.setattr(os, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        state.save(tmp_path, 1, tensors, values, 2, set())
    monkeypatch.undo()
    found, _ = state.latest(tmp_path, pytest.fail)
    assert found.name == "step-00000001" and [*tmp_path.iterdir()] == [found]


@pytest.mark.seconds
def test_best_weights_lost_before_the_end(fresh, monkeypatch, capfd):
    """Newer whole checkpoints stay; who says so goes on from them."""
    scores(monkeypatch, [0.9, 0.2, 0.1])
    fresh.run(keep=3)
    flip(fresh.folder / "step-00000008" / "model.safetensors")
    names = fresh.names()
    with pytest.raises(ValueError, match="goes on without them"):
        fresh.run(keep=3)
    assert fresh.names() == names
    fresh.run(keep=3, resume=str(fresh.folder / "step-00000024"))
    assert "best weights so far are lost" in capfd.readouterr().err and fresh.weights()


@pytest.mark.seconds
def test_anew_beside_an_older_run(done, capfd):
    """`--resume no`: the new run's checkpoints stay, the old one's go with the first of them."""
    assert done.names() == ["step-00000016", "step-00000024"]
    short = {"seed": 5, "max_steps": 4, "save_steps": 1}
    done.run(**short, resume="no")
    assert done.names() == ["step-00000003", "step-00000004"]
    expected = done.weights()
    done.run(**short)
    assert "resumed from" in capfd.readouterr().err and done.weights() == expected


def test_anew_that_fails_at_once_keeps_the_old(done, monkeypatch):
    scores(monkeypatch, [])
    with pytest.raises(StopIteration):
        done.run(resume="no")
    assert done.names() == ["step-00000016", "step-00000024"]


@pytest.mark.seconds
@pytest.mark.parametrize("damage", ["cut", "gone", "binary", "grown"])
def test_metrics_that_were_touched(done, whole, capfd, damage):
    """metrics.jsonl is lines of JSON whatever was done to it, and no later resume minds."""
    log = done.out / "metrics.jsonl"
    shutil.rmtree(done.folder / "step-00000024")
    before = log.read_bytes()
    if damage == "gone":
        log.unlink()
    else:
        log.write_bytes({"cut": before[:700], "binary": b"\0" * 900, "grown": before * 2}[damage])
    done.run()
    assert ("records are missing" in capfd.readouterr().err) == (damage != "grown")
    records = [json.loads(line) for line in log.read_bytes().splitlines()]
    found = [r["step"] for r in records if "loss" in r]
    assert found[-8:] == list(range(17, 25)) and (damage != "grown" or len(found) == 24)
    assert done.weights() == whole.weights()
    if damage == "cut":
        done.run()
        assert "records are missing" not in capfd.readouterr().err


@pytest.mark.seconds
def test_best_weights_are_checked(fresh, monkeypatch, capfd):
    """The best evaluation's are the model; damaged, they are trained again."""
    scores(monkeypatch, [0.5, 0.9, 0.1])
    fresh.run(keep=3)
    best = fresh.folder / "step-00000016" / "model.safetensors"
    expected, found = load_file(best), load_file(fresh.out / "model.safetensors")
    assert all(torch.equal(found[n], t) for n, t in expected.items())
    expected = fresh.weights()
    flip(best)
    scores(monkeypatch, [0.9, 0.1])
    fresh.run(keep=3)
    err = capfd.readouterr().err
    assert err.count(f"{best} does not match its checksum") == 2  # of step 24 and of itself
    assert "step-00000008" in err and fresh.weights() == expected


# TensorBoard's thread says that its file went.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("how", ["flipped", "deleted"])
def test_best_weights_lost_in_the_run(fresh, monkeypatch, how):
    """Never other weights in their place: an error, and no model."""

    def lose(number):
        if number == 2 and how == "flipped":
            flip(fresh.folder / "step-00000008" / "model.safetensors")
        if number == 2 and how == "deleted":
            shutil.rmtree(fresh.out)

    scores(monkeypatch, [0.9, 0.2, 0.1], lose)
    refused(TrainingError, "weights of the best evaluation are lost", fresh.run)
    assert not (fresh.out / "model.safetensors").exists()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_folder_deleted_in_the_run(fresh, monkeypatch):
    """What comes after goes into a new one; nothing of the model is lost."""

    def delete():  # at once: TensorBoard's thread may make a file meanwhile
        shutil.rmtree(fresh.out.rename(fresh.out.with_name("gone")), ignore_errors=True)

    scores(monkeypatch, [0.1, 0.2, 0.9], lambda n: n == 1 and delete())
    fresh.run()
    assert fresh.weights() and fresh.names()[-1] == "step-00000024"


@pytest.mark.seconds
def test_resumed_from_another_folder(fresh, base, tmp_path, monkeypatch):
    """The best weights so far come from there too."""
    scores(monkeypatch, [0.9, 0.2, 0.1])
    fresh.run(keep=3)
    scores(monkeypatch, [0.1])
    other = tuning(base, tmp_path / "other")
    other.run(resume=str(fresh.folder / "step-00000016"))
    assert other.weights() == fresh.weights() and other.names() == [
        "step-00000008",
        "step-00000024",
    ]
    shutil.rmtree(fresh.out)  # which the other one no longer needs
    assert other.run() and other.weights()


TIMED = ("seconds", "hours", "rate", "per_second", "energy")


def figures(results):
    """Without what a clock tells."""
    cost = results["train"]["cost"]
    cost = {k: v for k, v in cost.items() if not any(word in k for word in TIMED)}
    return results | {"train": results["train"] | {"cost": cost}}


def test_resumed_at_the_end(done, whole):
    """All figures are those of the first time: no epoch more, nothing logged again."""
    log = (done.out / "metrics.jsonl").read_bytes()
    assert figures(done.run()) == figures(whole.results)
    assert (done.out / "metrics.jsonl").read_bytes() == log


@pytest.mark.seconds
@pytest.mark.parametrize("options", [{"max_steps": 12}, {"patience": 1}], ids=str)
def test_resumed_where_it_stopped_early(fresh, monkeypatch, options):
    scores(monkeypatch, [0.5, 0.4])
    first = fresh.run(**options)
    assert figures(fresh.run(**options)) == figures(first)


@BOTH
def test_one_run_a_folder(base, tmp_path, kind):
    runs = kind(base, tmp_path / "out")
    with locked(runs.out):
        refused(BlockingIOError, "in use by another run", runs.run)
    assert not (runs.out / "run_config.yaml").exists()


@BOTH
def test_full_disk_in_the_run(base, tmp_path, kind):
    """safetensors' own kind of error becomes OSError and says what is kept."""
    runs = kind(base, tmp_path / "out")
    runs.run(**SHORT)
    shutil.rmtree(runs.folder / "step-00000004")
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, old[1]))
    try:
        refused(OSError, "File too large.*kept: step-00000002.*goes on", runs.run, **SHORT)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert runs.names() == ["step-00000002"] and not list(runs.folder.glob(".*"))
