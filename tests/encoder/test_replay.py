"""An encoder's layers replayed: what a graph may stand for, and its results beside those of the
launched kernels. Without a GPU a tape stands in for a graph (tape.py)."""

import copy
import gc
import pickle
import threading
import warnings
from contextlib import nullcontext

import families
import pytest
import torch
import transformers
from helpers import GPU, apart, close_to_truth, exact, refused
from tape import Tape
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import bertfast
from bertfast.encoder import graph, replay
from bertfast.encoder.packed import Freezable

pytestmark = pytest.mark.usefixtures("tape", "same_kernels")
SIZES = dict(vocab_size=90, hidden_size=48, num_hidden_layers=2, num_attention_heads=3,
             intermediate_size=80, max_position_embeddings=64, initializer_range=0.3)  # fmt: skip
FIRST = "the first batch of this size"


@pytest.fixture
def same_kernels():
    """A tape records the operators: what is launched here takes them, too."""
    with bertfast.executor("operators") if GPU == "cpu" else nullcontext():
        yield


def native(p=0.0):
    torch.manual_seed(0)
    config = transformers.BertConfig(
        **SIZES, hidden_dropout_prob=p, attention_probs_dropout_prob=p, _attn_implementation="sdpa"
    )
    return bertfast.BertModel(config, add_pooling_layer=False).to(GPU)


def accelerated(p=0.0, **options):
    model = native(p)
    theirs = transformers.BertModel(model.config, add_pooling_layer=False)
    theirs.load_state_dict(model.state_dict())
    theirs.to(GPU).bertfast_report = bertfast.accelerate(theirs, strict=True, **options)
    return theirs


def encoder(model):
    return next(m for m in model.modules() if isinstance(m, Freezable))


def launching(model):
    """A copy that launches."""
    model = copy.deepcopy(model)
    encoder(model).bertfast_graphs = None
    return model


def counts(model):
    return encoder(model).bertfast_graphs.counts()[:3]


def why(model):
    return encoder(model).bertfast_last.executor


def batch(*lengths, seed=0):
    g = torch.Generator().manual_seed(seed)
    shape = len(lengths), max(lengths)
    mask = (torch.arange(shape[1]) < torch.tensor(lengths)[:, None]).long()
    ids = torch.randint(5, 90, shape, generator=g)
    return {"input_ids": ids.to(GPU), "attention_mask": mask.to(GPU)}


FULL = batch(16, 16)  # fills its bucket, so that what is launched has the same sizes


def score(states, mask=None):
    """A number that all states at real tokens reach."""
    weights = torch.linspace(-1, 1, states.numel(), device=states.device).view_as(states)
    weights = weights if mask is None else weights * mask[..., None]
    return (states.float() * weights).sum()


def loss_of(model, inputs):
    return score(model(**inputs).last_hidden_state, inputs["attention_mask"])


def taken(model):
    """{name: gradient}, which are gone from the model then."""
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def gradients(model, inputs=FULL, seed=0, loss=loss_of):
    torch.manual_seed(seed)
    model.zero_grad()
    loss(model, inputs).backward()
    return taken(model)


def assert_same(found, expected):
    assert found.keys() == expected.keys() and expected
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


BUILDS = pytest.mark.parametrize("build", [native, accelerated])


@pytest.mark.parametrize("kind", families.MASKS)
@pytest.mark.parametrize("family", families.FAMILIES)
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


def wanted_of(model):
    return encoder(model).layer[0].output.dense.weight


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


def swap_data(model):
    wanted_of(model).data = wanted_of(model).data * 2


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
        model.to(torch.bfloat16)
        assert held.counts().bytes == 0 and held._memory is None


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
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
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

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong and counts(model)[0] >= 40


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


def test_a_frozen_model_launches_no_cpu_graph():
    """On a CPU the whole encoder is one call already."""
    if GPU == "cpu" and bertfast.ops.extension.C is not None:
        model = bertfast.freeze(accelerated().eval())
        with warnings.catch_warnings(), torch.no_grad():
            for _ in range(3):
                model(**FULL)
        assert counts(model) == (0, 0, 0)
