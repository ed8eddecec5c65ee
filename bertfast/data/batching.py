"""Token ids, batches of positions and padded tensors."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CHUNK = 1024  # texts in one call of the tokenizer, which bounds its memory
UNKNOWN = 0.05  # share of unknown tokens above which users are warned: emoji alone give less


def encode(
    tokenizer: "PreTrainedTokenizerBase",
    texts: Sequence[str],
    pairs: Sequence[str] | None = None,
    max_length: int | None = None,
) -> list[dict]:
    """Token ids of each text (or pair), specials included, cut to max_length tokens (None: whole).

    A pair loses tokens of its longer side first. Each row: input_ids and, where the tokenizer
    makes them, token_type_ids, lists of int.
    """
    specials = tokenizer.num_special_tokens_to_add(pair=pairs is not None)
    if max_length is not None and max_length <= specials:
        raise ValueError(
            f"max_length is {max_length}, of which {specials} are special tokens; make it larger"
        )
    rows = []
    for start in range(0, len(texts), _CHUNK):
        part = slice(start, start + _CHUNK)
        out = tokenizer(
            list(texts[part]),
            None if pairs is None else list(pairs[part]),
            truncation=max_length is not None,
            max_length=max_length,
            return_attention_mask=False,
            verbose=False,
        )
        fields = [k for k in ("input_ids", "token_type_ids") if k in out]
        rows += [
            dict(zip(fields, values, strict=True))
            for values in zip(*(out[k] for k in fields), strict=True)
        ]
    return rows


def unknown_share(tokenizer: "PreTrainedTokenizerBase", rows: list[dict], pairs: bool) -> float:
    """The share of tokens, without the specials, of which the tokenizer knows nothing."""
    specials = tokenizer.num_special_tokens_to_add(pair=pairs)
    tokens = sum(len(row["input_ids"]) - specials for row in rows)
    unknown = sum(row["input_ids"].count(tokenizer.unk_token_id) for row in rows)
    return unknown / max(tokens, 1)


def unknown_text(share: float) -> str:
    return (
        f"{share:.1%} of the tokens are unknown to the tokenizer ([UNK]): is it for this language, "
        "with upper and lower case as in the texts?"
    )


def collate(batch: list[dict], pad_token_id: int) -> dict[str, torch.Tensor]:
    """Pad rows on the right to the longest: int64 [batch, seqlen] ids, mask and types.

    Labels, where the rows have them: int64 [batch] for class ids, float32 [batch] for numbers,
    float32 [batch, classes] for rows of flags.
    """
    lengths = np.array([len(row["input_ids"]) for row in batch], np.int64)
    shape = len(batch), int(lengths.max(initial=0))
    ids, types = np.full(shape, pad_token_id, np.int64), np.zeros(shape, np.int64)
    for i, row in enumerate(batch):
        ids[i, : lengths[i]] = row["input_ids"]
        if "token_type_ids" in row:
            types[i, : lengths[i]] = row["token_type_ids"]
    mask = (np.arange(shape[1]) < lengths[:, None]).astype(np.int64)
    out = {"input_ids": ids, "attention_mask": mask, "token_type_ids": types}
    if batch and "labels" in batch[0]:
        labels = np.asarray([row["labels"] for row in batch])
        whole = labels.ndim == 1 and np.issubdtype(labels.dtype, np.integer)
        out["labels"] = labels.astype(np.int64 if whole else np.float32)
    return {name: torch.from_numpy(array) for name, array in out.items()}


def batches(
    lengths: Sequence[int] | np.ndarray,
    batch_size: int,
    seed: int | None = None,
    epoch: int = 0,
    tokens: int | None = None,
) -> list[list[int]]:
    """Positions 0..n-1 in batches of `batch_size`, or of up to so many `tokens` (a longer text is
    alone); the last one possibly smaller.

    With a seed: a plain shuffle, the same for the same (seed, epoch), for training. Without:
    sorted from long to short, which pads least and meets the largest batch first.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; expected 1 or more")
    lengths = np.asarray(lengths, np.int64)
    if seed is None:
        order = np.argsort(-lengths, kind="stable")
    else:
        order = np.random.default_rng([seed, epoch]).permutation(len(lengths))
    if tokens is None:
        order = order.tolist()
        return [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    total, out, start = np.concatenate([[0], np.cumsum(lengths[order])]), [], 0
    while start < len(order):
        fits = int(np.searchsorted(total, total[start] + tokens, side="right")) - 1
        end = max(start + 1, fits)
        out.append(order[start:end].tolist())
        start = end
    return out
