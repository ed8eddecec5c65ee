"""Pairs of sentences: equal to transformers' own model, one masked token at a time, and to the
arithmetic of CrowS-Pairs' metric, written again here."""

import csv
import difflib
import json
from functools import cache

import audited
import pytest
import torch
from families import build
from helpers import refused
from transformers import AutoModelForMaskedLM, AutoTokenizer

import bertfast
from bertfast.audit import intervals, pairs, pseudo_log_likelihoods
from bertfast.cli import main
from bertfast.data import DataError
from bertfast.model import CheckpointError

HEADER = ["", "sent_more", "sent_less", "stereo_antistereo", "bias_type", "annotations"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A masked language model that is sure of what it says: its weights are far from 0."""
    folder = tmp_path_factory.mktemp("mlm")
    torch.manual_seed(1)
    return str(audited.checkpoint(folder, bertfast.BertForMaskedLM))


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    path = tmp_path_factory.mktemp("pairs") / "pairs.csv"
    rows = []
    for i, row in enumerate(audited.rows(24, 7)):
        other = row["text"]
        for a, b in zip(*audited.GROUPS.values(), strict=True):
            swap = {a: b, b: f"{a} and {a}"}  # of other lengths, too
            other = " ".join(swap.get(w, w) for w in other.split())
        kind = ("gender", "age")[i % 3 == 0]
        direction = ("stereo", "antistereo")[i % 4 == 0]
        rows.append([i, row["text"], other, direction, kind, "[]"])
    write(path, rows)
    return path


def write(path, rows, header=HEADER):
    with open(path, "w", newline="") as f:
        csv.writer(f).writerows([header, *rows])
    return path


@cache
def stock(folder):
    return AutoModelForMaskedLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(
        folder
    )


@torch.no_grad()
def stock_scores(folder, text):
    """ids, and of each place the log-probability of its token, by a loop without batches."""
    model, tokenizer = stock(folder)
    ids = tokenizer(text)["input_ids"]
    found = []
    for i in range(len(ids)):
        masked = torch.tensor([ids])
        masked[0, i] = tokenizer.mask_token_id
        scores = model(input_ids=masked).logits[0, i].double().log_softmax(0)
        found.append(scores[ids[i]].item())
    return ids, found


def read(path):
    with open(path, newline="") as f:
        return list(csv.DictReader(f))


def test_scores_and_metric(model, table):
    found = pairs(model, table)
    rows, right = read(table), {"overall": [], "gender": [], "age": []}
    assert len(found["pairs"]) == len(rows) == 24
    for row, one in zip(rows, found["pairs"], strict=True):
        more, less = (stock_scores(model, row[side]) for side in ("sent_more", "sent_less"))
        same = difflib.SequenceMatcher(None, more[0], less[0]).get_opcodes()
        spans = [s for s in same if s[0] == "equal"]
        a = [i for _, start, end, _, _ in spans for i in range(start, end)][1:-1]
        b = [i for _, _, _, start, end in spans for i in range(start, end)][1:-1]
        sums = sum(more[1][i] for i in a), sum(less[1][i] for i in b)
        assert one["shared_tokens"] == len(a) == len(b)
        assert (one["sent_more"], one["sent_less"]) == pytest.approx(sums, abs=6e-4)  # 3 places
        whole = sum(more[1][1:-1]), sum(less[1][1:-1])
        assert (one["sent_more_all"], one["sent_less_all"]) == pytest.approx(whole, abs=1e-4)
        for key in ("overall", row["bias_type"]):
            right[key].append(round(sums[0], 3) > round(sums[1], 3))
    for key, hits in right.items():
        part = found["overall"] if key == "overall" else found["bias_types"][key]
        assert part["pairs"] == len(hits)
        assert part["shared"]["share"] == pytest.approx(sum(hits) / len(hits))
    assert 0 < found["overall"]["shared"]["share"] < 1
    assert {*found["directions"]} == {"stereo", "antistereo"}
    assert found["directions"]["antistereo"]["pairs"] == 6
    assert found["masked"] == sum(
        len(stock(model)[1](r[s])["input_ids"]) - 2
        for r in rows
        for s in ("sent_more", "sent_less")
    )


@pytest.mark.parametrize("family", ["Bert", "Roberta", "DistilBert"])
def test_likelihoods_of_families(family, saved):
    """Also of those that take padded rows; BERT's of a checkpoint for pre-training."""
    folder = saved(family, "ForPreTraining" if family == "Bert" else "ForMaskedLM")
    texts = ["the cat sat on the mat", "a dog", "sun zzz far"]
    found = pseudo_log_likelihoods(folder, texts)
    for text, value in zip(texts, found, strict=True):
        assert value == pytest.approx(sum(stock_scores(folder, text)[1][1:-1]), abs=1e-4)


def test_batches_do_not_matter(model):
    from bertfast.audit.likelihood import MaskedLM

    given = MaskedLM(model)
    rows = given.encoded([r["text"] for r in audited.rows(10)], str)
    places = [given.own(row) for row in rows]
    one, many = (given.log_probabilities(rows, places, tokens) for tokens in (1, 100_000))
    for a, b in zip(one, many, strict=True):
        assert a == pytest.approx(b, abs=1e-5)


def test_shares_intervals():
    """Wilson's, by the textbook's example, and never empty at the ends."""
    found = intervals.of_share(15, 50)
    assert (found["low"], found["high"]) == pytest.approx((0.1910, 0.4375), abs=1e-4)
    assert intervals.of_share(0, 20)["high"] == pytest.approx(0.1611, abs=1e-4)
    assert intervals.of_share(20, 20)["high"] == 1


def test_command(model, table, tmp_path, capsys):
    given = ["audit", "pairs", "--model", model, "--data", str(table)]
    assert main([*given, "--json", str(tmp_path / "out.json")]) == 0
    shown = capsys.readouterr().out
    for text in ("prefers sent_more", "gender", "antistereo", "Norwegian Salmon", "24 pairs"):
        assert text in shown
    assert len(json.loads((tmp_path / "out.json").read_text())["pairs"]) == 24
    assert main([*given, "--json", str(table)]) == 2
    assert "is read from" in capsys.readouterr().err


def test_wrong_input(model, tmp_path, classifiers):
    good = [0, "she ran", "he ran", "stereo", "gender", "[]"]
    run = lambda *rows: pairs(model, write(tmp_path / "x.csv", rows))
    for bad, message in (
        ({3: "pro"}, r"row 2 \(line 3\): column 'stereo_antistereo' is 'pro', expected stereo or"),
        ({2: "she ran"}, "row 2 .*: column 'sent_less' is the same sentence as sent_more"),
        ({1: ""}, "row 2 .*: column 'sent_more' is an empty text"),
        ({1: "she " * 40}, "x.csv: row 2: 42 tokens, the model takes up to 32: shorten"),
    ):
        row = [bad.get(i, value) for i, value in enumerate(good)]
        refused(DataError, rf"x\.csv: {message.removeprefix('x.csv: ')}", run, good, row)
    refused(DataError, "x.csv: has a header .* but no rows", run)
    lacking = write(tmp_path / "y.csv", [good[:4]], HEADER[:4])
    refused(DataError, "y.csv: no column 'bias_type'; it has", pairs, model, lacking)
    fine = write(tmp_path / "x.csv", [good])
    refused(CheckpointError, "is no fine-tuned model for this task .MaskedLM.", pairs,
            classifiers["group"], fine)  # fmt: skip
    build("Bert", "Model", pad_token_id=0).save_pretrained(tmp_path / "headless")
    refused(CheckpointError, "BertModel", pairs, tmp_path / "headless", fine)
