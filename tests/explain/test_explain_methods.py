"""Every method beside captum, transformers' maps, or the definition, on stock models."""

import copy

import families
import numpy as np
import pytest
import tiny
import tiny_families
import torch
import transformers
from helpers import close_to_truth

from bertfast.data import Examples
from bertfast.dropin import is_accelerated
from bertfast.dropin.fused import FusedEncoder
from bertfast.explain import METHODS, Settings, explain, maps
from bertfast.explain.explainer import Explainer
from bertfast.explain.sanity import untrained
from bertfast.explain.words import read

captum = pytest.importorskip("captum.attr")
TEXTS = [row["text"] for row in tiny.rows(2, 3)] + ["red", "blue cat, dog. run run run"]
FAMILIES = [
    f for f in (*tiny_families.FAMILIES, "MPNet", "Electra", "Albert") if f in families.FAMILIES
]
NAMES = {"id2label": {0: "a", 1: "b", 2: "c"}, "label2id": {"a": 0, "b": 1, "c": 2}}


@pytest.fixture(scope="module", params=["Bert", *FAMILIES])
def folder(request, tmp_path_factory):
    """A classifier of random weights, of whose classes none is nearly certain."""
    made = tmp_path_factory.mktemp(request.param)
    options = {"initializer_range": 0.1, **NAMES, "num_labels": 3}
    options |= {"classifier_pooling": "mean"} if request.param == "ModernBert" else {}
    head = "ForSequenceClassification"
    return str(tiny_families.checkpoint(made, request.param, head, **options))


@pytest.fixture(scope="module")
def stock(folder):
    """transformers' model in fp32 and in fp64, and the rows that it reads."""
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        folder, attn_implementation="eager"
    ).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    return model, copy.deepcopy(model).double(), read(tokenizer, TEXTS, None, 40), tokenizer


def given(text, device="cpu"):
    return {k: torch.tensor([v]) for k, v in text.row.items()}


def explainer(folder, *methods, **options):
    return Explainer(folder, Settings(methods=methods or METHODS, **options), device="cpu")


def test_integrated_gradients_are_captums(folder, stock):
    """`LayerIntegratedGradients` of the word embeddings, fp64, as many steps."""
    plain, exact, texts, tokenizer = stock
    found = explain(
        folder, TEXTS, methods=["integrated_gradients"], device="cpu", baseline="pad", max_length=40
    )
    for text, result in zip(texts, found, strict=True):
        target = "abc".index(result["target"])
        ids, start = given(text), torch.tensor([text.row["input_ids"]])
        start[0, text.word >= 0] = tokenizer.pad_token_id
        own = {}
        for name, model in (("like", plain), ("truth", exact)):
            more = {k: v for k, v in ids.items() if k != "input_ids"}
            first = getattr(getattr(model.base_model, "embeddings", None), "padding_idx", None)
            if first is not None:  # RoBERTa's positions skip padding, of which the baseline is made
                more["position_ids"] = torch.arange(len(text.word))[None] + first + 1
            rows = lambda n: {k: v.expand(n, -1) for k, v in more.items()}
            forward = lambda i: model(i, torch.ones_like(i), **rows(len(i))).logits
            method = captum.LayerIntegratedGradients(forward, model.get_input_embeddings())
            steps = result["methods"]["integrated_gradients"]["steps"]
            scores = method.attribute(ids["input_ids"], start, target=target, n_steps=steps)
            own[name] = torch.from_numpy(text.total(scores[0].double().sum(1).numpy()))
        words = torch.tensor([w["scores"]["integrated_gradients"] for w in result["words"]])
        close_to_truth(words.double(), own["truth"], own["like"])


def test_gradients_are_fused(folder, stock):
    """On our kernels, not by a fallback to the stock layers."""
    own = explainer(folder, "integrated_gradients")
    own.explained(Examples(TEXTS[:1]), 40)
    encoders = [m for m in own.model.modules() if isinstance(m, FusedEncoder)]
    assert [m.bertfast_last.fallback for m in encoders] in ([], [None])
    assert encoders or type(own.model).__module__.startswith("bertfast")


def test_untrained_models(folder):
    model = explainer(folder, "occlusion").model
    other = untrained(model, seed=5)  # 0 is the folder's own
    assert type(other) is type(model) and is_accelerated(other) == is_accelerated(model)
    ours, theirs = model.get_input_embeddings().weight, other.get_input_embeddings().weight
    assert ours.shape == theirs.shape and not torch.equal(ours, theirs)
    assert torch.equal(theirs, untrained(model, seed=5).get_input_embeddings().weight)


def test_completeness(folder, stock):
    _, exact, texts, tokenizer = stock
    found = explain(folder, TEXTS, methods=["integrated_gradients"], device="cpu", max_length=40)
    for text, result in zip(texts, found, strict=True):
        target, own = "abc".index(result["target"]), result["methods"]["integrated_gradients"]
        total = sum(w["scores"]["integrated_gradients"] for w in result["words"])
        x, x0 = given(text), given(text)
        x0["input_ids"][0, text.word >= 0] = tokenizer.mask_token_id
        with torch.no_grad():
            change = (exact(**x).logits - exact(**x0).logits)[0, target].item()
        assert own["complete"] and own["completeness_error"] <= 0.01
        assert abs(total - change) <= 0.0101 * abs(change)
        assert own["logit"] - own["baseline_logit"] == pytest.approx(change, rel=1e-3, abs=1e-5)


def test_maps_are_those_of_transformers(folder, stock):
    plain, exact, texts, _ = stock
    ours = explainer(folder, "gradient_attention").model
    native = type(ours).__module__.startswith("bertfast")
    assert native or is_accelerated(ours)
    targets = [i % 3 for i in range(len(texts))]
    before = None if native else ours.config._attn_implementation
    made = [list(layers) for layers in maps.maps(ours, texts, targets, True)]
    assert native or ours.config._attn_implementation == before
    for text, target, layers in zip(texts, targets, made, strict=True):
        own = {}
        for name, model in (("like", plain), ("truth", exact)):
            out = model(**given(text), output_attentions=True)
            grads = torch.autograd.grad(out.logits[0, target], out.attentions)
            own[name] = out.attentions, grads
        assert len(layers) == len(own["truth"][0]) >= 2
        for layer, (a, grad) in enumerate(layers):
            close_to_truth(a, own["truth"][0][layer][0], own["like"][0][layer][0])
            close_to_truth(grad, own["truth"][1][layer][0], own["like"][1][layer][0], floor=1e-4)


def test_scores_of_maps_by_their_papers(folder, stock):
    """Rollout and relevance in NumPy from transformers' maps in fp64."""
    _, exact, texts, _ = stock
    methods = ["attention_rollout", "gradient_attention"]
    found = explain(folder, TEXTS, methods=methods, device="cpu", max_length=40)
    mean = getattr(exact.config, "classifier_pooling", None) == "mean"
    for text, result in zip(texts, found, strict=True):
        out = exact(**given(text), output_attentions=True)
        target = "abc".index(result["target"])
        grads = torch.autograd.grad(out.logits[0, target], out.attentions)
        n = len(text.word)
        rolled, relevance = np.eye(n), np.eye(n)
        for a, g in zip(out.attentions, grads, strict=True):
            a, g = a[0].detach().numpy(), g[0].numpy()
            step = a.mean(0) + np.eye(n)
            rolled = (step / step.sum(1, keepdims=True)) @ rolled
            relevance += np.maximum(a * g, 0).mean(0) @ relevance
        relevance -= np.eye(n)
        for method, table in (("attention_rollout", rolled), ("gradient_attention", relevance)):
            row = table.mean(0) if mean else table[0]
            words = np.array([w["scores"][method] for w in result["words"]])
            np.testing.assert_allclose(words, text.total(row), atol=2e-4 * row.max())
            rest = result["methods"][method]["rest"]
            assert rest == pytest.approx(row[text.word < 0].sum(), abs=2e-4 * row.max())


@pytest.mark.parametrize("way", ("mask", "delete"))
def test_occlusion_by_one_text_at_a_time(folder, stock, way):
    _, exact, texts, tokenizer = stock
    found = explain(
        folder, TEXTS, methods=["occlusion"], occlusion=way, target="b", device="cpu", max_length=40
    )
    probability = lambda x: exact(**x).logits.softmax(1)[0, 1].item()
    for text, result in zip(texts, found, strict=True):
        assert result["target"] == "b"
        x = given(text)
        with torch.no_grad():
            whole = probability(x)
            assert result["probability"] == pytest.approx(whole, abs=2e-6)
            for i, word in enumerate(result["words"]):
                gone = torch.from_numpy(text.word == i)
                if way == "delete":
                    less = {k: v[:, ~gone] for k, v in x.items()}
                else:
                    less = x | {
                        "input_ids": torch.where(gone, tokenizer.mask_token_id, x["input_ids"])
                    }
                change = whole - probability(less)
                assert word["scores"]["occlusion"] == pytest.approx(change, abs=1e-5)


def test_occlusion_is_captums_feature_ablation(folder, stock):
    plain, _, texts, tokenizer = stock
    found = explain(folder, TEXTS, methods=["occlusion"], device="cpu", max_length=40)
    for text, result in zip(texts, found, strict=True):
        x, target = given(text), "abc".index(result["target"])
        types = {k: v for k, v in x.items() if k != "input_ids"}
        forward = lambda ids: plain(ids, torch.ones_like(ids), **types).logits.softmax(1)
        # One group of all specials, which takes no part.
        groups = torch.from_numpy(np.where(text.word < 0, len(result["words"]), text.word))[None]
        with torch.no_grad():
            scores = captum.FeatureAblation(forward).attribute(
                x["input_ids"], tokenizer.mask_token_id, target, feature_mask=groups
            )[0]
        for i, word in enumerate(result["words"]):
            at = int(np.flatnonzero(text.word == i)[0])
            assert word["scores"]["occlusion"] == pytest.approx(scores[at].item(), abs=1e-5)
