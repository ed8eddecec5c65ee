"""peft's adapters on native and accelerated models: as on transformers', trained alone, merged."""

import contextlib
import copy
import warnings

import families
import pytest
import torch
from helpers import refused, relative
from test_watch import CLASSIFIER, LAYER, assert_same, given, outputs, results, small
from torch import nn

import bertfast
from bertfast.encoder import adapters, watch
from bertfast.encoder import layer as arithmetic

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


@pytest.mark.parametrize("family", families.FAMILIES)
@pytest.mark.parametrize("kind", families.MASKS)
def test_every_family(family, kind):
    theirs = families.build(family)
    everything = peft.LoraConfig(target_modules="all-linear", **LORA)
    theirs, inputs = adapted(theirs, everything), families.inputs_for(kind=kind)
    ours, report = accelerated(theirs)
    mask = inputs["attention_mask"]
    assert_same(
        families.gradients(ours, inputs, mask), families.gradients(theirs, inputs, mask), family
    )
    with torch.no_grad():
        found, expected = (m(**inputs)[0] for m in (ours, theirs))
    assert relative(found, expected) < 1e-10  # at padded rows, too
    assert report.fused == 2
    assert not any(report.fallbacks.values()) or family == "MPNet", report


@pytest.mark.parametrize("path", ["", ".base_layer", ".lora_A.default", ".lora_dropout.default"])
@pytest.mark.parametrize("when", ["forward", "full_backward"])
@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
def test_hooks_on_an_adapter(path, when):
    seen = []

    def watched(model):
        m = encoder(model).layer[1].get_submodule("attention.self.value" + path)
        getattr(m, f"register_{when}_hook")(
            lambda m, a, b: seen[-1].append((b if torch.is_tensor(b) else b[0]).clone())
        )
        seen.append([])
        return results(model, inputs)

    theirs, inputs = lora(small(CLASSIFIER)[0]), given()
    ours, report = accelerated(theirs)
    assert_same(watched(ours), watched(theirs), path)
    assert len(seen[0]) == len(seen[1]) > 0
    assert all(relative(a, b) < 1e-10 for a, b in zip(*seen, strict=True))
    assert f"attention.self.value{path}: it has a hook" in str(report), report
    assert report.fused == 1


def test_adapters_of_each_row():
    """peft's adapter_names, which it hands in by hooks."""
    theirs, inputs = lora(small(CLASSIFIER)[0]), given()
    ours, _ = accelerated(theirs)
    names = ["default", "__base__", "default", "__base__"]
    with torch.no_grad():
        found, expected = (m(**inputs, adapter_names=names).logits for m in (ours, theirs))
        assert relative(found, expected) < 1e-10
        assert relative(ours(**inputs).logits, expected) > 1e-3


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("targets", [["query", "value"], EVERY[:4]])
@pytest.mark.parametrize("native", [False, True])
def test_rounding(native, targets, bf16):
    theirs, ours = (lora(m, target_modules=targets) for m in small(CLASSIFIER))
    if not native:
        ours = copy.deepcopy(theirs)
        assert bertfast.accelerate(ours).fused == 2
    exact, inputs = results(theirs, given()), given()
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        stock, found = (results(m.float(), inputs) for m in (theirs, ours))
    errors = torch.zeros(2, dtype=torch.float64)  # of all outputs and all gradients
    for parts in ([n for n in exact if "." not in n], [n for n in exact if "." in n]):
        for i, of in enumerate((found, stock)):
            errors[i] = torch.stack([(of[n].double() - exact[n]).norm() for n in parts]).norm()
        whole = torch.stack([exact[n].norm() for n in parts]).norm()
        assert errors[0] <= 2 * errors[1] + 1e-5 * whole, (parts[0], errors / whole)


@pytest.mark.parametrize("layer", [0, 1])
def test_parts_draw_the_same_dropout(layer):
    """Adapters that do nothing yet, on one layer, change neither masks nor rows that are wanted."""
    rates = {"hidden_dropout_prob": 0.3, "attention_probs_dropout_prob": 0.3}
    model = small(CLASSIFIER, rates)[1]
    config = peft.LoraConfig(target_modules=SOME, layers_to_transform=[layer])
    model = peft.get_peft_model(model, config).train()
    logits = []
    for here in (contextlib.nullcontext(), model.disable_adapter()):
        torch.manual_seed(3)
        with here:
            logits.append(model(**given()).logits.detach())
    assert relative(*logits) < 1e-5
    assert relative(logits[0], model(**given()).logits.detach()) > 1e-2


@pytest.mark.parametrize("activation", ["gelu", "gelu_new", "relu"])
def test_activations_behind_an_adapter(activation):
    models = small(CLASSIFIER, {"hidden_act": activation, "hidden_dropout_prob": 0.0})
    config = peft.LoraConfig(target_modules=["intermediate.dense"], **LORA)
    theirs, ours = (adapted(m, config) for m in models)
    fast, report = accelerated(theirs)
    expected = results(theirs, given())
    for model in ours, fast:
        assert_same(results(model, given()), expected, activation)
    assert report.fused == 2


def test_activations_are_saved(monkeypatch):
    """Also of a first layer with no gradient but its adapters'."""
    model, _ = accelerated(lora(small(CLASSIFIER)[0]).float(), "auto")
    saved, forward = [], arithmetic.forward
    monkeypatch.setattr(arithmetic, "forward", lambda *a: saved.append(a[-1]) or forward(*a))
    model(**given())
    assert saved == [True, True]


@pytest.mark.usefixtures("tape")
def test_never_replayed():
    model, report = accelerated(lora(small(CLASSIFIER)[0], layers_to_transform=[1]).float(), "auto")
    for _ in range(3):
        ran = runs(model, report)
    assert "; graph: there is an adapter on query, value, out, down" in ran
    with model.disable_adapter():
        for _ in range(3):
            ran = runs(model, report)
    assert ran.startswith("graph of ")


@pytest.mark.parametrize("native", [False, True])
def test_dropout_and_gradient_checkpointing(native):
    """peft's dropout draws from torch's generator: recomputed, its masks are the same."""
    model = lora(small(CLASSIFIER)[native], lora_dropout=0.3).train()
    if not native:
        bertfast.accelerate(model, "reference")
    found, inputs = [], given()
    for saving in (False, True, True):
        if saving:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(len(found) // 2)
        found.append(results(model, inputs))
    assert_same(found[1], found[0], "checkpointing")
    assert relative(found[2]["output 0"], found[0]["output 0"]) > 1e-3


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
