"""What an update is made of: groups of parameters, the schedule, AdamW or LAMB."""

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import nn

from .lamb import Lamb

if TYPE_CHECKING:
    from .config import RunConfig


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """AdamW's groups: no decay on biases and LayerNorm, which are the vectors."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trained if p.dim() > 1], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.dim() <= 1], "weight_decay": 0.0},
    ]


def learning_rate(step: int, steps: int, config: "RunConfig") -> float:
    """The rate of step `step` (from 0) of `steps`: linear warm-up, then the schedule's decay."""
    warmup = round(config.warmup * steps)
    if step < warmup:
        return config.lr * step / warmup
    done = (step - warmup) / max(1, steps - warmup)
    factor = {"linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done)), "constant": 1.0}
    return config.lr * factor[config.schedule]


def make_optimizer(model: nn.Module, config: "RunConfig") -> torch.optim.Optimizer:
    """One that reads its rate and, in `found_inf`, whether to do nothing from tensors."""
    groups = parameter_groups(model, config.weight_decay)
    if config.optimizer == "lamb":
        return Lamb(groups, lr=config.lr, betas=(0.9, config.beta2))
    on_gpu = groups[0]["params"][0].is_cuda
    options = {"betas": (0.9, config.beta2), "fused": True, "capturable": on_gpu}
    return torch.optim.AdamW(groups, lr=config.lr, **options)


_BUCKET = 25 * 2**20  # bytes, as DDP's
_ALIGNMENT = 16  # values, so that kernels may load each gradient by vectors


def flat_gradients(parameters: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    """Zeros that stay the parameters' `.grad`: each a view of one of these buffers, which are
    cleared and summed over ranks as they are."""
    buffers, parts, size = [], [], 0

    def close():
        buffer = parts[0].new_zeros(size)
        at = 0
        for p in parts:
            p.grad = buffer[at : at + p.numel()].view_as(p)
            at += -(-p.numel() // _ALIGNMENT) * _ALIGNMENT
        buffers.append(buffer)

    for p in parameters:
        n = -(-p.numel() // _ALIGNMENT) * _ALIGNMENT
        other = parts and (p.dtype, p.device) != (parts[0].dtype, parts[0].device)
        if other or (parts and (size + n) * p.element_size() > _BUCKET):
            close()
            parts, size = [], 0
        parts, size = [*parts, p], size + n
    if parts:
        close()
    return buffers
