"""`bertfast.freeze` of accelerated models: the stock model's answers from packed weights."""

import copy
import pickle

import pytest
import torch
from families import FAMILIES, UNFUSED, build, few, inputs_for, real
from helpers import apart, close_to_truth, exact, refused

import bertfast

# Beside the fp64 truth. Sums of 16 bits, without VNNI, take more of the inputs' 8.
BOUND = {"fp32": 1e-5, "bf16": 0.05, "int8": 0.12}
pytestmark = pytest.mark.filterwarnings("ignore:int8")


def frozen(family, precision, head="Model", **options):
    theirs = build(family, head, initializer_range=0.1, **options)
    ours = copy.deepcopy(theirs)
    report = bertfast.accelerate(ours, strict=True)
    return theirs, bertfast.freeze(ours, precision), report


@pytest.mark.parametrize("precision", BOUND)
@pytest.mark.parametrize(
    "family, kind", [(f, kind) for f in FAMILIES for kind in few(f, ["right", "left", "none"])]
)
def test_same_as_stock(family, precision, kind):
    """Padded rows too, which a base model gives away."""
    if kind in UNFUSED.get(family, ()):
        pytest.skip("its padded rows on the left are left to stock layers, which are gone")
    theirs, ours, report = frozen(family, precision)
    given = inputs_for(kind=kind)
    truth = exact(theirs, given).last_hidden_state
    with torch.inference_mode():
        found = ours(**given).last_hidden_state
        assert torch.equal(ours(**given).last_hidden_state, found)
    close_to_truth(found, truth, floor=BOUND[precision])
    assert report.executors == dict.fromkeys(report.executors, f"whole_cpu, frozen in {precision}")
    assert not any("encoder.layer" in name for name, _ in ours.named_parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_heads_and_hidden_states(family):
    theirs, ours, _ = frozen(family, "fp32", "ForSequenceClassification")
    given = inputs_for()
    expected = exact(theirs, given | {"output_hidden_states": True})
    with torch.inference_mode():
        close_to_truth(ours(**given).logits, expected.logits, floor=5e-5)
    given |= {"output_hidden_states": True}
    if family not in (
        "MPNet",
        "MegatronBert",
        "DebertaV2",
    ):  # transformers' hooks on layers collect them
        return refused(RuntimeError, "frozen.*hidden states", ours, **given)
    with torch.inference_mode():
        found = ours(**given)
    assert len(found.hidden_states) == len(expected.hidden_states) == 3
    for a, e in zip(found.hidden_states, expected.hidden_states, strict=True):
        close_to_truth(real(a, given["attention_mask"]), real(e, given["attention_mask"]))


def test_what_it_can_not_do(tmp_path):
    _, ours, report = frozen("Bert", "fp32")
    given = inputs_for()
    refused(RuntimeError, "frozen.*attention maps", ours, **given, output_attentions=True)
    refused(RuntimeError, "for inference", ours.train(), **given)
    ours.eval()
    refused(TypeError, "copied or pickled", copy.deepcopy, ours)
    refused(TypeError, "copied or pickled", pickle.dumps, ours)
    refused(ValueError, "saved, its layers", ours.save_pretrained, tmp_path)
    refused(ValueError, "is frozen", bertfast.restore, ours)
    refused(ValueError, "isn't frozen", bertfast.freeze, ours)
    refused(ValueError, "isn't frozen", bertfast.freeze, build("Bert"))
    assert "frozen, 2 layers, fp32" in str(report)


def test_sentences(saved):
    """By sentence-transformers, whose encode moves the model first."""
    st = pytest.importorskip("sentence_transformers")
    texts = ["a cat", "the dog ran far away", "sea"]
    model = st.SentenceTransformer(saved(), device="cpu")
    expected = model.encode(texts, convert_to_tensor=True)
    bertfast.accelerate(model, strict=True)
    bertfast.freeze(model)
    assert apart(model.encode(texts, convert_to_tensor=True), expected) < 1e-4
