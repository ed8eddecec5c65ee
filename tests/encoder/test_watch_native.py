"""Native models that someone watches: what hooks see, and what else must be as without them."""

import warnings
from unittest import mock

import pytest
import torch
from helpers import refused, relative
from test_watch import (
    CLASSIFIER,
    LAYER,
    PRETRAINING,
    TABLES,
    assert_same,
    backward_hook,
    given,
    hook,
    outputs,
    own_forward,
    parametrized,
    pre_hook,
    results,
    small,
    subclass,
    wrapper,
)
from torch import nn
from torch.nn import functional as F
from torch.nn.modules import module as torch_module
from torch.nn.utils import parametrizations

import bertfast
from bertfast.encoder import watch
from bertfast.encoder.executors import whole_cpu
from bertfast.model.graphs import GraphedModel


@pytest.mark.parametrize("name", ["BertForMaskedLM", CLASSIFIER])
def test_a_hook_that_does_nothing_changes_no_dropout_mask(name):
    dropout = {"hidden_dropout_prob": 0.3, "attention_probs_dropout_prob": 0.3}
    model, inputs = small(name, dropout)[1].train(), given()

    def trained():
        torch.manual_seed(3)
        return results_in_training(model, inputs)

    expected = trained()
    for path, m in model.named_modules():
        if (name, path) == (CLASSIFIER, "bert"):
            continue  # called, it gives all tokens' states, whose masks are others
        handle = m.register_forward_hook(lambda *_: None)
        found = trained()
        handle.remove()
        whole = max(t.norm() for t in expected.values())
        for key, t in expected.items():
            error = (found[key] - t).norm()
            assert error <= 1e-4 * t.norm() + 1e-6 * whole, f"{path}: {key} off by {error:.1e}"


def results_in_training(model, inputs):
    model.zero_grad()
    logits = model(**inputs).logits
    logits.tanh().sum().backward()
    return {"logits": logits.detach()} | {
        n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None
    }


def seen_by(m):
    seen = []
    m.register_forward_hook(
        lambda m, args, out: seen.append(out[0] if isinstance(out, tuple) else out)
    )
    return seen


@pytest.mark.parametrize("path", ["bert.encoder", LAYER, LAYER + ".output.dense"])
def test_hooks_see_all_tokens_of_the_last_layer(path):
    """Also where a classifier needs one row of each sequence."""
    theirs, ours = small(CLASSIFIER)
    inputs, real = given(), given()["attention_mask"] == 1
    before = ours(**inputs).logits
    expected, seen = (seen_by(m.get_submodule(path)) for m in (theirs, ours))
    with torch.no_grad():
        theirs(**inputs)
        after = ours(**inputs).logits
    states = expected[0] if torch.is_tensor(expected[0]) else expected[0].last_hidden_state
    assert relative(seen[0], states[real]) < 1e-5
    assert relative(after, before.detach()) < 1e-5
    starts = torch.tensor([0, 3, 8], dtype=torch.int32)
    rows = torch.tensor([7, 0])
    few = ours.bert.encode_packed(torch.arange(8), starts, 5, rows=rows)
    assert len(seen[1]) == 8 and few.shape == (2, 16)


def test_hooks_see_states_alone_where_maps_are_asked_for():
    _, ours = small("BertModel")
    inputs, seen = given(), seen_by(ours.encoder.layer[0])
    with torch.no_grad():
        states = ours(**inputs, output_hidden_states=True).hidden_states
        ours(**inputs, output_attentions=True)
    for t in seen:
        torch.testing.assert_close(t, states[1][inputs["attention_mask"] == 1])


def test_global_hooks_see_every_module():
    theirs, ours = small(PRETRAINING)
    calls = []
    for m in theirs, ours:
        names = {child: name for name, child in m.named_modules()}
        handle = torch_module.register_module_forward_hook(
            lambda child, args, out, names=names: calls[-1].append(names.get(child))
        )
        calls.append([])
        try:
            with torch.no_grad():
                m(**given())
        finally:
            handle.remove()
    assert set(calls[1]) == set(calls[0])
    with torch.no_grad(), mock.patch.object(whole_cpu, "run", wraps=whole_cpu.run) as run:
        ours(**given())
    assert run.call_count == 1  # back to one call


def test_torchs_quantised_modules():
    models, inputs = small(PRETRAINING), given((16, 16))  # a tensor's range counts padding too
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        theirs, ours = (torch.ao.quantization.quantize_dynamic(m, {nn.Linear}) for m in models)
        for a, e in zip(outputs(ours, inputs), outputs(theirs, inputs), strict=True):
            assert relative(a, e) < 1e-2  # what rounds may round another way


def test_fewer_heads():
    models, inputs = [m.double() for m in small("BertModel")], given()
    for m in models:
        torch.manual_seed(3)
        attention = m.encoder.layer[0].attention
        for name in ("query", "key", "value"):
            setattr(attention.self, name, nn.Linear(16, 8).double())
        attention.output.dense = nn.Linear(8, 16).double()
    assert_same(*(results(m, inputs) for m in reversed(models)), "fewer heads")
    refused(ValueError, "layer.0 can't be frozen", bertfast.freeze, models[1].float())


@pytest.mark.parametrize("option", [{"max_norm": 0.5}, {"scale_grad_by_freq": True}])
def test_tables_with_options(option):
    models, inputs = [m.double() for m in small("BertModel")], given((16, 16))
    for m in models:
        for key, value in option.items():
            setattr(m.embeddings.word_embeddings, key, value)
    assert_same(*(results(m, inputs) for m in reversed(models)), str(option))


def test_gradient_checkpointing_with_hooks():
    _, ours = small(CLASSIFIER, {"hidden_dropout_prob": 0.2})
    inputs, ours = given(), ours.train()
    hook(ours.get_submodule(LAYER + ".intermediate"), None)
    found = []
    for enabled in (False, True):
        ours.gradient_checkpointing_enable(enabled)
        torch.manual_seed(2)
        found.append(results_in_training(ours, inputs))
    assert all(torch.equal(t, found[1][key]) for key, t in found[0].items())


@pytest.mark.seconds
def test_compiled_with_hooks_and_adapters():
    theirs, ours = small("BertModel")
    inputs = given()
    for m in theirs, ours:
        hook(m.encoder.layer[0].attention.self.query, None)
        wrapper(m.encoder.layer[1].output.dense, m.encoder.layer[1].output)
    compiled = torch.compile(ours, backend="aot_eager")
    with torch.no_grad():
        for a, e in zip(outputs(compiled, inputs), outputs(theirs, inputs), strict=True):
            assert relative(a, e) < 1e-5


def test_the_loss_of_pretraining():
    _, ours = small(PRETRAINING)
    head, hidden, labels = ours.cls.predictions, torch.randn(9, 16), torch.arange(9)
    before = head.loss(hidden, labels)
    torch.testing.assert_close(before, F.cross_entropy(head(hidden), labels))
    for m in head.decoder, head:
        hook(m, None)
        after = head.loss(hidden, labels)
        assert abs(after - before) > 1e-2
        torch.testing.assert_close(after, F.cross_entropy(head(hidden), labels))
    assert head.loss(hidden[:0], labels[:0]) == 0


REFUSED = [hook, pre_hook, backward_hook, own_forward, subclass, wrapper, parametrized]


@pytest.mark.parametrize("attach", REFUSED)
@pytest.mark.parametrize("path", ["output.dense", "attention.output.LayerNorm", "attention.self"])
def test_freeze_refuses_what_it_would_lose(attach, path):
    if path == "attention.self" and attach in (wrapper, parametrized):
        pytest.skip("it has no weight")
    _, ours = small(CLASSIFIER)
    path, expected = f"{LAYER}.{path}", outputs(ours, given())[0]
    attach(ours.get_submodule(path), ours.get_submodule(path.rpartition(".")[0]))
    refused(ValueError, f"{path} can't be frozen.*merge_and_unload", bertfast.freeze, ours)
    if attach is hook:
        ours.get_submodule(path)._forward_hooks.clear()
        frozen = bertfast.freeze(ours)
        with torch.no_grad():
            assert relative(outputs(frozen, given())[0], expected.detach()) < 1e-4


@pytest.mark.parametrize(
    "path", ["embeddings", "encoder", "pooler.dense", *(p[5:] for p in TABLES)]
)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_what_frozen_models_still_call(path, precision):
    _, ours = small("BertModel")
    frozen, inputs = bertfast.freeze(ours, precision), given()
    with torch.no_grad():
        before = outputs(frozen, inputs)
        hook(frozen.get_submodule(path), None)
        after = outputs(frozen, inputs)
    which = 1 if path.startswith("pooler") else 0
    assert relative(after[which], before[which]) > 0.05


@pytest.mark.usefixtures("tape")
def test_graphs_refuse_what_they_would_not_follow():
    _, ours = small("BertModel")
    fast, inputs = GraphedModel(ours, 100, 9), given()
    fast(**inputs)
    handle = torch_module.register_module_forward_hook(lambda *_: None)
    try:
        refused(RuntimeError, "global module hooks", fast, **inputs)
    finally:
        handle.remove()
    query = ours.encoder.layer[0].attention.self.query
    wrapper(query, ours.encoder.layer[0].attention.self)
    ours.eval()
    refused(RuntimeError, "query is a test_watch.Wrapper.*merge", fast, **inputs)
    ours.encoder.layer[0].attention.self.query = query
    parametrizations.weight_norm(query).eval()  # all of it is in its parameters
    with torch.no_grad():
        torch.testing.assert_close(fast(**inputs)[0], ours(**inputs)[0])


def test_looked_into():
    layer = small("BertModel")[1].encoder.layer[0]
    assert not watch.looked_into(layer)
    handle = layer.output.dense.register_full_backward_pre_hook(lambda *_: None)
    assert watch.looked_into(layer) and not watch.hooked(layer)
    handle.remove()
    assert not watch.looked_into(layer)
