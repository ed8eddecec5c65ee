"""Several seeds of one run; thresholds of a multi-label model."""

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny
from helpers import refused
from sklearn.metrics import f1_score

from bertfast.cli import main
from bertfast.model import CheckpointError
from bertfast.train import ClassifyConfig, ConfigError, evaluate, finetune, metrics, predict


@pytest.mark.seconds
def test_figures_over_seeds(tmp_path, capsys):
    given = tiny.settings(tmp_path, max_steps=3, seed=4)
    results = finetune(ClassifyConfig(**given | {"seeds": 3}))
    out, alone = tmp_path / "out", {}
    for seed in (4, 5, 6):
        folder = str(tmp_path / f"alone-{seed}")
        alone[seed] = finetune(ClassifyConfig(**given | {"seed": seed, "out": folder}))["valid"]
        saved = json.loads((out / f"seed-{seed}" / "eval_results.json").read_text())["valid"]
        assert saved["loss"] == pytest.approx(alone[seed]["loss"], rel=1e-5)
    losses = [alone[seed]["loss"] for seed in alone]
    told = results["seeds"]["valid"]["loss"]
    assert told["values"] == pytest.approx(losses, rel=1e-5)
    assert told["mean"] == pytest.approx(np.mean(losses)) and len({*told["values"]}) == 3
    assert told["sd"] == pytest.approx(np.std(losses, ddof=1))
    best = max(alone, key=lambda seed: alone[seed]["macro_f1"])
    summary = json.loads((out / "seeds.json").read_text())
    assert summary["best"] == f"seed-{best}" and summary["valid"] == results["seeds"]["valid"]
    for name in ("model.safetensors", "tokenizer.json", "run_config.yaml"):
        assert (out / name).read_bytes() == (out / f"seed-{best}" / name).read_bytes()
    assert evaluate(str(out), given["valid"])["loss"] == pytest.approx(
        alone[best]["loss"], rel=1e-5
    )
    assert not (out / "checkpoints").exists()
    # What is done is not trained again.
    capsys.readouterr()
    again = finetune(ClassifyConfig(**given | {"seeds": 4}))
    err = capsys.readouterr().err
    assert err.count("resumed from") == 3 and len(again["seeds"]["valid"]["loss"]["values"]) == 4
    assert again["seeds"]["valid"]["loss"]["values"][:3] == pytest.approx(losses, rel=1e-5)


def test_seeds_spare_what_is_no_runs(tmp_path, capsys):
    """A folder of the pretrained model, somebody's card."""
    given = tiny.settings(tmp_path, max_steps=1, seeds=2)
    weights = (tmp_path / "model" / "model.safetensors").read_bytes()
    text = "the folder of the model, whose weights would be lost"
    refused(ConfigError, text, finetune, ClassifyConfig(**given | {"out": given["model"]}))
    assert (tmp_path / "model" / "model.safetensors").read_bytes() == weights
    for name, kept in (("mine", True), ("ours", False)):
        out = tmp_path / name
        out.mkdir()
        if kept:
            (out / "README.md").write_text("my own")
        finetune(ClassifyConfig(**given | {"out": str(out)}))
        card = (out / "README.md").read_text()
        assert (card == "my own") == kept == ("is kept" in capsys.readouterr().err)
        assert kept or ("\n# ours\n" in card and "seed-" not in card)


def test_the_best_of_seeds_is_a_number(tmp_path, monkeypatch):
    given, values = tiny.settings(tmp_path, metric="loss"), iter([math.nan, 0.7, 0.2, 0.4])

    def one(config, dry_run=False):
        Path(config.out).mkdir(parents=True)
        return {"valid": {"loss": next(values)}}

    monkeypatch.setattr(sys.modules["bertfast.train.finetune"], "_one", one)
    assert finetune(ClassifyConfig(**given, seeds=4))["valid"]["loss"] == 0.2
    summary = json.loads((tmp_path / "out" / "seeds.json").read_text())
    assert summary["best"] == "seed-2" and summary["valid"]["loss"]["sd"] is None


def test_of_the_command_line(tmp_path, capsys):
    given = tiny.settings(tmp_path, max_steps=1, seeds=2)
    options = [t for k, v in given.items() for t in ("--" + k.replace("_", "-"), str(v))]
    assert main(["finetune", "classify", *options]) == 0
    assert "seeds" not in capsys.readouterr().out  # dicts stay in the files
    assert json.loads((tmp_path / "out" / "seeds.json").read_text())["valid"]["loss"]["sd"] > 0
    refused(ConfigError, "seeds is 0", ClassifyConfig, seeds=0)
    refused(ConfigError, "resume is 'x', expected auto or no", ClassifyConfig, seeds=2, resume="x")


@pytest.mark.seconds
def test_best_thresholds_beside_a_search():
    r = np.random.default_rng(0)
    for _ in range(30):
        logits = np.round(r.normal(size=(25, 4)), 1).astype(np.float32)  # some are equal
        targets = (r.random((25, 4)) < [0.1, 0.5, 0.9, 0.0]).astype(np.float32)
        found = metrics.best_thresholds(logits, targets)
        p = metrics.probabilities(logits, "multi_label")
        for k in range(4):
            values = np.unique(p[:, k])
            cuts = [0.0, *(values[1:] + values[:-1]) / 2, 1.0]
            if not targets[:, k].any():
                assert found[k] == 0.5
                continue
            best = max(f1_score(targets[:, k], p[:, k] > cut, zero_division=0) for cut in cuts)
            own = f1_score(targets[:, k], p[:, k] > found[k], zero_division=0)
            assert own == pytest.approx(best, abs=1e-12)


def multi(n, seed=0):
    rows = tiny.rows(n, seed)
    for row in rows:
        words = row["text"].split()
        row["label"] = [w for w in ("cat", "dog", "stone") if w in words]
    return rows


@pytest.mark.seconds
def test_an_older_runs_findings_go(tmp_path):
    """Its thresholds, its seeds, its pictures: they are of another model."""
    given, out = tiny.settings(tmp_path, max_steps=1, resume="no"), tmp_path / "out"
    more = given | {"task": "multi_label", "thresholds": True}
    more |= {n: tiny.write(tmp_path / f"many-{n}.jsonl", multi(30)) for n in ("train", "valid")}
    for seeds in (1, 2):
        finetune(ClassifyConfig(**more, seeds=seeds))
        assert (out / "decision.json").exists() and (out / "seeds.json").exists() == (seeds == 2)
        finetune(ClassifyConfig(**given))
        there = {path.name for path in out.iterdir()}
        assert "confusion_matrix.png" in there and not {"decision.json", "seeds.json"} & there
    finetune(ClassifyConfig(**more | {"thresholds": False}, seeds=2))
    assert not {"decision.json", "confusion_matrix.png"} & {path.name for path in out.iterdir()}


def test_thresholds_are_the_models(tmp_path):
    given = tiny.settings(tmp_path, task="multi_label", max_steps=6, thresholds=True)
    for name, n, seed in (("train", 60, 0), ("valid", 21, 1), ("test", 21, 2)):
        given[name] = tiny.write(tmp_path / f"{name}.jsonl", multi(n, seed))
    results, out = finetune(ClassifyConfig(**given)), tmp_path / "out"
    cuts = json.loads((out / "decision.json").read_text())["thresholds"]
    assert [*cuts] == ["cat", "dog", "stone"] and len({*cuts.values()}) > 1
    texts = [row["text"] for row in multi(21, 2)]
    rows = predict(str(out), texts)
    for row in rows:
        assert row["labels"] == [n for n, p in row["probabilities"].items() if p > cuts[n]]
    truth = [[n in row["label"] for n in cuts] for row in multi(21, 2)]
    ours = [[n in row["labels"] for n in cuts] for row in rows]
    expected = f1_score(truth, ours, average="micro", zero_division=0)
    assert results["test"]["micro_f1"] == pytest.approx(expected)
    assert evaluate(str(out), given["test"])["micro_f1"] == pytest.approx(expected)
    plain = finetune(ClassifyConfig(**given | {"thresholds": False, "out": str(tmp_path / "p")}))
    assert plain["valid"]["micro_f1"] <= results["valid"]["micro_f1"]
    assert not (tmp_path / "p" / "decision.json").exists()
    for bad in ({"thresholds": {"cat": 0.5}}, {"thresholds": dict.fromkeys(cuts, 2.0)}):
        (out / "decision.json").write_text(json.dumps(bad))
        refused(CheckpointError, "expected a probability for each of cat, dog, stone",
                predict, str(out), texts)  # fmt: skip
    refused(ConfigError, "thresholds is True, expected none", ClassifyConfig, thresholds=True)


def test_seeds_have_one_split(tmp_path):
    """Of what is held out: their figures are of the same rows."""
    given = tiny.settings(tmp_path, max_steps=1, seeds=2)
    del given["valid"]
    finetune(ClassifyConfig(**given))
    parts = [
        json.loads((tmp_path / "out" / f"seed-{i}" / "data_report.json").read_text())
        for i in (0, 1)
    ]
    assert parts[0] == parts[1]
    alone = given | {"seeds": 1, "seed": 1, "out": str(tmp_path / "alone")}
    finetune(ClassifyConfig(**alone))
    assert json.loads((tmp_path / "alone" / "data_report.json").read_text()) != parts[0]
