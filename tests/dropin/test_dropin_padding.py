"""Accelerated heads on padded batches: what can be read at padding is what stock has there.

The table is transformers' own: a head that it adds is a row here.
"""

import copy
import functools

import pytest
import torch
from families import EAGER, FAMILIES, PARTLY_FP32, UNFUSED, few, heads
from padded import (
    KINDS,
    assert_same,
    assert_told,
    embedded,
    every,
    labels,
    observe,
    padded,
    stock,
    three,
)

import bertfast

_QA = "ForQuestionAnswering"
HEADS = [(family, head) for family in FAMILIES for head in heads(family)]
MODES = ("outputs", "hidden states", "masked labels", "labels everywhere", "own loss")


@functools.lru_cache(1)
def accelerated(family, head):
    return three(stock(family, head))


def asked(model, head, kind, mode):
    """The call of a mode, and the loss that it is differentiated by."""
    given = padded(head, kind)
    if mode == "outputs":
        return given, None
    if mode == "hidden states":
        return given | {"output_hidden_states": True}, None
    if mode == "own loss" or head == "Model":
        return embedded(model, given) if mode == "labels everywhere" else given, every
    wanted = labels(model, given, everywhere=mode == "labels everywhere")
    if mode == "labels everywhere":
        given = embedded(model, given)
    return given | wanted, lambda output: output.loss


def check(models, given, loss):
    assert_same(*(observe(m.train(loss is not None), given, loss) for m in models))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "family, head, kind", [(f, h, kind) for f, h in HEADS for kind in few(f, KINDS)]
)
def test_heads(family, head, kind, mode):
    models, report = accelerated(family, head)
    given, loss = asked(models[1], head, kind, mode)
    check(models, given, loss)
    assert report.fused == 2
    if kind in UNFUSED.get(family, ()):
        assert any(report.fallbacks.values())
    else:
        assert not any(report.fallbacks.values()), report
        assert_told(report)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family, head", [(f, h) for f, h in HEADS if "Sequence" in h])
def test_padding_stock(family, head, kind):
    """Asked for, padded rows are there whatever the consumer."""
    models, report = three(stock(family, head), padding="stock")
    check(models, *asked(models[1], head, kind, "masked labels"))
    if kind == "right":  # the report alone can tell; "auto" leaves them out
        left_out, automatic = three(stock(family, head))
        check(left_out, *asked(left_out[1], head, kind, "masked labels"))
        assert report.padding != automatic.padding


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_padding_zeros(family, kind):
    """Asked for, padded rows are zeros and the rest is as it was; so is the gradient."""
    (ours, theirs, exact), report = three(stock(family), padding="zeros")
    given = padded(kind=kind)
    real = given["attention_mask"] == 1
    if kind == "holes" and family in UNFUSED:
        pytest.skip("distances among holes run unfused")
    seen = []
    for model in (ours, theirs, exact):
        seen.append(observe(model, given, lambda output: output[0][real].square().mean()))
        seen[-1].pop("pooler_output", None)  # of column 0
    assert not seen[0]["last_hidden_state"][~real].any()
    for s in seen:
        s["last_hidden_state"] = s["last_hidden_state"][real]
    assert_same(*seen)
    assert_told(report)


def test_padding_refused():
    with pytest.raises(ValueError, match="'none'"):
        bertfast.accelerate(stock("Bert"), padding="none")


@pytest.mark.parametrize("padding", ["zeros", "stock", "auto"])
def test_accelerating_again_takes_the_new_choice(padding):
    model = stock("Bert")
    given = padded()
    for first in ("auto", "zeros"):
        bertfast.accelerate(model, padding=first)
        bertfast.accelerate(model, padding=padding)
        with torch.no_grad():
            found = model(**given)[0][given["attention_mask"] == 0]
        assert found.any(1).all() if padding != "zeros" else not found.any()


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("head", ["Model", "ForQuestionAnswering", "ForSequenceClassification"])
@pytest.mark.parametrize("family", ["Bert", "Roberta", "DistilBert"])
def test_attention_implementations(family, head, attention):
    models, _ = three(stock(family, head, attention=attention))
    check(models, *asked(models[1], head, "left", "labels everywhere"))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize(
    "family, head", [h for h in HEADS if h[1] in ("Model", "ForSequenceClassification", _QA)]
)
def test_a_row_of_padding(family, head, attention):
    """It is finite, and nothing to the other rows."""
    if family in EAGER and attention == "sdpa":
        pytest.skip("transformers has no SDPA for it")
    if (family, head) == ("EuroBert", "ForSequenceClassification"):
        pytest.skip("it divides by the number of tokens")
    if family in PARTLY_FP32 and attention == "eager":
        pytest.skip("its softmax is in fp32, and without a key NaN")
    models, _ = three(stock(family, head, attention=attention))
    given = padded()
    given["attention_mask"][2] = 0
    rest = torch.tensor([0, 1, 3])
    seen = []
    for model in models:
        seen.append(
            observe(model, given, lambda output: every({k: t[rest] for k, t in output.items()}))
        )
        if model is models[0]:
            assert all(t.isfinite().all() for t in seen[0].values())
        seen[-1] = {k: t[rest] if len(t.shape) and len(t) == 4 else t for k, t in seen[-1].items()}
    assert_same(*seen)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("summary", ["first", "last", "mean", "cls_index"])
def test_electra_summaries(summary, kind):
    """ELECTRA's multiple choice reads what its configuration says."""
    models, _ = three(stock("Electra", "ForMultipleChoice", summary_type=summary))
    check(models, *asked(models[1], "ForMultipleChoice", kind, "masked labels"))


@pytest.mark.parametrize("family", FAMILIES)
def test_tuples_and_configuration(family):
    """`return_dict=False`, and hidden states asked for by the configuration."""
    for head in {"ForSequenceClassification", _QA} & {*heads(family)}:
        (ours, theirs, _), _ = three(stock(family, head))
        tuples = [] if family in PARTLY_FP32 else [("return_dict", False)]  # which raise there
        for name, value in [("output_hidden_states", True), *tuples]:
            for model in ours, theirs:
                setattr(model.config, name, value)
            with torch.no_grad():
                found = [
                    model(**padded()) for model in (ours, theirs, copy.deepcopy(theirs).double())
                ]
            named = [dict(enumerate(f.to_tuple() if name != "return_dict" else f)) for f in found]
            assert_same(
                *({f"{k}.{i}": t for k, v in n.items() for i, t in enumerate(v)} for n in named)
            )


@pytest.mark.parametrize("family", ["Bert", "DistilBert", "MPNet"])
def test_feed_forward_chunks(family):
    """transformers' own suite: chunks of the feed-forward change nothing at any position."""
    theirs = stock(family)
    ours = copy.deepcopy(theirs)
    for module in ours.modules():
        if hasattr(module, "chunk_size_feed_forward"):
            module.chunk_size_feed_forward = 1
    bertfast.accelerate(ours)
    check((ours, theirs, copy.deepcopy(theirs).double()), padded(), every)
