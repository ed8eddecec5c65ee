"""What the training loop asks of a task."""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .step import Step

if TYPE_CHECKING:
    from .config import RunConfig


class Task:
    """What is trained: its batches, their losses as sums, and what those are to be divided by.

    A task may have several objectives, named in `names`: `weight` and `loss` then give one value
    for each, and the loss of a step is the sum of their means.
    """

    names: tuple[str, ...] = ()
    alike = False  # whether all parts are taken to be like the first where their work is counted
    exact = True  # whether `work` counts all, or expects something
    counts_whole = True  # whether `flops` has all products
    tells_losses = True  # whether a run's log has the loss of every step

    def batches(self, part: int) -> list:
        """The micro-batches of an epoch (or another part of the data), the same each time."""
        raise NotImplementedError

    def steps(self, config: "RunConfig", group: int) -> int:
        """Optimizer steps in the run; `group` micro-batches make one."""
        steps = sum(math.ceil(len(self.batches(i)) / group) for i in range(config.epochs))
        return steps if config.max_steps is None else min(steps, config.max_steps)

    def step(self, *arguments: Any) -> Step:
        """What does the loop's steps, with the arguments of `Step`."""
        return Step(*arguments)

    def load(self, batch: Any) -> Any:
        """What the methods below get for a batch, by default the batch; called in another thread.

        A `Packed` (on the CPU) is replayed where the device can; `loss` gets it on the device,
        there with fillers at its end, whose labels are `IGNORED`.
        """
        return batch

    def weight(self, batch: Any) -> float | list[float]:
        """What the batch's summed loss is to be divided by: its targets, or their weights."""
        raise NotImplementedError

    def tokens(self, batch: Any) -> int:
        """Real tokens in the batch."""
        raise NotImplementedError

    def flops(self, batch: Any) -> float:
        """Floating-point operations of the batch's forward and backward; 0 for no MFU."""
        return 0.0

    def work(self, batches: list) -> tuple[int, float] | None:
        """Tokens and operations of micro-batches as `batches` gives them, which are not loaded for
        it; None where that can't be told."""
        return None

    def loss(self, model: nn.Module, batch: Any) -> torch.Tensor:
        """The batch's loss, summed over its targets; [objectives] where there are several."""
        raise NotImplementedError

    def score(self, model: nn.Module, batch: Any) -> Any:
        """What `evaluate` needs of a batch, for tasks that may run on several ranks."""
        raise NotImplementedError

    def evaluate(self, model: nn.Module, score: Callable) -> dict:
        """Metrics on the validation data, floats by name. `score(batch)` calls the method of that
        name so that sharded weights are there; what is no float is logged alone."""
        raise NotImplementedError
