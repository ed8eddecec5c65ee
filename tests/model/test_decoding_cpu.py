"""A decoder's steps by one call into C++ each, beside torch's in fp64."""

import copy

import pytest
import torch
from helpers import close_to_truth
from translated import pair

from bertfast import ops
from bertfast.model.decoder import Sequences
from bertfast.model.steps import ROOM, Steps
from bertfast.model.steps_cpu import CpuSteps, steps_of


def model_of(seed=0, **options):
    _, model = pair(seed=seed, tie=False, head=False, **options)
    return model.decoder


def states(model, lengths, seed=0):
    g = torch.Generator().manual_seed(seed)
    starts = torch.tensor([0, *lengths]).cumsum(0).int()
    values = torch.randn(sum(lengths), model.config.hidden_size, generator=g)
    return Sequences(values, starts, max([1, *lengths]))


def both(model, sources, each, most):
    own = steps_of(model, sources, each, most)
    assert type(own) is CpuSteps
    with ops.backend("reference"):
        exact = copy.deepcopy(model).double()
        return own, Steps(exact, sources._replace(values=sources.values.double()), each, most)


def words(n, model, seed):
    g = torch.Generator().manual_seed(seed)
    return torch.randint(0, model.config.vocab_size, (n,), generator=g)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("each", [1, 3])
@pytest.mark.parametrize("act", ["gelu", "relu", "gelu_new"])
def test_steps(act, each, threads):
    """Logits while rows change places, twice or not at all, and sources leave."""
    model, before = model_of(hidden_act=act), torch.get_num_threads()
    own, exact = both(model, states(model, [5, 1, 9, 3]), each, ROOM + 4)
    rows = 4 * each
    try:
        torch.set_num_threads(threads)
        for i in range(ROOM + 4):
            ids = words(rows, model, i)
            with torch.no_grad():
                found, truth = own(ids), exact(ids)
            close_to_truth(found, truth)
            if i % 3 == 1:
                leaves = i == 4  # the second source
                kept = torch.tensor([0, 2, 3]) if leaves else torch.arange(rows // each)
                chosen = kept[:, None] * each + torch.randint(0, each, (len(kept), each))
                for steps in (own, exact):
                    steps.select(chosen.flatten(), kept if leaves else None)
                rows = chosen.numel()
    finally:
        torch.set_num_threads(before)


@torch.no_grad()
def test_best():
    """The first of the largest, whatever panel it is in; a NaN before all; and no row of zeros
    that a panel is filled up with."""
    model = model_of()
    decoder = model.cls.predictions.decoder
    sources = states(model, [4, 2])
    ids = words(2, model, 0)

    def best():
        own, _ = both(model, sources, 1, 4)
        found = own.best(ids)
        logits = steps_of(model, sources, 1, 4)(ids)
        assert found.tolist() == logits.argmax(1).tolist()
        return found.tolist()

    best()
    decoder.weight.zero_()
    decoder.bias.fill_(-1)
    assert best() == [0, 0]
    decoder.bias[[97, 33, 60]] = 2.0
    assert best() == [33, 33]
    decoder.bias[-1] = torch.inf
    assert best() == [model.config.vocab_size - 1] * 2
    decoder.bias[[70, 41]] = torch.nan
    assert best() == [41, 41]


def test_a_source_without_tokens():
    model = model_of()
    own, exact = both(model, states(model, [3, 0]), 1, 2)
    ids = words(2, model, 1)
    with torch.no_grad():
        close_to_truth(own(ids), exact(ids))


def test_who_must_see_modules_gets_torch():
    model = model_of()
    sources = states(model, [3])
    assert type(steps_of(model, sources, 1, 2)) is CpuSteps
    with ops.backend("reference"):
        assert type(steps_of(model, sources, 1, 2)) is Steps
    with torch.autocast("cpu", torch.bfloat16):
        assert type(steps_of(model, sources, 1, 2)) is Steps
    low = copy.deepcopy(model).bfloat16()
    lower = sources._replace(values=sources.values.bfloat16())
    assert type(steps_of(low, lower, 1, 2)) is Steps
    dense = model.bert.encoder.layer[0].output.dense
    with_hook = dense.register_forward_hook(lambda m, x, y: y)
    assert type(steps_of(model, sources, 1, 2)) is Steps
    with_hook.remove()
    model.bert.encoder.layer[0].output.dense = torch.nn.Linear(dense.in_features, 1, bias=False)
    assert type(steps_of(model, sources, 1, 2)) is Steps
