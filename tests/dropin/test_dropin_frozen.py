"""`bertfast.freeze` of accelerated models: the stock model's answers from packed weights."""

import copy
import pickle

import pytest
import torch
import transformers
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
    refused(TypeError, "save_frozen", pickle.dumps, ours)
    refused(ValueError, "save_frozen", ours.save_pretrained, tmp_path)
    refused(ValueError, "is frozen", bertfast.restore, ours)
    refused(ValueError, "isn't frozen", bertfast.freeze, ours)
    refused(ValueError, "isn't frozen", bertfast.freeze, torch.nn.Linear(2, 2))
    assert "frozen, 2 layers, fp32" in str(report)


def test_what_can_not_be_frozen_stays_as_it_was():
    """No half: neither accelerated, nor in eval mode."""
    model = build("Bert", hidden_size=33).train()
    refused(ValueError, "heads of 11", bertfast.freeze, model, "int8")
    model.encoder.layer[1].register_forward_hook(lambda *_: None)
    refused(ValueError, "encoder.layer.1 can't be frozen", bertfast.freeze, model)
    assert not bertfast.is_accelerated(model) and model.training
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    "texts, error",
    [
        ({}, ValueError),
        ({"input_ids": torch.full((2, 3), 1000)}, IndexError),
        ({"input_ids": torch.ones(2, 3).long(), "attention_mask": torch.zeros(2, 3)}, ValueError),
    ],
)
def test_texts_that_it_can_not_take(texts, error):
    """And they change nothing."""
    model = build("Bert").train()
    model.pooler.requires_grad_(False)
    asked = [p.requires_grad for p in model.parameters()]
    with pytest.raises(error):
        bertfast.freeze(model, "auto", texts)
    assert not bertfast.is_accelerated(model) and model.training and len(model.encoder.layer) == 2
    assert [p.requires_grad for p in model.parameters()] == asked
    bertfast.freeze(model, "auto", inputs_for())


@pytest.mark.parametrize("native", [False, True])
def test_stopped_while_it_packs(monkeypatch, native, tmp_path):
    """No answer of an encoder without layers, by Ctrl-C in a notebook."""
    from bertfast.encoder.packed_cpu import PackedLayer

    def stop(*_):
        raise KeyboardInterrupt

    model = build("Bert")
    model = bertfast.BertModel(model.config).eval() if native else model
    monkeypatch.setattr(PackedLayer, "of", stop)
    with pytest.raises(KeyboardInterrupt):
        bertfast.freeze(model)
    given = inputs_for()
    for options in ({}, {"output_hidden_states": True}):
        with torch.inference_mode():
            refused(RuntimeError, "stopped|hidden states", model, **given, **options)
    assert "stopped" in str(bertfast.accelerate(model)) or native
    refused(ValueError, "isn't frozen for a CPU", bertfast.save_frozen, model, tmp_path)


def test_each_encoder_has_its_tokenizer(saved):
    """Of a router's, whose vocabularies differ: ids of one are out of the other's range."""
    st = pytest.importorskip("sentence_transformers")
    modules = pytest.importorskip("sentence_transformers.sentence_transformer.modules")
    parts = [[modules.Transformer(saved(vocab_size=n)), modules.Pooling(48)] for n in (90, 21)]
    parts[0][0].tokenizer.add_tokens([f"w{i}" for i in range(30)])
    router = modules.Router.for_query_document(*parts)
    model = st.SentenceTransformer(modules=[router], device="cpu")
    bertfast.freeze(model, "auto", ["w8 w9 cat", "w29"])
    assert model.encode_query("w29 cat").shape == model.encode_document("cat").shape


def test_slow_bf16_is_told(monkeypatch):
    """Where the processor only widens it."""
    from bertfast.ops.extension import C

    about = C.build_info() | {"bf16_products": False}
    monkeypatch.setattr(C, "build_info", lambda: about)
    with pytest.warns(UserWarning, match="no faster than in fp32 and saves memory"):
        bertfast.freeze(build("Bert"), "bf16")


def test_copies_share_what_is_packed():
    _, ours, _ = frozen("Bert", "int8")
    given = inputs_for()
    with torch.inference_mode():
        expected = ours(**given).last_hidden_state
        other = copy.deepcopy(ours)
        ours.config.output_hidden_states = True  # its own, which it can't serve
        assert torch.equal(other(**given).last_hidden_state, expected)
    a, b = (m.encoder.packed.layers[0].tensors["qkv"] for m in (ours, other))
    assert a.data_ptr() == b.data_ptr()


def test_pipeline(saved):
    """What holds a model: it is given, and comes back."""
    folder = saved(head="ForSequenceClassification")
    texts = ["a cat", "the dog ran far away"]
    pipe = transformers.pipeline("text-classification", folder, device="cpu")
    expected = [row["score"] for row in pipe(texts)]
    assert bertfast.freeze(pipe) is pipe
    assert pipe.model.bert.encoder.packed.precision == "fp32"
    assert [row["score"] for row in pipe(texts)] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("cls", ["SentenceTransformer", "CrossEncoder", "SparseEncoder"])
def test_sentences(saved, cls):
    """Untouched models of sentence-transformers, whose encode moves the model first."""
    st = pytest.importorskip("sentence_transformers")
    head = {"CrossEncoder": "ForSequenceClassification", "SparseEncoder": "ForMaskedLM"}.get(cls)
    model = getattr(st, cls)(saved(head=head or "Model"), device="cpu")
    texts = ["a cat", "the dog ran far away", "sea"]
    asked = {"convert_to_tensor": True}

    def answer():
        if cls == "CrossEncoder":
            return model.predict([("sun", text) for text in texts], **asked)
        found = model.encode(texts, **asked)
        return found.to_dense() if found.is_sparse else found

    expected = answer()
    assert bertfast.freeze(model) is model
    assert apart(answer(), expected) < 1e-4
    assert "frozen, 2 layers" in str(bertfast.accelerate(model))


@pytest.mark.parametrize("precision", ["bf16", "int8"])
@pytest.mark.parametrize("family", FAMILIES)
def test_embeddings_of_every_family(saved, family, precision):
    """By sentence-transformers: the frozen model's states pooled, and near fp32's."""
    st = pytest.importorskip("sentence_transformers")
    from sentences import TEXTS

    model = st.SentenceTransformer(saved(family, initializer_range=0.02), device="cpu")
    expected = model.encode(TEXTS, convert_to_tensor=True)
    bertfast.freeze(model, precision)
    found = model.encode(TEXTS, convert_to_tensor=True, batch_size=len(TEXTS))
    cosine = torch.cosine_similarity(found, expected)
    assert cosine.mean() >= {"bf16": 0.9999, "int8": 0.998}[precision], cosine
    order = sorted(range(len(TEXTS)), key=lambda i: -len(TEXTS[i]))  # as encode's batches
    features = model.preprocess([TEXTS[i] for i in order])
    with torch.inference_mode():
        states = model[0].model(**{k: t for k, t in features.items() if torch.is_tensor(t)})[0]
    pooled = model[1](features | {"token_embeddings": states})["sentence_embedding"]
    assert torch.equal(found[order], pooled)


@pytest.mark.parametrize("precision", BOUND)
def test_native_layers_are_packed_alike(precision):
    """To the bit: the same weights, and the same states from the same embeddings."""
    theirs, ours, _ = frozen("Bert", precision)
    native = bertfast.BertModel(theirs.config)
    native.load_state_dict(theirs.state_dict())
    packed = bertfast.freeze(native, precision).encoder.packed
    for a, b in zip(packed.layers, ours.encoder.packed.layers, strict=True):
        assert a.tensors.keys() == b.tensors.keys()
        assert all(torch.equal(t, b.tensors[name]) for name, t in a.tensors.items())
