"""The groups, the rates and the state of AdamW and LAMB."""

import pytest
import torch
from helpers import close_to_truth
from tiny_classify import classification

from bertfast.train.lamb import Lamb
from bertfast.train.optimizer import make_optimizer

KINDS = pytest.mark.parametrize("kind", ["adamw", "lamb"])


@KINDS
def test_decay_of_matrices_alone(kind):
    """Without a gradient, weights shrink by rate times decay; biases and LayerNorm stay."""
    model, _, config = classification(optimizer=kind, weight_decay=0.5, lr=0.1)
    optimizer = make_optimizer(model, config)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for name, p in model.named_parameters():
        fixed = name.endswith("bias") or "LayerNorm" in name
        assert torch.equal(p, before[name]) == fixed, name
        if not fixed and kind == "adamw":
            torch.testing.assert_close(p, before[name] * (1 - 0.1 * 0.5))


@KINDS
def test_beta2_is_the_settings(kind):
    model, _, config = classification(optimizer=kind, beta2=0.25)
    optimizer = make_optimizer(model, config)
    for p in model.parameters():
        p.grad = torch.full_like(p, 2.0)
    optimizer.step()
    for p in model.parameters():
        torch.testing.assert_close(optimizer.state[p]["exp_avg_sq"], torch.full_like(p, 3.0))
        torch.testing.assert_close(optimizer.state[p]["exp_avg"], torch.full_like(p, 0.2))


def test_lamb_follows_the_paper():
    """One step against the formula in fp64."""
    torch.manual_seed(0)
    w, g = torch.randn(4, 3), torch.randn(4, 3)
    bias, gb = torch.randn(3), torch.randn(3)
    p, b = torch.nn.Parameter(w.clone()), torch.nn.Parameter(bias.clone())
    groups = [{"params": [p], "weight_decay": 0.1}, {"params": [b], "weight_decay": 0.0}]
    optimizer = Lamb(groups, lr=0.01)
    m = v = torch.zeros(4, 3, dtype=torch.float64)
    expected = w.double()
    for step in (1, 2, 3):
        p.grad, b.grad = g * step, gb.clone()
        optimizer.step()
        d = g.double() * step
        m, v = 0.9 * m + 0.1 * d, 0.999 * v + 0.001 * d * d
        u = (m / (1 - 0.9**step)) / ((v / (1 - 0.999**step)).sqrt() + 1e-6) + 0.1 * expected
        expected = expected - 0.01 * expected.norm() / u.norm() * u
    close_to_truth(p, expected, floor=1e-5)
    # eps 1e-6 beside the gradient: its sign
    close_to_truth(b, (bias - 0.03 * gb.sign()).double(), floor=1e-4)
