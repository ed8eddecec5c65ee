"""What people attach to a native model's modules does what it does to transformers' modules."""

import copy
import warnings

import pytest
import torch
from helpers import relative
from native import batch, pair
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize

TINY = {"hidden_size": 16, "intermediate_size": 24, "vocab_size": 40, "num_attention_heads": 2}
TINY |= {"max_position_embeddings": 16}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
PRETRAINING, CLASSIFIER = "BertForPreTraining", "BertForSequenceClassification"
LENGTHS = (11, 3, 1, 16)

LAYER = "bert.encoder.layer.1"  # the last, of which a classifier wants few rows
LINEARS = [f"{LAYER}.attention.self.{name}" for name in ("query", "key", "value")]
LINEARS += [f"{LAYER}.{n}.dense" for n in ("attention.output", "intermediate", "output")]
LINEARS += ["bert.pooler.dense"]
NORMS = [f"{LAYER}.attention.output.LayerNorm", f"{LAYER}.output.LayerNorm"]
NORMS += ["bert.embeddings.LayerNorm"]
TABLES = [f"bert.embeddings.{n}_embeddings" for n in ("word", "position", "token_type")]
DROPOUTS = ["bert.embeddings.dropout", *(f"{LAYER}.{n}.dropout" for n in ("attention.output", "output"))]  # fmt: skip
BLOCKS = ["attention.self", "attention.output", "attention", "intermediate", "output"]
BLOCKS = [f"{LAYER}.{n}" for n in BLOCKS] + [LAYER, "bert.encoder.layer.0"]
HEAD = "cls.predictions"
HEADS = [HEAD + ".transform.dense", HEAD + ".transform.LayerNorm", HEAD + ".transform", HEAD]
HEADS += [HEAD + ".decoder", "cls.seq_relationship", "cls"]
WEIGHTED = [*LINEARS, *NORMS, HEAD + ".transform.dense", HEAD + ".decoder", "classifier"]
FLOATS = [*LINEARS, *NORMS, *DROPOUTS, *BLOCKS, *HEADS, "bert.pooler", "classifier"]
ALL = [*FLOATS, *TABLES, "bert.embeddings"]


def small(name, options=NO_DROPOUT):
    return pair(TINY | options, name)


def given(lengths=LENGTHS):
    return batch(lengths, TINY["vocab_size"])


def scaled(found):
    """The first tensor of floats changed, not in proportion; of ids others."""
    if isinstance(found, tuple):
        return (scaled(found[0]), *found[1:])
    return found * 1.5 + found.sin() if found.is_floating_point() else (found + 1) % 2


def hook(m, _):
    m.register_forward_hook(lambda m, args, out: scaled(out))


def hook_with_kwargs(m, _):
    m.register_forward_hook(lambda m, args, kwargs, out: scaled(out), with_kwargs=True)


def pre_hook(m, _):
    m.register_forward_pre_hook(lambda m, args: scaled(args))


def pre_hook_with_kwargs(m, _):
    m.register_forward_pre_hook(lambda m, args, kw: (scaled(args), kw), with_kwargs=True)


def backward_hook(m, _):
    m.register_full_backward_hook(lambda m, into, out: (1.5 * into[0], *into[1:]))


def backward_pre_hook(m, _):
    m.register_full_backward_pre_hook(lambda m, out: (1.5 * out[0], *out[1:]))


def own_forward(m, _):
    forward = m.forward
    m.forward = lambda *args, **kwargs: scaled(forward(*args, **kwargs))


def subclass(m, _):
    was = type(m)

    class Changed(was):
        def forward(self, *args, **kwargs):
            return scaled(was.forward(self, *args, **kwargs))

    m.__class__ = Changed


class Half(nn.Module):
    def forward(self, weight):
        return weight / 2


def parametrized(m, _):
    parametrize.register_parametrization(m, "weight", Half())


def weight_norm(m, _):
    with torch.no_grad():
        parametrizations.weight_norm(m).parametrizations.weight.original0.mul_(1.5)


def spectral_norm(m, _):
    torch.manual_seed(0)
    parametrizations.spectral_norm(m)


class Watched(torch.Tensor):
    """A parameter of a type of its own, which has its say where it is used."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        found = super().__torch_function__(function, types, args, kwargs or {})
        if function in (F.linear, F.layer_norm, F.embedding):
            return found.as_subclass(torch.Tensor) * 1.5
        return found


def tensor_subclass(m, _):
    m.weight = nn.Parameter(m.weight.detach().as_subclass(Watched))


class Wrapper(nn.Module):
    """As peft's: the weight's owner's weight stands for its own."""

    def __init__(self, base):
        super().__init__()
        self.base = base
        self.more = nn.Parameter(torch.full((), 0.5, dtype=base.weight.dtype))

    @property
    def weight(self):
        return self.base.weight

    @property
    def bias(self):
        return getattr(self.base, "bias", None)

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base"), name)

    def forward(self, x):
        return self.base(x) * (1 + self.more)


def wrapper(m, parent):
    name = next(n for n, c in parent.named_children() if c is m)
    setattr(parent, name, Wrapper(m))


SOME = [LINEARS[0], LAYER, HEAD]
MATRICES = [p for p in WEIGHTED if p not in NORMS and p != HEAD + ".decoder"]  # it has a zero row
ATTACHMENTS = [
    (hook, ALL),
    (hook_with_kwargs, SOME),
    (pre_hook, [*FLOATS, *TABLES]),  # transformers calls embeddings by keywords
    (pre_hook_with_kwargs, SOME),
    (backward_hook, FLOATS),
    (backward_pre_hook, ALL),
    (own_forward, ALL),
    (subclass, ALL),
    (parametrized, [*WEIGHTED, *TABLES]),
    (weight_norm, MATRICES),
    (spectral_norm, [*MATRICES, *TABLES]),
    (tensor_subclass, [*LINEARS, *NORMS, "classifier", *TABLES[1:]]),
    (wrapper, [*WEIGHTED, *TABLES]),
]


def outputs(model, inputs):
    """At real tokens, one after another."""
    mask = inputs["attention_mask"] == 1
    return [t[mask] if t.dim() == 3 else t for t in model(**inputs).to_tuple()]


def results(model, inputs):
    """Outputs without and with gradients, and the parameters' gradients, by name."""
    with torch.no_grad():
        found = {f"inference {i}": t for i, t in enumerate(outputs(model, inputs))}
    trained = outputs(model, inputs)
    found |= {f"output {i}": t.detach() for i, t in enumerate(trained)}
    model.zero_grad()
    sum(t.tanh().sum() for t in trained).backward()
    return found | {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def assert_same(ours, theirs, what, bound=1e-10):
    """In fp64 the only error is what isn't computed."""
    assert ours.keys() == theirs.keys(), what
    whole = max(t.norm() for name, t in theirs.items() if not name.startswith(("inf", "out")))
    for name, t in theirs.items():
        # A key's bias has no gradient but rounding's.
        error = (ours[name] - t).norm()
        assert error <= bound * (t.norm() + 0.01 * whole), f"{what}: {name} off by {error:.1e}"


def each(attach, paths, dtype):
    """(what, ours as it was, ours, theirs) of the same attachment on one path after another."""
    models = {name: [m.to(dtype) for m in small(name)] for name in (PRETRAINING, CLASSIFIER)}
    for path in paths:
        pair = models[CLASSIFIER if path.startswith((LAYER, "classifier")) else PRETRAINING]
        theirs, ours = changed = copy.deepcopy(pair)
        for m in changed:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                attach(m.get_submodule(path), m.get_submodule(path.rpartition(".")[0]))
        yield f"{attach.__name__} on {path}", pair[1], ours, theirs


attachments = pytest.mark.parametrize(
    "attach, paths", ATTACHMENTS, ids=[a.__name__ for a, _ in ATTACHMENTS]
)


@pytest.mark.seconds
@attachments
@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
def test_attached_to_every_module(attach, paths):
    inputs = given()
    for what, _, ours, theirs in each(attach, paths, torch.float64):
        assert_same(results(ours, inputs), results(theirs, inputs), what)


@pytest.mark.seconds
@attachments
@torch.no_grad()
def test_inference_by_kernels(attach, paths):
    """In fp32, where all layers run by one call as long as nothing is attached."""
    inputs = given()
    for what, plain, ours, theirs in each(attach, paths, torch.float32):
        found, expected, was = (outputs(m, inputs) for m in (ours, theirs, plain))
        errors = [relative(a, e) for a, e in zip(found, expected, strict=True)]
        assert max(errors) < 1e-5, f"{what}: {errors}"
        effects = [relative(a, b) for a, b in zip(found, was, strict=True)]
        assert "backward" in what or max(effects) > 1e-3, f"{what} does nothing"
