"""Pre-norm encoders: the norm behind the last layer, which is the encoder's own or its model's."""

import pytest
import torch
from families import build
from padded import assert_same, every, observe, padded, three

NORMS = {
    "MegatronBert": "encoder.ln",
    "XLMRobertaXL": "encoder.LayerNorm",
    "RobertaPreLayerNorm": "LayerNorm",
    "ModernBert": "final_norm",
    "EuroBert": "norm",
}
HEADS = ("Model", "ForMaskedLM", "ForSequenceClassification")


def norm_of(model, family):
    return getattr(model, model.base_model_prefix, model).get_submodule(NORMS[family])


def mixed(norm):
    """Another class, whose rows look at each other."""

    class Mixed(type(norm)):
        def forward(self, x):
            return super().forward(x) + x.mean(1, keepdim=True)

    norm.__class__ = Mixed


def hooked(norm):
    norm.register_forward_hook(lambda m, args, out: out + args[0].mean(1, keepdim=True))


@pytest.mark.parametrize("touch", [mixed, hooked])
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("family", NORMS)
def test_who_looks_there_sees_stock(family, head, touch):
    models, report = three(build(family, head))
    for m in models:
        touch(norm_of(m, family))
    assert_same(*(observe(m, padded(), every) for m in models))
    assert report.fused == 2 and not any(report.fallbacks.values())
    assert all(said.startswith("as in the stock") for said in report.padding.values())


@pytest.mark.parametrize("family", NORMS)
def test_nobody_looks(family):
    models, report = three(build(family, "ForSequenceClassification"))
    assert_same(*(observe(m, padded(), every) for m in models))
    if family != "EuroBert":  # which weighs all tokens
        assert [*report.padding.values()] == ["skipped: nobody reads them"]


@pytest.mark.parametrize("touch", [None, hooked])
@pytest.mark.parametrize("family", ["MegatronBert", "XLMRobertaXL"])
def test_zeros_as_asked(family, touch):
    (ours, *_), report = three(build(family), padding="zeros")
    if touch:
        touch(norm_of(ours, family))
    given = padded()
    with torch.no_grad():
        for more in ({}, {"output_hidden_states": True}):
            out = ours(**given, **more).last_hidden_state
            assert not out[given["attention_mask"] == 0].any() and out.any()
    assert [*report.padding.values()] == ["zeros, as asked"]


def test_attention_maps_of_a_hooked_layer():
    """MegatronBERT's layers return them unasked."""
    models, report = three(build("MegatronBert"))
    seen = []
    for m in models[:2]:
        m.encoder.layer[1].register_forward_hook(lambda m, args, out: seen.append(out))
    assert_same(*(observe(m, padded(), every) for m in models))
    ours, theirs = seen
    assert [t.shape for t in ours] == [t.shape for t in theirs] and len(ours) == 2
    assert report.layers["encoder.layer.0"] is None
    assert "attention maps" in report.layers["encoder.layer.1"]
