"""An encoder's layers replayed forward and backward, beside the launched kernels. Without a GPU a tape
stands in for a graph (tape.py)."""

import gc

import families
import pytest
import torch
from helpers import GPU, apart, refused
from replayed import (
    BUILDS,
    FULL,
    accelerated,
    assert_same,
    batch,
    counts,
    encoder,
    gradients,
    launching,
    loss_of,
    native,
    score,
    swap_data,
    taken,
    wanted_of,
    why,
)
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import bertfast
from bertfast.encoder import replay

pytestmark = pytest.mark.usefixtures("tape", "same_kernels")


@pytest.mark.parametrize("p", [0.0, 0.2])
@BUILDS
def test_a_step_is_bitwise_the_launched_one(build, p):
    """Dropout too: the same seed has the same masks, another one others."""
    model = build(p).train()
    expected = gradients(launching(model))
    for _ in range(5):
        assert_same(gradients(model), expected)
    other = gradients(model, seed=1)
    assert all(torch.equal(other[n], g) for n, g in expected.items()) == (p == 0)
    assert counts(model) == (4, 1, 1)


@BUILDS
def test_gradients_of_changing_lengths(build):
    """What fills a bucket up reaches no gradient, though it was a batch of infinities before."""
    model, truth = build().train(), native().double().train()
    for seed in range(3):
        for lengths in ((40, 9, 3), (39, 12), (5, 1, 9, 2), (33,)):
            bad = batch(*(n + 2 for n in lengths))
            with pytest.MonkeyPatch.context() as m:
                m.setattr(model.embeddings.LayerNorm, "eps", float("nan"))
                gradients(model, bad)
            inputs = batch(*lengths, seed=seed)
            with bertfast.backend("reference"):
                expected = gradients(truth, inputs)
            found = gradients(model, inputs)
            assert found.keys() == expected.keys()
            scale = max(g.norm() for g in expected.values())
            for name, g in expected.items():
                # A key's bias has no gradient but rounding.
                assert apart(found[name], g) < 1e-4 or (found[name] - g).norm() < 1e-6 * scale, name
    assert counts(model)[0] > 8


def test_rows_that_are_wanted():
    """A classifier's last layer computes column 0 alone."""
    torch.manual_seed(0)
    model = bertfast.BertForSequenceClassification(native(0.2).config).to(GPU).train()

    def loss(m, inputs):
        return score(m(**inputs).logits)

    for lengths in ((16, 16), (30,), (5, 1, 9, 2)):
        inputs = batch(*lengths)
        expected = gradients(launching(model), inputs, loss=loss)
        for _ in range(3):
            found = gradients(model, inputs, loss=loss)
            scale = max(g.norm() for g in expected.values())
            for name, g in expected.items():
                assert apart(found[name], g) < 1e-4 or (found[name] - g).norm() < 1e-6 * scale, name
    assert counts(model)[0] >= 3


def test_in_low_precision():
    """Under autocast, fp32 weights are cast within the graph, as they are then."""
    model = accelerated(0.1).train()
    other = launching(model)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.01) for m in (model, other)]
    for _ in range(4):
        for m, optimizer in zip((model, other), optimizers, strict=True):
            torch.manual_seed(0)
            with torch.autocast(GPU, torch.bfloat16):
                loss = loss_of(m, FULL)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    assert_same(dict(model.named_parameters()), dict(other.named_parameters()))
    assert counts(model) == (2, 1, 1)


def test_many_forwards_before_a_backward():
    """Two towers, an evaluation between, a forward that nobody follows; then accumulation."""
    model = accelerated(0.2).train()
    other = launching(model)

    def towers(m, a):
        first = m(**a).last_hidden_state
        with torch.no_grad():
            m.eval()(**FULL)
            m.train()
        m(**a)
        second = m(**batch(16, 16, seed=1)).last_hidden_state
        return score(first * second)

    for _ in range(4):
        expected = gradients(other, loss=towers)
        assert_same(gradients(model, loss=towers), expected)
    assert counts(model)[0] > 8
    for seed in range(3):
        for m in (model, other):
            torch.manual_seed(seed)
            loss_of(m, batch(16, 16, seed=seed)).backward()
    assert_same(taken(model), taken(other))


def test_more_forwards_than_lanes():
    model = accelerated(0.2).train()
    other = launching(model)

    def many(m, inputs):
        return sum(loss_of(m, inputs) for _ in range(replay.LANES + 2))

    for _ in range(3):
        expected = gradients(other, loss=many)
        found = gradients(model, loss=many)
        for name, g in expected.items():
            assert apart(found[name], g) < 1e-5, name
    assert "4 forwards wait for their backward" in why(model)
    gradients(model)
    assert why(model).startswith("graph of")
    kept = [loss_of(model, FULL) for _ in range(replay.LANES)]
    loss_of(model, FULL)
    assert "wait for their backward" in why(model)
    del kept
    gc.collect()
    loss_of(model, FULL)
    assert why(model).startswith("graph of")


def test_backward_twice():
    model = accelerated(0.2).train()
    other = launching(model)
    for m in (model, other):
        gradients(m), gradients(m)
        torch.manual_seed(3)
        loss = loss_of(m, FULL)
        loss.backward(retain_graph=True)
        m.eval()(**FULL), m.train()
        loss.backward(retain_graph=True)
        loss.backward()
        refused(RuntimeError, "backward through the graph a second time", loss.backward)
    assert_same(taken(model), taken(other))
    assert counts(model)[0] >= 1


def test_batched_gradients_and_second_derivatives():
    model = accelerated().train()
    gradients(model), gradients(model)
    wanted = encoder(model).layer[0].output.dense.weight
    found = []
    for m in (model, launching(model)):
        wanted = encoder(m).layer[0].output.dense.weight
        states = m(**FULL).last_hidden_state
        rows = torch.stack([torch.full_like(states, k) for k in (1.0, -2.0)])
        found.append(torch.autograd.grad(states, wanted, rows, is_grads_batched=True)[0])
    assert apart(found[0], found[1]) < 1e-5
    assert counts(model)[0] >= 1
    first = torch.autograd.grad(loss_of(model, FULL), wanted_of(model), create_graph=True)[0]
    refused(RuntimeError, "no second derivative", first.sum().backward)


def test_weights_of_the_step():
    """An optimizer's change is seen; one between a forward and its backward is an error, as in
    torch."""
    model = accelerated(0.1).train()
    other = launching(model)
    trained = [torch.optim.AdamW(m.parameters(), lr=0.01) for m in (model, other)]
    for step in range(5):
        for m, optimizer in zip((model, other), trained, strict=True):
            torch.manual_seed(step)
            optimizer.zero_grad(set_to_none=step % 2 == 0)
            loss_of(m, FULL).backward()
            optimizer.step()
    assert_same(dict(model.named_parameters()), dict(other.named_parameters()))
    loss = loss_of(model, FULL)
    with torch.no_grad():
        wanted_of(model).add_(1)
    refused(RuntimeError, "changed in place between a forward and its backward", loss.backward)


def swap_parameter(model):
    layer = encoder(model).layer[1].output.dense
    layer.weight = torch.nn.Parameter(layer.weight.detach() * 2)


def swap_strides(model):
    """The same memory, dtype and shape."""
    weight = encoder(model).layer[0].attention.output.dense.weight
    weight.data = weight.data.T


def swap_layers(model):
    layers = encoder(model).layer
    layers[0], layers[1] = layers[1], layers[0]


def change_eps(model):
    for name in ("attention.output.LayerNorm", "output.LayerNorm"):
        encoder(model).layer[0].get_submodule(name).eps = 0.5


def freeze_a_layer(model):
    encoder(model).layer[0].requires_grad_(False)


def freeze_a_bias(model):
    encoder(model).layer[1].output.dense.bias.requires_grad_(False)


def drop_more(model):
    encoder(model).layer[1].output.dropout.p = 0.5


CHANGES = [swap_data, swap_parameter, swap_strides, swap_layers, change_eps, freeze_a_layer,
           freeze_a_bias, drop_more]  # fmt: skip


@BUILDS
@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_model(change, build):
    model = build(0.1).train()
    before = [gradients(model) for _ in range(3)][-1]
    change(model)
    expected = gradients(launching(model))
    for _ in range(3):
        assert_same(gradients(model), expected)
    assert before.keys() != expected.keys() or any(
        not torch.equal(before[n], expected[n]) for n in expected
    )


def test_hooks_and_ddp():
    """A parameter's hooks run once a backward, not for a recording; DDP reduces what is replayed."""
    model, seen = accelerated(0.1).train(), []
    wanted_of(model).register_hook(lambda g: seen.append(1))
    wanted_of(model).register_post_accumulate_grad_hook(lambda p: seen.append(2))
    for n in range(4):
        gradients(model)
        assert seen == [1, 2] * (n + 1)
    if not torch.distributed.is_available():
        return
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        model = accelerated(0.1).train()
        other = launching(model)
        wrapped = DistributedDataParallel(model, gradient_as_bucket_view=True)
        for _ in range(3):
            torch.manual_seed(0)
            wrapped.zero_grad()
            loss_of(wrapped, FULL).backward()
        found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        assert_same(found, gradients(other))
        assert counts(model) == (1, 1, 1)
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reentrant):
    model = accelerated(0.2).train()
    other = launching(model)

    def loss(m, inputs):
        def states(hidden):
            return m.encoder(hidden, None).last_hidden_state

        hidden = m.embeddings(inputs["input_ids"])
        return score(checkpoint(states, hidden, use_reentrant=reentrant))

    for _ in range(3):
        expected = gradients(other, loss=loss)
        assert_same(gradients(model, loss=loss), expected)
    if not reentrant:
        assert "hooked, as by checkpointing" in why(model)
    model.gradient_checkpointing_enable()
    other.gradient_checkpointing_enable()
    for _ in range(3):
        assert_same(gradients(model), gradients(other))


def test_relative_positions_are_trained():
    """MPNet's bias is a batch's own, of another size in a bucket."""
    model = families.build("MPNet").to(GPU).train()
    bertfast.accelerate(model, strict=True)
    other = launching(model)
    for lengths in ((17, 5, 11), (16, 16), (13,)):
        inputs = batch(*lengths)
        for _ in range(3):
            found, expected = gradients(model, inputs), gradients(other, inputs)
            scale = max(g.norm() for g in expected.values())
            for name, g in expected.items():
                assert apart(found[name], g) < 1e-4 or (found[name] - g).norm() < 1e-6 * scale, name
    assert "encoder.relative_attention_bias.weight" in found and counts(model)[0] >= 3
