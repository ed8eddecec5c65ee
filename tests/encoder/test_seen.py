"""What an encoder reads off its layers once, until one of them changes."""

import copy
import pickle
from multiprocessing.reduction import ForkingPickler

import families
import pytest
import torch
import transformers
from torch import nn

import bertfast
from bertfast.encoder import Layer, Unfit


def native():
    config = transformers.BertConfig(
        vocab_size=90, hidden_size=48, num_hidden_layers=2, num_attention_heads=3,
        intermediate_size=80, max_position_embeddings=64,
    )  # fmt: skip
    return bertfast.BertModel(config).encoder


def fused():
    rates = dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob"), 0.1)
    model = families.build("Bert", **rates).train()
    bertfast.accelerate(model)
    return model.encoder


def layer_of(encoder):
    return encoder.layer[1]


def put(encoder, path, module):
    parent, _, name = path.rpartition(".")
    setattr(layer_of(encoder).get_submodule(parent), name, module)


CHANGES = {
    "mode": lambda e: layer_of(e).train(not e.training),
    "rate": lambda e: setattr(layer_of(e).output.dropout, "p", 0.37),
    "eps": lambda e: setattr(layer_of(e).output.LayerNorm, "eps", 0.5),
    "parameter": lambda e: setattr(
        layer_of(e).output.dense, "weight", nn.Parameter(torch.ones(48, 80))
    ),
    "no parameter": lambda e: setattr(layer_of(e).output.dense, "bias", None),
    "module": lambda e: put(e, "intermediate.dense", nn.Linear(48, 80)),
    "another class": lambda e: put(e, "output.dense", nn.Bilinear(48, 80, 48)),
    "class": lambda e: setattr(
        layer_of(e).output.dense, "__class__", type("Mine", (nn.Linear,), {})
    ),
    "activation": lambda e: put(e, "intermediate.intermediate_act_fn", nn.ReLU()),
    "its form": lambda e: put(e, "intermediate.intermediate_act_fn", nn.GELU("tanh")),
    "forward": lambda e: setattr(layer_of(e).output, "forward", lambda x, y: x),
    "forward hook": lambda e: layer_of(e).output.register_forward_hook(lambda *_: None),
    "pre-hook": lambda e: layer_of(e).output.dense.register_forward_pre_hook(lambda *_: None),
    "backward hook": lambda e: layer_of(e).register_full_backward_hook(lambda *_: None),
    "order": lambda e: e.layer._modules.update({"0": e.layer[1], "1": e.layer[0]}),
    "fewer": lambda e: e.layer.__delitem__(0),
    "more": lambda e: e.layer.append(copy.deepcopy(e.layer[0])),
    "another list": lambda e: setattr(e, "layer", nn.ModuleList([*e.layer][::-1])),
    "an array": lambda e: setattr(layer_of(e), "mine", torch.ones(2)),
}


def same(a, b):
    """Whether two readings have the same parameters and everything else alike."""
    return len(a) == len(b) and all(
        type(x) is type(y)
        and (
            x == y
            if isinstance(x, Unfit)
            else x.spec == y.spec
            and x.dropout == y.dropout
            and x.adapters == y.adapters
            and all(p is q for p, q in zip(x.weights.flat(), y.weights.flat(), strict=True))
        )
        for x, y in zip(a, b, strict=True)
    )


@pytest.mark.parametrize("build", [native, fused])
@pytest.mark.parametrize("change", CHANGES)
def test_changes(change, build):
    encoder = build()
    before = encoder.describe()
    assert encoder.describe() is before and isinstance(before[1], Layer)
    CHANGES[change](encoder)
    after = encoder.describe()
    assert same(after, encoder.read())
    if change not in ("an array", "backward hook"):  # a hook on the layer is another's question
        assert not same(after, before)
    if change == "an array":
        layer_of(encoder).mine = torch.ones(2)
        assert same(encoder.describe(), before)  # neither equal nor different


ADAPTERS = {
    "another": lambda m: m.add_adapter("more", peft_config("key")),
    "the active one": lambda m: m.set_adapter("more"),
    "merged": lambda m: m.merge_adapter(),
    "unmerged": lambda m: m.unmerge_adapter(),
    "disabled": lambda m: m.base_model.disable_adapter_layers(),
    "enabled": lambda m: m.base_model.enable_adapter_layers(),
    "gone": lambda m: m.unload(),
}


def peft_config(*names):
    return pytest.importorskip("peft").LoraConfig(target_modules=[*names])


@pytest.mark.parametrize("build", [native, fused])
def test_changes_of_adapters(build):
    """peft keeps what it has merged in a list, which it changes in place."""
    encoder = build()
    before = encoder.describe()
    model = pytest.importorskip("peft").get_peft_model(encoder, peft_config("query"))
    for what, change in {"added": lambda m: m, **ADAPTERS}.items():
        change(model)
        after = encoder.describe()
        assert same(after, encoder.read()), what
        assert same(after, before) == (what == "the active one"), what
        assert encoder.describe() is after
        before = after
    assert not any(layer.adapters for layer in before)


def test_a_native_heads_size_is_its_configurations():
    encoder = native()
    assert encoder.describe()[0].spec.heads == 3
    encoder.config.num_attention_heads = 4
    assert encoder.describe()[0].spec.heads == 4


def test_hooks_are_asked_for_each_time():
    encoder = fused()
    first = encoder.describe()
    handle = layer_of(encoder).output.register_forward_hook(lambda *_: None)
    assert isinstance(encoder.describe()[1], Unfit) and isinstance(encoder.describe()[1], Unfit)
    handle.remove()
    assert same(encoder.describe(), first)


def test_hidden_states_that_were_asked_for_once():
    """What collects them stays, and does nothing."""
    model = families.build("Bert").eval()
    bertfast.accelerate(model)
    inputs = families.inputs_for()
    with torch.no_grad():
        model(**inputs, output_hidden_states=True)
    encoder = model.encoder
    assert any(layer._forward_hooks for layer in encoder.layer)
    assert encoder.describe() is encoder.describe()


@pytest.mark.parametrize("build", [native, fused])
def test_copies_see_their_own(build):
    encoder = build()
    encoder.describe()
    for other in (copy.deepcopy(encoder), pickle.loads(ForkingPickler.dumps(encoder))):
        assert same(other.describe(), other.read()) and not same(other.describe(), encoder.read())
    replica = encoder._replicate_for_data_parallel()  # nn.DataParallel's, with weights of its own
    assert replica.bertfast_seen is replica.bertfast_graphs is None
    assert encoder.bertfast_seen is not None
