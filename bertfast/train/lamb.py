"""LAMB: Adam whose step in each tensor is scaled to that tensor's size, for large batches.

You et al., "Large batch optimization for deep learning", arXiv:1904.00962, algorithm 2.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.optim import Optimizer


class Lamb(Optimizer):
    """The step of a tensor w is lr * |w| / |u| * u with u = Adam's direction + weight_decay * w;
    lr * u where either norm is 0, and in vectors (biases, LayerNorm), whose norms say little.

    State of each tensor: "step" (on its device), "exp_avg", "exp_avg_sq", as AdamW's. As AdamW's
    fused step this one waits for no device: the rate may be a tensor, and where `found_inf` is 1
    nothing changes.
    """

    found_inf: torch.Tensor | None = None

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
    ) -> None:
        super().__init__(
            params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        )

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
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
        state, (beta1, beta2), skip = self.state[p], group["betas"], self.found_inf
        if not state:
            state["step"] = torch.zeros((), device=p.device)
            state["exp_avg"] = torch.zeros_like(p)
            state["exp_avg_sq"] = torch.zeros_like(p)
        step = state["step"] + 1
        mean = state["exp_avg"].lerp(p.grad, 1 - beta1)
        square = (state["exp_avg_sq"] * beta2).addcmul_(p.grad, p.grad, value=1 - beta2)
        # In fp64: in fp32 the first steps' 1 - beta2**step has three digits.
        scale = (square / (1 - beta2 ** step.double())).sqrt_().add_(group["eps"])
        update = mean / (1 - beta1 ** step.double()) / scale
        if group["weight_decay"]:
            update.add_(p, alpha=group["weight_decay"])
        if p.dim() > 1:
            size, length = p.norm(), update.norm()
            update.mul_(torch.where((size > 0) & (length > 0), size / length, 1.0))
        new = {"step": step, "exp_avg": mean, "exp_avg_sq": square}
        for old, value in [(p, p - update * group["lr"]), *((state[k], v) for k, v in new.items())]:
            old.copy_(value if skip is None else torch.where(skip > 0, old, value))
