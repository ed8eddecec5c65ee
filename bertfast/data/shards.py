"""Token shards on disk: memory-mapped arrays, an index with checksums, read back shard by shard.

A folder holds tokenizer/, index.json and, for each shard, three .npy files: NAME.tokens (uint16,
or uint32 for large vocabularies), NAME.sentences (int64 offsets into tokens) and NAME.documents
(int64 offsets into sentences). Offsets end with the total.
"""

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..files import StrPath, read_json, sha256, write_whole
from .errors import DataError

INDEX = "index.json"
FORMAT = 1
PARTS = ("train", "valid")


class Shard(NamedTuple):
    tokens: np.ndarray  # [tokens]
    sentences: np.ndarray  # int64 [sentences + 1], offsets into tokens
    documents: np.ndarray  # int64 [documents + 1], offsets into sentences


def token_dtype(vocab_size: int) -> type[np.unsignedinteger]:
    return np.uint16 if vocab_size <= 2**16 else np.uint32


def write_shard(folder: Path, name: str, shard: Shard) -> dict:
    """Write one shard, each file whole or not at all; its entry in the index."""
    sums = {}
    for field, values in shard._asdict().items():
        path = folder / f"{name}.{field}.npy"

        def write(temporary, values=values):
            with open(temporary, "wb") as f:
                np.save(f, values)

        write_whole(path, write)
        sums[path.name] = sha256(path)
    sizes = {"tokens": len(shard.tokens), "sentences": len(shard.sentences) - 1}
    return {"name": name, **sizes, "documents": len(shard.documents) - 1, "sha256": sums}


def write_json(path: Path, value: object) -> None:
    write_whole(path, lambda p: Path(p).write_text(json.dumps(value, indent=1) + "\n"))


class Shards:
    """The shards of one part ("train" or "valid") of a prepared folder."""

    def __init__(self, folder: StrPath, part: str) -> None:
        self.folder, self.part = Path(folder), part
        self.index = read_index(folder)
        self.entries = self.index["shards"][part]
        self._checked = set()

    def __len__(self) -> int:
        return len(self.entries)

    @property
    def tokens(self) -> int:
        return sum(e["tokens"] for e in self.entries)

    def load(self, i: int) -> Shard:
        """Shard i, memory-mapped; its checksums are verified the first time."""
        entry = self.entries[i]
        if i not in self._checked:
            verify(self.folder, entry)
            self._checked.add(i)
        files = (self.folder / f"{entry['name']}.{field}.npy" for field in Shard._fields)
        return Shard(*(np.load(path, mmap_mode="r") for path in files))


def read_index(folder: StrPath) -> dict:
    """index.json of a prepared folder. Raises DataError."""
    path = Path(folder) / INDEX
    try:
        index = read_json(path)
    except FileNotFoundError:
        raise DataError(f"{path} is not there: make the folder with `bertfast prepare`") from None
    except (OSError, ValueError) as e:
        raise DataError(f"{path} can't be read: {e}") from None
    found = index.get("format") if isinstance(index, dict) else index
    if found != FORMAT:
        raise DataError(f"{path} has format {found!r:.80}, expected {FORMAT}")
    return index


def verify(folder: StrPath, entry: dict) -> None:
    """Check a shard's files against the index. Raises DataError naming the file."""
    for name, expected in entry["sha256"].items():
        path = Path(folder) / name
        if not path.is_file():
            raise DataError(f"{path} is not there; run `bertfast prepare` again")
        if sha256(path) != expected:
            raise DataError(f"{path} does not match its checksum; run `bertfast prepare` again")
