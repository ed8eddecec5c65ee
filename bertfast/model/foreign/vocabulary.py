"""A checkpoint's tokenizer: its own files, or one made of a vocab.txt."""

import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...data.errors import ConfigError
from ...files import read_json, regular
from ..errors import CheckpointError, unreadable
from ..tokenizer import load_tokenizer

if TYPE_CHECKING:
    from transformers import BertConfig

VOCAB, CONFIG = "vocab.txt", "tokenizer_config.json"
_FAST = "tokenizer.json"
_FILES = [_FAST, CONFIG, VOCAB, "special_tokens_map.json", "added_tokens.json", "vocab.json"]
_FILES += ["merges.txt", "sentencepiece.bpe.model", "spiece.model"]
_SETTINGS = "strip_accents", "tokenize_chinese_chars", "model_max_length"
_ASK = "say --cased or --uncased"


def write(
    folder: Path,
    vocab: Path | None,
    config: "BertConfig",
    options: dict[str, Any],
    lowercase: bool | None,
    out: Path,
) -> str | None:
    """The tokenizer of a checkpoint's folder into `out`, which has its config.json; what it is, in
    words, or None where there is none.

    Args:
        vocab: a WordPiece vocabulary in place of the folder's files.
        options: settings of the checkpoint that may say do_lower_case.
        lowercase: whether texts are lower-cased, None where the files are to say so.

    Raises: CheckpointError, ConfigError for a `lowercase` that can't be honoured.
    """
    there = [] if vocab else [n for n in _FILES if (folder / n).exists()]
    if _FAST in there or (there and VOCAB not in there):
        if lowercase is not None:
            raise ConfigError(
                f"{folder} has a whole tokenizer, {there[0]}, which itself says whether it "
                "lower-cases: leave --cased and --uncased out"
            )
        for name in there:
            with unreadable():
                shutil.copyfile(regular(folder / name), out / name)
        _check(load_tokenizer(out), folder / there[0], config)
        return f"the files of {folder}"
    if not vocab and VOCAB not in there:
        return None
    return _of_vocabulary(vocab or folder / VOCAB, config, options, lowercase, out, there)


def _of_vocabulary(vocab, config, options, lowercase, out, there):
    from transformers import BertTokenizer

    if config.model_type not in ("bert", "distilbert", "electra"):
        raise CheckpointError(
            f"{vocab} is WordPiece's, and a {config.model_type} has another tokenizer: put its "
            "tokenizer.json there"
        )
    if not vocab.exists():
        raise CheckpointError(f"{vocab} is not there: give --vocab another file")
    with unreadable():
        words = regular(vocab).read_bytes()
    with unreadable(f"{vocab} is no text in UTF-8"):
        words = words.decode().rstrip("\n").split("\n")
    settings = {}
    if CONFIG in there:
        with unreadable():
            settings = dict(read_json(vocab.parent / CONFIG))
    lower, why = _lowercase(vocab, words, options | settings, lowercase)
    given = {"model_max_length": config.max_position_embeddings}
    given |= {name: settings[name] for name in _SETTINGS if name in settings}
    with unreadable(f"{vocab} makes no tokenizer"):
        shutil.copyfile(vocab, out / VOCAB)
        made = BertTokenizer(str(vocab), **given, do_lower_case=lower)
        made.save_pretrained(out)
    _check(load_tokenizer(out), vocab, config)
    return f"{VOCAB}, {'un' * lower}cased ({why})"


def _lowercase(vocab, words, settings, given):
    """(whether texts are lower-cased, who says so)"""
    if given is not None:
        return given, "as told"
    said = settings.get("do_lower_case")
    if isinstance(said, bool):
        return said, f"do_lower_case is {str(said).lower()} in its configuration"
    plain = [w for w in words if not re.fullmatch(r"\[.*\]", w)]
    upper = sum(any(c.isupper() for c in w) for w in plain)
    lower = sum(any(c.islower() for c in w) for w in plain)
    if upper > lower / 100:
        return False, f"guessed: {upper:,} of its {len(words):,} words have upper-case letters"
    if lower:
        return True, f"guessed: {lower:,} of its words have lower-case letters, {upper} upper-case"
    raise CheckpointError(f"{vocab} has no letters of either case: {_ASK}")


def _check(tokenizer, path, config) -> None:
    if len(tokenizer) > config.vocab_size:
        raise CheckpointError(
            f"{path} has {len(tokenizer):,} words, and the model {config.vocab_size:,}: give the "
            "vocabulary that belongs to it (--vocab)"
        )
