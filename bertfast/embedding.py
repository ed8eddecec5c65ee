"""Vectors of the texts of a table of any size: `bertfast embed`."""

import hashlib
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeAlias

import numpy as np
import torch

from . import __version__, data
from .data.cells import text
from .data.errors import ConfigError, DataError
from .data.examples import Cells
from .data.vectors import COLUMN, DTYPES, SUFFIXES, Vectors, ranges_file, vectors
from .encoder import packed
from .files import StrPath, sha256
from .model import checkpoint
from .progress import Progress, Say
from .saved import is_frozen
from .text_encoder import TASKS, TextEncoder
from .train.outputs import check_result

if TYPE_CHECKING:
    from .encoder.packed import Precision

Dtype: TypeAlias = Literal["fp32", "fp16", "int8", "uint8", "binary", "ubinary"]
PRECISIONS = (*packed.PRECISIONS, "auto")
BATCH_TOKENS = {"cpu": 4096, "cuda": 65536}
SYNC = 1.0  # seconds between two times that what is done is made sure of
_MODEL = {".json", ".txt", ".model", ".safetensors", ".bin"}  # suffixes of its files


class Chunk(NamedTuple):
    """Rows of the table, as the model takes them."""

    examples: data.Examples
    ids: list | None
    texts: str  # checksum of all texts and ids up to here
    batches: list


def embed(
    model: StrPath,
    input: StrPath,
    output: StrPath,
    *,
    text_column: str = "text",
    id_column: str | None = None,
    prompt: str | None = None,
    prompt_name: str | None = None,
    task: Literal["query", "document"] | None = None,
    precision: "Precision | None" = None,
    dtype: Dtype = "fp32",
    truncate_dim: int | None = None,
    normalize: bool = False,
    batch_tokens: int | None = None,
    device: str | None = None,
    restart: bool = False,
    say: Say | None = None,
) -> dict:
    """Write the embeddings of a table's texts, one row a text, as sentence-transformers' `encode`
    gives them: prompts, pooling and normalisation are those of the model's configuration.

    Args:
        model: a folder or hub name of sentence-transformers, or a transformers checkpoint, which
            gets a mean pooling.
        input: as `data.read_table` reads it, "-" for JSON lines on standard input; it is read in
            chunks. An empty text is a text; one that is missing is refused.
        output: a .npy file, [texts, dim], or .parquet, with a column "embedding".
        text_column: of the texts.
        id_column: of texts or whole numbers, that a .parquet output keeps.
        prompt: what stands before each text; else the model's of this `prompt_name`; else its
            default.
        task: "query" or "document": as `encode_query` and `encode_document`, with their prompts.
        precision: None, or what `bertfast.freeze` takes, on a CPU unless `device` is given.
        dtype: "fp32", "fp16", or as sentence-transformers' `quantize_embeddings` has them, of all
            embeddings: "int8" and "uint8", whose ranges go into OUTPUT's name with .ranges.npy, for
            queries; "binary" and "ubinary", eight dimensions a byte.
        truncate_dim: the first dimensions alone; None is the model's own.
        normalize: to length 1, after that.
        batch_tokens: tokens in a batch, padding not counted; None for 4096, on a GPU 65536.
        device: "cpu" or "cuda"; None takes a GPU where there is one.
        restart: drop what an earlier run did, and replace an output that is there.
        say: called with a line of progress, now and then.

    What is done is kept in the folder OUTPUT.partial until OUTPUT is whole: a run that was killed
    goes on when called again with the same settings, and the output is that of an unbroken run, to
    the byte (of `device` "cpu").

    Returns: {"output", "shape", "dtype", "texts_per_second"}, the last of this run.

    Raises: ConfigError, also where rows that are done were made with other settings, DataError,
    model.CheckpointError, OSError.
    """
    path = Path(output)
    settings = {"text_column": text_column, "id_column": id_column, "prompt": prompt}
    settings |= {"prompt_name": prompt_name, "task": task, "precision": precision, "dtype": dtype}
    settings |= {"truncate_dim": truncate_dim, "normalize": normalize, "batch_tokens": batch_tokens}
    _check(path, settings)
    for file in (path, ranges_file(path)):
        check_result(file, input, model)
    folder = checkpoint.resolve(model)
    if device is None:
        packed = precision is not None or is_frozen(folder)
        device = "cuda" if not packed and torch.cuda.is_available() else "cpu"
    settings |= {"model": _checksum(folder), "bertfast": __version__, "device": device}
    settings["batch_tokens"] = batch_tokens or BATCH_TOKENS[device]
    with vectors(path, settings, restart) as rows:
        # "auto" goes by times: what it chose for the first rows is taken for the others.
        encoder = TextEncoder(folder, settings | {"precision": rows.mark["frozen"] or precision})
        rows.mark["frozen"] = encoder.frozen
        progress = Progress(say, rows.done)
        _run(encoder, rows, input, settings, progress)
        rows.finish()
    if say:
        say(f"{progress}: {path}")
    found = {"output": str(path), "shape": [rows.done, rows.mark["width"]], "dtype": dtype}
    return found | {"texts_per_second": round(progress.rate(), 1)}


def _check(path: Path, settings: dict) -> None:
    """Raises ConfigError."""
    if path.suffix not in SUFFIXES:
        raise ConfigError(f"output is {str(path)!r}, expected a name in {' or '.join(SUFFIXES)}")
    known = {"task": (None, *TASKS), "precision": (None, *PRECISIONS), "dtype": tuple(DTYPES)}
    for name, values in known.items():
        if settings[name] not in values:
            expected = ", ".join(v for v in values if v)
            raise ConfigError(f"{name} is {settings[name]!r}, expected one of {expected}")
    for name in ("batch_tokens", "truncate_dim"):
        if settings[name] is not None and settings[name] < 1:
            raise ConfigError(f"{name} is {settings[name]}, expected 1 or more")
    if settings["prompt"] is not None and settings["prompt_name"] is not None:
        raise ConfigError("prompt and prompt_name are given: drop one")
    if settings["id_column"] is not None and path.suffix != ".parquet":
        raise ConfigError(f"id_column needs an output in .parquet, which keeps it; it is {path}")
    if settings["id_column"] == COLUMN:
        raise ConfigError(f"id_column is {COLUMN!r}, the vectors' own: rename it in the input")


def _checksum(folder: Path) -> str:
    """Of all in a model's folder that could change its embeddings."""
    digest = hashlib.sha256()
    for file in sorted(p for p in folder.rglob("*") if p.suffix in _MODEL and p.is_file()):
        name = file.relative_to(folder).as_posix()
        if not name.startswith((".", "onnx/", "openvino/")) and ".partial/" not in name:
            digest.update(f"{name} {sha256(file)}\n".encode())
    return digest.hexdigest()[:16]


def _chunks(encoder, rows: Vectors, path, text_column, id_column) -> Iterator[Chunk]:
    """The chunks that are not done yet, once those that are have been seen to be the same."""
    done, expected, digest, last = rows.done, rows.mark["texts"], hashlib.sha256(), 0
    changed = ConfigError(
        f"{path} is not what the {done:,} rows in {rows.folder} were made of: give that again to "
        "go on, or --restart to drop them"
    )
    columns = [c for c in (text_column, id_column) if c is not None]
    kind = None
    for table in data.read_chunks(path, columns, rows=encoder.chunk):
        cells = Cells(path, table)
        texts = cells.parse(text_column, lambda value: text(value, clean=False, needed=False))
        ids = None
        if id_column is not None:
            kind = kind or type(table[id_column][0])
            ids = cells.parse(id_column, lambda value: _id(value, kind))
        digest.update(json.dumps([texts, ids]).encode())
        last = cells.rows[-1]
        if last > done:
            if cells.rows[0] <= done:
                raise changed
            examples = data.Examples(
                texts, rows=cells.rows, lines=cells.lines, path=cells.name, share=table.share
            )
            yield Chunk(examples, ids, digest.hexdigest(), encoder.batches(texts))
        elif last == done and digest.hexdigest() != expected:
            raise changed
    if last < done:
        raise changed


def _id(value, kind):
    if type(value) not in (int, str) or (type(value) is int and abs(value) >= 1 << 63):
        raise ValueError(f"is {value!r:.80}; expected text or a whole number of 64 bits")
    if type(value) is not kind:
        raise ValueError(f"is {value!r:.80}, the first row's is of another type: make all text")
    return value


def _run(encoder, rows: Vectors, path, settings, progress) -> None:
    """Adds the rows that are not done."""
    columns = settings["text_column"], settings["id_column"]
    synced = time.monotonic()
    try:
        for examples, ids, texts, batches in data.ahead(_chunks(encoder, rows, path, *columns)):
            found = encoder.vectors(batches, lambda n: progress.step(n, examples.total))
            _finite(found, examples, settings["dtype"])
            rows.add(found, ids, texts)
            if time.monotonic() - synced >= SYNC:
                rows.sync()
                synced = time.monotonic()
    finally:
        rows.sync()


def _finite(found, examples, dtype) -> None:
    limit = np.finfo(DTYPES["fp16"] if dtype == "fp16" else np.float32).max
    bad = np.flatnonzero(~(np.abs(found) <= limit).all(1))
    if len(bad):
        raise DataError(
            f"{examples.place(bad[0])}: its embedding has numbers that are not finite in {dtype}: "
            "look for NaN in the model's weights, or use fp32"
        )
