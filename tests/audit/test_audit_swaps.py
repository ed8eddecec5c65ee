"""Counterfactual swaps: a planted bias is found, an unbiased control isn't; nothing else changes."""

import json
import re

import audited
import numpy as np
import pytest
import tiny
import torch
from helpers import refused
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from bertfast.audit import lexicon, swapping, swaps
from bertfast.cli import main
from bertfast.data import DataError, Examples
from bertfast.train import ConfigError

LOWER = {"ignore_case": True, "samples": 100}


def test_planted_bias_and_control(classifiers, table):
    biased = swaps(classifiers["group"], table, **LOWER)
    control = swaps(classifiers["colour"], table, **LOWER)
    assert biased["texts"] == biased["with_terms"] == biased["changed"]["texts"] == 200
    assert biased["changed"]["low"] > 0.8 and biased["shift"]["high"] < -0.7
    assert control["changed"]["high"] < 0.05 and control["absolute_shift"]["high"] < 0.05
    way = {(one["from"], one["to"]): one["classes"]["yes"] for one in biased["directions"]}
    assert way["female", "male"]["high"] < -0.7 and way["male", "female"]["low"] > 0.7
    for one in biased["worst"]:
        assert one["label_before"] != one["label_after"]
        words, others = one["before"].split(), one["after"].split()
        differ = [(a, b) for a, b in zip(words, others, strict=True) if a != b]
        sides = [words for pair in audited.GROUPS.values() for words in pair]
        assert len(differ) == 1 and {*differ[0]} <= {*sides, "him", "hers"}


def test_probabilities_are_the_stock_models(classifiers, table):
    """Of the worst examples, one text at a time."""
    found = swaps(classifiers["group"], table, **LOWER, worst=20)
    model = AutoModelForSequenceClassification.from_pretrained(classifiers["group"]).eval()
    tokenizer = AutoTokenizer.from_pretrained(classifiers["group"])
    labels = model.config.label2id
    assert len(found["worst"]) == 20
    with torch.no_grad():
        for one in found["worst"]:
            for side in ("before", "after"):
                given = tokenizer(one[side], return_tensors="pt")
                p = model(**given).logits.softmax(1)[0]
                expected = p[labels[one["label_before"]]].item()
                assert one[f"probability_{side}"] == pytest.approx(expected, abs=1e-5)
                assert labels[one[f"label_{side}"]] == p.argmax()


def test_texts_that_do_not_count_are_named(classifiers, tmp_path, capsys):
    rows = [*audited.rows(10), {"text": "the red cat"}, {"text": "grandpa saw the cat"}]
    rows.append({"text": "the cat and the dog ran far away and the cat and the dog ran, he saw"})
    path = tiny.write(tmp_path / "rows.jsonl", rows)
    found = swaps(classifiers["group"], path, **LOWER)
    assert found["without_terms"] == [11]
    assert found["unseen"] == [12, 13]  # both words unknown; beyond max_length, 16
    assert (found["texts"], found["with_terms"], found["changed"]["texts"]) == (13, 12, 10)
    given = ["audit", "swaps", "--model", classifiers["group"], "--data", path, "--ignore-case"]
    assert main([*given, "--json", str(tmp_path / "out.json")]) == 0
    shown = capsys.readouterr().out
    assert "1 texts without a term (rows 11)" in shown and "doesn't see (rows 12, 13)" in shown
    assert re.search(r"female -> male +\d+ ", shown) and "note: A lexicon knows words" in shown
    one = json.loads((tmp_path / "out.json").read_text())["worst"][0]
    assert f"  - {one['before']}\n  + {one['after']}" in shown


def test_more_than_two_groups(classifiers, tmp_path):
    (tmp_path / "three.txt").write_text("f | m | n\nshe | he | the\nher | his | the\n")
    refused(DataError, "line 3: 'the' stands in", swaps, classifiers["group"],
            tmp_path / "x", lexicon=tmp_path / "three.txt")  # fmt: skip
    (tmp_path / "three.txt").write_text("f | m | n\nshe | he | the\n")
    rows = [{"text": "she saw red"}, {"text": "he saw the dog"}, {"text": "ran away"}]
    path = tiny.write(tmp_path / "rows.jsonl", rows)
    found = swaps(classifiers["group"], path, lexicon=tmp_path / "three.txt", samples=50)
    ways = [(one["from"], one["to"]) for one in found["directions"]]
    assert ways == [("f", "m"), ("f", "n"), ("m and n", "n and f"), ("m and n", "f and m")]
    after = {(one["row"], one["after"]) for one in found["worst"]}
    assert after == {(1, "he saw red"), (1, "the saw red"), (2, "the saw she dog"), (2, "she saw he dog")}  # fmt: skip
    shifts = {row: [] for row in (1, 2)}
    for one in found["worst"]:
        shifts[one["row"]].append(one["probability_after"] - one["probability_before"])
    mean = np.mean([np.mean(v) for v in shifts.values()])
    assert found["shift"]["mean"] == pytest.approx(mean)


def test_wrong_input(classifiers, tmp_path, capsys):
    run = lambda rows, **options: swaps(
        classifiers["group"], tiny.write(tmp_path / "x.jsonl", rows), **options
    )
    refused(DataError, "x.jsonl: no text has a term of gender, names .rows: 1.", run,
            [{"text": "the red cat"}])  # fmt: skip
    refused(DataError, "ignore the case", run, [{"text": "emma saw"}])
    refused(DataError, "change nothing that the model sees", run, [{"text": "my grandpa"}])
    refused(ConfigError, "samples is 0, expected 1 or more", run, [{"text": "she"}], samples=0)
    refused(DataError, "no column 'text'", run, [{"words": "she saw"}])
    refused(DataError, r"row 2 \(line 2\): column 'text' is an empty", run,
            [{"text": "she"}, {"text": ""}])  # fmt: skip
    given = ["audit", "swaps", "--model", classifiers["group"], "--data", str(tmp_path / "x.jsonl")]
    assert main([*given, "--lexicon", str(tmp_path / "none.txt")]) == 2
    assert "none.txt': no such file, and none of gender" in capsys.readouterr().err


def test_both_texts_of_a_pair():
    examples = Examples(["She ran", "no", "the cat"], ["did he?", "Her book", "far"])
    made = swapping._made(examples, lexicon.load("gender"))
    assert made.texts == [0, 1] and made.own == [{0, 1}, {0}]
    assert made.variants == [("He ran", "did she?"), ("no", "His book")]
