"""What fine-tuning tasks share: encoded rows, batches of them, and what is done with parts."""

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import nn

from ... import data
from ...files import StrPath, regular
from ...progress import Say
from ..config import ConfigError, FinetuneConfig
from ..flops import Products
from ..networks import logits, outputs, padded
from ..opening import Head
from ..packed import Packed
from ..ranks import Ranks
from ..task import Task

PARTS = ("train", "valid", "test")


class FinetuneTask(Task):
    """A task of `finetune`. What each has of its own is marked "of each".

    config: its settings; `finetune` then calls `read`, `open` and `encode`, trains, and asks for
    `tune`, `figures`, `draw` and `card`.
    """

    Config: ClassVar[type[FinetuneConfig]]  # of each
    head: ClassVar[Head]  # of each
    pipeline_tag: ClassVar[str]  # of each: transformers' name of the task
    config: FinetuneConfig
    model: Any
    tokenizer: Any
    products: Any

    def __init__(self, config: FinetuneConfig, device: torch.device, say: Say = print) -> None:
        self.config, self.device, self.say = config, device, say
        self.parts: dict[str, Any] = {}  # examples; without those that there are none of
        self.rows: dict[str, list[dict]] = {}  # as the model takes them
        self.tokenizer = self.model = self.products = None
        self.decision: dict = {}  # what `tune` found, which is saved with the model

    def load_part(self, path: StrPath) -> Any:
        """Of each: the examples of a file, with `__len__`, `place`, `keys` and `select`."""
        raise NotImplementedError

    def read(self) -> None:
        """All parts; what isn't given is split off the training data."""
        config = self.config
        # A file is read again, for its checksum.
        given = {n: self.load_part(regular(p)) for n in PARTS if (p := getattr(config, n))}
        for name, part in given.items():
            if not len(part):
                raise data.DataError(f"{getattr(config, name)} has no rows")
        if "valid" not in given:
            fractions = (0.9, 0.1, 0.0) if "test" in given else (0.8, 0.1, 0.1)
            seed = config.seed if config.split_seed is None else config.split_seed
            *parts, held_out = data.split(given["train"], fractions, seed)
            given |= zip(("train", "valid"), parts, strict=True)
            given.setdefault("test", held_out)
            if not len(given["valid"]):
                raise data.DataError(
                    f"{config.train} has too few rows to split off a validation part; give --valid"
                )
        self.parts = {name: given[name] for name in PARTS if name in given and len(given[name])}

    def build(self, folder: Path) -> nn.Module:
        """Of each: the model, of `opening.pretrained`, its outputs named as the data have them."""
        raise NotImplementedError

    def check(self, folder: Path) -> None:
        """Of each: that tokenizer, model and settings fit; ConfigError, CheckpointError."""

    def report(self) -> Any:
        """Of each: what the data look like; has `as_dict`, and is told as its text."""
        raise NotImplementedError

    def encode(self, examples: Any) -> list[dict]:
        """Of each: rows for `Packed.of_rows`, of `input_ids` and what is to be learnt."""
        raise NotImplementedError

    def loss(self, model: nn.Module, batch: Any) -> torch.Tensor:
        """Of each: the batch's summed loss, from `self.logits(model, batch)`."""
        raise NotImplementedError

    def weight(self, batch: Any) -> float:
        """Of each, where it isn't the sequences' number."""
        return float(len(batch.cu_seqlens) - 1)

    def figures(self, name: str, found: list[np.ndarray], brief: bool = False) -> dict:
        """Of each: the metrics of a part, from `networks.outputs` of its rows. brief: those alone
        that an evaluation during training prints, floats by name, NaN where there is no such
        figure."""
        raise NotImplementedError

    def tune(self, found: list[np.ndarray]) -> dict:
        """Of each that decides by more than the largest output: what to decide by, as JSON values,
        from the validation part's outputs. `self.decision` from then on."""
        return {}

    def draw(self, out: Path, found: dict[str, list[np.ndarray]], results: dict) -> None:
        """Of each: its pictures in `out`, each within `outputs.optional`."""

    def results(self, outcome: dict) -> dict:
        """Of each that has more to say than figures: parts of eval_results.json, after a training
        that went as `train` says."""
        return {}

    def card(self) -> str:
        """Of each: a sentence for the model card on what the outputs are."""
        return ""

    def logits(self, model: nn.Module, batch: Packed) -> torch.Tensor:
        return logits(model, batch, self.head.per_token)

    @property
    def pad(self) -> int:
        return self.tokenizer.pad_token_id

    def batches(self, part: int) -> list[list[int]]:
        config = self.config
        lengths = [len(row["input_ids"]) for row in self.rows["train"]]
        return data.batches(lengths, config.batch_size, config.seed, part, config.batch_tokens)

    def load(self, batch: list[int]) -> Packed:
        rows = [self.rows["train"][i] for i in batch]
        return Packed.of_rows(rows, self.pad if padded(self.model) else None)

    def tokens(self, batch: Any) -> int:
        return len(batch.input_ids)

    def count(self, model: nn.Module) -> None:
        """Of each whose model isn't an encoder and a head: `products`, of what is frozen now."""
        self.products = Products.of(model)

    @property
    def counts_whole(self) -> bool:
        return self.products is None or self.products.whole

    def flops(self, batch: Any) -> float:
        if not isinstance(batch, Packed):
            return 0.0
        lengths = np.diff(batch.cu_seqlens)
        rows = len(batch.input_ids if batch.positions is None else batch.positions)
        return self._flops(lengths, rows if self.head.per_token else len(lengths))

    def _flops(self, lengths, rows: int) -> float:
        """rows: that the head is for; the last layer of ours does no more for any other."""
        if self.products is None:
            return 0.0
        return self.products.flops(lengths, rows, None if padded(self.model) else rows)

    def work(self, batches: list) -> tuple[int, float]:
        rows = [self.rows["train"][i] for batch in batches for i in batch]
        lengths = [len(row["input_ids"]) for row in rows]
        read = len(rows)
        if self.head.per_token:
            read = sum(len(row.get("places", row["input_ids"])) for row in rows)
        return sum(lengths), self._flops(lengths, read)

    def score(self, model: nn.Module, batch: Any) -> Any:
        return self.logits(model, batch)

    def outputs(
        self, name: str, model: nn.Module, score: Callable | None = None, ranks: Ranks | None = None
    ) -> list[np.ndarray]:
        """`networks.outputs` of a part."""
        score = score or partial(self.score, model)
        return outputs(
            *(model, self.rows[name], self.pad, self.head.per_token), score=score, ranks=ranks
        )

    def evaluate(self, model: nn.Module, score: Callable) -> dict:
        found = self.outputs("valid", model, score, Ranks(self.config.parallel))
        return self.figures("valid", found, brief=True)


def choose_device(name: str | None) -> torch.device:
    """This process's, of torchrun's too."""
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device is 'cuda', but torch sees no GPU; use cpu")
    if name == "cuda" and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    return torch.device(name)
