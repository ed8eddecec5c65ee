"""Steps replayed from graphs, which a tape stands in for: beside launched ones, bit for bit, and
beside what runs without fillers."""

import json
import threading
from contextlib import contextmanager, nullcontext

import numpy as np
import pytest
import tiny_pretrain
import torch
import transformers
from helpers import GPU, close_to_truth, refused
from tape import Tape

import bertfast
from bertfast.encoder import graph
from bertfast.train import FinetuneConfig, InterruptedRunError, TrainingError
from bertfast.train.classify import ClassificationTask, freeze
from bertfast.train.loop import train
from bertfast.train.optimizer import make_optimizer
from bertfast.train.packed import IGNORED, Packed
from bertfast.train.ranks import Ranks
from bertfast.train.replay import Replay
from bertfast.train.step import Step

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 40}
SIZES |= {"intermediate_size": 48, "max_position_embeddings": 32, "initializer_range": 0.1}
KINDS = {
    "single_label": {},
    "class_weights": {"class_weights": {"b": 5.0}},
    "multi_label": {"task": "multi_label"},
    "regression": {"task": "regression"},
    # The head's dropout is torch's: with fillers it draws more, and the next seeds are others.
    "accumulation": {"accumulation": 3, "batch_size": 4, "dropout": 0.0},
    "lamb": {"optimizer": "lamb", "clip": 0.0},
    "bf16": {"precision": "bf16"},
    "checkpointing": {"gradient_checkpointing": True},
    "by_tokens": {"batch_tokens": 100, "batch_size": 32},
}


ON_TAPE = pytest.mark.skipif(GPU != "cpu", reason="it is the tape's")


def rows(n=40, kind="single_label", longest=30, seed=0):
    r = np.random.default_rng(seed)
    out = []
    for _ in range(n):
        m = int(r.integers(2, longest))
        ids = r.integers(5, 40, m).tolist()
        label = {"multi_label": [float(ids[0] > 20), float(m > 9), 0.0], "regression": m / 9}
        types = [0] * (m // 2) + [1] * (m - m // 2)
        label = label.get(kind, ids[0] % 3)
        out.append({"input_ids": ids, "token_type_ids": types, "labels": label})
    return out


def classification(data=None, frozen=None, dropout=0.1, **options):
    """(model, task, config)"""
    config = FinetuneConfig(**{"epochs": 2, "batch_size": 8, "lr": 1e-2, "device": GPU} | options)
    labels = type("Labels", (), {"names": ("a", "b", "c")})
    tokenizer = type("Tokenizer", (), {"pad_token_id": 0})
    data = data or rows(kind=config.task)
    task = ClassificationTask(config, labels, tokenizer, data, data[:8], GPU)
    torch.manual_seed(0)
    outputs = 1 if config.task == "regression" else 3
    rates = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    sizes = transformers.BertConfig(**SIZES, **rates, num_labels=outputs)
    model = bertfast.BertForSequenceClassification(sizes)
    model.gradient_checkpointing_enable(config.gradient_checkpointing)
    freeze(model, frozen)
    return model, task, config


def run(out, model, task, config, said=None):
    """-> losses and norms of the steps, weights, what `train` returns"""
    said = [] if said is None else said
    outcome = train(model, task, config, out, {}, said.append)
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    steps = [r for r in records if "loss" in r]
    assert [r["step"] for r in steps] == list(range(1, outcome["step"] + 1))
    curve = torch.tensor([[r["loss"], r["gradient_norm"]] for r in steps], dtype=torch.float64)
    return curve, {k: v.cpu().clone() for k, v in model.state_dict().items()}, outcome


def same(a, b):
    assert torch.equal(a[0].nan_to_num(), b[0].nan_to_num())
    assert all(torch.equal(a[1][name], b[1][name]) for name in a[1])


@contextmanager
def launched():
    """A block in which buckets are as they are, but nothing is recorded."""
    with pytest.MonkeyPatch.context() as m:
        m.setattr(Replay, "_record", lambda *_: None)
        yield


def three(tmp_path, make):
    """Runs of what `make` gives: without fillers, launched with them, and replayed."""
    found = []
    with pytest.MonkeyPatch.context() as m:
        m.setenv("BERTFAST_GRAPHS", "0")
        found.append(run(tmp_path / "plain", *make()))
    assert "graphs" not in found[0][2]
    with launched():
        found.append(run(tmp_path / "launched", *make()))
    found.append(run(tmp_path / "replayed", *make()))
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_classification(kind, tmp_path, tape):
    plain, with_fillers, replayed = three(
        tmp_path, lambda: classification(max_steps=8, **KINDS[kind])
    )
    same(replayed, with_fillers)
    if GPU == "cpu" or "dropout" in KINDS[kind]:  # torch's dropout there goes by the shape
        close_to_truth(replayed[0][:, 0], plain[0][:, 0], floor=3e-2 if kind == "bf16" else 1e-3)
    counts, steps = replayed[2]["graphs"], replayed[2]["step"]
    assert counts["launched"] == 0 and counts["captures"] > 1
    micros = 8 + 2 * steps if kind == "accumulation" else steps  # 40 rows: 10 of 4, the last step 1
    assert abs(sum(counts.values()) - steps - micros) <= 8
    assert counts["hits"] > counts["captures"]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    return tiny_pretrain.folder(tmp_path_factory.mktemp("prepared"))


@pytest.mark.parametrize("nsp", [True, False])
def test_pretraining(nsp, prepared, tmp_path, tape):
    """With fillers the last layer's dropout of masked tokens is that of other rows, behind those of
    the pairs: beside the plain run it is off there."""
    options = {"nsp": nsp, "max_steps": 8, "eval_steps": None, "accumulation": 2}
    options |= {
        "lr": 1e-3,
        "device": GPU,
        "config": str(prepared / ("still.json" if nsp else "config.json")),
    }

    def make():
        task, model = tiny_pretrain.task(prepared, **options)
        return model, task, task.config

    plain, with_fillers, replayed = three(tmp_path, make)
    same(replayed, with_fillers)
    close_to_truth(replayed[0], plain[0], floor=1e-4)
    assert replayed[2]["graphs"]["captures"] > 1
    if nsp:
        options["config"] = str(prepared / "config.json")
        with launched():
            with_fillers = run(tmp_path / "dropout", *make())
        same(run(tmp_path / "replays", *make()), with_fillers)


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
        layout, values = batch.padded(False)
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


def test_fillers_of_masked_tokens(prepared, tape):
    task, model = tiny_pretrain.task(prepared)  # on the CPU
    batch = task.load(task.batches(0)[0])
    layout, values = batch.padded(False)
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
        layout, values = batch.padded(False)
        padded, size = layout.batch(values), layout.size
        found = padded.cu_seqlens.diff()
        assert tokens <= len(padded.input_ids) == size.tokens == found.sum()
        assert size.tokens == tokens or tokens < 16 or tokens & (tokens - 1)
        assert found[:sequences].tolist() == lengths and found.min() >= 0
        assert found.max() <= size.longest == padded.max_seqlen
        assert padded.first.max() < size.tokens and (padded.positions[1:] == size.tokens - 1).all()
        assert padded.real.sum() == sequences == (padded.targets != IGNORED).sum()


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


def test_frozen_layers(tmp_path, tape):
    start = classification()[0].state_dict()
    make = lambda: classification(frozen=1, max_steps=6)
    _, with_fillers, replayed = three(tmp_path, make)
    same(replayed, with_fillers)
    for name, value in replayed[1].items():
        kept = name.startswith(("bert.embeddings", "bert.encoder.layer.0"))
        assert torch.equal(value, start[name]) == kept or "key.bias" in name, name


@pytest.mark.parametrize("late", [1, 4, 7])
def test_resume(late, tmp_path, tape, monkeypatch):
    """Stopped before a step, where its graph is known or not: the same end, bit for bit."""
    options = {"max_steps": 8, "save_steps": 3}
    whole = run(tmp_path / "whole", *classification(**options))
    model, task, config = classification(**options)
    real, steps = Step.begin, []

    def begin(self, *args):
        steps.append(args)
        if len(steps) > late:
            raise InterruptedRunError("stop")
        real(self, *args)

    with monkeypatch.context() as m:
        m.setattr(Step, "begin", begin)
        refused(InterruptedRunError, "stop", run, tmp_path / "parts", model, task, config)
    again = run(tmp_path / "parts", *classification(**options))
    same(again, whole)


@ON_TAPE
@pytest.mark.parametrize("limit", [1, 100_000, 400_000])
def test_out_of_memory_in_a_recording(limit, tmp_path, tape, monkeypatch):
    """In any of a step's parts: nothing of it is lost, and the run says that it goes on launched."""
    make = lambda: classification(max_steps=8, accumulation=2, batch_size=4, dropout=0.0)
    with monkeypatch.context() as m:
        m.setenv("BERTFAST_GRAPHS", "0")
        plain = run(tmp_path / "plain", *make())
    monkeypatch.setattr(Tape, "limit", limit)
    said = []
    found = run(tmp_path / "found", *make(), said)
    close_to_truth(found[0][:, 0], plain[0][:, 0], floor=1e-3)
    counts = found[2]["graphs"]
    assert sum("out of memory" in text for text in said) == 1 and counts["launched"] > 8
    assert "launched" in said[-1]


@ON_TAPE
@pytest.mark.parametrize("number", [1, 2, 3])
def test_out_of_memory_beside_graphs(number, tmp_path, tape, monkeypatch):
    """In a backward, which leaves some gradients: the step is done anew without graphs."""
    make = lambda: classification(max_steps=8, accumulation=2, batch_size=4)
    with launched():
        expected = run(tmp_path / "expected", *make())
    real, calls = Step._micro, []

    def short(self, batch, factor=1.0):
        real(self, batch, factor)
        if not Tape.recording():
            calls.append(1)
            if len(calls) == number:
                raise torch.OutOfMemoryError("out of memory, says the test")

    monkeypatch.setattr(Step, "_micro", short)
    monkeypatch.setattr(Step, "ready", lambda self, batch: batch.padded(False))
    said = []
    same(run(tmp_path / "found", *make(), said), expected)
    assert sum("out of memory" in text for text in said) == 1


@pytest.mark.parametrize("graphs", ["0", "1"])
def test_a_loss_that_is_not_finite(graphs, tmp_path, tape, monkeypatch):
    """The step is named, two steps later or at once; the weights are those before it."""
    monkeypatch.setenv("BERTFAST_GRAPHS", graphs)
    options = {"task": "regression", "epochs": 4, "schedule": "constant", "warmup": 0.0}
    data = rows(40, "regression")
    broken = [row | {"labels": np.inf} if i == 30 else row for i, row in enumerate(data)]
    _, task, config = classification(data, **options)
    in_epoch = next(i for i, batch in enumerate(task.batches(0)) if 30 in batch)
    assert 0 < in_epoch < 3
    kept = run(tmp_path / "a", *classification(data, **options, max_steps=in_epoch))[1]
    model, task, config = classification(broken, **options)
    message = f"the loss is inf at step {in_epoch + 1}: "
    refused(TrainingError, message, run, tmp_path / "b", model, task, config)
    assert all(torch.equal(v.cpu(), kept[name]) for name, v in model.state_dict().items())
    logged = (tmp_path / "b" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in logged] == list(range(1, in_epoch + 1))


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
        loader = threading.Thread(target=lambda: task.load(range(8)).padded(False))
        loader.start()
        loader.join()
        out.add_(buffer)

    for i in range(4):
        replay.run("key", function, here + i)
    assert out.tolist() == [6, 6, 6] and replay.counts["hits"] == 2
    assert len(replay.seen["key"].graph.calls) == 1


def test_large_batches_are_launched(tmp_path, tape, monkeypatch):
    make = lambda: classification(max_steps=6)
    with monkeypatch.context() as m:
        m.setenv("BERTFAST_GRAPHS", "0")
        plain = run(tmp_path / "plain", *make())
    monkeypatch.setattr(graph, "MAX_TOKENS", 100)
    found = run(tmp_path / "found", *make())
    close_to_truth(found[0], plain[0], floor=1e-3)
    counts = found[2]["graphs"]
    assert counts["launched"] == 6 and counts["hits"] + counts["captures"] == 5  # the updates


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


def test_a_task_without_a_static_form(tmp_path, tape):
    model, task, config = classification(max_steps=5)
    load, loss = task.load, task.loss
    task.load, task.loss = lambda batch: {"it": load(batch)}, lambda m, b: loss(m, b["it"])
    for name in ("weight", "tokens"):
        real = getattr(task, name)
        setattr(task, name, lambda b, real=real: real(b["it"]))
    said = []
    counts = run(tmp_path, model, task, config, said)[2]["graphs"]
    assert counts == {"hits": 0, "captures": 0, "misses": 0, "launched": 10}
    assert sum("a batch is a dict" in text for text in said) == 1


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
