"""Decoding with a cache beside transformers' generate."""

from itertools import pairwise

import pytest
import torch
from helpers import close_to_truth, refused
from translated import END, batch, ours, pair

from bertfast import ops
from bertfast.model.steps import Steps

ENDS = [END, *range(10, 40)]  # so many that random models come to one


def source(seed=1, lengths=(30, 3, 17, 1, 9, 22)):
    given = batch(lengths, lengths, seed=seed)
    return {k: given[k] for k in ("input_ids", "attention_mask")}


def words(sequences, ends=ENDS):
    """Lists up to the end: what stands behind it transformers fills as it likes."""
    found = []
    for row in sequences.tolist():
        end = next((i + 1 for i, token in enumerate(row[1:], 1) if token in ends), len(row))
        found.append(row[:end])
    return found


def wide(seed, **options):
    """Both in fp64, where nothing hangs on rounding: untied outputs change from step to step."""
    stock, model = pair(seed=seed, tie=False, head=False, **options)
    return stock.double(), model.double()


def both(stock, model, given, **options):
    options = {"max_new_tokens": 24, "eos_token_id": ENDS} | options
    with ops.backend("reference"):
        own = model.generate(**given, **options)
    expected = stock.generate(**given, do_sample=False, **options)
    ends = options["eos_token_id"]
    return words(own, ends), words(expected, ends)


@pytest.mark.parametrize("seed", range(4))
def test_greedy_is_transformers(seed):
    stock, model = wide(seed)
    own, expected = both(stock, model, source(seed))
    assert own == expected


@pytest.mark.parametrize("options", [
    {"min_new_tokens": 9},
    {"eos_token_id": [END]},
    {"max_new_tokens": 1},
    {"max_new_tokens": 40},
    {"min_new_tokens": 24},
], ids=str)  # fmt: skip
def test_lengths(options):
    own, expected = both(*wide(7), source(7), **options)
    assert own == expected
    own, expected = both(*wide(7), source(7), num_beams=3, **options)
    assert own == expected


BEAMS = [
    {"num_beams": 2},
    {"num_beams": 4, "early_stopping": True},
    {"num_beams": 3, "length_penalty": 0.0},
    {"num_beams": 4, "length_penalty": 2.0, "early_stopping": "never"},
    {"num_beams": 5, "length_penalty": -1.0, "early_stopping": "never"},
    {"num_beams": 3, "length_penalty": 0.6, "early_stopping": True},
]


@pytest.mark.parametrize("options", BEAMS, ids=str)
def test_beams_are_transformers(options):
    """The sequences and their scores, over several models and sources."""
    for seed in range(3):
        stock, model = wide(seed, layers=1)
        given = source(seed)
        wanted = options | {"max_new_tokens": 20, "eos_token_id": ENDS[: 1 + 10 * seed]}
        with ops.backend("reference"):
            own = model.decode(**given, **wanted)
        expected = stock.generate(
            **given, do_sample=False, return_dict_in_generate=True, output_scores=True, **wanted
        )
        ends = wanted["eos_token_id"]
        assert words(own.sequences, ends) == words(expected.sequences, ends), seed
        close_to_truth(own.scores, expected.sequences_scores.double(), floor=1e-6)


def test_fp32_kernels():
    stock, model = pair(seed=3, tie=False, head=False)
    given = source(3)
    for options in ({}, {"num_beams": 4}):
        options |= {"max_new_tokens": 24, "eos_token_id": ENDS}
        own = model.generate(**given, **options)
        assert words(own) == words(stock.generate(**given, **options))


def test_greedy_scores():
    """As beam search would score the same sequence: fp64 by the stock model's own logits."""
    stock, model = wide(2)
    given = source(2)
    with ops.backend("reference"):
        own = model.decode(
            **given, max_new_tokens=24, eos_token_id=ENDS, scores=True, length_penalty=0.5
        )
    for i, row in enumerate(words(own.sequences)):
        ids = torch.tensor([row])
        one = {k: v[i : i + 1] for k, v in given.items()}
        logits = stock(**one, decoder_input_ids=ids[:, :-1]).logits.log_softmax(2)
        truth = logits.gather(2, ids[:, 1:, None]).sum() / (len(row) - 1) ** 0.5
        close_to_truth(own.scores[i], truth.detach(), floor=1e-6)
    with ops.backend("reference"):
        assert model.decode(**given, max_new_tokens=2).scores is None


@pytest.mark.parametrize("beams", [1, 3])
def test_sequences_that_end_leave_the_batch(beams, monkeypatch):
    rows = []
    call = Steps.__call__
    monkeypatch.setattr(Steps, "__call__", lambda s, ids: (rows.append(len(ids)), call(s, ids))[1])
    _, model = wide(1)
    with ops.backend("reference"):
        found = model.generate(**source(1), max_new_tokens=24, num_beams=beams, eos_token_id=ENDS)
    assert rows[0] == 6 * beams and rows[-1] < rows[0]
    assert all(a >= b for a, b in pairwise(rows))
    assert len(rows) >= found.shape[1] - 1
    if beams == 1:  # at most a sixth of the rows has ended and is still there
        lengths = torch.tensor([len(r) - 1 for r in words(found)])
        going = [(lengths > i).sum() for i in range(len(rows))]
        assert all(r <= g / 0.85 for r, g in zip(rows, going, strict=True))


@pytest.mark.parametrize("beams", [1, 3])
def test_a_source_alone_or_among_others(beams):
    _, model = wide(4)
    given = source(4)
    options = {"max_new_tokens": 20, "num_beams": beams, "eos_token_id": ENDS}
    with ops.backend("reference"):
        together = words(model.generate(**given, **options))
        for i, expected in enumerate(together):
            one = {k: v[i : i + 1] for k, v in given.items()}
            assert words(model.generate(**one, **options)) == [expected]
        none = {k: v[:0] for k, v in given.items()}
        assert model.generate(**none, **options).shape == (0, 1)


def test_the_end_of_the_configuration_and_tokens():
    stock, model = wide(5)
    given = source(5)
    model.config.eos_token_id = ENDS
    with ops.backend("reference"):
        found = model.decode(**given, max_new_tokens=24)
    rows = words(stock.generate(**given, max_new_tokens=24, eos_token_id=ENDS))
    assert words(found.sequences) == rows
    assert found.tokens(ENDS) == [[t for t in row[1:] if t not in ENDS] for row in rows]
    behind = [row[len(kept) :] for row, kept in zip(found.sequences.tolist(), rows, strict=True)]
    assert not any(map(any, behind))  # padding


def test_hooked_layers():
    """A layer's hook counts at every step."""
    stock, model = wide(6)
    for m in (stock, model):
        layer = m.decoder.bert.encoder.layer[0]
        for path in ("intermediate.dense", "attention.self.query", "crossattention.output.dense"):
            layer.get_submodule(path).register_forward_hook(lambda m, x, y: y * 1.5)
    own, expected = both(stock, model, source(6))
    assert own == expected


def test_refused():
    model, given = ours(), source()
    for options, match in (
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"max_new_tokens": 41}, "expected 1 to 40"),
        ({"max_new_tokens": 5, "min_new_tokens": 6}, "min_new_tokens 6"),
        ({"num_beams": 0}, "num_beams is 0"),
        ({"early_stopping": "yes"}, "early_stopping 'yes'"),
        ({"eos_token_id": 200}, "eos_token_id is 200"),
    ):
        refused(ValueError, match, model.generate, **given, **({"max_new_tokens": 8} | options))
    refused(ValueError, "training mode", model.train().generate, **given, max_new_tokens=8)
    model.eval().config.decoder_start_token_id = None
    refused(ValueError, "decoder_start_token_id is None", model.generate, **given,
            max_new_tokens=8)  # fmt: skip


def test_an_empty_source():
    """One that is all padding: zeros come of its cross-attention, as in training."""
    _, model = wide(8)
    given = source(8)
    given["attention_mask"][1] = 0
    options = {"max_new_tokens": 6, "eos_token_id": []}
    with ops.backend("reference"):
        found = model.generate(**given, **options)
        ids = torch.cat([found[1:2, :1], found[1:2, 1:-1]], 1)
        one = {k: v[1:2] for k, v in given.items()}
        logits = model(**one, decoder_input_ids=ids).logits
    assert logits.isfinite().all() and found[1, 1:].tolist() == logits[0].argmax(1).tolist()


@pytest.mark.parametrize("dtype", [torch.bfloat16, "autocast"])
def test_bf16(dtype):
    """It runs in bf16, and says nearly what fp32 does of the first token."""
    _, model = pair(seed=9, tie=False, head=False)
    given, options = source(9), {"max_new_tokens": 4, "scores": True}
    exact = model.decode(**given, **options).scores
    low = dtype == "autocast"
    with torch.autocast("cpu", torch.bfloat16, enabled=low):
        found = (model if low else model.to(dtype)).decode(**given, **options).scores
    assert found.isfinite().all() and (found - exact).abs().median() < 0.1
