"""Inference by one call on weights that may change: the same answers, never stale, and only where
nobody could tell."""

import contextlib
import copy
import pickle
from unittest import mock

import pytest
import torch
import transformers
from families import FAMILIES, inputs_for
from families import build as stock
from helpers import apart, close_to_truth, exact, refused
from test_frozen import BOUND, COSINE, LENGTHS, SHAPES, batch, build
from torch.nn.functional import cosine_similarity
from torch.utils.flop_counter import FlopCounterMode

import bertfast
from bertfast.encoder import Batch
from bertfast.encoder.batch import Packing, PaddedPacking
from bertfast.encoder.executors import operators, whole_cpu
from bertfast.model.encoder import BertLayer

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@contextlib.contextmanager
def counted():
    """How many layers each call took, from states or from ids."""
    calls = []

    def counting(function):
        return lambda layers, *given: (calls.append(len(layers)), function(layers, *given))[1]

    with contextlib.ExitStack() as stack:
        for name in ("run", "live_texts"):
            one = counting(getattr(whole_cpu, name))
            stack.enter_context(mock.patch.object(whole_cpu, name, one))
        yield calls


def states(model, given, fast=True):
    """The model's, without gradients; `fast`: whether by one call."""
    with torch.no_grad(), counted() as calls:
        found = model(**given).last_hidden_state
    assert (calls == [3]) == fast
    return found


def close_states(actual, model, given, floor=BOUND["fp32"]):
    """The real tokens' beside what the model says in fp64."""
    real = given["attention_mask"] == 1
    close_to_truth(actual[real], exact(model, given).last_hidden_state[real], floor=floor)


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("how", ["fp32", "bf16", "autocast"])
@pytest.mark.usefixtures("guarded")
def test_same_states(how, shape, lengths):
    model, given = build(shape), batch(lengths)
    expected = exact(model, given).last_hidden_state
    real = given["attention_mask"] == 1
    if how == "bf16":
        model = model.to(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        actual = states(model, given)
    assert actual.dtype == (torch.float32 if how == "fp32" else torch.bfloat16)
    assert (actual[~real] == 0).all()
    a, e = actual[real].double(), expected[real]
    bound = "fp32" if how == "fp32" else "bf16"
    close_to_truth(a, e, floor=BOUND[bound])
    assert cosine_similarity(a, e, dim=1).min() > COSINE[bound]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.usefixtures("guarded")
def test_few_tokens(shape, dtype):
    """Whose weights are multiplied where they lie, in tiles of few rows, then of many."""
    model = build(shape).to(DTYPES[dtype])
    for tokens in (*range(1, 14), 16, 17, 32, 33):
        given = batch((tokens,))
        close_states(states(model, given), model, given, floor=BOUND[dtype])


@pytest.mark.parametrize("act", ["relu", "gelu_new"])
def test_activations(act):
    model, given = build(act=act), batch((40, 17))
    close_states(states(model, given), model, given)


def test_a_head_wants_few_rows():
    model, given = build(cls="BertForSequenceClassification"), batch([5, 9, 2] * 60)
    with torch.no_grad():
        with mock.patch.object(whole_cpu, "run", wraps=whole_cpu.run) as run:
            actual = model(**given).logits
        assert run.call_args.args[1].rows is not None and run.call_count == 1
    close_to_truth(actual, exact(model, given).logits)


def through_data(model):
    for p in model.parameters():
        p.data.mul_(1.1)


def by_fused_adamw(model):
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    torch.optim.AdamW(model.parameters(), lr=0.02, fused=True).step()


def by_loading(model):
    torch.manual_seed(5)
    changed = {k: v + 0.1 * torch.randn(v.shape) for k, v in model.state_dict().items()}
    model.load_state_dict(changed, assign=True)


def by_other_memory(model):
    for p in model.parameters():
        p.data = p.data * 1.1


def by_strides(model):
    for layer in model.encoder.layer:  # square: their pointers and shapes stay
        for dense in (layer.attention.self.query, layer.attention.output.dense):
            dense.weight.data = dense.weight.data.t()


def by_vectors_in_bf16(model):
    for p in model.encoder.parameters():
        p.data = p.data if p.dim() == 2 else (1.1 * p.data).bfloat16()


def by_a_flag(model):
    for p in model.encoder.parameters():
        p.data = torch._neg_view(p.data)


CHANGES = [through_data, by_fused_adamw, by_loading, by_other_memory, by_strides]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("change", [*CHANGES, by_vectors_in_bf16, by_a_flag])
def test_never_stale(change, dtype):
    model, given = build().to(DTYPES[dtype]), batch((40, 17))
    before = states(model, given)
    change(model)
    after = states(model, given, fast=change is not by_a_flag)
    assert apart(after, before) > {"fp32": 1000, "bf16": 4}[dtype] * BOUND[dtype]
    close_states(after, model, given, floor=BOUND[dtype])
    assert torch.equal(states(model, given, fast=change is not by_a_flag), after)


def test_encoder_is_kept_and_copied_without():
    """While weights lie where they lay; not for another dtype, nor by a copy."""
    model, given = build(), batch((40, 17))
    layers = model.encoder.describe()
    states(model, given)
    kept = layers.kept
    through_data(model)
    states(model, given)
    assert kept is not None and layers.kept is kept
    assert copy.deepcopy(layers).kept is pickle.loads(pickle.dumps(layers)).kept is None
    twin = copy.deepcopy(model)
    close_states(states(twin, given), model, given)
    assert twin.encoder.describe().kept.flat[0] is twin.encoder.layer[0].attention.self.query.weight
    with torch.autocast("cpu", torch.bfloat16):
        assert states(model, given).dtype == torch.bfloat16
    close_states(states(model, given), model, given)


def test_weights_that_are_no_rows_of_memory():
    model, given = build(), batch((40, 17))
    expected = states(model, given)
    for layer in model.encoder.layer:
        dense = layer.intermediate.dense
        dense.weight = torch.nn.Parameter(dense.weight.detach().t().contiguous().t())
        dense.bias = torch.nn.Parameter(torch.stack([dense.bias.detach()] * 2, 1)[:, 0])
    assert torch.equal(states(model, given), expected)


def with_hook(model, given):
    seen = []
    model.encoder.layer[1].register_forward_hook(lambda *a: seen.append(a))
    states(model, given, fast=False)
    assert len(seen) == 1


def with_global_hook(model, given):
    handle = torch.nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        states(model, given, fast=False)
    finally:
        handle.remove()


def with_mixed_weights(model, given):
    model.encoder.layer[1].intermediate.dense.weight.data = model.encoder.layer[
        1
    ].intermediate.dense.weight.data.bfloat16()
    refused(TypeError, "dtype", states, model, given, fast=False)


def with_frozen_dropout(model, given):
    model.encoder.layer[1].train()  # drops on, whatever the encoder's own mode
    states(model, given, fast=False)


def with_dispatch_mode(model, given):
    with FlopCounterMode(display=False):
        states(model, given, fast=False)


def with_vmap(model, given):
    packing = Packing(2, 40, given["attention_mask"], "cpu")
    hidden = torch.randn(2, 57, model.config.hidden_size)
    with torch.no_grad(), counted() as calls, contextlib.suppress(Exception):
        # May be refused, must not be wrong.
        torch.func.vmap(lambda h: model.encoder(h, packing, [None] * 9))(hidden)
    assert calls == []


class Halved(BertLayer):
    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs) / 2


def with_a_layer_of_another_class(model, given):
    model.encoder.layer[2].__class__ = Halved
    close_states(states(model, given, fast=False), model, given)


def with_a_weight_cut_short(model, given):
    dense = model.encoder.layer[1].output.dense
    dense.weight = torch.nn.Parameter(dense.weight.detach()[:, :-8])
    refused(ValueError, "expected", states, model, given, fast=False)


@pytest.mark.parametrize(
    "case",
    [
        with_hook,
        with_global_hook,
        with_mixed_weights,
        with_frozen_dropout,
        with_dispatch_mode,
        with_vmap,
        with_a_layer_of_another_class,
        with_a_weight_cut_short,
    ],
)
def test_operator_by_operator_where_someone_could_tell(case):
    model, given = build(), batch((40, 17))
    states(model, given)
    case(model, given)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_padded_rows(dtype, shape):
    """All rows of a padded batch by one call, as by the operators in fp64: padding is no key."""
    model, mask = build(shape).to(dtype), batch((130, 40, 17, 1, 0))["attention_mask"]
    mask[1, 3:20] = 0
    size = model.config.hidden_size
    packing = PaddedPacking(Packing(*mask.shape, mask, "cpu"))
    g = torch.Generator().manual_seed(3)
    hidden = packing.pack(torch.randn(*mask.shape, size, generator=g).to(dtype))

    with torch.no_grad():
        found = whole_cpu.run(model.encoder.describe(), Batch.of(hidden, packing))
        agrees_with_operators(found, model, hidden, packing)


def agrees_with_operators(found, model, hidden, packing, bias=None):
    """As the reference's operators in fp64, layer by layer."""

    def by_operators(model, x, bias):
        return operators.run(model.encoder.describe(), Batch.of(x, packing, bias=bias))

    with bertfast.backend("reference"):
        wide = None if bias is None else bias.double()
        truth = by_operators(copy.deepcopy(model).double(), hidden.double(), wide)
        close_to_truth(found, truth, by_operators(model, hidden, bias))


def some_bias(*shape, dtype):
    """[batch, heads, seqlen, seqlen] with a row that sees nothing, neither dense nor aligned."""
    g = torch.Generator().manual_seed(4)
    bias = torch.randn(*shape[:-1], shape[-1] + 3, generator=g).to(dtype)[..., 1:-2]
    bias[0, :, 2] = -torch.inf
    bias[..., 5, 1::2] = -torch.inf
    return bias


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.usefixtures("guarded")
def test_bias(dtype, shape, shared):
    """On the scores, for all sequences and heads or for each."""
    model, mask = build(shape).to(dtype), batch((130, 40, 17, 1, 0))["attention_mask"]
    heads, size = model.config.num_attention_heads, model.config.hidden_size
    bias_shape = (1, 1, 130, 130) if shared else (5, heads, 130, 130)
    bias = some_bias(*bias_shape, dtype=torch.float32 if shared else dtype)
    for packing in (Packing(*mask.shape, mask, "cpu"), PaddedPacking(Packing(5, 130, mask, "cpu"))):
        hidden = packing.pack(torch.randn(5, 130, size).to(dtype))
        with torch.no_grad():
            given = Batch.of(hidden, packing, bias=bias)
            found = whole_cpu.run(model.encoder.describe(), given)
            agrees_with_operators(found, model, hidden, packing, bias)


def test_no_layers():
    model = bertfast.BertModel(
        transformers.BertConfig(
            num_hidden_layers=0, hidden_size=8, num_attention_heads=2, vocab_size=9
        )
    ).eval()
    states(model, {"input_ids": torch.tensor([[1, 2]])}, fast=False)


def test_default_device():
    model, given = build(), batch((5,))
    expected = states(model, given)
    packing, hidden = Packing(1, 5, None, "cpu"), torch.randn(5, model.config.hidden_size)
    with torch.no_grad(), torch.device("meta"):
        assert model.encoder(hidden, packing, [None] * 9).device.type == "cpu"
    assert torch.equal(states(model, given), expected)


@pytest.mark.parametrize("precision", [None, "fp32", "int8"])
def test_packed_input(precision):
    """What a kernel would read or write out of bounds is refused; no rows are no result."""
    model, starts = build(), torch.tensor([0, 3, 7], dtype=torch.int32)
    ids = torch.arange(7) + 1
    if precision:
        bertfast.freeze(model, precision)
    encode = torch.no_grad()(model.encode_packed)
    whole = encode(ids, starts, 4)
    rows = torch.tensor([6, 6, 6, 0, 0, 0])[::3]
    few = encode(ids, starts, 4, rows=rows)  # of live weights by sums in another order
    assert torch.equal(few, whole[[6, 0]]) or (not precision and apart(few, whole[[6, 0]]) < 2e-6)
    wide = torch.stack([starts, starts], 1)[:, 0]
    assert torch.equal(encode(ids, wide, 4), whole)
    assert encode(ids, starts, 4, rows=rows[:0]).shape == (0, model.config.hidden_size)
    refused(TypeError, "torch.int64", encode, ids, starts.long(), 4)
    refused(ValueError, "to the 7 tokens", encode, ids, starts[:2], 4)
    refused(ValueError, "max_seqlen", encode, ids, starts, 3)
    refused(TypeError, "rows has dtype torch.int32", encode, ids, starts, 4, rows=rows.int())
    refused(IndexError, "0 to 7", encode, ids, starts, 4, rows=torch.tensor([0, 7]))
    refused(IndexError, "-1 to 0", encode, ids, starts, 4, rows=torch.tensor([0, -1]))


def test_with_gradients_and_states_asked_for():
    model, given = build(), batch((40, 17))
    with counted() as calls:
        loss = model(**given).last_hidden_state.sum()
        with torch.no_grad():
            model(**given, output_attentions=True)
            assert calls == [] and loss.requires_grad
            model(**given, output_hidden_states=True)
    assert calls == [1, 1, 1]


@pytest.mark.parametrize("family", FAMILIES)
def test_drop_in(family):
    """test_dropin.py compares the outputs."""
    model = stock(family)
    bertfast.accelerate(model, strict=True)
    with torch.no_grad(), counted() as calls:
        model(**inputs_for())
    assert calls == [4 if family == "Albert" else 2]


def test_drop_in_is_never_stale():
    theirs = transformers.BertModel(build().config).eval()
    ours, given = copy.deepcopy(theirs), batch((40, 17))
    bertfast.accelerate(ours, strict=True)
    for change in (through_data, by_fused_adamw):
        for model in (theirs, ours):
            change(model)
        close_states(states(ours, given), theirs, given)
