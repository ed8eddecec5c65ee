"""What goes on around an adapter that kernels call: hooks, dtypes, dropout, recordings."""

import contextlib
import copy

import families
import pytest
import torch
from helpers import relative
from test_adapters import EVERY, LORA, SOME, accelerated, adapted, encoder, lora, runs
from test_watch import CLASSIFIER, assert_same, given, results, small

import bertfast
from bertfast.encoder import layer as arithmetic

peft = pytest.importorskip("peft")


@pytest.mark.parametrize(
    "family, kind",
    [(f, kind) for f in families.FAMILIES for kind in families.few(f, families.MASKS)],
)
def test_every_family(family, kind):
    theirs = families.build(family)
    everything = peft.LoraConfig(target_modules="all-linear", **LORA)
    theirs, inputs = adapted(theirs, everything), families.inputs_for(kind=kind)
    ours, report = accelerated(theirs)
    mask = inputs["attention_mask"]
    bound = 1e-5 if family in families.PARTLY_FP32 else 1e-10
    assert_same(*(families.gradients(m, inputs, mask) for m in (ours, theirs)), family, bound)
    with torch.no_grad():
        found, expected = (m(**inputs)[0] for m in (ours, theirs))
    assert relative(found, expected) < bound  # at padded rows, too
    assert report.fused == 2
    assert not any(report.fallbacks.values()) or kind in families.UNFUSED.get(family, ()), report


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
        ours = copy.deepcopy(theirs).float()
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
