"""What a prepared folder lacks for pre-training is said, or refused where nothing can be learnt."""

import json
import random

import numpy as np
import pytest
import tiny_pretrain
import torch
from helpers import refused

from bertfast.cli import main
from bertfast.data import DataError, masking
from bertfast.data.prepare import PrepareConfig, prepare
from bertfast.train import PretrainConfig, pretrain
from bertfast.train.pretrain import _parts, _tokenizer


def corpus(folder, text, **options):
    """Settings of a run of one step on a text."""
    (folder / "corpus.txt").write_text(text)
    settings = {"vocab_size": 120, "processes": 1, "similarity": 0, "boilerplate": 0}
    settings |= {"corpus": [str(folder / "corpus.txt")], "out": str(folder / "data")}
    prepare(PrepareConfig(**settings | options), lambda text: None)
    (folder / "config.json").write_text(json.dumps(tiny_pretrain.SIZES))
    return tiny_pretrain.settings(folder, max_steps=1, eval_steps=1)


def run(settings, **options):
    return pretrain(PretrainConfig(**settings | options))


@pytest.fixture
def sentences():
    r = random.Random(0)
    words = [a + b for a in "bdfgklmn" for b in "aeiou"]
    return [" ".join(r.choices(words, k=8)).capitalize() + "." for _ in range(400)]


def test_pairs_that_are_all_alike_are_refused(tmp_path, sentences):
    """With a blank line after each sentence, or none at all; also where --length is too short."""
    for name, text, share, why in (
        ("every", "\n\n".join(sentences), "100%", "do blank lines end each"),
        ("none", "\n".join(sentences), "0%", "put blank lines between"),
    ):
        (tmp_path / name).mkdir()
        settings = corpus(tmp_path / name, text, valid_fraction=0.1)
        refused(DataError, rf"{share} of .*\(train\) are random.*{why}.*--no-nsp", run, settings)
        assert run(settings, nsp=False)["train"]["step"] == 1
    (tmp_path / "short").mkdir()
    documents = [" ".join(sentences[i : i + 4]) for i in range(0, 400, 4)]
    settings = corpus(tmp_path / "short", "\n\n".join(documents), valid_fraction=0.1)
    refused(DataError, "100% of .* fit into --length", run, settings, length=8)
    assert run(settings)["train"]["step"] == 1


def test_pairs_that_are_nearly_all_alike_are_named(tmp_path, sentences, capfd):
    documents = [*sentences[:200], *("\n".join(sentences[i : i + 4]) for i in range(200, 220, 4))]
    run(corpus(tmp_path, "\n\n".join(documents), valid_fraction=0.1))
    err = capfd.readouterr().err
    assert "warning: 9" in err and "next-sentence pairs in" in err and "not half" in err


def test_validation_of_one_sentence(tmp_path, sentences, capfd):
    documents = [" ".join(sentences[i : i + 4]) for i in range(0, 400, 4)]
    (tmp_path / "valid.txt").write_text(sentences[0])
    valid = [str(tmp_path / "valid.txt")]
    run(corpus(tmp_path, "\n\n".join(documents), valid_corpus=valid))
    assert "nothing will be evaluated: too little text" in capfd.readouterr().err


def test_damaged_validation_is_no_empty_one(tmp_path):
    settings = tiny_pretrain.settings(tmp_path, max_steps=1, eval_steps=1)
    shard = next((tmp_path / "data").glob("valid-*.tokens.npy"))
    shard.write_bytes(shard.read_bytes()[:-1] + b"x")
    refused(DataError, "valid-.*does not match its checksum", run, settings)


def test_no_validation_part(tmp_path, sentences, capfd):
    """Said, and the command prints how training went."""
    documents = [" ".join(sentences[i : i + 4]) for i in range(0, 400, 4)]
    settings = corpus(tmp_path, "\n\n".join(documents), valid_fraction=0)
    options = [t for k, v in settings.items() for t in ("--" + k.replace("_", "-"), str(v))]
    assert main(["pretrain", *options]) == 0
    out, err = capfd.readouterr()
    assert json.loads(out)["step"] == 1
    assert "warning: nothing will be evaluated" in err and "has no validation part" in err


def test_same_validation_for_every_seed(tmp_path):
    """So that runs compare; what is trained on follows the seed."""
    found = []
    for seed in (0, 1):
        config = PretrainConfig(**tiny_pretrain.settings(tmp_path, seed=seed))
        words = masking.vocabulary(_tokenizer(config))
        found.append([p.window(0).keys.tolist() for p in _parts(config, words, None, print)])
    (train, valid), (other, again) = found
    assert valid == again and train != other


def test_weights_of_the_losses(tmp_path):
    """Each loss is the mean over what it has: masked tokens, pairs."""
    task, _ = tiny_pretrain.task(tmp_path)
    batch = task.load(task.batches(0)[0])
    assert task.weight(batch) == [len(batch.labels), len(batch.targets)]
    assert len(batch.labels) > len(batch.targets) == len(batch.cu_seqlens) - 1


def test_figures_of_an_evaluation(tmp_path, monkeypatch):
    """Of all validation tokens and pairs, by another route: each figure is a mean over what it has."""
    task, model = tiny_pretrain.task(tmp_path)
    task.valid = task.train
    monkeypatch.setitem(type(task).evaluate.__globals__, "_EVAL_BATCH", 300)
    model.eval()
    with torch.no_grad():
        found = task.evaluate(model, lambda batch: task.score(model, batch))
        window = task.valid.window(0)
        batch = task._packed(task.valid.build(window, np.arange(len(window.first))))
        first, masked = task._hidden(model, batch)
        tokens, pairs = (
            model.cls.predictions(masked).double(),
            model.cls.seq_relationship(model.bert.pooler(first)).double(),
        )
    entropy = torch.nn.functional.cross_entropy
    expected = {"loss": entropy(tokens, batch.labels), "nsp_loss": entropy(pairs, batch.targets)}
    for name, logits, true in (
        ("mlm_accuracy", tokens, batch.labels),
        ("nsp_accuracy", pairs, batch.targets),
    ):
        expected[name] = (logits.argmax(1) == true).double().mean()
    expected["unigram_accuracy"] = (batch.labels == task.common).double().mean()
    for name, value in expected.items():
        assert found[name] == pytest.approx(value.item(), rel=1e-4), name
    assert found["perplexity"] == pytest.approx(np.exp(found["loss"]))
