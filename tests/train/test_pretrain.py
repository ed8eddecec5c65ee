"""Pre-training: learning, losses that batches don't change, checkpoints, the command line."""

import copy
import json
import os
import signal
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import tiny
import tiny_pretrain
import torch
import transformers
from families import close_gradients
from helpers import close_to_truth, exact, refused
from safetensors.torch import load_file

import bertfast
from bertfast import ops
from bertfast.cli import main
from bertfast.train import (
    ConfigError,
    InterruptedRunError,
    PretrainConfig,
    TrainingError,
    pretrain,
)
from bertfast.train import checkpoint as state
from bertfast.train.pretrain import PretrainTask


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    return tiny_pretrain.folder(tmp_path_factory.mktemp("prepared"))


def run(prepared, out, **options):
    return pretrain(PretrainConfig(**tiny_pretrain.settings(prepared, out=str(out), **options)))


def records(out):
    return [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]


def losses(out):
    return [r["loss"] for r in records(out) if "loss" in r]


@pytest.mark.seconds
def test_learns_and_writes(prepared, tmp_path, capfd):
    results = run(prepared, tmp_path / "o", max_steps=150, eval_steps=50, log_steps=50)
    valid = results["valid"]
    assert valid["mlm_accuracy"] > 2.5 * valid["unigram_accuracy"]
    assert valid["nsp_accuracy"] > 0.7  # the topics tell
    assert valid["perplexity"] == pytest.approx(np.exp(valid["loss"]))
    out = tmp_path / "o"
    for name in (
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "run_config.yaml",
        "eval_results.json",
        "training_curve.png",
    ):
        assert (out / name).stat().st_size > 0, name
    assert list((out / "tensorboard").iterdir())
    lines = records(out)
    perplexity = [r["valid_perplexity"] for r in lines if "valid_loss" in r]
    assert len(perplexity) == 3 and perplexity[0] > perplexity[1] > perplexity[2]
    steps = [r for r in lines if "loss" in r]
    assert len(steps) == 150
    assert {
        "mlm_loss",
        "nsp_loss",
        "lr",
        "tokens_per_second",
        "mfu",
        "tokens_seen",
        "eta_seconds",
    } <= set(steps[0])
    assert all(r["loss"] == pytest.approx(r["mlm_loss"] + r["nsp_loss"], rel=1e-5) for r in steps)
    seen = [r["tokens_seen"] for r in steps]
    assert all(0 < b - a <= 512 for a, b in pairwise(seen))
    said = capfd.readouterr().err
    assert "step 100/150" in said and "tokens seen" in said and "MFU" in said and " -> " in said

    theirs = transformers.AutoModelForPreTraining.from_pretrained(out).eval()
    ours = bertfast.BertForPreTraining.from_pretrained(out)
    tokens = transformers.AutoTokenizer.from_pretrained(out)(
        "kaa kab [MASK].", "kab kaa", return_tensors="pt"
    )
    with torch.no_grad():
        a, b = theirs(**tokens), ours(**tokens)
    for name, truth in exact(theirs, tokens).items():
        close_to_truth(b[name], truth, a[name], what=name)


@pytest.mark.parametrize("nsp", [True, False])
def test_packed_loss_is_transformers(prepared, nsp):
    """The packed losses against transformers' padded model with the same masks and weights."""
    task, model = tiny_pretrain.task(prepared, nsp=nsp)
    batch = task.load(task.batches(0)[0])
    ours = task.loss(model, batch)
    cls = transformers.BertForPreTraining if nsp else transformers.BertForMaskedLM
    theirs = cls(model.config).train()
    theirs.load_state_dict(model.state_dict())
    theirs.tie_weights()
    wide = copy.deepcopy(theirs).double()
    cu = batch.cu_seqlens.tolist()
    n, longest = len(cu) - 1, batch.max_seqlen
    ids, mask, types = (torch.zeros(n, longest, dtype=torch.long) for _ in range(3))
    labels = torch.full((n, longest), -100)
    flat = torch.full((cu[-1],), -100)
    flat[batch.positions] = batch.labels
    for i in range(n):
        part, size = slice(cu[i], cu[i + 1]), cu[i + 1] - cu[i]
        ids[i, :size], mask[i, :size], types[i, :size] = (
            batch.input_ids[part],
            1,
            batch.token_type_ids[part],
        )
        labels[i, :size] = flat[part]

    def losses_of(theirs):
        out = theirs(input_ids=ids, attention_mask=mask, token_type_ids=types)
        pairs = [(out.prediction_logits if nsp else out.logits, labels)]
        if nsp:
            pairs.append((out.seq_relationship_logits, batch.targets))
        entropy = torch.nn.functional.cross_entropy
        return torch.stack(
            [entropy(x.flatten(0, -2), y.flatten(), reduction="sum") for x, y in pairs]
        )

    found = ours, losses_of(theirs), losses_of(wide)
    close_to_truth(found[0], found[2], found[1], floor=1e-5)
    for loss in found:
        loss.sum().backward()
    grads = [
        {n: p.grad for n, p in m.named_parameters() if p.grad is not None}
        for m in (model, theirs, wide)
    ]
    close_gradients(*({n: g[n] for n in grads[0]} for g in grads))


def test_packed_encoder_is_the_padded_one(prepared):
    _, model = tiny_pretrain.task(prepared)
    model.eval()
    ids = torch.randint(5, model.config.vocab_size, (7,))
    cu = torch.tensor([0, 3, 7], dtype=torch.int32)
    padded = torch.zeros(2, 4, dtype=torch.long)
    padded[0, :3], padded[1] = ids[:3], ids[3:]
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])
    with torch.no_grad():
        packed = model.bert.encode_packed(ids, cu, 4)
        rows = model.bert.encode_packed(ids, cu, 4, rows=torch.tensor([0, 5]))
    given = {"input_ids": padded, "attention_mask": mask}
    truth = exact(model.bert, given).last_hidden_state[mask.bool()]
    close_to_truth(packed, truth)
    close_to_truth(rows, truth[[0, 5]])
    refused(ValueError, "max_seqlen is 65", model.bert.encode_packed, ids, cu, 65)


@pytest.mark.seconds
def test_accumulation_changes_nothing(prepared, tmp_path):
    """The same steps, cut into 1, 2 or 4 micro-batches: the same losses but for rounding."""
    curves = []
    for n in (1, 2, 4):
        run(
            prepared,
            tmp_path / str(n),
            config=str(prepared / "still.json"),
            accumulation=n,
            max_steps=8,
            lr=1e-3,
        )
        curves.append(losses(tmp_path / str(n)))
    for other in curves[1:]:
        np.testing.assert_allclose(other, curves[0], rtol=1e-5)
    assert curves[0][-1] < curves[0][0]


def test_more_parts_than_sequences(prepared, tmp_path):
    """Empty micro-batches count for nothing."""
    few = {"batch_tokens": 40, "max_steps": 3, "config": str(prepared / "still.json")}
    for n in (1, 4):
        run(prepared, tmp_path / str(n), accumulation=n, **few)
    np.testing.assert_allclose(losses(tmp_path / "4"), losses(tmp_path / "1"), rtol=1e-5)


def test_accumulated_gradient(prepared):
    """Normalised by the global counts of targets and of pairs, not by the number of parts."""
    grads = []
    for n, dtype in ((1, torch.float64), (1, None), (2, None), (4, None)):
        task, model = tiny_pretrain.task(prepared, accumulation=n)
        model.to(dtype)
        parts = [task.load(b) for b in task.batches(0)[:n]]
        weights = torch.tensor([task.weight(b) for b in parts]).sum(0)
        for b in parts:
            (task.loss(model, b) / weights).sum().backward()
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    for g in grads[1:]:
        close_to_truth(g, grads[0])


@pytest.mark.parametrize("kind", ["whole_word", "span", "entity"])
def test_kinds_of_masking(prepared, tmp_path, kind):
    lexicon = None
    if kind == "entity":
        lexicon = str(tmp_path / "lexicon.txt")
        Path(lexicon).write_text("kaa kab\nmoa\n")
    results = run(
        prepared,
        tmp_path / "o",
        nsp=False,
        masking=kind,
        lexicon=lexicon,
        max_steps=12,
        eval_steps=12,
    )
    assert 0 < results["valid"]["loss"] < 6 and "nsp_accuracy" not in results["valid"]
    assert (tmp_path / "o" / "config.json").exists()


@pytest.mark.seconds
def test_bf16_and_lamb(prepared, tmp_path):
    results = run(
        prepared, tmp_path / "b", precision="bf16", max_steps=100, eval_steps=100, schedule="cosine"
    )
    lamb = run(prepared, tmp_path / "l", optimizer="lamb", lr=2e-2, max_steps=100, eval_steps=100)
    for r in (results, lamb):
        assert r["valid"]["mlm_accuracy"] > 1.5 * r["valid"]["unigram_accuracy"]
    assert all(
        t.dtype == torch.float32 for t in load_file(tmp_path / "b" / "model.safetensors").values()
    )


def test_masked_cross_entropy():
    torch.manual_seed(0)
    hidden, weight, bias = torch.randn(9, 8), torch.randn(20, 8), torch.randn(20)
    labels = torch.randint(0, 20, (9,))
    labels[[1, 4]] = -100
    logits = hidden.double() @ weight.double().T + bias
    truth = torch.nn.functional.cross_entropy(logits, labels)
    found = ops.masked_cross_entropy(hidden, weight, bias, labels)
    close_to_truth(found, truth, floor=1e-5)


@pytest.mark.seconds
def test_resume_goes_on(prepared, tmp_path):
    """Stopped by max_steps' sibling, the checkpoint; a longer schedule is another run."""
    whole = run(prepared, tmp_path / "a")
    assert whole["train"]["step"] == 30
    again = run(prepared, tmp_path / "a")
    assert again["valid"] == whole["valid"] and len(losses(tmp_path / "a")) == 30
    refused(
        TrainingError, r"other settings \(max_steps\)", run, prepared, tmp_path / "a", max_steps=31
    )
    for old in state.checkpoints(tmp_path / "a" / "checkpoints")[1:]:
        (old / "optimizer.safetensors").write_bytes(b"x")
    # accumulation is free to change: the steps stay what they were
    run(prepared, tmp_path / "a", accumulation=2)
    assert len(losses(tmp_path / "a")) == 30


@pytest.mark.seconds
@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.safetensors", "state.json"])
def test_flipped_bit_falls_back(prepared, tmp_path, file, capfd):
    """Found by its checksum; the checkpoint before it leads to the same end."""
    run(prepared, tmp_path / "a", max_steps=12, eval_steps=6)
    expected = load_file(tmp_path / "a" / "model.safetensors")
    newest = state.checkpoints(tmp_path / "a" / "checkpoints")[-1]
    data = bytearray((newest / file).read_bytes())
    data[len(data) // 2] ^= 8
    (newest / file).write_bytes(data)
    run(prepared, tmp_path / "a", max_steps=12, eval_steps=6)
    said = capfd.readouterr().err
    assert f"{file} does not match its checksum" in said and "step-00000008" in said
    found = load_file(tmp_path / "a" / "model.safetensors")
    assert all(torch.equal(found[n], expected[n]) for n in expected)


@pytest.mark.seconds
@pytest.mark.parametrize("where", ["score", "loss"])
def test_sigterm_at_once(prepared, tmp_path, monkeypatch, where):
    """Within an evaluation, or between micro-batches: left at once, nothing lost."""
    options = {"max_steps": 8, "eval_steps": 4, "save_steps": None, "accumulation": 2}
    run(prepared, tmp_path / "whole", **options)
    real, calls = getattr(PretrainTask, where), []

    def interrupted(self, model, batch):
        calls.append(1)
        if len(calls) == (1 if where == "score" else 5):
            os.kill(os.getpid(), signal.SIGTERM)
            if where == "score":
                time.sleep(60)
        return real(self, model, batch)

    start = time.monotonic()
    with monkeypatch.context() as m:
        m.setattr(PretrainTask, where, interrupted)
        refused(InterruptedRunError, "stopped at step", run, prepared, tmp_path / "o", **options)
    assert time.monotonic() - start < 30
    found = state.latest(tmp_path / "o" / "checkpoints", print)[1]
    assert found["step"] == (4 if where == "score" else 2)
    assert len(calls) == (1 if where == "score" else 5)
    run(prepared, tmp_path / "o", **options)
    a, b = (load_file(tmp_path / o / "model.safetensors") for o in ("whole", "o"))
    assert all(torch.equal(a[n], b[n]) for n in a)
    assert losses(tmp_path / "o") == losses(tmp_path / "whole")


@pytest.mark.seconds
def test_goes_on_from_a_checkpoint_and_finetunes(prepared, tmp_path):
    run(prepared, tmp_path / "a", max_steps=100, eval_steps=100)
    first = json.loads((tmp_path / "a" / "eval_results.json").read_text())["valid"]
    more = run(
        prepared,
        tmp_path / "b",
        model=str(tmp_path / "a"),
        max_steps=20,
        eval_steps=20,
        lr=1e-3,
        nsp=False,
    )
    assert more["valid"]["loss"] < first["loss"] + 0.5  # not from random weights again
    rows = [
        {"text": f"{t}a {t}b {t}a", "label": t} for t in ("ka", "mo", "si", "tu") for _ in range(12)
    ]
    for name in ("train", "valid"):
        tiny.write(tmp_path / f"{name}.jsonl", rows)
    results = bertfast.train.finetune(
        bertfast.train.ClassifyConfig(
            model=str(tmp_path / "b"), train=str(tmp_path / "train.jsonl"), valid=str(tmp_path / "valid.jsonl"),
            out=str(tmp_path / "f"), epochs=4, lr=3e-3, batch_size=8, max_length=16, device="cpu",
        )
    )  # fmt: skip
    assert results["valid"]["accuracy"] > 0.9
    other = tiny.checkpoint(tmp_path / "other")
    refused(
        ConfigError, "prepare it with --tokenizer", run, prepared, tmp_path / "c", model=str(other)
    )


def test_command_line(prepared, tmp_path, capsys):
    values = tiny_pretrain.settings(prepared, out=str(tmp_path / "o"), max_steps=4, eval_steps=4)
    options = [t for k, v in values.items() for t in ("--" + k.replace("_", "-"), str(v))]
    assert main(["pretrain", *options, "--dry-run"]) == 0
    captured = capsys.readouterr()
    assert captured.out == "" and "4 steps of up to 512 tokens" in captured.err
    assert main(["pretrain", *options]) == 0
    assert json.loads(capsys.readouterr().out)["mlm_accuracy"] >= 0
    (tmp_path / "s.yaml").write_text("lr: 1e-3\nmasking: span\n")
    assert (
        main(
            [
                "pretrain",
                "--settings",
                str(tmp_path / "s.yaml"),
                "--config",
                "mini",
                "--print-config",
            ]
        )
        == 0
    )
    shown = capsys.readouterr().out
    assert "masking: span" in shown and "config: mini" in shown and "lr: 0.001" in shown
    for wrong, text in (
        (["--config", "huge"], "config is 'huge'"),
        (["--batch-tokens", "16"], "batch_tokens is 16"),
        (["--masking", "entity"], "lexicon"),
        (["--length", "100"], "length is 100, the model takes up to 64"),
        (["--mask-share", "0"], "mask_share is 0.0"),
    ):
        assert main(["pretrain", *options, *wrong]) == 2
        assert text in capsys.readouterr().err
    assert main(["pretrain", *options, "--data", str(tmp_path)]) == 1
    assert "bertfast prepare" in capsys.readouterr().err


def test_passes_make_steps(prepared, tmp_path):
    task, _ = tiny_pretrain.task(prepared, max_steps=None)
    config = task.config
    config.max_steps, config.epochs = None, 2
    assert task.steps(config, 1) == 2 * task.train.windows * len(task.batches(0))
