"""Vectors on their way to a .npy or .parquet file: what is done is on disk, to go on from."""

import io
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

import numpy as np

from ..files import json_text, locked, put, read_json, write_text, write_whole
from .errors import ConfigError, DataError

DTYPES = {"fp32": np.float32, "fp16": np.float16, "int8": np.int8, "uint8": np.uint8}
DTYPES |= {"binary": np.int8, "ubinary": np.uint8}
SUFFIXES = (".npy", ".parquet")
_RANGED = ("int8", "uint8")  # what they become depends on all rows: these wait in fp32
_HEADER = 128  # bytes before the rows, where a .npy file has its header
_BLOCK = 1 << 25  # bytes of rows that are looked at together at the end
COLUMN = "embedding"  # in Parquet


def ranges_file(output: Path) -> Path:
    """Where the ranges of int8 and uint8 go: fp32 [2, dim], least and largest of each dimension,
    for sentence_transformers' quantize_embeddings(queries, ranges=...)."""
    return output.with_suffix(".ranges.npy")


class Vectors:
    """The rows done, in the folder OUTPUT.partial:

    rows: 128 bytes for a header, then one row after the other, in the dtype asked for, or in fp32
        where that needs all rows' ranges;
    ids.jsonl: their ids, one a line;
    state.json: how many rows of these are surely on disk, `texts`, a checksum of the texts and ids
        that they are of, the precision they were made in where that was to be chosen, and the
        settings they were made with.
    """

    def __init__(self, folder: Path, output: Path, settings: dict) -> None:
        self.folder, self.output, self.settings = folder, output, settings
        self.dtype = settings["dtype"]
        self.stored = np.dtype(np.float32 if self.dtype in _RANGED else DTYPES[self.dtype])
        self.mark = {"done": 0, "width": 0, "ids_size": 0, "texts": None, "frozen": None}
        self.rows = self.ids = None

    @property
    def done(self) -> int:
        return self.mark["done"]

    @property
    def state(self) -> Path:
        return self.folder / "state.json"

    def open(self) -> None:
        """Go on after the rows that `state.json` tells of. ConfigError where they were made with
        other settings."""
        if self.state.exists():
            found = read_json(self.state)
            self._same(found["settings"])
            self.mark = {name: found[name] for name in self.mark}
        rows = _HEADER + self.done * self.mark["width"] * self.stored.itemsize
        self.rows = self._appended("rows", rows)
        self.ids = self._appended("ids.jsonl", self.mark["ids_size"])

    def _appended(self, name, size):
        path = self.folder / name
        if self.done and (not path.exists() or path.stat().st_size < size):
            raise DataError(f"{path} is shorter than {self.state} says: use --restart")
        file = open(path, "ab")  # noqa: SIM115
        file.truncate(size)
        return file

    def _same(self, before: dict) -> None:
        names = [n for n in {**before, **self.settings} if before.get(n) != self.settings.get(n)]
        if names:
            changes = [f"{n} was {before.get(n)!r}, is {self.settings.get(n)!r}" for n in names]
            raise ConfigError(
                f"{self.folder} has rows that were made otherwise ({'; '.join(changes)}): give "
                "the same again to go on, or --restart to drop them"
            )

    def add(self, rows: np.ndarray, ids: list | None, texts: str) -> None:
        """fp32 [n, dim] and their ids; `texts` is the checksum up to them. On disk after `sync`."""
        if self.dtype.endswith("binary"):
            rows = _quantized(rows, self.dtype)
        self.rows.write(rows.astype(self.stored, copy=False).tobytes())
        lines = b"".join(json.dumps(one).encode() + b"\n" for one in ids or ())
        self.ids.write(lines)
        self.mark = self.mark | {  # in one step, for an interrupted run still calls `sync`
            "done": self.done + len(rows),
            "width": rows.shape[1],
            "ids_size": self.mark["ids_size"] + len(lines),
            "texts": texts,
        }

    def sync(self) -> None:
        """What was added stays, whatever happens."""
        for file in (self.rows, self.ids):
            file.flush()
            os.fsync(file.fileno())
        if self.done:
            state = self.mark | {"settings": self.settings}
            write_text(self.state, json_text(state, indent=1) + "\n")

    def close(self) -> None:
        for file in filter(None, (self.rows, self.ids)):
            file.close()

    def finish(self) -> None:
        """Write the output, whole or not at all."""
        self.close()
        ranges = None
        if self.dtype in _RANGED:
            ranges = self._ranges()
            write_whole(ranges_file(self.output), lambda path: _save(path, ranges))
        blocks = lambda: (_quantized(b, self.dtype, ranges) for b in self._blocks())
        if self.output.suffix == ".parquet":
            write_whole(self.output, lambda path: self._parquet(path, blocks()))
        elif ranges is not None:
            write_whole(self.output, lambda path: self._npy(path, blocks()))
        else:
            with open(self.folder / "rows", "r+b") as f:
                f.write(self._header())
                os.fsync(f.fileno())
            put(self.folder / "rows", self.output)

    def _blocks(self) -> Iterator[np.ndarray]:
        """The rows as they are stored, a bounded number at a time."""
        width = self.mark["width"]
        size = max(1, _BLOCK // (width * self.stored.itemsize))
        with open(self.folder / "rows", "rb") as f:
            f.seek(_HEADER)
            for start in range(0, self.done, size):
                count = min(size, self.done - start)
                yield np.fromfile(f, self.stored, count * width).reshape(count, width)

    def _ranges(self) -> np.ndarray:
        if self.done < 2:
            raise DataError(f"{self.dtype} needs the ranges of 2 texts or more: use another dtype")
        least, largest = zip(*((b.min(0), b.max(0)) for b in self._blocks()), strict=True)
        return np.stack([np.min(least, 0), np.max(largest, 0)])

    def _header(self) -> bytes:
        head = {"descr": np.lib.format.dtype_to_descr(np.dtype(DTYPES[self.dtype]))}
        head |= {"fortran_order": False, "shape": (self.done, self.mark["width"])}
        out = io.BytesIO()
        np.lib.format.write_array_header_1_0(out, head)
        assert out.tell() == _HEADER
        return out.getvalue()

    def _npy(self, path, blocks) -> None:
        with open(path, "wb") as f:
            f.write(self._header())
            for block in blocks:
                f.write(block.tobytes())

    def _parquet(self, path, blocks) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        vector = pa.list_(pa.from_numpy_dtype(DTYPES[self.dtype]), self.mark["width"])
        fields, name = {COLUMN: vector}, self.settings["id_column"]
        with open(self.folder / "ids.jsonl", encoding="utf-8") as lines:
            if name is not None:
                number = isinstance(json.loads(lines.readline()), int)
                lines.seek(0)
                fields = {name: pa.int64() if number else pa.string()} | fields
            schema = pa.schema(list(fields.items()))
            with pq.ParquetWriter(path, schema, use_dictionary=False) as writer:
                for block in blocks:
                    columns = {name: list(map(json.loads, islice(lines, len(block))))}
                    flat = pa.array(block.reshape(-1))
                    columns[COLUMN] = pa.FixedSizeListArray.from_arrays(flat, type=vector)
                    writer.write_table(pa.table([columns[f] for f in fields], schema))


def _save(path, array) -> None:
    with open(path, "wb") as f:
        np.save(f, array)


def _quantized(rows, dtype, ranges=None) -> np.ndarray:
    if rows.dtype == DTYPES[dtype]:
        return rows
    from sentence_transformers.util import quantize_embeddings

    return quantize_embeddings(rows, dtype, ranges=ranges)


@contextmanager
def vectors(output: Path, settings: dict, restart: bool = False) -> Iterator[Vectors]:
    """The rows of `output` that are done, for this process alone; `restart` drops them.

    Raises ConfigError where `output` is there, unless `restart`; and where rows that are done were
    made with other settings. Raises BlockingIOError where another run makes them.
    """
    output = output.resolve()
    folder = Path(f"{output}.partial")
    with locked(folder, "--output"):
        found = Vectors(folder, output, settings)
        state, rows = found.state, folder / "rows"
        if restart or (state.exists() and not rows.exists()):
            _clear(folder)  # the latter was killed after its rows had become the output
        try:
            if output.exists() and not restart and not state.exists():
                raise ConfigError(
                    f"{output} is there: give another --output, or --restart to replace it when "
                    "the new one is whole"
                )
            found.open()
            yield found
        except BaseException:
            if not state.exists():
                shutil.rmtree(folder)
            raise
        finally:
            found.close()
        shutil.rmtree(folder)


def _clear(folder: Path) -> None:
    for name in ("state.json", "rows", "ids.jsonl"):  # the state first: it speaks of the others
        (folder / name).unlink(missing_ok=True)
