"""An optimizer step on the device: gradients of micro-batches, then one update, without waiting."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch

from ..encoder import graph
from ..progress import Say
from .optimizer import flat_gradients
from .packed import Filled, Packed
from .ranks import Ranks, full
from .replay import Replay


class Step:
    """What the loop does over and over:

        step.begin(weights, rate)
        for batch in batches:
            step.add(step.ready(batch))
        report = step.update()  # report.read() waits for the device

    On a device that records (`encoder.graph`) both are replayed, with what changes from step to
    step in tensors that stay. An update after a loss that isn't finite does nothing, nor do those
    that follow.

    Args:
        loss: batch -> [objectives], summed; a module where FSDP is to act.
        optimizer: of `make_optimizer`.
        autocast: a function that gives the context of a forward.
        say: hears what isn't replayed.
    """

    def __init__(
        self,
        loss: Callable[..., torch.Tensor],
        optimizer: torch.optim.Optimizer,
        objectives: int,
        clip: float,
        autocast: Callable[[], AbstractContextManager],
        ranks: Ranks,
        say: Say,
    ) -> None:
        self.loss, self.optimizer, self.clip = loss, optimizer, clip
        self.autocast, self.ranks, self.say = autocast, ranks, say
        self.trained = [p for group in optimizer.param_groups for p in group["params"]]
        self.device = device = self.trained[0].device
        self.pin, self.replay, self.gradients = device.type == "cuda", None, None
        if graph.recorder(device) is not None:
            if ranks.sharded:
                say("fsdp: steps are launched, not replayed")
            else:
                self.replay = Replay(device, say)
        if self.replay or ranks.reduces:
            self.gradients = flat_gradients(self.trained)
        self.late = self.pin or self.replay is not None  # whether a report is worth waiting with
        # The weights of the losses, then the learning rate.
        self.numbers = torch.zeros(objectives + 1, dtype=torch.float64, device=device)
        self.losses = torch.zeros(objectives, device=device)
        # They and the gradient's norm, of the last update.
        self.report = torch.full((objectives + 1,), float("nan"), device=device)
        # The dtypes that AdamW's kernels take.
        self.skip = torch.zeros((), device=device)
        wide = torch.float64 if device.type == "cpu" else torch.float32
        self.rate = torch.zeros((), dtype=wide, device=device)
        optimizer.found_inf = self.skip
        for group in optimizer.param_groups:
            group["lr"] = self.rate

    def ready(self, batch: Any) -> Any:
        """What `add` takes of a batch that a task has loaded; for another thread to make."""
        if not isinstance(batch, Packed):
            return batch
        fits = len(batch.input_ids) <= graph.MAX_TOKENS and batch.rows is None
        if fits and self.replay and self.replay.recorder:
            return batch.filled(self.pin)
        return batch.to(self.device)

    def begin(self, weights: list[float], rate: float) -> None:
        """Losses are divided by `weights`, of all ranks and micro-batches together."""
        numbers = torch.tensor([*weights, rate], dtype=torch.float64, pin_memory=self.pin)
        self.numbers.copy_(numbers, non_blocking=True)

    def add(self, ready: Any, factor: float = 1.0, last: bool = True) -> None:
        """A micro-batch's losses and gradients. factor: 0.0 for one that counts for nothing, and
        only takes part. last: whether it is the step's."""
        if isinstance(ready, Filled):
            layout, values = ready
            self.replay.run(layout, lambda buffer: self._micro(layout.batch(buffer)), values)
            return
        if self.replay:
            self.replay.counts["launched"] += 1
            if not isinstance(ready, Packed):
                self.replay.stop(f"a batch is a {type(ready).__name__}, not a Packed")
        if self.ranks.sharded:
            self.loss.set_requires_gradient_sync(last)
        self._micro(ready, factor)

    def _micro(self, batch, factor=1.0):
        with self.autocast():
            means = self.loss(batch).view(-1) * factor / self.numbers[:-1].float()
        # FSDP takes the mean over ranks; the sum is wanted.
        (means.sum() * (self.ranks.world if self.ranks.sharded else 1)).backward()
        self.losses += means.detach()

    def update(self) -> "Report":
        self.ranks.sum(self.losses, *(self.gradients or ()))
        if self.replay:
            self.replay.run("update", lambda _: self._update())
        else:
            self._update()
        return Report(self.report)

    def _update(self):
        broken = ~self.losses.isfinite().all()
        self.skip.copy_(torch.maximum(self.skip, broken.float()))
        self.report[:-1].copy_(self.losses)
        if self.clip:
            norm = full(torch.nn.utils.clip_grad_norm_(self.trained, self.clip))
            self.report[-1].copy_(norm)
        self.rate.copy_(self.numbers[-1])
        self.optimizer.step()
        self.clear()

    def give_up(self, error: torch.OutOfMemoryError) -> bool:
        """Whether graphs had memory: then they are gone, and the step may begin anew, launched."""
        if self.replay is None or self.replay.recorder is None:
            return False
        self.replay.stop(f"{error!s:.200}")
        self.clear()
        return True

    def clear(self) -> None:
        """Forgets what was added since the last update."""
        self.losses.zero_()
        if self.gradients is None:
            self.optimizer.zero_grad(set_to_none=True)
        else:
            torch._foreach_zero_(self.gradients)


class Report:
    """Values on their way from the device."""

    def __init__(self, values: torch.Tensor) -> None:
        self.event = None
        if values.is_cuda:
            self.values = torch.empty(values.shape, pin_memory=True)
            self.values.copy_(values, non_blocking=True)
            self.event = torch.cuda.Event(blocking=True)  # the loader may need the core
            self.event.record()
        else:
            self.values = values.clone()

    def read(self) -> tuple[list[float], float]:
        """The mean losses of a step, and the norm of its gradient before clipping."""
        if self.event is not None:
            self.event.synchronize()
        *losses, norm = self.values.tolist()
        return losses, norm
