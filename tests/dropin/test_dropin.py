"""`bertfast.accelerate` on transformers' own models: same outputs, same gradients, same habits."""

import copy
import pickle

import pytest
import torch
import transformers
from families import (
    FAMILIES,
    MASKS,
    build,
    gradients,
    heads,
    inputs_for,
    real,
    same_gradients,
    tensors,
)
from helpers import close_to_truth, exact

import bertfast
from bertfast.dropin import AccelerationError

CASES = [
    (family, head, mask)
    for family in FAMILIES
    for head in heads(family)
    for mask in (("right",) if head == "ForMultipleChoice" else MASKS)  # one logit a choice
]


@pytest.mark.parametrize("family, head, kind", CASES)
def test_outputs_and_gradients(family, head, kind):
    theirs = build(family, head)
    ours = copy.deepcopy(theirs)
    report = bertfast.accelerate(ours)
    assert report.fused == 2, report
    given = inputs_for(head, kind)
    mask = given["attention_mask"]
    with torch.no_grad():
        expected, actual = tensors(theirs(**given)), tensors(ours(**given))
    truth = tensors(exact(theirs, given))
    # MPNet's bias needs positions as they stand, padding last.
    stock = family == "MPNet" and kind in ("holes", "left", "row")
    assert report.fallbacks and any(report.fallbacks.values()) == stock, report
    assert len(expected) == len(actual) > 0
    for e, a, t in zip(expected, actual, truth, strict=True):
        close_to_truth(*(real(x, mask) for x in (a, t, e)))
        assert torch.isfinite(a).all()
    same_gradients(gradients(ours, given, mask), theirs, given, mask)


@pytest.mark.parametrize("by", ["call", "config"])
@pytest.mark.parametrize(
    "family, attention",
    [("Bert", "sdpa"), ("Roberta", "sdpa"), *((family, "eager") for family in FAMILIES)],
)
def test_hidden_states_and_attentions(family, attention, by):
    theirs = build(family, attention=attention)
    ours = copy.deepcopy(theirs)
    report = bertfast.accelerate(ours)
    given = inputs_for()
    wanted = ["output_hidden_states"] + ["output_attentions"] * (attention == "eager")
    for count in (1, len(wanted)):
        for m in theirs, ours:
            for name in wanted[:count] if by == "config" else ():
                setattr(m.config, name, True)
        asked = {} if by == "config" else dict.fromkeys(wanted[:count], True)
        with torch.no_grad():
            expected, actual = theirs(**given, **asked), ours(**given, **asked)
        truth = exact(theirs, given | asked)
        assert len(actual.hidden_states) == 3
        states = (actual.hidden_states, truth.hidden_states, expected.hidden_states)
        for found in zip(*states, strict=True):
            close_to_truth(*(real(x, given["attention_mask"]) for x in found))
        if count == 2:
            maps = (actual.attentions, truth.attentions, expected.attentions)
            for found in zip(*maps, strict=True):
                close_to_truth(*found)
            assert "attention maps" in str(report)
        else:
            assert not any(report.fallbacks.values())
    if by == "call":  # the hooks that transformers leaves behind change nothing
        with torch.no_grad():
            ours(**given)
        assert not any(report.fallbacks.values())


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_to_see(family):
    """An empty batch, a batch without a real token, a model without layers."""
    theirs = build(family)
    ours = copy.deepcopy(theirs)
    report = bertfast.accelerate(ours)
    given = inputs_for()
    with torch.no_grad():
        empty = {name: t[:0] for name, t in given.items()}
        assert ours(**empty)[0].shape == (0, 17, 48)
        given["attention_mask"] = torch.zeros_like(given["attention_mask"])
        out, expected = ours(**given)[0], theirs(**given)[0]
        assert out.shape == (4, 17, 48) and torch.isfinite(out).all()
        close_to_truth(out, expected)
        for m in theirs, ours:
            next(c for c in m.children() if hasattr(c, "layer")).layer = torch.nn.ModuleList()
        close_to_truth(ours(**given)[0], theirs(**given)[0])
    assert "no layers" in str(report)


def test_restore_is_the_inverse():
    model = build("Roberta", "ForMaskedLM")
    before = [(n, type(m), sorted(vars(m))) for n, m in model.named_modules()]
    keys = list(model.state_dict())
    bertfast.accelerate(model)
    bertfast.accelerate(model)
    model(**inputs_for())
    assert bertfast.is_accelerated(model) and list(model.state_dict()) == keys
    bertfast.restore(model)
    bertfast.restore(model)
    assert not bertfast.is_accelerated(model)
    assert [(n, type(m), sorted(vars(m))) for n, m in model.named_modules()] == before


def test_block():
    model = build("Bert")
    with bertfast.accelerated(model) as report:
        assert bertfast.is_accelerated(model) and report.fused == 2
    assert not bertfast.is_accelerated(model)
    bertfast.accelerate(model)
    with bertfast.accelerated(model):
        pass
    assert bertfast.is_accelerated(model)


def test_copies_saves_and_loads(tmp_path):
    model = build("Bert", "ForSequenceClassification")
    bertfast.accelerate(model)
    given = inputs_for()
    with torch.no_grad():
        expected = model(**given).logits
        clone = copy.deepcopy(model)
        for p in clone.parameters():
            p.zero_()
        assert not clone(**given).logits.any()  # its own weights, not the original's
        torch.testing.assert_close(model(**given).logits, expected, rtol=0, atol=0)
        thawed = pickle.loads(pickle.dumps(model))
        torch.testing.assert_close(thawed(**given).logits, expected, rtol=0, atol=0)
        model.save_pretrained(tmp_path)
        assert model.config.architectures == ["BertForSequenceClassification"]
        loaded = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
        stock = loaded(**given).logits
        close_to_truth(expected, exact(loaded, given).logits, stock)
        state = {n: torch.zeros_like(t) for n, t in model.state_dict().items()}
        model.load_state_dict(state, assign=True)
        assert not model(**given).logits.any()


def test_a_changed_module_is_not_bypassed():
    class Doubled(torch.nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    theirs = build("Bert")
    dense = theirs.encoder.layer[0].intermediate.dense
    changed = Doubled(dense.in_features, dense.out_features)
    changed.load_state_dict(dense.state_dict())
    theirs.encoder.layer[0].intermediate.dense = changed
    ours = copy.deepcopy(theirs)
    report = bertfast.accelerate(ours)
    assert report.fused == 1 and "Doubled" in report.layers["encoder.layer.0"]
    given = inputs_for()
    with torch.no_grad():
        found = ours(**given)[0], exact(theirs, given)[0], theirs(**given)[0]
    close_to_truth(*(real(x, given["attention_mask"]) for x in found))
    bertfast.restore(ours)
    with pytest.raises(AccelerationError, match="Doubled"):
        bertfast.accelerate(ours, strict=True)
    assert not bertfast.is_accelerated(ours)


@pytest.mark.parametrize(
    "mask, why",
    [
        (torch.ones(4, 1, 17, 17).tril().bool(), "differs between queries"),
        (torch.linspace(-1, 0, 17).expand(4, 1, 17, 17), "other than 0"),
    ],
)
def test_other_masks_fall_back(mask, why):
    theirs = build("Bert")
    ours = copy.deepcopy(theirs)
    report = bertfast.accelerate(ours)
    given = inputs_for() | {"attention_mask": mask}
    with torch.no_grad():
        close_to_truth(ours(**given)[0], theirs(**given)[0])
    assert why in str(report)


def test_decoder_falls_back():
    model = build("Bert", "LMHeadModel", is_decoder=True)
    expected = model(**inputs_for()).logits
    report = bertfast.accelerate(model)
    assert report.fused == 0 and "decoder" in str(report)
    close_to_truth(model(**inputs_for()).logits, expected)


def test_other_models_are_left_alone():
    report = bertfast.accelerate(torch.nn.Linear(2, 2))
    assert report.fused == 0 and "nothing changed" in str(report)
    with pytest.raises(AccelerationError, match="no encoder"):
        bertfast.accelerate(torch.nn.Linear(2, 2), strict=True)
    with pytest.raises(ValueError, match="'fast'"):
        bertfast.accelerate(build("Bert"), backend="fast")


def test_forced_backend(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")  # the interpreter would take the CPU's tensors
    model = build("Bert")
    report = bertfast.accelerate(model, backend="triton")
    with pytest.raises(RuntimeError, match="triton"), torch.no_grad():
        model(**inputs_for())
    bertfast.accelerate(model, backend="reference")
    with torch.no_grad():
        model(**inputs_for())
    assert not any(report.fallbacks.values())
