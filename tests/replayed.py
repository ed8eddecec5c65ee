"""Models that replay their layers, copies that launch them, and what both are asked."""

import copy

import pytest
import torch
import transformers
from helpers import GPU

import bertfast
from bertfast.encoder.packed import Freezable

SIZES = dict(vocab_size=90, hidden_size=48, num_hidden_layers=2, num_attention_heads=3,
             intermediate_size=80, max_position_embeddings=64, initializer_range=0.3)  # fmt: skip
FIRST = "the first batch of this size"


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


def wanted_of(model):
    return encoder(model).layer[0].output.dense.weight


def swap_data(model):
    wanted_of(model).data = wanted_of(model).data * 2
