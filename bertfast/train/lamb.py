"""LAMB: Adam whose step in each tensor is scaled to that tensor's size, for large batches.

You et al., "Large batch optimization for deep learning", arXiv:1904.00962, algorithm 2.
"""

import torch
from torch.optim import Optimizer


class Lamb(Optimizer):
    """The step of a tensor w is lr * |w| / |u| * u with u = Adam's direction + weight_decay * w;
    lr * u where either norm is 0, and in vectors (biases, LayerNorm), whose norms say little.

    State of each tensor: "step", "exp_avg", "exp_avg_sq", as AdamW's.
    """

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-6, weight_decay=0.01):
        super().__init__(
            params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        )

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._update(p, group)
        return loss

    def _update(self, p, group):
        state, (beta1, beta2) = self.state[p], group["betas"]
        if not state:
            state["step"] = torch.tensor(0.0)
            state["exp_avg"] = torch.zeros_like(p)
            state["exp_avg_sq"] = torch.zeros_like(p)
        state["step"] += 1
        step = state["step"].item()
        state["exp_avg"].lerp_(p.grad, 1 - beta1)
        state["exp_avg_sq"].mul_(beta2).addcmul_(p.grad, p.grad, value=1 - beta2)
        scale = (state["exp_avg_sq"] / (1 - beta2**step)).sqrt_().add_(group["eps"])
        update = state["exp_avg"] / (1 - beta1**step) / scale
        if group["weight_decay"]:
            update.add_(p, alpha=group["weight_decay"])
        if p.dim() > 1:
            size, length = p.norm(), update.norm()
            update.mul_(torch.where((size > 0) & (length > 0), size / length, 1.0))
        p.add_(update, alpha=-group["lr"])
