"""What crosses into C++ is as declared, whichever way the call came."""

import pytest
import torch
import transformers
from helpers import offsets, refused

import bertfast
from bertfast import ops
from bertfast.encoder.batch import PackedSequences
from bertfast.encoder.spec import DROPOUTS
from bertfast.ops.declare import FLOATS, Declaration, Number, Tensor

raw = torch.ops.bertfast
ids, table, vector = torch.tensor([0, 1]), torch.ones(5, 8), torch.ones(8)


def embed(**other):
    given = {"input_ids": ids, "position_ids": ids, "token_type_ids": ids, "word": table}
    given |= {"position": table, "token_type": table, "weight": vector, "bias": vector}
    return ops.embedding_layer_norm(**given | other, eps=1e-5)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.int8, torch.float32])
def test_indices_of_another_dtype(dtype):
    x, rows = torch.zeros(4, 3), torch.arange(4).to(dtype)
    refused(
        TypeError, f"indices has dtype {dtype}, expected torch.int64", ops.unpack, x, rows, 2, 2
    )
    refused(TypeError, "torch.int64", raw.scatter_rows, x, rows, 4)
    refused(TypeError, "torch.int64", raw.gather_rows, x, rows)


@pytest.mark.parametrize(
    "other, error, match",
    [
        ({"weight": table[:0]}, ValueError, r"weight has shape \[0, 8\], expected \[hidden\]"),
        ({"bias": vector[:3]}, ValueError, r"bias has shape \[3\].*hidden is 8"),
        ({"position": vector}, ValueError, r"position has shape \[8\]"),
        ({"word": torch.ones(5, 2, 8)}, ValueError, r"word has shape \[5, 2, 8\]"),
        ({"position_ids": None}, TypeError, "position_ids is None, expected a torch.Tensor"),
        ({"token_type": None}, ValueError, "token_type and token_type_ids go together"),
        ({"position": table.double()}, TypeError, "expected torch.float32"),
        (
            {"token_type_ids": ids + 4},
            IndexError,
            "token_type_ids run from 4 to 5, expected 0 to 4",
        ),
        ({"word": table.to("meta")}, ValueError, "input_ids is on cpu, expected meta as word"),
        ({"word": "words"}, TypeError, "word is 'words', expected a torch.Tensor"),
    ],
)
def test_tables(other, error, match):
    refused(error, match, embed, **other)


@pytest.mark.parametrize("kinds", [(0, 1, 1), (1, 0, 0), (0, 0, 1), (0, 1, 0)])
def test_biases_of_one_dtype(kinds):
    x, w = torch.ones(2, 4).bfloat16(), torch.ones(4, 4).bfloat16()
    bq, bk, bv = (torch.ones(4, dtype=(torch.float32, torch.bfloat16)[k]) for k in kinds)
    refused(TypeError, "has dtype .*, expected", ops.qkv_linear, x, w, bq, w, bk, w, bv)


def test_flagged_tensors():
    """Negated, conjugated or zero by a flag alone, which who reads the memory must know."""
    mask = torch.ones(2, 3)
    z = torch.view_as_complex(torch.randn(2, 3, 4, 2)).conj()
    assert torch.equal(ops.pack(z, mask)[0], z.resolve_conj().flatten(0, 1))
    x = torch._neg_view(torch.randn(2, 3, 4))
    assert torch.equal(ops.pack(x, mask)[0], x.clone().flatten(0, 1))
    zero = torch._efficientzerotensor((2, 3, 4))
    assert torch.equal(ops.pack(zero, mask)[0], torch.zeros(6, 4))
    y = ops.linear_act(
        torch._efficientzerotensor((2, 4)), torch._neg_view(table[:, :4]), table[0, :5]
    )
    assert torch.equal(y, torch.ones(2, 5))
    assert torch.equal(embed(word=torch._neg_view(-table)), embed())


def bert():
    config = transformers.BertConfig(
        vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8
    )
    torch.manual_seed(0)
    return bertfast.BertModel(config).eval()


@pytest.mark.parametrize("precision", [None, "fp32", "int8"])
@torch.no_grad()
def test_encoder(precision):
    """Layers that run by one call: what they take, and parameters that are flagged."""
    model = bert() if precision is None else bertfast.freeze(bert(), precision)
    starts, hidden, seeds = offsets([3, 4]), torch.randn(7, 8), [None] * DROPOUTS
    packing = PackedSequences(starts, 4)
    run = lambda x, packing=packing, rows=None: model.encoder(x, packing, seeds, rows=rows)
    expected = run(hidden)
    torch.testing.assert_close(run(torch._neg_view(-hidden)), expected)
    zero = torch._efficientzerotensor((7, 8))
    torch.testing.assert_close(run(zero), run(torch.zeros(7, 8)))
    first = run(hidden, rows=torch._efficientzerotensor(3, dtype=torch.int64))
    torch.testing.assert_close(first, expected[:1].expand(3, 8))
    refused(ValueError, r"hidden has shape \[7, 6\].*size is 8", run, hidden[:, :6])
    refused(
        TypeError,
        "cu_seqlens has dtype torch.int64",
        run,
        hidden,
        PackedSequences(starts.long(), 4),
    )
    refused(ValueError, "to the 7 tokens", run, hidden, PackedSequences(starts + 1, 4))
    refused(IndexError, "0 to 6", run, hidden, rows=torch.tensor([7]))
    if precision is None:
        weight = model.encoder.layer[0].output.dense.weight
        weight.data = torch._neg_view(-weight.data)
        torch.testing.assert_close(run(hidden), expected)


def test_zero_sizes():
    """torch's result, where it has one."""
    assert torch.equal(
        ops.linear_act(torch.ones(3, 0), torch.ones(5, 0), torch.ones(5)), torch.ones(3, 5)
    )
    assert ops.linear_act(torch.ones(2, 0, 4), torch.ones(5, 4)).shape == (2, 0, 5)
    assert ops.linear_act(torch.ones(0), torch.ones(5, 0)).shape == (5,)
    assert ops.attention(torch.ones(3, 3, 2, 0), offsets([3]), 3).shape == (3, 2, 0)
    assert ops.attention(torch.ones(3, 3, 0, 4), offsets([3]), 3).shape == (3, 0, 4)
    nothing = torch.full((3,), -100)
    assert ops.masked_cross_entropy(torch.ones(3, 4), torch.ones(0, 4), None, nothing) == 0
    refused(
        IndexError,
        "expected 0 to -1",
        ops.masked_cross_entropy,
        torch.ones(3, 4),
        torch.ones(0, 4),
        None,
        nothing * 0,
    )
    refused(
        ValueError, "batch is -1, expected 0 <= batch", ops.unpack, torch.ones(2, 4), ids, -1, -2
    )
    grads = raw.qkv_linear_backward(
        torch.ones(3, 0), torch.ones(3, 4), *(torch.ones(0, 4),) * 3, None, 7
    )
    assert torch.equal(grads[0], torch.zeros(3, 4))


def test_called_by_the_dispatcher():
    """Who calls `torch.ops.bertfast` is checked too, backward operators included."""
    qkv, out = torch.ones(5, 3, 2, 4), torch.ones(5, 2, 4)
    args = [out, qkv, out, torch.ones(2, 5), offsets([2, 3]), 3, 0.5, 0.0, None, False]
    args += [None] * 6
    raw.attention_backward(*args, False, False)
    match = "need_dbias is True, yet bias is None"
    refused(ValueError, match, raw.attention_backward, *args, True, False)
    match = "need_drel is True, yet rel_index is None"
    refused(ValueError, match, raw.attention_backward, *args, False, True)
    refused(
        TypeError,
        "lse has dtype",
        raw.attention_backward,
        *args[:3],
        args[3].double(),
        *args[4:],
        *(False, False),
    )
    refused(
        ValueError,
        "rise from 0",
        raw.attention_backward,
        *args[:4],
        offsets([2, 9]),
        *args[5:],
        *(False, False),
    )
    refused(ValueError, "dropout_p is 1.0", raw.attention, *args[1:2], *args[4:7], 1.0, *args[8:])
    refused(ValueError, "activation is 5", raw.linear_act, table, table, None, 5, False)
    unnormed = table, None, None, vector, 1e-5, None, 0.0, None
    refused(ValueError, "bias is given, yet weight is None", raw.add_layer_norm, *unnormed, False)
    unnormed = table, table, None, None
    refused(
        *(ValueError, "mean and weight go together", raw.add_layer_norm_backward, *unnormed),
        *(vector[:5], None, None, 0.0, None, False),
    )
    meta = table.to("meta")
    refused(ValueError, "weight is on meta", raw.linear_act, table, meta, None, 0, False)


def test_declaration():
    it = Declaration(
        "op(Tensor a, Tensor? b, SymInt n) -> Tensor",
        a=Tensor("batch + 1, 2, ...", FLOATS),
        b=Tensor("3 * batch, >= n", "as a or float32"),
        n=Number(1),
    )
    a = torch.ones(3, 2, 5)
    it.check((a, torch.ones(6, 4), 4))
    it.check((a, None, 4))
    refused(
        ValueError,
        r"a has shape \[3, 1, 5\], expected \[batch \+ 1, 2",
        it.check,
        (a[:, :1], None, 4),
    )
    refused(ValueError, r"b has shape \[5, 4\].*batch is 2", it.check, (a, torch.ones(5, 4), 4))
    refused(ValueError, r"b has shape \[6, 3\].*n is 4", it.check, (a, torch.ones(6, 3), 4))
    refused(
        TypeError, "expected torch.float64 or torch.float32", it.check, (a.double(), a.half(), 4)
    )
    other = Declaration(
        "op(Tensor a, Tensor? b, bool c) -> Tensor",
        a=Tensor("batch, size", FLOATS),
        b=Tensor("batch, size / 2", "statistics of a or float32", needs="a"),
        c=Number(0, 2, needs="b"),
    )
    a = torch.ones(3, 8, dtype=torch.float64)
    for b in (torch.ones(3, 4), torch.ones(3, 4).double()):
        other.check((a, b, True))
    refused(ValueError, r"b has shape \[3, 3\].*size is 8", other.check, (a, a[:, :3], False))
    refused(ValueError, "size / 2", other.check, (a[:, :7], a[:, :3], False))
    refused(TypeError, "expected torch.float32", other.check, (a.half(), a[:, :4].half(), False))
    refused(ValueError, "c is True, yet b is None", other.check, (a, None, True))
    refused(ValueError, "n is 0, expected 1 <= n", it.check, (a, None, 0))
    refused(TypeError, "n is '4', expected a number", it.check, (a, None, "4"))
