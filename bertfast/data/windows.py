"""Token ids of texts of any length, in overlapping windows that know where tokens come from."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from .errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass
class Window:
    """A window of one text, or of one pair's second text behind the whole first.

    input_ids, token_type_ids (None where the tokenizer makes none): [n], specials included.
    example: which text it is of. offsets: int64 [n, 2], each token's characters in its text (in its
    word, of texts given as words). words: int64 [n], each token's word in its text. Both are of
    the windowed text alone: `inside` [n] is False of specials and of a pair's first text, whose
    words are -1.
    """

    input_ids: list[int]
    token_type_ids: list[int] | None
    example: int
    offsets: np.ndarray
    words: np.ndarray
    inside: np.ndarray


def windows(
    tokenizer: "PreTrainedTokenizerBase",
    texts: Sequence[str],
    pairs: Sequence[str] | None = None,
    *,
    max_length: int,
    stride: int,
    split: bool = False,
) -> list[Window]:
    """Windows of up to `max_length` tokens, those of a text in their order, each sharing `stride`
    tokens with the one before.

    Args:
        texts: strings; with `split` lists of words, which are encoded with a space between where
            the tokenizer (of bytes, as RoBERTa's) tells words apart by it.
        pairs: second texts, which are then what is windowed: the first stand in each window.

    Raises: ConfigError where specials (and a first text) leave no room, or the tokenizer can't say
    where its tokens come from.
    """
    if not tokenizer.is_fast:
        raise ConfigError(
            f"{type(tokenizer).__name__} can't say where in a text its tokens stand: use a model "
            "with a fast tokenizer (tokenizer.json)"
        )
    if not 0 <= stride < max_length:
        raise ConfigError(f"stride is {stride}, expected 0 to max_length - 1, {max_length - 1}")
    if not len(texts):
        return []
    taken = tokenizer.num_special_tokens_to_add(pair=pairs is not None)
    if pairs is not None:
        heads = tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
        taken += max(map(len, heads), default=0)
    if taken + stride >= max_length:
        raise ConfigError(
            f"max_length is {max_length}: {taken} tokens of it are special ones"
            f"{' and the longest first text' * (pairs is not None)}, and stride {stride} leaves "
            "none for new ones: give a larger max_length or a smaller stride"
        )
    spaced = split and _needs_spaces(tokenizer)
    given = [[*w[:1], *(f" {v}" for v in w[1:])] for w in texts] if spaced else texts
    side, tokenizer.truncation_side = tokenizer.truncation_side, "right"
    try:
        out = tokenizer(
            list(given),
            None if pairs is None else list(pairs),
            truncation="longest_first" if pairs is None else "only_second",
            max_length=max_length,
            stride=stride,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
            return_attention_mask=False,
            is_split_into_words=split,
            verbose=False,
        )
    finally:
        tokenizer.truncation_side = side
    types = out.get("token_type_ids") or [None] * len(out["input_ids"])
    side, found = int(pairs is not None), []
    for i, ids in enumerate(out["input_ids"]):
        inside = np.array([s == side for s in out.sequence_ids(i)], bool)
        words = np.array([-1 if w is None else w for w in out.word_ids(i)], np.int64)
        offsets = np.array(out["offset_mapping"][i], np.int64).reshape(-1, 2)
        if spaced:
            offsets = np.maximum(offsets - (words > 0)[:, None], 0)
        found.append(
            Window(
                ids,
                types[i],
                out["overflow_to_sample_mapping"][i],
                offsets,
                np.where(inside, words, -1),
                inside,
            )
        )
    return found


def _needs_spaces(tokenizer) -> bool:
    """Whether words given apart come out as one word would."""
    ids = lambda text, split: tokenizer(text, is_split_into_words=split)["input_ids"]
    return ids("x x", False) != ids(["x", "x"], True)
