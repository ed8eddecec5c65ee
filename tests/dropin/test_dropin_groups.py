"""ALBERT: layers in groups that run several times each."""

import copy

import pytest
import torch
from families import build, close_gradients, gradients, inputs_for
from helpers import apart, exact, refused
from padded import assert_same, every, observe, padded, three

import bertfast
from bertfast.encoder.packed import Freezable

GROUPS = dict(num_hidden_layers=5, num_hidden_groups=2, inner_group_num=2)
GROUP = "encoder.albert_layer_groups"


def check(models, given=None, loss=every):
    assert_same(*(observe(m.train(), given or padded(), loss) for m in models))


def encoder(model):
    return next(m for m in model.modules() if isinstance(m, Freezable))


def test_order_and_names():
    models, report = three(build("Albert", **GROUPS))
    assert [*report.layers] == [
        f"{GROUP}.{group}.albert_layers.{layer}" for group in range(2) for layer in range(2)
    ]
    check(models)
    assert report.fused == 4 and not any(report.fallbacks.values())
    asked = padded() | {"output_hidden_states": True}
    check(models, asked)
    with torch.no_grad():
        assert len(models[0](**asked).hidden_states) == 11


def test_the_configuration_is_read_at_every_call():
    models, report = three(build("Albert", **GROUPS))
    for count in (5, 2, 7):
        for m in models:
            m.config.num_hidden_layers = count
        check(models)
    assert not any(report.fallbacks.values())


def hooked(group):
    group.register_forward_hook(lambda m, args, out: 2 * out)


def replaced(group):
    def forward(*args, **kwargs):
        return 2 * type(group).forward(group, *args, **kwargs)

    group.forward = forward


@pytest.mark.parametrize("touch", [hooked, replaced])
@pytest.mark.parametrize("late", [False, True])
def test_a_group_that_is_touched_is_called(touch, late):
    theirs = build("Albert", **GROUPS)
    models, report = three(theirs)
    if late:
        check(models)
    for m in models:
        touch(m.encoder.albert_layer_groups[1])
    check(models)
    why = "albert_layer_groups.1: it has a hook or a forward of its own"
    assert {*report.layers.values(), *report.fallbacks.values()} == {why}
    refused(ValueError, why, bertfast.freeze, models[0])


@pytest.mark.parametrize(
    "path", ["albert_layer_groups.0.albert_layers.1", "embedding_hidden_mapping_in"]
)
@pytest.mark.parametrize("fused", [True, False])
def test_hooks_are_called_as_often_as_their_module_runs(path, fused):
    models, report = three(build("Albert", **GROUPS))
    given, seen = padded(), []
    for m in models[:2]:
        seen.append([])
        m.encoder.get_submodule(path).register_forward_hook(
            lambda m, args, out, own=seen[-1]: own.append(out)
        )
        if not fused:
            m.encoder.albert_layer_groups[0].register_forward_hook(lambda *_: None)
    check(models, given)
    assert len(seen[0]) == len(seen[1]) > 0 and any(report.fallbacks.values()) != fused
    assert [t.shape for t in seen[0]] == [t.shape for t in seen[1]]


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
@pytest.mark.filterwarnings("ignore:int8")
def test_frozen_once(precision):
    """Each layer, and what runs first again: behind another norm int8's center is another."""
    theirs = build("Albert", num_hidden_layers=3, initializer_range=0.1)
    model = copy.deepcopy(theirs)
    bertfast.accelerate(model, strict=True)
    bertfast.freeze(model, precision)
    packed = encoder(model).packed
    assert packed.count == 6 and len({*map(id, packed.layers)}) == 3
    assert not len(model.encoder.albert_layer_groups)
    given = inputs_for(kind="none")
    with torch.inference_mode():
        found = model(**given).last_hidden_state
    bound = {"fp32": 1e-5, "bf16": 0.05, "int8": 0.2}[precision]
    assert apart(found, exact(theirs, given).last_hidden_state) < bound


@pytest.mark.usefixtures("tape", "same_kernels")
def test_replayed_training():
    """The gradients of all runs of a layer."""
    theirs = build("Albert", **GROUPS)
    ours, given = copy.deepcopy(theirs), inputs_for(kind="none")
    report = bertfast.accelerate(ours, strict=True)
    mask = given["attention_mask"]
    truth = gradients(copy.deepcopy(theirs).double(), given, mask)
    for _ in range(3):
        close_gradients(gradients(ours, given, mask), gradients(theirs, given, mask), truth)
    hits, captures, misses, _ = report.graphs["encoder"]
    assert hits >= captures == 1 and hits + captures + misses == 3
