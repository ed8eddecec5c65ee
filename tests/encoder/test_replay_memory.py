"""Which graphs of an encoder's layers are kept, for how long, and when recording pays."""

import gc
import sys
import threading
import weakref

import pytest
import torch
from helpers import GPU
from replayed import (
    FULL,
    accelerated,
    batch,
    counts,
    encoder,
    gradients,
    loss_of,
    swap_data,
    why,
)

import bertfast
from bertfast.encoder import graph, replay

pytestmark = pytest.mark.usefixtures("tape", "same_kernels")


def test_weights_that_are_replaced_all_the_time():
    """Recordings, which cost as much as many calls, don't take over."""
    model = accelerated().eval()
    with torch.no_grad():
        for n in range(60):
            if n % 3 == 0:
                swap_data(model)
            model(**FULL)
        assert counts(model)[1] <= 3 and "of a model that has changed" in why(model)
        bertfast.accelerate(bertfast.restore(model) or model)
        for _ in range(4):  # a graph that was worth it is recorded again at once
            for _ in range(replay.WORTH + 2):
                model(**FULL)
            swap_data(model)
        assert counts(model)[1:] == (4, 4)


def test_a_kept_loss_keeps_no_graph():
    model = accelerated().train()
    gradients(model), gradients(model)
    losses = [loss_of(model, FULL)]
    losses[0].backward()
    graphs = encoder(model).bertfast_graphs
    graph = weakref.ref(next(iter(graphs._training[0].graphs.values())))
    gc.disable()
    try:
        graphs.release()
        assert graph() is None
    finally:
        gc.enable()


@pytest.mark.skipif(GPU == "cuda", reason="the tape's")
def test_a_launched_batch_has_the_memory(monkeypatch):
    """A graph that holds more than its share goes before another size needs as much."""
    model = accelerated().train()
    gradients(model), gradients(model)
    held = encoder(model).bertfast_graphs
    monkeypatch.setattr(graph.RECORDERS[GPU], "memory", lambda: 2 * held.counts().bytes)
    gradients(model)
    assert held.counts().bytes > 0
    gradients(model, batch(5))
    assert held.counts().bytes == 0


def test_one_thread_records_at_a_time():
    model = accelerated().eval()
    with torch.no_grad():
        model(**FULL)
        with graph.recording:  # another's
            model(**FULL), model(**FULL)
        assert "another thread records" in why(model)
        model(**FULL)
    assert counts(model) == (0, 1, 1)


def test_threads_that_record_and_count(monkeypatch):
    """One encoder's recording asks what all others hold, which record meanwhile."""
    models, wrong = [accelerated().eval() for _ in range(2)], []
    for model in models:
        encoder(model).bertfast_graphs.max_graphs = 2

    def work(model, last):
        try:
            for n in (16, 32, 48, 64) * 2:
                with torch.no_grad():
                    model(**batch(n)), model(**batch(n))
        except RuntimeError as e:
            wrong.append(e)
        last.set()

    def look(last):
        try:
            while not last.is_set():
                replay.Graphs(), replay._held(), replay.Graphs()
        except RuntimeError as e:
            wrong.append(e)

    interval, last = sys.getswitchinterval(), threading.Event()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=work, args=(m, last)) for m in models]
        threads += [threading.Thread(target=look, args=(last,)) for _ in range(2)]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
    finally:
        sys.setswitchinterval(interval)
    assert not wrong


def test_buffers_of_gradients_go_with_their_graphs():
    """Layers unfrozen one by one want other gradients each time."""
    model = accelerated().train()
    held = encoder(model).bertfast_graphs
    for p in [*encoder(model).parameters()][:6]:
        gradients(model), gradients(model)
        p.requires_grad_(False)
    before, held.max_graphs = held.counts().bytes, 1
    gradients(model), gradients(model)
    (last,) = held._training[0].graphs.values()
    whole = 4 * sum(p.numel() for p in encoder(model).parameters() if p.requires_grad)
    assert held.counts().bytes == held._training[0].grown + whole + last.nbytes < before


def test_more_sizes_than_are_remembered(monkeypatch):
    """The size of a graph that had to make room may be forgotten by then."""
    monkeypatch.setattr(replay, "_SIGHTS", 2)
    model = accelerated().eval()
    encoder(model).bertfast_graphs = replay.Graphs(max_graphs=2)
    with torch.no_grad():
        for n in (16, 32, 48, 64):
            model(**batch(n))
            model(**batch(n))
        assert counts(model) == (0, 4, 4)
