"""A step on the device, its micro-batches and graphs; a tape stands in for those."""

import threading
from contextlib import nullcontext

import numpy as np
import pytest
import tiny_pretrain
import torch
from helpers import GPU, close_to_truth
from tape import Tape
from tiny_classify import classification, rows

import bertfast
from bertfast.encoder import graph
from bertfast.train.optimizer import make_optimizer
from bertfast.train.packed import IGNORED, Packed
from bertfast.train.ranks import Ranks
from bertfast.train.replay import Replay
from bertfast.train.step import Step

ON_TAPE = pytest.mark.skipif(GPU != "cpu", reason="it is the tape's")


def stepper(model, task, config, **options):
    """A `Step` alone."""
    said = []
    optimizer = make_optimizer(model.train().to(GPU), config)
    loss = lambda batch: task.loss(model, batch)
    settings = {"ranks": Ranks(), "clip": config.clip} | options
    step = Step(loss, optimizer, 1, settings["clip"], nullcontext, settings["ranks"], said.append)
    return step, said


def take(step, task, batch, rate=0.0, weight=1.0):
    step.begin([weight], rate)
    step.add(step.ready(task.load(batch)))
    return step.update().read()


def test_two_replays_draw_two_masks(tape):
    model, task, config = classification()
    step, _ = stepper(model, task, config)
    found = []
    for seed in (1, 1, 2, 1, None):
        if seed is not None:
            torch.manual_seed(seed)
        found.append(take(step, task, range(8))[0])
    assert found[0] == found[1] == found[3]  # launched, recorded, replayed
    assert len({*map(tuple, found)}) == 3
    assert step.replay.counts == {"hits": 6, "captures": 2, "misses": 2, "launched": 0}


def test_weights_and_rate_are_not_baked_in(tape):
    model, task, config = classification(dropout=0.0, clip=0.0, weight_decay=0.0)
    step, _ = stepper(model, task, config)
    parameter = model.classifier.bias
    first = [take(step, task, range(8))[0][0] for _ in range(3)][-1]
    assert take(step, task, range(8), weight=4.0)[0][0] == first / 4
    for rate in (1e-3, 1e-4, 0.0):
        before = parameter.detach().clone()
        take(step, task, range(8), rate)
        moved = (parameter - before).abs()
        assert (moved <= 2 * rate).all() and (moved >= rate / 2).all()
    assert step.replay.counts["captures"] == 2


@pytest.mark.parametrize("kind", ["single_label", "multi_label", "regression"])
def test_fillers_reach_nothing(kind, tape):
    """Whatever the fillers are, losses and gradients are the same, bit for bit."""
    model, task, config = classification(task=kind)
    step, _ = stepper(model, task, config)
    batch, found = task.load(range(7)), []
    for poison in (False, True):
        layout, values = batch.filled(False)
        ids, places, types, _, real, _, _, targets = layout.views(values)
        tokens = len(batch.input_ids)
        assert layout.size.tokens > tokens and layout.size.sequences > 7
        if poison:
            ids[tokens:], places[tokens:], types[tokens:] = 37, 21, 1
            if kind != "single_label":
                targets.view(torch.float64)[7 * (len(targets) // len(real)) :] = 99.0
        torch.manual_seed(0)
        step.clear()
        step.begin([1.0], 0.0)
        with graph.paused():
            step._micro(layout.batch(values.to(GPU)))
        found.append([step.losses.clone(), *(p.grad.clone() for p in model.parameters())])
    assert all(map(torch.equal, *found))
    assert all(t.isfinite().all() for t in found[0])


def test_fillers_of_masked_tokens(tmp_path, tape):
    task, model = tiny_pretrain.task(tmp_path)  # on the CPU
    batch = task.load(task.batches(0)[0])
    layout, values = batch.filled(False)
    padded, n = layout.batch(values), len(batch.positions)
    assert len(padded.labels) >= n and (padded.labels[n:] == IGNORED).all()
    assert (padded.positions[n:] == layout.size.tokens - 1).all()
    lengths = padded.cu_seqlens.diff()
    assert lengths.sum() == layout.size.tokens and lengths.max() <= layout.size.longest
    assert torch.equal(lengths[: len(batch.targets)], batch.cu_seqlens.diff())
    close_to_truth(task.loss(model, padded), task.loss(model, batch).double(), floor=1e-6)


@pytest.mark.parametrize("sequences", [1, 2, 7])
def test_layouts(sequences):
    """Every token is in a sequence no longer than the longest; a full bucket has no fillers."""
    for tokens in (*range(sequences, 150), 512, 1000, 4096):
        lengths = [len(part) for part in np.array_split(range(tokens), sequences)]
        label = {"labels": 0}
        batch = Packed.of_rows([{"input_ids": [5] * n} | label for n in lengths])
        batch = batch._replace(positions=torch.arange(1), labels=torch.ones(1, dtype=torch.int64))
        layout, values = batch.filled(False)
        padded, size = layout.batch(values), layout.size
        found = padded.cu_seqlens.diff()
        assert tokens <= len(padded.input_ids) == size.tokens == found.sum()
        assert size.tokens == tokens or tokens < 16 or tokens & (tokens - 1)
        assert found[:sequences].tolist() == lengths and found.min() >= 0
        assert found.max() <= size.longest == padded.max_seqlen
        assert padded.first.max() < size.tokens and (padded.positions[1:] == size.tokens - 1).all()
        assert padded.real.sum() == sequences == (padded.targets != IGNORED).sum()


@pytest.mark.parametrize("clip", [0.0, 0.01, 1e6])
def test_gradients_are_clipped_to_the_norm(clip):
    """And the norm that is reported is the one before."""
    model, task, config = classification(dropout=0.0)
    step, _ = stepper(model, task, config, clip=clip)
    norms, total = [], lambda: torch.stack([p.grad.norm() for p in model.parameters()]).norm()
    step.optimizer.step = lambda: norms.append(total().item())
    reported = take(step, task, range(8))[1]
    assert norms == [pytest.approx(0.01 if clip == 0.01 else norms[0], rel=1e-3)]
    assert np.isnan(reported) if not clip else reported > 0.1
    assert clip != 1e6 or reported == pytest.approx(norms[0], rel=1e-5)


def test_gradients_stay(tape):
    """An optimizer skips a gradient that is None in silence."""
    model, task, config = classification()
    step, _ = stepper(model, task, config)
    step.clear()
    where = [p.grad.data_ptr() for p in model.parameters()]
    for _ in range(3):
        step.begin([1.0], 0.1)
        for batch in (range(8), range(8, 16)):
            step.add(step.ready(task.load(batch)))
            assert all(p.grad.abs().sum() > 0 for p in model.parameters() if p.dim() > 1)
        before = model.classifier.weight.detach().clone()
        step.update()
        assert not torch.equal(before, model.classifier.weight)
        assert where == [p.grad.data_ptr() for p in model.parameters()]
        assert not any(p.grad.any() for p in model.parameters())


def test_a_replayed_update_skips(tape):
    """And those after it: whoever reads late finds the weights of before."""
    for optimizer in ("adamw", "lamb"):
        model, task, config = classification(optimizer=optimizer)
        step, _ = stepper(model, task, config)
        for _ in range(3):
            take(step, task, range(8), 1e-2)
        kept = [p.detach().clone() for p in model.parameters()]
        moments = [v.clone() for s in step.optimizer.state.values() for v in s.values()]
        assert np.isnan(take(step, task, range(8), 1e-2, float("nan"))[0][0])
        assert np.isfinite(take(step, task, range(8), 1e-2)[0][0])
        assert all(map(torch.equal, kept, model.parameters()))
        after = [v for s in step.optimizer.state.values() for v in s.values()]
        assert all(map(torch.equal, moments, after))


@ON_TAPE
def test_a_step_that_waits_is_launched(tape):
    model, task, config = classification()
    step, said = stepper(model, task, config)
    step.loss = lambda batch: task.loss(model, batch) * min(1.0, model.classifier.bias.sum().item())
    for _ in range(4):
        take(step, task, range(8))
    assert len(said) == 1 and "not permitted when stream is capturing" in said[0]
    assert step.replay.counts == {"hits": 0, "captures": 0, "misses": 2, "launched": 6}
    assert not step.replay.seen  # nor what they hold


@ON_TAPE
def test_another_thread_loads_while_one_records(tape):
    _, task, _ = classification()
    replay, here = Replay(torch.device("cpu"), print), torch.zeros(3, dtype=torch.int64)
    out = torch.zeros(3, dtype=torch.int64)

    def function(buffer):
        loader = threading.Thread(target=lambda: task.load(range(8)).filled(False))
        loader.start()
        loader.join()
        out.add_(buffer)

    for i in range(4):
        replay.run("key", function, here + i)
    assert out.tolist() == [6, 6, 6] and replay.counts["hits"] == 2
    assert len(replay.seen["key"].graph.calls) == 1


@ON_TAPE
def test_the_least_recently_used_makes_room(tape, monkeypatch):
    monkeypatch.setattr(graph, "MAX_GRAPHS", 2)
    replay, out = Replay(torch.device("cpu"), print), []
    for key in "aabbacacc":
        replay.run(key, lambda _, key=key: out.append(key))
        assert len(replay.seen) <= 2
    assert list(replay.seen) == ["a", "c"]


@ON_TAPE
def test_a_full_pool_is_given_back(tape, monkeypatch):
    monkeypatch.setattr(Tape, "memory", staticmethod(lambda: 100))
    replay, out = Replay(torch.device("cpu"), print), torch.zeros(64)
    for i, key in enumerate("aaabbbb"):
        replay.run(key, lambda _: out.add_(torch.ones(64)))
        assert out[0] == i + 1
    assert list(replay.seen) == ["b"] and replay.counts["captures"] == 2


class Twice(Ranks):
    """Two ranks that do the same."""

    def __init__(self):
        super().__init__()
        self.world, self.reduces, self.sums = 2, True, []

    def sum(self, *values):
        self.sums.append(len(values))
        for v in values:
            v.mul_(2)


@pytest.mark.parametrize("graphs", ["0", "1"])
def test_gradients_of_all_ranks_are_summed_once(graphs, tape, monkeypatch):
    monkeypatch.setenv("BERTFAST_GRAPHS", graphs)
    weights = []
    for ranks, weight in ((Ranks(), 8.0), (Twice(), 16.0)):
        model, task, config = classification()
        step, _ = stepper(model, task, config, ranks=ranks)
        for i in range(4):
            torch.manual_seed(i)
            step.begin([weight], 1e-2)
            for batch in (range(8), range(8, 16)):
                step.add(step.ready(task.load(batch)))
            step.update()
        weights.append([*model.parameters()])
    assert ranks.sums == [1 + len(step.gradients)] * 4
    assert all(map(torch.equal, *weights))


def test_flat_gradients(monkeypatch):
    from bertfast.train import optimizer

    monkeypatch.setattr(optimizer, "_BUCKET", 4 * 64)
    parameters = [torch.nn.Parameter(torch.ones(n)) for n in ((3, 5), (40,), (2, 50), (7,))]
    parameters.append(torch.nn.Parameter(torch.ones(4, dtype=torch.float64)))
    buffers = optimizer.flat_gradients(parameters)
    assert [len(b) for b in buffers] == [64, 112, 16, 16]
    for p in parameters:
        p.grad.copy_(torch.ones_like(p))
    assert [int(b.sum()) for b in buffers] == [55, 100, 7, 4]


def test_packed_rows_are_padded_ones():
    data = rows(5)
    packed = Packed.of_rows(data)
    padded = bertfast.data.collate(data, 0)
    mask = padded["attention_mask"].bool()
    assert torch.equal(packed.input_ids, padded["input_ids"][mask])
    assert torch.equal(packed.token_type_ids, padded["token_type_ids"][mask])
    places = torch.arange(mask.shape[1]).expand(mask.shape)
    assert torch.equal(packed.position_ids, places[mask])
    assert torch.equal(packed.cu_seqlens.diff(), mask.sum(1))
    assert torch.equal(packed.targets, padded["labels"]) and packed.max_seqlen == mask.shape[1]
