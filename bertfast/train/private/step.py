"""DP-SGD's step: the clipped gradients of the examples drawn, noise, an update."""

import secrets
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..step import Step
from .accounts import Budget
from .gradients import clipped

if TYPE_CHECKING:
    from ..packed import Packed


class Noise:
    """Gaussian noise from the operating system's entropy: no seed is given or kept, so that nobody
    can take the noise off again, and a resumed run draws other. By ordinary generators in floating
    point: no guard against attacks on those (Mironov, CCS 2012)."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.host = device, np.random.default_rng()
        if device.type != "cpu":
            self.there = torch.Generator(device)
            self.there.manual_seed(secrets.randbits(63))

    def __call__(self, shape: Sequence[int], std: float) -> torch.Tensor:
        """fp32, independent."""
        if self.device.type != "cpu":
            found = torch.empty(shape, device=self.device)
            return found.normal_(0, std, generator=self.there)
        # torch's generator of a CPU has 32 bits of seed.
        return torch.from_numpy(self.host.standard_normal(shape, np.float32)).mul_(std)


class PrivateStep(Step):
    """A `Step` whose batch is what was drawn, in parts, and is divided by what was expected.

    Dropout's masks come of secret seeds: in a packed batch they depend on who else was drawn.
    """

    def __init__(
        self,
        budget: Budget,
        losses: Callable[..., torch.Tensor],
        loss: Callable[..., torch.Tensor],
        optimizer: torch.optim.Optimizer,
        objectives: int,
        clip: float,
        *rest: Any,
    ) -> None:
        super().__init__(loss, optimizer, objectives, 0.0, *rest)
        self.budget, self.losses_of = budget, losses
        self.noise = Noise(self.device)
        if self.replay:
            self.replay.stop("private steps are launched, not replayed")

    def ready(self, batch: "list[Packed]") -> "list[Packed]":
        return [part.to(self.device) for part in batch]

    def add(self, ready: "list[Packed]", factor: float = 1.0, last: bool = True) -> None:
        on_gpu = self.device.type == "cuda"
        with torch.random.fork_rng([self.device] if on_gpu else []):  # checkpoints have the others
            seed = int(self.noise.host.integers(2**63))
            torch.default_generator.manual_seed(seed)
            if on_gpu:
                torch.cuda.manual_seed(seed)
            for part in ready:
                found, _ = clipped(self.loss.model, part, self.losses_of, self.budget.clip)
                self.losses += found.sum() / self.budget.batch

    def _update(self):
        std = self.budget.sigma * self.budget.clip
        for p in self.trained:
            noise = self.noise(p.shape, std)
            p.grad = noise if p.grad is None else p.grad.add_(noise)
            p.grad /= self.budget.batch
        super()._update()
