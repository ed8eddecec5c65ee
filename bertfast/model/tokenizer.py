"""A checkpoint's tokenizer, its faults of one kind and found when it is read."""

from pathlib import Path
from typing import TYPE_CHECKING

from ..files import StrPath, regular
from .errors import CheckpointError, unreadable

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SUFFIXES = {".json", ".txt", ".model", ".jinja"}


def load_tokenizer(folder: StrPath) -> "PreTrainedTokenizerBase":
    """transformers' tokenizer of a local folder; code in the folder is never run.

    Raises CheckpointError where it can't be read or lacks what an encoder needs.
    """
    from transformers import AutoTokenizer

    folder = Path(folder)
    fault = f"{folder}: the tokenizer can't be used; take its files anew from where it came from"
    with unreadable(fault):
        for path in sorted(folder.iterdir()):
            if path.suffix in _SUFFIXES:
                regular(path)
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        room = tokenizer.num_special_tokens_to_add(pair=True) + 2
        tokenizer(["a"])
        ids = tokenizer(["a"], ["a"], truncation=True, max_length=room)["input_ids"][0]
    for what, i in (("pads with", tokenizer.pad_token_id), *(("gives", i) for i in ids)):
        if type(i) is not int or i < 0:
            raise CheckpointError(f"{fault}: it {what} {i!r}, expected a token's number")
    return tokenizer
