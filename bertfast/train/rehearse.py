"""A dry run's steps."""

import dataclasses
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from torch import nn

from .cost import EnoughError
from .loop import _Run
from .task import Task

if TYPE_CHECKING:
    from .config import RunConfig


def rehearse(model: nn.Module, task: Task, config: "RunConfig", say: Callable = print) -> None:
    """Takes the first steps of `train`, on weights that the caller throws away, to tell what all of
    them would cost. Raises what it does."""
    once = dataclasses.replace(config, resume="no", eval_steps=10**9, save_steps=None)
    with TemporaryDirectory() as out, suppress(EnoughError):
        run = _Run(model, task, once, Path(out), {}, say)
        run.cost.dry = True
        run.train()
