"""CUDA graphs: buckets, what a graph may be reused for, and results beside the plain forward.

Without a GPU a tape stands in for a graph (tape.py).
"""

import copy

import pytest
import torch
import transformers
from helpers import GPU, close_to_truth, exact, refused

import bertfast
from bertfast.encoder.graph import RECORDERS
from bertfast.model import graphs
from bertfast.model.graphs import GraphedModel, Static, bucket

CONFIG = dict(hidden_size=48, num_hidden_layers=2, num_attention_heads=4, intermediate_size=100,
              vocab_size=200, max_position_embeddings=80, initializer_range=0.3)  # fmt: skip
NAMES = ["BertModel", "BertForMaskedLM", "BertForPreTraining", "BertForSequenceClassification"]
# In an order that leaves long batches' remains in the buffers of shorter ones.
LENGTHS = [(60, 60, 7), (58, 61, 3), (1,), (64,), (5, 1, 9, 2), (16,), (15,), (0, 5), (33, 0, 20)]
LENGTHS += [(12,) * 41]  # more padding than one sequence may have


def build(name="BertModel"):
    torch.manual_seed(0)
    return getattr(bertfast, name)(transformers.BertConfig(**CONFIG)).eval().to(GPU)


pytestmark = pytest.mark.usefixtures("tape")


def graphed(model, max_tokens=512, max_graphs=64):
    return GraphedModel(model, max_tokens, max_graphs)


def batch(lengths, seed=0, device="cpu"):
    g = torch.Generator().manual_seed(seed)
    size = len(lengths), max(lengths)
    inputs = {
        "input_ids": torch.randint(5, 200, size, generator=g),
        "attention_mask": (torch.arange(size[1]) < torch.tensor(lengths)[:, None]).long(),
        "token_type_ids": torch.randint(0, 2, size, generator=g),
    }
    return {k: v.to(device) for k, v in inputs.items()}


@torch.no_grad()
def assert_equal(fast, model, inputs):
    """A replay's outputs and a call's, each by the truth: they may go different ways."""
    here = {k: v.to(GPU) for k, v in inputs.items()}
    replayed, called, truth = fast(**inputs), model(**here), exact(model, here)
    with bertfast.backend("reference"):
        plain = model(**here)
    # Of one token, two logits that nearly cancel have fewer digits, and `plain` may be lucky.
    floor = 1e-4 if model.dtype == torch.float32 else 2e-3
    for found in (replayed, called):
        assert type(found) is type(truth) and found.keys() == truth.keys() and len(found) > 0
        for key in found:
            assert found[key].dtype == plain[key].dtype
            close_to_truth(found[key], truth[key], plain[key], floor, key)


@pytest.mark.parametrize("device", sorted({"cpu", GPU}))
@pytest.mark.parametrize("name", NAMES)
def test_changing_lengths(name, device):
    model = build(name)
    fast = graphed(model)
    for seed in range(2):  # the second time every bucket exists
        for lengths in LENGTHS:
            assert_equal(fast, model, batch(lengths, seed, device))
    # (60, 60, 7) and (58, 61, 3) share one, as do (1,) and (15,); on a GPU the width counts.
    assert len(fast.graphs) < len(LENGTHS)


@pytest.fixture(params=["OnCPU", "OnGPU"])
def reader(request, monkeypatch):
    """Inputs on the CPU packed by numpy, then by the GPU's kernel in Triton's interpreter."""
    if GPU == "cpu":
        monkeypatch.setattr(graphs, "OnCPU", getattr(graphs, request.param))
    return "cpu" if request.param == "OnCPU" else GPU


def test_inputs(reader):
    model = build()
    fast = graphed(model)
    inputs = batch((30, 4, 21), device=reader)
    assert_equal(fast, model, {"input_ids": inputs["input_ids"]})
    assert_equal(fast, model, {k: v.int() for k, v in inputs.items()})
    holes = inputs["attention_mask"] * (
        torch.arange(30, device=reader) % 3 > 0
    )  # column 0 is padding
    assert_equal(fast, model, inputs | {"attention_mask": holes})
    assert_equal(fast, model, inputs | {"attention_mask": holes.flip(1).bool()})
    positions = torch.arange(30, device=reader).flip(0)[None]
    assert_equal(fast, model, inputs | {"position_ids": positions})
    assert_equal(fast, model, {"input_ids": inputs["input_ids"], "position_ids": positions})
    nothing = torch.zeros(3, 30, device=reader)
    assert_equal(fast, model, inputs | {"attention_mask": nothing})  # no tokens at all
    as_tuple = fast(**inputs, return_dict=False)
    assert isinstance(as_tuple, tuple) and torch.equal(as_tuple[0], fast(**inputs)[0])


@pytest.mark.parametrize("lengths", LENGTHS)
def test_readers_agree(lengths):
    """numpy and the kernel fill a bucket's buffer with the same numbers."""
    pytest.importorskip("triton")
    model, inputs = build(), batch(lengths).values()
    static = Static(model, bucket(sum(lengths), len(lengths), max(lengths)), GPU)
    shape, filled = (len(lengths), max(lengths)), []
    for read, device in ((graphs.OnCPU, "cpu"), (graphs.OnGPU, GPU)):
        static.buffer.fill_(-1)  # whatever an earlier batch left
        found = read(model, shape, *(t.to(device) for t in inputs), None)
        found.fill(static)
        filled.append([found.tokens, *(v.tolist() for v in static.views(static.buffer)[:-1])])
    assert filled[0] == filled[1]


def test_results_are_their_own():
    """The next replay must not change what an earlier call gave."""
    fast = graphed(build())
    first = fast(**batch((20, 20)))
    kept = copy.deepcopy(first)
    fast(**batch((20, 20), seed=1))
    assert all(torch.equal(first[k], kept[k]) for k in first)
    assert not first.last_hidden_state.requires_grad


def bias(model):
    return model.encoder.layer[0].output.dense.bias


def swap_in(model):
    bias(model).data.add_(1)


def swap_parameter(model):
    model.encoder.layer[1].intermediate.dense.weight = torch.nn.Parameter(
        model.encoder.layer[1].intermediate.dense.weight.detach() * 2
    )


def swap_data(model):
    bias(model).data = bias(model).data + 1


def swap_strides(model):
    """The same memory, dtype and shape."""
    weight = model.encoder.layer[0].attention.output.dense.weight
    weight.data = weight.data.T


def drop_layer(model):
    del model.encoder.layer[1]


def change_eps(model):
    for name in ("attention.output.LayerNorm", "output.LayerNorm"):
        model.encoder.layer[0].get_submodule(name).eps = 0.5


def replace_module(model):
    new = copy.deepcopy(model.encoder.layer[0])
    swap_in(model)
    model.encoder.layer[0] = new


def to_bf16(model):
    model.bfloat16()


CHANGES = [
    *(swap_parameter, swap_data, swap_strides, drop_layer, change_eps, replace_module, to_bf16)
]


@pytest.mark.parametrize("change", [swap_in, *CHANGES])
def test_changed_model(change):
    """The result follows the model; a graph of what it was before is never replayed."""
    model = build()
    fast, inputs = graphed(model), batch((20, 9))
    before, old = fast(**inputs).last_hidden_state, list(fast.graphs.values())
    change(model)
    after = fast(**inputs).last_hidden_state
    assert (list(fast.graphs.values()) == old) == (change is swap_in)  # in place needs no capture
    if change is not replace_module:
        assert not torch.equal(before.float(), after.float())
    assert_equal(fast, model, inputs)


def test_settings_are_part_of_the_key(monkeypatch):
    fast, inputs = graphed(build()), batch((20, 9))
    fast(**inputs)
    old = list(fast.graphs.values())
    for name in ("pack_indices", "gather_rows"):  # inputs on the CPU, no matter who is forced
        entries = bertfast.ops.registry._table[name]
        no = entries["reference"]._replace(limit=lambda *_: "the tensors are on cpu")
        monkeypatch.setitem(entries, "reference", no)
    with bertfast.backend("reference" if GPU == "cpu" else "triton"):
        fast(**inputs)
    assert list(fast.graphs.values()) != old
    old = list(fast.graphs.values())
    with torch.autocast(GPU, torch.bfloat16):
        assert fast(**inputs).last_hidden_state.dtype == torch.bfloat16
    assert list(fast.graphs.values()) != old
    assert fast(**inputs).last_hidden_state.dtype == torch.float32


def test_autocast_keeps_no_weight():
    model = build("BertForSequenceClassification")
    fast, inputs = graphed(model), batch((20, 9), device=GPU)
    for factor in (1, -7):
        with torch.no_grad():
            model.classifier.weight.mul_(factor)
        with torch.no_grad(), torch.autocast(GPU, torch.bfloat16):
            found = fast(**inputs).logits
            with bertfast.backend("reference"):
                plain = model(**inputs).logits
        # An old weight's logits are off by their own size.
        close_to_truth(found, exact(model, inputs).logits, plain, floor=0.1)


def test_replays_of_a_changed_model_are_dropped(monkeypatch):
    """A graph replays before the host has looked at all; not where its weights' memory is gone."""
    model = build()
    fast, inputs, replayed = graphed(model), batch((20, 9)), []
    replay = Static.replay
    monkeypatch.setattr(Static, "replay", lambda self, b: replayed.append(self) or replay(self, b))
    for change, replays in ((swap_in, 1), (drop_layer, 2), (swap_data, 1)):
        fast(**inputs)
        old = next(iter(fast.graphs.values()))
        change(model)
        replayed.clear()
        assert_equal(fast, model, inputs)
        assert len(replayed) == replays and (replayed[-1] is old) == (change is swap_in)


def test_a_larger_table_takes_more_ids():
    """No replay ahead: the captured table ends before them."""
    model = build()
    fast, inputs = graphed(model), batch((5,))
    fast(**inputs)
    old = model.embeddings.word_embeddings.weight
    larger = torch.nn.Embedding(len(old) + 10, old.shape[1]).to(old)
    model.embeddings.word_embeddings = larger.eval()
    inputs["input_ids"][0, 1] = len(old) + 3
    assert_equal(fast, model, inputs)


def test_weights_stay_until_the_next_call():
    model = build()
    fast, inputs, old = graphed(model), batch((20, 9)), bias(model).data_ptr()
    fast(**inputs)
    swap_data(model)
    assert old in [t.data_ptr() for t in fast._baked.memory.kept]
    fast(**inputs)
    assert old not in [t.data_ptr() for t in fast._baked.memory.kept]


def test_outputs_make_room(monkeypatch):
    fast = graphed(build())
    states = 4 * 16 * 48 + 4 * 48  # of 16 tokens, with the pooler's
    monkeypatch.setattr(graphs, "OUTPUTS", 3 * states)
    for n in (16, 32, 48):
        fast(**batch((n,)))
    assert list(fast.graphs) == [bucket(48, 1, 48)]
    monkeypatch.setattr(graphs, "OUTPUTS", 1)
    fast(**batch((16,)))
    assert list(fast.graphs) == [bucket(16, 1, 16)]


def test_inference_mode_on_and_off():
    model = build()
    fast, inputs = graphed(model), batch((20, 9))
    with torch.inference_mode():
        fast(**inputs)
    assert not fast(**inputs).last_hidden_state.is_inference()
    with torch.inference_mode():
        assert_equal(fast, model, inputs)


def test_least_recently_used_makes_room():
    fast = graphed(build(), max_graphs=2)
    a, b, c = (batch((n,)) for n in (16, 32, 64))
    for inputs in (a, b, a, c):
        fast(**inputs)
    assert list(fast.graphs) == [bucket(16, 1, 16), bucket(64, 1, 64)]


def test_one_graph_at_a_time():
    """Memory of graphs that are gone is not given to the next."""
    model = build()
    fast = graphed(model, max_graphs=1)
    for n in (16, 32, 16):
        assert_equal(fast, model, batch((n,)))
        assert list(fast.graphs) == [bucket(n, 1, n)]


def test_large_batches_run_plainly():
    model = build()
    fast = graphed(model, max_tokens=50)
    assert_equal(fast, model, batch((40, 11)))
    assert not fast.graphs
    assert_equal(fast, model, batch((40, 10)))
    assert len(fast.graphs) == 1


@pytest.mark.parametrize("sequences", [1, 2, 3, 100])
def test_buckets(sequences):
    for tokens in (*range(1, 300), 1000, 4095, 4096, 4097, 16000):
        for longest in (1, 16, 17, 33, 64, 65, 129, 512):
            size = bucket(tokens, sequences, longest)
            assert tokens <= size.tokens <= max(tokens * 9 / 8, tokens + 15)
            assert longest <= size.longest < max(2 * longest, longest + 64, 17)
            needed = sequences + -(-(size.tokens - tokens) // size.longest)
            assert needed <= size.sequences < 2 * needed
    assert len({bucket(t, 1, 128).tokens for t in range(1, 4097)}) < 60


def test_refusals(monkeypatch):
    model = build()
    if GPU == "cpu":
        with monkeypatch.context() as m:
            m.delitem(RECORDERS, "cpu")
            refused(ValueError, "on cpu, CUDA graphs need it on a GPU", bertfast.cuda_graphs, model)
    refused(TypeError, "is a Linear", bertfast.cuda_graphs, torch.nn.Linear(2, 2))
    refused(ValueError, "max_graphs is 0", graphed, model, max_graphs=0)
    fast, inputs = graphed(model), batch((20, 9))
    refused(IndexError, "input_ids run from", fast, inputs["input_ids"] + 200)
    refused(
        ValueError, r"\[2, 5\], expected \[2, 20\]", fast, inputs["input_ids"], torch.ones(2, 5)
    )
    refused(TypeError, "labels", fast, **inputs, labels=inputs["input_ids"])
    model.encoder.layer[0].train()
    refused(RuntimeError, "call model.eval", fast, **inputs)
    model.eval()
    hook = model.encoder.layer[0].register_forward_hook(lambda *_: None)
    refused(RuntimeError, "a BertLayer has hooks", fast, **inputs)
    hook.remove()
    fast(**inputs)
    model.encoder.layer[0] = copy.deepcopy(model.encoder.layer[0]).train()
    refused(RuntimeError, "call model.eval", fast, **inputs)
    model.eval()
    model.config.output_hidden_states = True
    refused(RuntimeError, "config.output_hidden_states is set", fast, **inputs)


@pytest.mark.skipif(GPU == "cpu", reason="needs a CUDA GPU")
def test_replay_runs_no_python(monkeypatch):
    model = build()
    fast, inputs = bertfast.cuda_graphs(model), batch((20, 9))
    expected = fast(**inputs)
    assert fast.graphs and all(static.graph is not None for static in fast.graphs.values())
    monkeypatch.setattr(type(model), "encode", None)
    torch.testing.assert_close(dict(fast(**inputs)), dict(expected), rtol=0, atol=0)
