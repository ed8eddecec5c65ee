"""A family is a table: one of our own here, with other names, and what it then gets."""

import copy

import pytest
import torch
from families import close_gradients
from helpers import apart, close_to_truth, refused
from test_watch import hook, subclass, wrapper
from torch import nn
from transformers.activations import GELUActivation

import bertfast
from bertfast import families
from bertfast.encoder import Layer, Unfit


class Heads(nn.Module):
    def __init__(self, size, heads):
        super().__init__()
        self.attention_head_size = size // heads
        self.to_q, self.to_k, self.to_v, self.to_out = (nn.Linear(size, size) for _ in range(4))
        self.drop = nn.Dropout(0.0)

    def forward(self, x, mask):
        q, k, v = (
            m(x).unflatten(-1, (-1, self.attention_head_size)).transpose(1, 2)
            for m in (self.to_q, self.to_k, self.to_v)
        )
        p = self.drop.p if self.training else 0.0
        x = nn.functional.scaled_dot_product_attention(q, k, v, mask, p)
        return self.to_out(x.transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, size, heads, inner):
        super().__init__()
        self.heads = Heads(size, heads)
        self.wide, self.narrow, self.act = (
            nn.Linear(size, inner),
            nn.Linear(inner, size),
            GELUActivation(),
        )
        self.first, self.second = nn.LayerNorm(size, eps=1e-6), nn.LayerNorm(size, eps=1e-6)
        self.drop = nn.Dropout(0.0)

    def forward(self, x, mask=None):
        x = self.first(x + self.drop(self.heads(x, mask)))
        return self.second(x + self.drop(self.narrow(self.act(self.wide(x)))))


class Stack(nn.Module):
    def __init__(self, size=32, heads=2, inner=72, layers=3):
        super().__init__()
        self.config = None
        self.layer = nn.ModuleList(Block(size, heads, inner) for _ in range(layers))

    def forward(self, x, mask=None):
        for layer in self.layer:
            x = layer(x, mask)
        return x


TOY = families.Family(
    module=__name__,
    encoder="Stack",
    layer="Block",
    roles={
        **{"query": "heads.to_q", "key": "heads.to_k", "value": "heads.to_v"},
        **{"out": "heads.to_out", "norm1": "first", "up": "wide", "down": "narrow"},
        "norm2": "second",
    },
    bypassed={"heads": "Heads"},
    activation="act",
    attention="heads",
    dropouts=("heads.drop", "drop", "drop"),
    output=lambda hidden, states, kwargs: hidden,
)


@pytest.fixture(autouse=True)
def known():
    families.register(TOY)
    yield
    families.forget(TOY)


def pair():
    torch.manual_seed(0)
    theirs = Stack().eval()
    for p in theirs.parameters():
        nn.init.normal_(p, std=0.3)
    ours = copy.deepcopy(theirs)
    report = bertfast.accelerate(ours, strict=True)
    mask = (torch.arange(19) < torch.tensor([19, 4, 11])[:, None])[:, None, None]
    given = torch.randn(3, 19, 32), mask.expand(3, 1, 19, 19)
    return theirs, ours, report, given


def real(x, mask):
    return x[mask[:, 0, 0]]


def test_inference_and_training():
    theirs, ours, report, (x, mask) = pair()
    assert report.fused == 3
    truth = copy.deepcopy(theirs).double()(x.double(), mask)
    with torch.no_grad():
        close_to_truth(real(ours(x, mask), mask), real(truth, mask))
    assert report.executors == {"": "whole_cpu"} and report.padding[""].startswith(
        "as in the stock"
    )
    models = copy.deepcopy(theirs).double(), theirs, ours
    for m in models:
        real(m(x.to(next(m.parameters()).dtype), mask), mask).square().sum().backward()
    truth, expected, found = ({n: p.grad for n, p in m.named_parameters()} for m in models)
    close_gradients(found, expected, truth)
    assert report.executors[""].startswith("node")


@pytest.mark.parametrize("attach", [hook, wrapper, subclass])
def test_what_is_attached_is_called(attach):
    theirs, ours, report, (x, mask) = pair()
    for m in theirs, ours:
        attach(m.layer[1].heads.to_q, m.layer[1].heads)
    with torch.no_grad():
        truth = copy.deepcopy(theirs).double()(x.double(), mask)
        close_to_truth(real(ours(x, mask), mask), real(truth, mask))
    assert report.fused == 2 and "heads.to_q" in report.layers["layer.1"]
    refused(ValueError, "layer.1.heads.to_q can't be frozen", bertfast.freeze, ours)


@pytest.mark.parametrize("precision, bound", [("fp32", 1e-5), ("bf16", 0.03)])
def test_frozen(precision, bound):
    theirs, ours, report, (x, mask) = pair()
    expected = theirs.double()(x.double(), mask)
    bertfast.freeze(ours, precision)
    with torch.inference_mode():
        assert apart(real(ours(x, mask), mask), real(expected, mask)) < bound
    assert f"frozen, 3 layers, {precision}" in str(report) and not list(ours.parameters())
    refused(ValueError, "is frozen", bertfast.restore, ours)


def test_what_read_says():
    layer = pair()[0].layer[0]
    assert isinstance(TOY.read(layer), Layer)
    layer.second.eps = 0.5
    assert TOY.read(layer) == Unfit("", "its norms differ in eps")
    layer.act = nn.Mish()
    assert TOY.read(layer).where == "act"
    del layer.heads.to_k
    assert "to_k" in TOY.read(layer).why
