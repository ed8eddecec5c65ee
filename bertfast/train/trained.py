"""A fine-tuned model at work, whatever its task."""

from collections.abc import Callable

import numpy as np

from ..freeze import freeze
from ..model import checkpoint
from ..model.tokenizer import load_tokenizer
from ..saved import is_frozen, load_frozen
from . import networks, opening, outputs
from .config import ConfigError
from .tasks.base import choose_device


class Trained:
    """A folder's model, with its head, tokenizer and `decision`.

    Args:
        model: folder or hub name, of `finetune`, `save_frozen` or transformers.
        head: of the task.
        device: "cpu", "cuda", None for a GPU where there is one.
        precision: of `bertfast.freeze`, on a CPU; None runs the model as it is stored.

    Raises: CheckpointError where it is no fine-tuned model of the task; ConfigError.
    """

    def __init__(
        self,
        model: str,
        head: opening.Head,
        allow_pickle: bool,
        device: str | None,
        precision: str | None,
    ) -> None:
        if precision is not None and device == "cuda":
            raise ConfigError(f"precision {precision} is for a CPU, device is 'cuda'; drop one")
        self.folder, self.head = checkpoint.resolve(model), head
        if is_frozen(self.folder):
            self.model = _frozen(self.folder, head, device, precision)
        else:
            opening.verify(self.folder, allow_pickle)
            self.model = opening.trained(self.folder, head, allow_pickle)
            if precision is not None:
                freeze(self.model, precision)
                device = "cpu"
            self.model = self.model.to(choose_device(device))
        self.tokenizer = load_tokenizer(self.folder)
        self.decision = outputs.read_decision(self.folder)

    def outputs(
        self, rows: list[dict], place: Callable[[int], str], tokens: int = networks.EVAL_TOKENS
    ) -> list[np.ndarray]:
        """`networks.outputs`; place(i) says where a row comes from. CheckpointError where one is
        not finite."""
        pad = self.tokenizer.pad_token_id
        found = networks.outputs(self.model, rows, pad, self.head.per_token, tokens=tokens)
        bad = [i for i, values in enumerate(found) if not np.isfinite(values).all()]
        if bad:
            raise checkpoint.CheckpointError(
                f"{self.folder} gives numbers that are not finite for {len(bad)} of {len(rows)} "
                f"texts, the first in {place(bad[0])}: look for NaN in its weights"
            )
        return found


def _frozen(folder, head, device, precision):
    """What `save_frozen` wrote."""
    if precision is not None:
        raise ConfigError(f"precision is {precision!r}, but {folder} is frozen: leave it out")
    if device == "cuda":
        raise ConfigError(f"device is 'cuda', but {folder} is frozen for a CPU: leave it out")
    model = load_frozen(folder)
    if not type(model).__name__.endswith(f"For{head.name}"):
        raise checkpoint.CheckpointError(
            f"{folder} is a frozen {type(model).__name__}, no fine-tuned model for this task "
            f"({head.name})"
        )
    return model
