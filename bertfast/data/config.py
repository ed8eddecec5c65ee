"""Settings of `bertfast prepare`."""

import dataclasses
import math
import os
from dataclasses import dataclass, field

from ..files import regular
from .errors import ConfigError, DataError


def _setting(default, text):
    kind = {"default_factory": default} if callable(default) else {"default": default}
    return field(**kind, metadata={"help": text})


@dataclass
class PrepareConfig:
    """What `prepare` does; every field is also a command-line option."""

    corpus: list[str] = _setting(list, "text files, gzip'd or not: documents separated by blank "
                                 "lines (an indented paragraph goes on), or .jsonl")  # fmt: skip
    out: str = _setting("", "folder for tokenizer and shards")
    valid_corpus: list[str] = _setting(list, "files whose documents are all for validation")
    valid_fraction: float = _setting(0.01, "share of the corpus for validation, without such files")
    text_column: str = _setting("text", "key of the text in .jsonl files")
    encoding: str = _setting("utf-8", "of the files: utf-8, cp1252, gb18030, ...")
    tokenizer: str | None = _setting(None, "folder of a WordPiece tokenizer (default: train one)")
    vocab_size: int = _setting(30522, "size of the vocabulary to train")
    lowercase: bool = _setting(True, "lower case, and no accents unless most of the corpus's marks "
                               "are vowel signs, where a tokenizer is trained")  # fmt: skip
    min_words: int = _setting(5, "drop shorter documents; in Chinese, Thai and other scripts "
                              "without spaces of so many letters")  # fmt: skip
    similarity: float = _setting(
        0.8, "drop documents this similar to an earlier one; 0: equal only"
    )
    boilerplate: float = _setting(0.001, "drop sentences in more than this share of the documents "
                                  "(and in more than 20); 0: none")  # fmt: skip
    shard_mb: float = _setting(4.0, "megabytes of text in a shard")
    processes: int = _setting(os.cpu_count() or 1, "processes")

    def __post_init__(self) -> None:
        for name, good, expected in (
            ("corpus", len(self.corpus) > 0, "one file or more: give --corpus"),
            ("out", bool(self.out), "a folder: give --out"),
            ("valid_fraction", 0 <= self.valid_fraction < 1, "between 0 and 1"),
            ("encoding", _keeps_ascii(self.encoding), "one that keeps ASCII, as utf-8 or cp1252"),
            ("vocab_size", self.vocab_size >= 100, "100 or more"),
            ("min_words", self.min_words >= 1, "1 or more"),
            ("similarity", 0 <= self.similarity <= 1, "between 0 and 1"),
            ("boilerplate", 0 <= self.boilerplate <= 1, "between 0 and 1"),
            ("shard_mb", 0 < self.shard_mb < math.inf, "a number above 0"),
            ("processes", self.processes >= 1, "1 or more"),
        ):
            if not good:
                raise ConfigError(f"{name} is {getattr(self, name)!r}, expected {expected}")

    def fingerprint(self) -> dict:
        """What must not differ between the runs that make one folder."""
        values = dataclasses.asdict(self)
        del values["out"], values["processes"]
        for name in ("corpus", "valid_corpus"):
            values[name] = [[str(p), *_size_and_time(p)] for p in values[name]]
        return values


def _keeps_ascii(encoding) -> bool:
    """Whether lines and documents can be told apart before anything is decoded."""
    try:
        return "a \t\n{".encode(encoding) == b"a \t\n{"
    except LookupError:
        return False


def _size_and_time(path):
    try:
        status = os.stat(regular(path))  # it is read by several processes
    except OSError as e:
        raise DataError(f"{path}: cannot be read: {e.strerror or e}") from None
    return status.st_size, status.st_mtime_ns
