"""`bertfast.accelerate` on transformers' own models: same outputs, same gradients, same habits."""

import copy
import io
import pickle
from multiprocessing.reduction import ForkingPickler

import pytest
import torch
import transformers
from families import (
    FAMILIES,
    MASKS,
    UNFUSED,
    build,
    config,
    few,
    gradients,
    heads,
    inputs_for,
    layers_of,
    real,
    same_gradients,
    tensors,
)
from helpers import close_to_truth, exact, refused

import bertfast
from bertfast.dropin import AccelerationError

CASES = [
    (family, head, mask)
    for family in FAMILIES
    for head in heads(family)
    for mask in few(family, MASKS[:1] if head == "ForMultipleChoice" else MASKS)  # a logit a choice
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
    late = kind == "row" and (family, head) == ("EuroBert", "ForSequenceClassification")  # x / 0
    stock = kind in UNFUSED.get(family, ())
    assert report.fallbacks and any(report.fallbacks.values()) == stock, report
    assert len(expected) == len(actual) > 0
    for e, a, t in zip(expected, actual, truth, strict=True):
        close_to_truth(*(real(x, mask) for x in (a, t, e)))
        assert torch.isfinite(a).all() or late
    if not late:
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
        assert len(actual.hidden_states) > 2
        states = (actual.hidden_states, truth.hidden_states, expected.hidden_states)
        for found in zip(*states, strict=True):
            close_to_truth(*(real(x, given["attention_mask"]) for x in found))
        if count == 2:
            maps = (actual.attentions, truth.attentions, expected.attentions)
            for found in zip(*maps, strict=True):
                close_to_truth(*map(torch.nan_to_num, found))  # a padded row without a key in sight
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
        if family == "DebertaV2":
            return  # stock itself needs a layer
        for m in theirs, ours:
            del layers_of(m)[:]
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
        sent = pickle.loads(ForkingPickler.dumps(model))  # as to a process of multiprocessing
        assert bertfast.is_accelerated(sent) and bertfast.is_accelerated(
            copy.copy(model.bert.encoder)
        )
        torch.testing.assert_close(sent(**given).logits, expected, rtol=0, atol=0)
        model.save_pretrained(tmp_path)
        assert model.config.architectures == ["BertForSequenceClassification"]
        loaded = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
        stock = loaded(**given).logits
        close_to_truth(expected, exact(loaded, given).logits, stock)
        state = {n: torch.zeros_like(t) for n, t in model.state_dict().items()}
        model.load_state_dict(state, assign=True)
        assert not model(**given).logits.any()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_pickle_is_the_stock_model(family):
    """It names nothing of ours, so that it loads where bertfast isn't; and takes it again."""
    model = build(family, "ForSequenceClassification")
    before = [(n, type(m), sorted(vars(m))) for n, m in model.named_modules()]
    bertfast.accelerate(model, padding="zeros")
    model(**inputs_for())
    for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
        file = io.BytesIO()
        torch.save(model, file, pickle_protocol=protocol)
        assert b"bertfast" not in file.getvalue()
        thawed = torch.load(io.BytesIO(file.getvalue()), weights_only=False)
        found = [(n, type(m), sorted(vars(m))) for n, m in thawed.named_modules()]
        assert found == before and bertfast.is_accelerated(model)
    assert bertfast.accelerate(thawed, padding="zeros").fused == 2
    with torch.no_grad():
        assert torch.equal(thawed(**inputs_for()).logits, model(**inputs_for()).logits)
    layer = pickle.loads(pickle.dumps(next(m for m in model.modules() if hasattr(m, "layer"))))
    assert not bertfast.is_accelerated(layer)


@pytest.mark.seconds
def test_saved_before_save_pretrained(tmp_path):
    """In every form that stock takes."""
    model = build("Roberta", "ForMaskedLM")
    ours = copy.deepcopy(model)
    bertfast.accelerate(ours)
    for i, options in enumerate(({}, {"safe_serialization": False}, {"max_shard_size": "100KB"})):
        folders = tmp_path / f"stock{i}", tmp_path / f"ours{i}"
        for m, folder in zip((model, ours), folders, strict=True):
            m.save_pretrained(folder, **options)
        names = [sorted(p.name for p in f.iterdir()) for f in folders]
        assert names[0] == names[1]
        for name in names[0]:
            assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes(), name
        assert not b"".join(p.read_bytes() for p in folders[1].iterdir()).count(b"bertfast")


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


def test_what_is_said_of_an_unknown_model():
    """Its class, in a wrapper too; the families known; what helps."""
    c = transformers.RoFormerConfig(vocab_size=90, hidden_size=48, num_hidden_layers=1,
                                    num_attention_heads=3, intermediate_size=80)  # fmt: skip
    text = str(bertfast.accelerate(torch.nn.ModuleDict({"0": transformers.RoFormerModel(c)})))
    for said in (
        "torch.nn.modules.container.ModuleDict",
        "transformers.models.roformer.modeling_roformer.RoFormerModel",
        "bert, roberta, xlm_roberta, camembert, electra",
        "distilbert, mpnet, modernbert",
        'attn_implementation="bertfast"',
    ):
        assert said in text
    native = bertfast.BertModel(config("Bert"))
    text = "bertfast.model.bert.BertModel runs on these kernels as it is"
    assert text in str(bertfast.accelerate(native))


@pytest.mark.parametrize("kind", ["relative_key", "relative_key_query", "rope"])
@pytest.mark.parametrize("family", ["Bert", "Electra"])
def test_positions_that_transformers_no_longer_computes(family, kind):
    theirs = build(family, position_embedding_type=kind)
    ours = copy.deepcopy(theirs)
    refused(AccelerationError, f"positions are '{kind}'", bertfast.accelerate, ours, strict=True)
    assert not bertfast.is_accelerated(ours)
    report = bertfast.accelerate(ours)
    assert report.fused == 0 and str(report).count(kind) == 2
    with torch.no_grad():  # its own code
        assert torch.equal(ours(**inputs_for())[0], theirs(**inputs_for())[0])
    refused(ValueError, kind, bertfast.freeze, ours)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_no_kernel_serves_is_said_at_once(family):
    theirs = build(family).half()
    ours = copy.deepcopy(theirs)
    refused(AccelerationError, "torch.float16 on cpu", bertfast.accelerate, ours, strict=True)
    report = bertfast.accelerate(ours)
    assert report.fused == 0 and set(report.layers.values()) == {
        "no kernel serves torch.float16 on cpu"
    }
    with torch.no_grad():
        assert torch.equal(ours(**inputs_for())[0], theirs(**inputs_for())[0])
    assert bertfast.accelerate(ours, backend="reference", strict=True).fused == 2
    bertfast.accelerate(ours)
    ours.bfloat16()
    assert report.fused == 2  # it looks when asked
    with torch.autocast("cpu", torch.float16):
        assert report.fused == 0
    with pytest.raises(AccelerationError), torch.autocast("cpu", torch.float16):
        bertfast.accelerate(ours, strict=True, padding="zeros")
    assert bertfast.is_accelerated(ours)  # as it was before
    assert {e.bertfast_padding for e in ours.modules() if hasattr(e, "bertfast_padding")} == {
        "auto"
    }


def dtypes(output):
    return {k: [t.dtype for t in (v if isinstance(v, tuple) else (v,))] for k, v in output.items()}


@pytest.mark.parametrize("states", [False, True])
@pytest.mark.parametrize(
    "family, head",
    [
        (f, h)
        for f in FAMILIES
        for h in few(f, ["Model", "ForMaskedLM", "ForSequenceClassification"])
    ],
)
def test_dtypes_out_of_autocast(family, head, states):
    theirs = build(family, head)
    ours, seen = copy.deepcopy(theirs), []
    report = bertfast.accelerate(ours)
    for hooked in (False, True):
        for m in (theirs, ours) if hooked else ():
            layers_of(m)[0].register_forward_hook(
                lambda _, a, out: seen.append((a[0].dtype, out[0].dtype))
            )
        for m in theirs, ours:
            m.train(hooked)
        with torch.autocast("cpu", torch.bfloat16):
            found = [m(**inputs_for(head), output_hidden_states=states) for m in (theirs, ours)]
        assert dtypes(found[0]) == dtypes(found[1])
        stock = hooked and family == "MegatronBert"  # whose layers give their attention maps away
        assert any(report.fallbacks.values()) == stock
    assert seen[0] == seen[1]


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
