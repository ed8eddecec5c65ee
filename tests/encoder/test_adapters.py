"""peft's adapters on native models: as on transformers', trained alone, merged."""

import copy

import pytest
import torch
from helpers import refused, relative
from test_watch import CLASSIFIER, LAYER, assert_same, given, outputs, results, small

import bertfast

peft = pytest.importorskip("peft")

EVERY = ["query", "key", "value", "dense", "word_embeddings", "position_embeddings"]
LORA = {"r": 4, "init_lora_weights": False}
ADAPTERS = {
    "lora": peft.LoraConfig(target_modules=["query", "value"], **LORA),
    "lora_everywhere": peft.LoraConfig(target_modules=EVERY, **LORA),
    "dora": peft.LoraConfig(target_modules=["key", "dense"], use_dora=True, **LORA),
    "ia3": peft.IA3Config(
        target_modules=["key", "value", "output.dense"],
        feedforward_modules=["output.dense"],
        init_ia3_weights=False,
    ),
}


def adapted(model, config):
    torch.manual_seed(7)
    return peft.inject_adapter_in_model(config, model).double().eval()


@pytest.mark.parametrize("name", ["BertForMaskedLM", CLASSIFIER])
@pytest.mark.parametrize("kind", ADAPTERS)
def test_same_as_on_transformers(kind, name):
    inputs = given()
    theirs, ours = (adapted(m, ADAPTERS[kind]) for m in small(name))
    found = results(ours, inputs)
    assert_same(found, results(theirs, inputs), kind)
    gradients = {n for n in found if "." in n}
    assert gradients and all("lora" in n or "ia3" in n for n in gradients)


def test_trained_alone_and_merged():
    config = peft.LoraConfig(
        r=4, target_modules=["query", "dense"], modules_to_save=["classifier"], task_type="SEQ_CLS"
    )
    inputs, _ = given(), torch.manual_seed(0)
    labels = torch.tensor([0, 1, 1, 0])
    model = peft.get_peft_model(small(CLASSIFIER)[1], config)
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(8):
        loss = model(**inputs, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    for name, t in model.state_dict().items():
        trained = "lora_" in name or "modules_to_save" in name
        assert torch.equal(t, before[name]) != trained, name
    model.eval()
    with torch.no_grad():
        expected = outputs(model, inputs)[0]
        with model.disable_adapter():
            assert relative(outputs(model, inputs)[0], expected) > 1e-2
        query = "bert.encoder.layer.0.attention.self.query"
        refused(ValueError, f"{query} can't be frozen", bertfast.freeze, model.base_model.model)
        merged = model.merge_and_unload()
        assert relative(outputs(merged, inputs)[0], expected) < 1e-5
        assert relative(outputs(bertfast.freeze(merged), inputs)[0], expected) < 1e-4


def test_modules_to_save_of_any_kind():
    for path in ("pooler", "intermediate", "attention", "embeddings"):
        theirs, ours = (m.double() for m in small(CLASSIFIER))
        config = peft.LoraConfig(target_modules=["classifier"], modules_to_save=[path])
        ours = peft.get_peft_model(ours, config)
        with torch.no_grad():
            a, e = (outputs(m, given())[0] for m in (ours, theirs))
        assert relative(a, e) < 1e-10, path
        ours.base_model.model(**given()).logits.sum().backward()
        copied = ours.base_model.model.get_submodule(LAYER if path in ("intermediate", "attention") else "bert")  # fmt: skip
        parameters = list(getattr(copied, path).modules_to_save.parameters())
        assert any(p.grad is not None for p in parameters), path


@pytest.mark.usefixtures("tape")
def test_adapters_under_cuda_graphs():
    from bertfast.model.graphs import GraphedModel

    fast = GraphedModel(adapted(small("BertModel")[1], ADAPTERS["lora"]), 100, 9)
    refused(RuntimeError, "query is a peft.*merge_and_unload", fast, **given())
