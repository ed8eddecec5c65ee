"""Two gloo ranks under torchrun: the same losses as one, no overlap, a lost rank."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tiny
import tiny_families
import tiny_pretrain
import torch
from safetensors.torch import load_file

from bertfast.train import PretrainConfig, finetune, pretrain, tasks

ROOT = Path(__file__).parents[2]


def command(settings, ranks=2, restarts=0, taped=False, what=("pretrain",)):
    options = [t for k, v in settings.items() for t in ("--" + k.replace("_", "-"), str(v))]
    run = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc-per-node={ranks}",
    ]
    return [
        *run,
        f"--max-restarts={restarts}",
        "--monitor-interval=0.3",
        *([str(ROOT / "tests" / "taped.py")] if taped else ["-m", "bertfast"]),
        *what,
        *options,
    ]


def start(settings, log, **options):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    return subprocess.Popen(
        command(settings, **options), stdout=log, stderr=log, cwd=ROOT, env=environment
    )


def records(out):
    return [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]


def losses(out):
    return [r["loss"] for r in records(out) if "loss" in r]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """A prepared folder and a run of one process: (folder, settings)."""
    folder = tiny_pretrain.folder(tmp_path_factory.mktemp("ranks"))
    settings = tiny_pretrain.settings(
        folder,
        out=str(folder / "one"),
        config=str(folder / "still.json"),
        max_steps=8,
        eval_steps=8,
        lr=1e-3,
    )
    pretrain(PretrainConfig(**settings))
    return folder, settings


@pytest.mark.slow
@pytest.mark.parametrize("taped", [False, True], ids=["launched", "replayed"])
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_ranks_are_one(alone, tmp_path, parallel, taped):
    """The same global batch: the same loss curve, evaluation and weights."""
    folder, settings = alone
    out = tmp_path / parallel
    log = tmp_path / "log"
    with open(log, "w") as f:
        process = start(settings | {"out": str(out), "parallel": parallel}, f, taped=taped)
        assert process.wait(timeout=180) == 0, log.read_text()[-3000:]
    counts = json.loads((out / "eval_results.json").read_text())["train"].get("graphs")
    if taped and parallel == "fsdp":
        assert counts is None and "fsdp: steps are launched" in log.read_text()
    else:
        assert (counts is not None and counts["hits"] > 8) == taped
    np.testing.assert_allclose(losses(out), losses(folder / "one"), rtol=1e-5)
    one, two = (next(r for r in records(o) if "valid_loss" in r) for o in (folder / "one", out))
    for key in ("valid_loss", "valid_mlm_accuracy", "valid_nsp_accuracy"):
        assert two[key] == pytest.approx(one[key], rel=1e-5)
    assert [r["tokens_seen"] for r in records(out) if "loss" in r] == [
        r["tokens_seen"] for r in records(folder / "one") if "loss" in r
    ]
    a, b = (load_file(Path(o) / "model.safetensors") for o in (folder / "one", out))
    assert a.keys() == b.keys()
    for name in a:
        if "key.bias" not in name:
            assert (a[name] - b[name]).norm() <= 1e-3 * a[name].norm(), name
    # Their checkpoint at step 4 is one that a single process goes on from.
    shutil.rmtree(sorted((out / "checkpoints").glob("step-*"))[-1])
    pretrain(PretrainConfig(**(settings | {"out": str(out)})))
    assert len(losses(out)) == 8
    np.testing.assert_allclose(losses(out), losses(folder / "one"), rtol=1e-5)


# Of a softmax over keys, and a question's over tokens, these move all scores alike: rounding alone.
NO_GRADIENT = ("key.bias", "k_lin.bias", "qa_outputs.bias", "layer.1.output.LayerNorm.bias")


def as_pairs(rows):
    return [
        {"text": r["text"], "text_pair": r["label"], "label": i % 3} for i, r in enumerate(rows)
    ]


def as_tags(rows):
    words = [row["text"].split() for row in rows]
    tag = lambda word: "B-COLOUR" if word in tiny.WORDS[:3] else "O"
    return [{"tokens": own, "tags": [*map(tag, own)]} for own in words]


def as_questions(rows):
    return [
        {"question": "cat run", "context": r["text"],
         "answers": {"text": [r["label"]], "answer_start": [r["text"].index(r["label"])]}}
        for r in rows
    ]  # fmt: skip


def as_translations(rows):
    return [{"source": r["text"], "target": r["label"]} for r in rows]


TASKS = [  # kind, family, how parallel, its rows of a classifier's
    ("classify", "Bert", "ddp", list),
    ("classify", "Roberta", "fsdp", list),
    ("pairs", "Bert", "fsdp", as_pairs),
    ("tokens", "Bert", "ddp", as_tags),
    ("tokens", "DistilBert", "fsdp", as_tags),
    ("qa", "Bert", "fsdp", as_questions),
    ("qa", "ModernBert", "ddp", as_questions),
    ("translate", "Bert", "fsdp", as_translations),
]


@pytest.mark.slow
@pytest.mark.parametrize("kind, family, parallel, make", TASKS)
def test_two_ranks_fine_tune_as_one(tmp_path, kind, family, parallel, make):
    """Beside one process with the same micro-batches: losses, figures and what is saved."""
    given = tiny.settings(tmp_path, batch_size=8, max_length=40, epochs=1, lr=1e-3)
    for name, n, seed in (("train", 60, 0), ("valid", 21, 1)):
        tiny.write(tmp_path / f"{name}.jsonl", make(tiny.rows(n, seed)))
    still = dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob"), 0.0)
    more = {"max_position_embeddings": 64} | (still if family == "Bert" else {})
    make_checkpoint = tiny.checkpoint if family == "Bert" else tiny_families.checkpoint
    own = () if family == "Bert" else (family,)
    if family == "DistilBert":
        more["seq_classif_dropout"] = more["qa_dropout"] = 0.0
    given["model"] = str(make_checkpoint(tmp_path / "base", *own, **more))
    given |= {"stride": 8} if kind in ("tokens", "qa") else {}
    if kind == "translate":
        given |= {"source_column": "source", "target_column": "target", "max_length": 20}
    config = tasks.module(kind).Task.Config
    alone = finetune(config(**given | {"out": str(tmp_path / "one"), "accumulation": 2}))
    out, log = tmp_path / parallel, tmp_path / "log"
    settings = given | {"out": str(out), "parallel": parallel}
    with open(log, "w") as f:
        process = start(settings, f, what=("finetune", kind))
        assert process.wait(timeout=180) == 0, log.read_text()[-3000:]
    np.testing.assert_allclose(losses(out), losses(tmp_path / "one"), rtol=1e-5)
    found = json.loads((out / "eval_results.json").read_text())
    assert found["valid"]["loss"] == pytest.approx(alone["valid"]["loss"], rel=1e-4)
    one, two = (load_file(o / "model.safetensors") for o in (tmp_path / "one", out))
    assert one.keys() == two.keys()
    for name, t in one.items():
        if not name.endswith(NO_GRADIENT):
            np.testing.assert_allclose(two[name], t, atol=5e-5, rtol=1e-3, err_msg=name)
    again = tasks.module(kind).evaluate(str(out), given["valid"])
    assert again["loss"] == pytest.approx(found["valid"]["loss"], rel=1e-4)
    told = log.read_text().count("head: new")  # once
    assert told == (kind != "translate")


@pytest.mark.slow
def test_lost_rank(alone, tmp_path):
    """One of two ranks is killed: torchrun starts both again, and they end as if nothing was."""
    _, settings = alone
    out = tmp_path / "out"
    longer = settings | {"out": str(out), "max_steps": 60, "eval_steps": 60, "save_steps": 2}
    log = tmp_path / "log"
    with open(log, "w") as f:
        process = start(longer, f, restarts=2)
        deadline = time.monotonic() + 120
        while not list((out / "checkpoints").glob("step-*")) and time.monotonic() < deadline:
            assert process.poll() is None, log.read_text()[-3000:]
            time.sleep(0.05)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        ranks = [int(c) for c in children if "pretrain" in Path(f"/proc/{c}/cmdline").read_text()]
        assert len(ranks) == 2
        os.kill(ranks[1], signal.SIGKILL)
        assert process.wait(timeout=180) == 0, log.read_text()[-3000:]
    assert "resumed from" in log.read_text()
    whole = tmp_path / "whole"
    pretrain(PretrainConfig(**(longer | {"out": str(whole)})))
    assert len(losses(out)) == 60
    np.testing.assert_allclose(losses(out), losses(whole), rtol=1e-4)


def test_ranks_share_without_overlap():
    from bertfast.train.ranks import Ranks

    for world in (1, 2, 3, 4):
        for n in (1, 2, 5, 8):
            shares = []
            for rank in range(world):
                r = Ranks()
                r.rank, r.world = rank, world
                shares.append(r.share(list(range(n))))
            assert len({len(s) for s in shares}) == 1  # every forward and backward is a meeting
            counted = [b for s in shares for b, factor in s if factor]
            assert sorted(counted) == list(range(n))


def test_full_and_like_are_plain_alone():
    from bertfast.train.ranks import full, like

    t = torch.ones(3)
    assert full(t) is t and like(t, torch.zeros(3)) is t
