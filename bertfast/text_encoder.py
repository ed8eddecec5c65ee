"""A SentenceTransformer's `encode` in two halves: token ids of texts, and their vectors."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from . import data
from .data.errors import ConfigError
from .dropin import accelerate
from .encoder.packed import Freezable
from .freeze import freeze
from .model import checkpoint
from .saved import is_frozen, load_frozen, sentences_class

if TYPE_CHECKING:
    from .encoder.packed import Precision

KIND = "SentenceTransformer"
TASKS = {"query": ("query",), "document": ("document", "passage", "corpus")}  # and their prompts
_TOKENS = 1 << 20  # of a chunk, at most
_LONGEST = 8192  # tokens of a text, where the model says no limit
_LISTS = {"text": {"padding": False}, "common": {"return_tensors": None}}


def load(folder: Path, precision: "Precision | None", device: str) -> Any:
    """A SentenceTransformer on our kernels."""
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError as e:
        raise ConfigError(f"embed needs sentence-transformers ({e}): pip install it") from e
    kind = sentences_class(folder)
    if kind not in (KIND, None):
        raise checkpoint.CheckpointError(f"{folder} is a {kind}, expected a {KIND}")
    if is_frozen(folder):
        if precision is not None:
            raise ConfigError(f"precision is {precision!r}, but {folder} is frozen: leave it out")
        model = load_frozen(folder)
        if isinstance(model, SentenceTransformer):
            return model
        raise checkpoint.CheckpointError(
            f"{folder} is a frozen {type(model).__name__}, without a tokenizer: expected a {KIND}"
        )
    model = SentenceTransformer(str(folder), device=device)
    accelerate(model)
    return model if precision is None else freeze(model, precision)


class TextEncoder:
    """A SentenceTransformer's `encode` in two halves, which can run at the same time."""

    def __init__(self, folder: Path, settings: dict) -> None:
        precision = settings["precision"]
        self.model = load(folder, precision, settings["device"])
        frozen = {
            layer.precision
            for m in self.model.modules()
            if precision and isinstance(m, Freezable)
            for layer in m.packed.layers
        }
        self.frozen = next((p for p in ("int8", "bf16", "fp32") if p in frozen), None)
        self.task = {} if settings["task"] is None else {"task": settings["task"]}
        self.prompt = _prompt(
            self.model, **{k: settings[k] for k in ("prompt", "prompt_name", "task")}
        )
        self.batch_tokens, self.normalize = settings["batch_tokens"], settings["normalize"]
        self.dim = settings["truncate_dim"] or self.model.truncate_dim
        longest = min(self.model.max_seq_length or _LONGEST, _LONGEST)
        self.chunk = max(64, min(self.batch_tokens // 4, _TOKENS // longest))  # texts

    def batches(self, texts: list[str]) -> list[tuple[list[int], dict]]:
        """Batches of texts of like length: their places in `texts`, and what the model takes."""
        found = self.model.preprocess(
            texts, prompt=self.prompt, processing_kwargs=_LISTS, **self.task
        )
        if not isinstance(found.get("input_ids"), list):
            raise checkpoint.CheckpointError(
                f"the model begins with a {type(self.model[0]).__name__} that gives no token ids: "
                "embed takes models that begin with a Transformer"
            )
        fields = {k: v for k, v in found.items() if isinstance(v, list)}
        rest = {k: v for k, v in found.items() if k not in fields}
        lengths = [len(ids) for ids in found["input_ids"]]
        return [
            (rows, {k: self._padded(k, [v[i] for i in rows]) for k, v in fields.items()} | rest)
            for rows in data.batches(lengths, 1, tokens=self.batch_tokens)
        ]

    def _padded(self, name, rows) -> torch.Tensor:
        """int64 [texts, longest], as the tokenizer pads."""
        tokenizer, lengths = self.model.tokenizer, [len(row) for row in rows]
        value = {"input_ids": tokenizer.pad_token_id, "token_type_ids": tokenizer.pad_token_type_id}
        out = np.full((len(rows), max(1, *lengths)), value.get(name, 0), np.int64)
        for row, values, n in zip(out, rows, lengths, strict=True):
            row[slice(n) if tokenizer.padding_side == "right" else slice(len(row) - n, None)] = (
                values
            )
        return torch.from_numpy(out)

    @torch.inference_mode()
    def vectors(self, batches: Iterable[Any], step: Callable[[int], object]) -> np.ndarray:
        """fp32 [texts, dim]; `step` is called with how many texts of a batch are done."""
        found = None
        for rows, part in batches:
            part = {
                k: v.to(self.model.device) if torch.is_tensor(v) else v for k, v in part.items()
            }
            out = self.model(part, **self.task)["sentence_embedding"][:, : self.dim].float()
            if self.normalize:
                out = torch.nn.functional.normalize(out, dim=1)
            if found is None:
                found = np.empty((sum(len(rows) for rows, _ in batches), out.shape[1]), np.float32)
            found[rows] = out.cpu().numpy()
            step(len(rows))
        return found


def _prompt(model, prompt, prompt_name, task) -> str | None:
    """As `encode`, `encode_query` and `encode_document` choose it."""
    if prompt is not None:
        return prompt
    if prompt_name is None:
        known = (name for name in TASKS.get(task, ()) if name in model.prompts)
        prompt_name = next(known, model.default_prompt_name)
    elif prompt_name not in model.prompts:
        names = ", ".join(map(repr, model.prompts)) or "none"
        raise ConfigError(f"prompt_name is {prompt_name!r}, the model has {names}")
    return model.prompts.get(prompt_name)
