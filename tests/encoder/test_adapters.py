"""peft's adapters on native and accelerated models: as on transformers', trained alone, merged."""

import contextlib
import copy
import warnings

import pytest
import torch
from helpers import refused, relative
from test_watch import CLASSIFIER, LAYER, assert_same, given, outputs, results, small
from torch import nn

import bertfast
from bertfast.encoder import adapters, watch

peft = pytest.importorskip("peft")

EVERY = ["query", "key", "value", "dense", "word_embeddings", "position_embeddings"]
SOME = ["query", "value", "output.dense"]
LORA = {"r": 4, "init_lora_weights": False}
ADAPTERS = {
    "lora": peft.LoraConfig(target_modules=["query", "value"], **LORA),
    "lora_everywhere": peft.LoraConfig(target_modules=EVERY, **LORA),
    "lora_with_bias": peft.LoraConfig(target_modules=SOME, use_rslora=True, lora_bias=True, **LORA),
    "dora": peft.LoraConfig(target_modules=["key", "dense"], use_dora=True, **LORA),
    "ia3": peft.IA3Config(
        target_modules=["key", "value", "output.dense"],
        feedforward_modules=["output.dense"],
        init_ia3_weights=False,
    ),
}
OTHERS = {  # of which one model each is enough
    "adalora": peft.AdaLoraConfig(target_modules=SOME, init_r=4, total_step=10),
    "boft": peft.BOFTConfig(target_modules=SOME, boft_block_size=4),
    "c3a": peft.C3AConfig(target_modules=["query", "value"], block_size=8),
    "delora": peft.DeloraConfig(target_modules=SOME, r=4),
    "fourierft": peft.FourierFTConfig(target_modules=SOME, n_frequency=40),
    "gralora": peft.GraloraConfig(target_modules=SOME, r=4, gralora_k=2),
    "hira": peft.HiraConfig(target_modules=SOME, r=4),
    "hra": peft.HRAConfig(target_modules=SOME, r=4),
    "loha": peft.LoHaConfig(target_modules=SOME, r=4),
    "lokr": peft.LoKrConfig(target_modules=SOME, r=4),
    "miss": peft.MissConfig(target_modules=["query", "value"], r=4),
    "oft": peft.OFTConfig(target_modules=SOME, oft_block_size=4),
    "randlora": peft.RandLoraConfig(target_modules=["query", "value"], r=4),
    "road": peft.RoadConfig(target_modules=SOME, group_size=8),
    "shira": peft.ShiraConfig(target_modules=SOME, r=4),
    "vblora": peft.VBLoRAConfig(target_modules=["query", "value"], num_vectors=16, vector_length=8),
    "vera": peft.VeraConfig(target_modules=["query", "value"], r=4),
    "waveft": peft.WaveFTConfig(target_modules=SOME, n_frequency=40),
}
LOOKS = {  # at more than a row, or nobody here has read what it does
    "lily": (
        peft.LilyConfig(target_modules=SOME, r=4),
        r"query: it is a peft.tuners.lily.layer.Linear, not",
    ),
    "norms": (
        peft.LNTuningConfig(target_modules=["LayerNorm"]),
        "LayerNorm: it is a peft.tuners.ln_tuning",
    ),
    "alora": (
        peft.LoraConfig(target_modules=SOME, alora_invocation_tokens=[1], task_type="CAUSAL_LM"),
        "attention.self.query: it is a peft.tuners.lora.variants.ALoraLinearVariant, not",
    ),
}


def adapted(model, config):
    torch.manual_seed(7)
    model = peft.get_peft_model(model, copy.deepcopy(config)).double().eval()
    with torch.no_grad():  # many start from nothing
        for p in model.parameters():
            p.add_(0.1 * torch.randn(p.shape, dtype=p.dtype) * p.requires_grad)
    return model


def accelerated(model, backend="reference"):
    """A copy of a stock model, and the report. In fp64 only the reference serves."""
    ours = copy.deepcopy(model)
    return ours, bertfast.accelerate(ours, backend)


def runs(model, report, grad=True):
    """Who runs an accelerated model in fp32."""
    with torch.set_grad_enabled(grad):
        model(**given())
    assert not any(report.fallbacks.values()), report
    return encoder(model).bertfast_last.executor


def encoder(model):
    return model.get_base_model().bert.encoder


def switched(model):
    """What peft can make of a model: (what, a context in which it is so)."""
    yield "as it is", contextlib.nullcontext()
    yield "disabled", model.disable_adapter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.merge_adapter()
        yield "merged", contextlib.nullcontext()
        with model.disable_adapter():  # which undoes the merge as it runs
            yield "merged and disabled", contextlib.nullcontext()
        yield "unmerged", contextlib.nullcontext()


@pytest.mark.parametrize("name", ["BertForMaskedLM", CLASSIFIER])
@pytest.mark.parametrize("kind", ADAPTERS)
def test_same_as_on_transformers(kind, name):
    inputs = given()
    theirs, ours = (adapted(m, ADAPTERS[kind]) for m in small(name))
    found, expected = results(ours, inputs), results(theirs, inputs)
    assert_same(found, expected, kind)
    gradients = {n for n in found if "." in n}
    assert gradients and all("lora" in n or "ia3" in n for n in gradients)
    fast, report = accelerated(theirs)
    assert_same(results(fast, inputs), expected, kind)
    assert report.fused == 2 and not any(report.fallbacks.values())


@pytest.mark.parametrize("kind", OTHERS)
def test_every_kind(kind):
    theirs, inputs = adapted(small(CLASSIFIER)[0], OTHERS[kind]), given()
    ours, report = accelerated(theirs)
    assert report.fused == 2, report
    assert_same(results(ours, inputs), results(theirs, inputs), kind)
    for (what, there), (_, here) in zip(*map(switched, (theirs, ours)), strict=True):
        with there, here, torch.no_grad():
            found, expected = (outputs(m, inputs)[0] for m in (ours, theirs))
        assert relative(found, expected) < 1e-10, what
        assert not any(report.fallbacks.values()), report


def test_every_kind_is_here():
    found = set()
    for config in (*ADAPTERS.values(), *OTHERS.values()):
        for m in adapted(small("BertModel")[0], config).modules():
            if adapters.is_adapter(m) and isinstance(m.base_layer, nn.Linear):
                own = (m, *vars(m).get("lora_variant", {}).values())
                found |= {watch.class_name(x).removeprefix("peft.tuners.") for x in own}
    assert found == adapters._BY_ROW


@pytest.mark.parametrize("kind", LOOKS)
def test_what_is_left_to_peft(kind):
    config, why = LOOKS[kind]
    model = small(CLASSIFIER)[0]
    model.prepare_inputs_for_generation = None  # "CAUSAL_LM" asks for it
    theirs, inputs = adapted(model, config), given()
    ours, report = accelerated(theirs)
    assert report.fused == 0 and all(why in r for r in report.layers.values()), report
    assert_same(results(ours, inputs), results(theirs, inputs), kind)


def test_trained_alone_and_merged():
    config = peft.LoraConfig(
        r=4, target_modules=["query", "dense"], modules_to_save=["classifier"], task_type="SEQ_CLS"
    )
    inputs, _ = given(), torch.manual_seed(0)
    labels = torch.tensor([0, 1, 1, 0])
    model = peft.get_peft_model(small(CLASSIFIER)[1], config)
    assert not any(map(watch.hooked, model.modules()))  # peft's, for checkpointing
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

    model = adapted(small("BertModel")[1], ADAPTERS["lora"]).get_base_model()
    fast = GraphedModel(model, 100, 9)
    refused(RuntimeError, "query is a peft.*merge_and_unload", fast, **given())


def lora(model, **options):
    return adapted(model, peft.LoraConfig(**{"target_modules": SOME} | LORA | options))


def add(model):
    torch.manual_seed(11)
    model.add_adapter("more", peft.LoraConfig(target_modules=["key", "dense"], **LORA))
    model.double()


def scale(model):
    for m in model.modules():
        if hasattr(m, "set_scale"):
            m.set_scale("default", 3.0)


STATES = {
    "added": add,
    "the other": lambda m: m.set_adapter("more"),
    "both": lambda m: m.base_model.set_adapter(["default", "more"]),
    "one merged": lambda m: m.merge_adapter(["more"]),
    "unmerged": lambda m: m.unmerge_adapter(),
    "scaled": scale,
    "deleted": lambda m: m.delete_adapter("default"),
}


@pytest.mark.filterwarnings("ignore:Already unmerged")
def test_several_adapters():
    theirs, inputs = lora(small(CLASSIFIER)[0]), given()
    ours, report = accelerated(theirs)
    before = results(ours, inputs)
    for what, change in STATES.items():
        change(theirs)
        change(ours)
        found = results(ours, inputs)
        assert_same(found, results(theirs, inputs), what)
        assert report.fused == 2 and not any(report.fallbacks.values()), what
        moved = relative(found["output 0"], before["output 0"]) > 1e-3
        assert moved != (what == "added"), what
        before = found


def test_adapters_on_some_layers():
    theirs, inputs = lora(small(CLASSIFIER)[0], layers_to_transform=[1]), given()
    ours, report = accelerated(theirs)
    assert_same(results(ours, inputs), results(theirs, inputs), "some layers")
    assert report.fused == 2 and not any(report.fallbacks.values())
    fast = accelerated(theirs.float(), "auto")
    assert runs(*fast, False).startswith("whole_cpu and operators; ")
    assert runs(*fast).startswith("node and operators; ")


def test_who_runs():
    model, report = accelerated(lora(small(CLASSIFIER)[0]).float(), "auto")
    for what, here in switched(model):
        fast = what in ("disabled", "merged")
        with here:
            assert runs(model, report, False).startswith("whole_cpu" if fast else "operators"), what
    ran = runs(model, report)
    assert ran.startswith("operators; ") and "; node: there is an adapter on query, value, " in ran
    model.merge_adapter()
    assert runs(model, report).startswith("node; ")


@pytest.mark.parametrize("native", [False, True])
def test_frozen(native):
    model = lora(small(CLASSIFIER)[native]).float()
    if not native:
        bertfast.accelerate(model)
    inner, inputs = model.get_base_model(), given()
    with torch.no_grad():
        expected = outputs(model, inputs)[0]
        query = "bert.encoder.layer.0.attention.self.query"
        why = f"{query} can't be frozen: it is a peft.tuners.lora.layer.Linear"
        refused(ValueError, why, bertfast.freeze, inner)
        with model.disable_adapter():
            refused(ValueError, why, bertfast.freeze, inner)
        model.merge_adapter()
        assert relative(outputs(bertfast.freeze(inner), inputs)[0], expected) < 1e-4
