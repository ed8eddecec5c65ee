"""An encoder's layers replayed, inference and what keeps a call from it: results beside those of the
launched kernels. Without a GPU a tape stands in for a graph (tape.py)."""

import copy
import pickle
import threading
import warnings
from multiprocessing.reduction import ForkingPickler

import families
import pytest
import torch
from helpers import GPU, close_to_truth, exact
from replayed import (
    BUILDS,
    FIRST,
    FULL,
    accelerated,
    assert_same,
    batch,
    counts,
    encoder,
    gradients,
    launching,
    native,
    swap_data,
    wanted_of,
    why,
)
from tape import Tape

import bertfast
from bertfast.encoder import graph, replay

pytestmark = pytest.mark.usefixtures("tape", "same_kernels")


@pytest.mark.parametrize(
    "family, kind",
    [(f, kind) for f in families.FAMILIES for kind in families.few(f, families.MASKS)],
)
def test_inference_of_every_family(family, kind):
    model, stock = (families.build(family).to(GPU) for _ in range(2))
    inputs = {k: v.to(GPU) for k, v in families.inputs_for(kind=kind).items()}
    report = bertfast.accelerate(model, strict=True)
    mask = inputs["attention_mask"]
    with torch.no_grad():
        truth, like = (
            families.real(f(**inputs).last_hidden_state if f is stock else f, mask)
            for f in (exact(stock, inputs).last_hidden_state, stock)
        )
        for _ in range(3):
            found = model(**inputs).last_hidden_state
            close_to_truth(families.real(found, mask), truth, like)
    (n,) = report.graphs.values()
    if not any(report.fallbacks.values()):
        assert n[:3] == (1, 1, 1) and n.bytes > 0
        assert "graph of" in str(report) and "1 calls replayed, 1 recorded" in str(report)


@BUILDS
def test_changing_lengths(build):
    """Longer batches leave remains in the buffers of shorter ones."""
    model, truth = build().eval(), native().eval().double()
    for seed in range(3):
        for lengths in ((40, 9, 3), (39, 12), (1,), (16,), (5, 1, 9, 2), (12,) * 20, (64,)):
            inputs = batch(*lengths, seed=seed)
            real = inputs["attention_mask"] == 1
            with torch.no_grad(), bertfast.backend("reference"):
                expected = truth(**inputs).last_hidden_state[real]
            with torch.no_grad():
                close_to_truth(model(**inputs).last_hidden_state[real], expected)
    hits, captures, misses = counts(model)
    assert hits + captures + misses == 21 and hits >= 7 >= misses >= captures


def test_what_turns_it_off(monkeypatch):
    model, other = accelerated(graphs=False).eval(), accelerated().eval()
    monkeypatch.setenv("BERTFAST_GRAPHS", "0")
    with torch.no_grad():
        for _ in range(3):
            model(**FULL), other(**FULL)
        for m in (model, other):
            assert m.bertfast_report.graphs == {"encoder": replay.NO_GRAPHS}
            assert "graph" not in why(m)
        monkeypatch.delenv("BERTFAST_GRAPHS")
        model(**FULL)
        assert m.bertfast_report.graphs == {"encoder": replay.NO_GRAPHS}
        bertfast.accelerate(model)
        model(**FULL)
        assert f"graph: {FIRST}" in why(model)
        model(**FULL)
    assert counts(model) == (0, 1, 1) and why(model).startswith("graph of ")
    bertfast.accelerate(model)  # again
    assert counts(model) == (0, 1, 1)
    bertfast.restore(model)
    assert not [name for name in vars(model.encoder) if name.startswith("bertfast")]


def test_weights_leave_memory():
    model = accelerated().eval()
    with torch.no_grad():
        model(**FULL), model(**FULL)
        old = wanted_of(model).data_ptr()
        swap_data(model)
        held = encoder(model).bertfast_graphs
        assert old in [t.data_ptr() for t in held._memory.kept]
        model(**FULL)
        assert old not in [t.data_ptr() for t in held._memory.kept]
        model(**FULL)
        assert held.counts().bytes > 0
        model.to(GPU)  # as many do before each call
        assert held.counts().bytes > 0
        model.to(torch.bfloat16)
        assert held.counts().bytes == 0 and held._memory is None


@pytest.mark.skipif(GPU == "cuda", reason="the tape's")
def test_out_of_memory(monkeypatch):
    """The call is launched, and says why; other sizes go on."""
    model = accelerated().train()
    expected = gradients(launching(model))
    small = gradients(model, batch(3)), gradients(model, batch(3))
    monkeypatch.setattr(Tape, "limit", 20_000)
    for n in range(3):
        assert_same(gradients(model), expected)
        assert ("graph: recording failed: out of memory" if n else FIRST) in why(model)
    assert counts(model)[1] == 1
    monkeypatch.setattr(Tape, "limit", None)
    for _ in range(3):
        assert_same(gradients(model, batch(3)), small[1])
    swap_data(model)
    gradients(model), gradients(model)
    assert why(model).startswith("graph of")


def test_larger_than_the_largest(monkeypatch):
    model = accelerated().eval()
    encoder(model).bertfast_graphs = replay.Graphs(max_tokens=31)
    with torch.no_grad():
        for _ in range(3):
            model(**FULL)
            assert "there are 32 tokens, a graph takes 1 to 31" in why(model)
        for _ in range(3):
            model(**batch(15, 15))
    assert counts(model) == (1, 1, 1)


def test_the_last_used_stay(monkeypatch):
    model = accelerated().eval()
    held = encoder(model).bertfast_graphs = replay.Graphs(max_graphs=2)

    def sizes():
        return [k.size.tokens for lane in held._lanes() for k in lane.graphs]

    with torch.no_grad():
        for n in (16, 32, 64):
            model(**batch(n)), model(**batch(n))
        assert sizes() == [32, 64]
        model(**batch(32))
        for _ in range(16):  # a dropped one must be worth another recording
            model(**batch(16))
            assert "its graph had to make room" in why(model)
        model(**batch(16))
        assert sizes() == [32, 16]
        monkeypatch.setattr(graph.RECORDERS[GPU], "memory", lambda: 1)
        model(**batch(48)), model(**batch(48))
        assert sizes() == [48]
    gradients(model, batch(16)), gradients(model, batch(16))
    assert sizes() == [16]


def test_copies_and_pickles():
    model = accelerated(0.1).train()
    expected = [gradients(model) for _ in range(2)][-1]
    for other in (copy.deepcopy(model), pickle.loads(ForkingPickler.dumps(model))):
        assert counts(other) == (0, 0, 0)
        for _ in range(3):
            assert_same(gradients(other), expected)
        assert counts(other) == (1, 1, 1)
    assert counts(model) == (0, 1, 1)
    assert not [k for k in model.state_dict() if "bertfast" in k]


def test_threads():
    model = accelerated().eval()
    inputs = [batch(16, 16, seed=seed) for seed in range(4)]
    with torch.no_grad():
        expected = [launching(model)(**b).last_hidden_state for b in inputs]
        model(**FULL), model(**FULL)
    wrong = []

    def work(i):
        with torch.no_grad():
            for _ in range(10):
                if not torch.equal(model(**inputs[i]).last_hidden_state, expected[i]):
                    wrong.append(i)

    def together(*each):
        threads = [threading.Thread(target=work, args=(i,)) for i in each]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
        return counts(model)[0]

    before = together(0)  # threads are not forced to the launched kernels: recorded anew
    assert together(0, 1, 2, 3) == before + 40 and not wrong


def test_anomaly_detection():
    """It reads values, which no recording survives; afterwards the size is recorded."""
    model = accelerated().train()
    with warnings.catch_warnings(), torch.autograd.detect_anomaly():
        warnings.simplefilter("ignore")
        for _ in range(3):
            gradients(model)
    assert "anomaly detection" in why(model)
    gradients(model), gradients(model)
    assert why(model).startswith("graph of")


def test_paused_and_inference_mode():
    model = accelerated().eval()
    with torch.no_grad(), graph.paused():
        for _ in range(3):
            model(**FULL)
        assert "a graph of more than the layers" in why(model)
    with torch.inference_mode():
        model(**FULL), model(**FULL)
    assert counts(model) == (0, 1, 1)
    model.train()
    for _ in range(3):
        gradients(model)
    with torch.no_grad():
        assert not model(**FULL).last_hidden_state.is_inference()
    with torch.inference_mode():
        assert model(**FULL).last_hidden_state.is_inference()


def test_a_frozen_model_launches_no_cpu_graph():
    """On a CPU the whole encoder is one call already."""
    if GPU == "cpu" and bertfast.ops.extension.C is not None:
        model = bertfast.freeze(accelerated().eval())
        with warnings.catch_warnings(), torch.no_grad():
            for _ in range(3):
                model(**FULL)
        assert counts(model) == (0, 0, 0)
