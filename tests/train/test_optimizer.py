"""The groups, the rates and the state of AdamW and LAMB."""

import pytest
import torch
from tiny_classify import classification

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
