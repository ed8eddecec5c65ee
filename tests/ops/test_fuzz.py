"""Arguments made of what operators and entry points declare, many of them damaged: each call gives
what it should or an error that says something. It never crashes: `make test-sanitize` runs this
under ASan. BERTFAST_FUZZ=100000 makes so many calls."""

import contextlib
import inspect
import os

import pytest
import torch
import transformers
from fuzz import Maker
from helpers import DEVICES

import bertfast
from bertfast import ops
from bertfast.encoder.batch import STATES, PackedSequences
from bertfast.encoder.spec import DROPOUTS
from bertfast.model.bert import _PACKED
from bertfast.ops.declare import Below, Declaration, Tensor
from bertfast.ops.library import CPU_DTYPES, DECLARED
from bertfast.ops.linear_act import ACTIVATIONS
from bertfast.ops.pack import _PACK, _UNPACK

CALLS, PART = int(os.environ.get("BERTFAST_FUZZ", 600)), 200
ERRORS = (ValueError, TypeError, IndexError, RuntimeError, MemoryError)
HALVES = (torch.bfloat16, torch.float16)
HIDDEN, LAYERS = 8, 2


def model(precision):
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=9, hidden_size=HIDDEN, num_hidden_layers=LAYERS, num_attention_heads=2,
        intermediate_size=12, max_position_embeddings=64,
    )  # fmt: skip
    it = bertfast.BertModel(config).eval()
    return it if precision is None else bertfast.freeze(it, precision)


MODELS = {precision: model(precision) for precision in (None, "fp32", "bf16", "int8")}


# --- what is called ---


def public(name, declared):
    """The public function of an operator, called with the operator's arguments."""
    function = getattr(ops, name)
    known = inspect.signature(function).parameters

    def call(args):
        given = {n: a for n, a in zip(declared.names, args, strict=True) if n in known}
        if isinstance(given.get("activation"), int):
            given["activation"] = ACTIVATIONS[given["activation"] % len(ACTIVATIONS)]
        torch.manual_seed(0)  # of dropout without a seed
        return function(**given)

    return call


def encoder(precision):
    def call(args):
        hidden, _, cu_seqlens, seqlen, used, rows = args
        with torch.no_grad():
            packing = PackedSequences(cu_seqlens, seqlen, used)
            return MODELS[precision].encoder(
                hidden, packing, [None] * (DROPOUTS * LAYERS), rows=rows
            )

    return call


def packed(precision):
    return lambda args: torch.no_grad()(MODELS[precision].encode_packed)(*args)


def padded(precision):
    def call(args):
        with torch.no_grad():
            try:
                return MODELS[precision](*args).last_hidden_state
            except AttributeError as error:  # of what is no tensor
                raise TypeError(error) from error

    return call


PADDED = Declaration(
    "bert(Tensor input_ids, Tensor? attention_mask, Tensor? token_type_ids) -> Tensor",
    input_ids=Tensor("batch, seqlen", torch.int64, Below("words")),
    attention_mask=Tensor("batch, seqlen", torch.int64),
    token_type_ids=Tensor("batch, seqlen", torch.int64),
)


def raw(name):
    return lambda args: getattr(torch.ops.bertfast, name)(*args)


TARGETS = {f"torch.ops.{name}": (declared, raw(name)) for name, declared in DECLARED.items()}
for declared in (*(DECLARED[n] for n in dir(ops) if n in DECLARED), _PACK, _UNPACK):
    TARGETS[declared.name] = declared, public(declared.name, declared)
for p in MODELS:
    TARGETS[f"encoder {p}"] = STATES, encoder(p)
    TARGETS[f"encode_packed {p}"] = _PACKED, packed(p)
    TARGETS[f"encode padded {p}"] = PADDED, padded(p)


# --- what must come of it ---


def outcome(call, args):
    try:
        return call(args), None
    except ERRORS as error:
        assert str(error), f"{type(error).__name__} without a message"
        return None, error
    except NotImplementedError as error:
        return None, error


def tensors(result):
    return [result] if isinstance(result, torch.Tensor) else [
        t for t in result if isinstance(t, torch.Tensor)
    ]  # fmt: skip


def shapes(result):
    return [(t.shape, t.dtype) for t in tensors(result)]


def close(actual, expected, low):
    """Within the rounding of fp32, or of half precision where `low`; inf and NaN in their places."""
    for a, e in zip(tensors(actual), tensors(expected), strict=True):
        assert a.shape == e.shape and a.dtype == e.dtype
        if not a.is_floating_point():
            assert torch.equal(a, e)
            continue
        finite = e.isfinite()
        assert torch.equal(a.isfinite(), finite)
        a, e = a[finite].double(), e[finite].double()
        error, norm = (a - e).norm(), e.norm()
        assert error <= (2e-2 if low else 1e-4) * norm + 1e-6, f"error {error:.2e} of {norm:.2e}"


def chosen(maker):
    """Now and then the CUDA kernels, in a build that has them on the CPU."""
    cuda = maker.random.random() < 0.1 and DEVICES.get("cuda") == "cpu"
    return ops.backend("cuda") if cuda else contextlib.nullcontext()


def one(seed):
    maker = Maker(seed, size=HIDDEN, words=9)
    name = maker.random.choice(list(TARGETS))
    declared, call = TARGETS[name]
    made = maker.arguments(declared)
    if maker.random.random() < 0.7:
        for _ in range(maker.random.choice([1, 1, 2])):
            maker.damage(made)
        with chosen(maker):
            result, error = outcome(call, list(made.values()))
        if error is None and any(t.requires_grad for t in tensors(result)):
            outcome(
                lambda _: sum(t.sum() for t in tensors(result) if t.requires_grad).backward(), ()
            )
        return
    args = list(made.values())
    if declared is STATES and made["hidden"].dtype not in CPU_DTYPES:
        outcome(call, args)  # which dtypes depends on where the model is
        return
    result = call(args)
    if name.startswith("torch.ops") and declared.name != "pack_indices":
        there = [a.to("meta") if isinstance(a, torch.Tensor) else a for a in args]
        assert shapes(result) == shapes(call(there))
    if not declared.name.endswith("_backward") and not name.startswith("enc"):
        with ops.backend("reference"):
            close(result, call(args), any(t.dtype in HALVES for t in tensors(args)))


@pytest.mark.parametrize("part", range(-(-CALLS // PART)))
def test_fuzz(part):
    for seed in range(part * PART, min((part + 1) * PART, CALLS)):
        try:
            one(seed)
        except Exception as error:
            raise AssertionError(f"call {seed}: {type(error).__name__}: {error}") from error
