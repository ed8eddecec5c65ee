"""Vectors of the texts of a table of any size: `bertfast embed`."""

import hashlib
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from . import __version__, data
from .data.cells import text
from .data.errors import ConfigError, DataError
from .data.examples import Cells
from .data.vectors import COLUMN, DTYPES, SUFFIXES, Vectors, ranges_file, vectors
from .dropin import accelerate
from .encoder.packed import Freezable
from .files import read_json, sha256
from .freeze import freeze
from .model import checkpoint
from .progress import Progress
from .saved import MANIFEST, load_frozen
from .train.outputs import check_result

KIND = "SentenceTransformer"
PRECISIONS = ("fp32", "bf16", "int8", "auto")
TASKS = {"query": ("query",), "document": ("document", "passage", "corpus")}  # and their prompts
BATCH_TOKENS = {"cpu": 4096, "cuda": 65536}
SYNC = 1.0  # seconds between two times that what is done is made sure of
_TOKENS = 1 << 20  # of a chunk, at most
_LONGEST = 8192  # tokens of a text, where the model says no limit
_LISTS = {"text": {"padding": False}, "common": {"return_tensors": None}}
_UNUSED = {".md", ".onnx", ".h5", ".msgpack", ".ot", ".png"}  # of a model's folder


class Chunk(NamedTuple):
    """Rows of the table, as the model takes them."""

    examples: data.Examples
    ids: list | None
    texts: str  # checksum of all texts and ids up to here
    batches: list


def embed(
    model: str,
    input: str,
    output: str,
    *,
    text_column: str = "text",
    id_column: str | None = None,
    prompt: str | None = None,
    prompt_name: str | None = None,
    task: str | None = None,
    precision: str | None = None,
    dtype: str = "fp32",
    truncate_dim: int | None = None,
    normalize: bool = False,
    batch_tokens: int | None = None,
    device: str | None = None,
    restart: bool = False,
    say=None,
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
    if device is None:
        device = "cuda" if precision is None and torch.cuda.is_available() else "cpu"
    batch_tokens = BATCH_TOKENS[device] if batch_tokens is None else batch_tokens
    settings = {"text_column": text_column, "id_column": id_column, "prompt": prompt}
    settings |= {"prompt_name": prompt_name, "task": task, "precision": precision, "dtype": dtype}
    settings |= {"truncate_dim": truncate_dim, "normalize": normalize, "device": device}
    settings |= {"batch_tokens": batch_tokens}
    _check(path, settings)
    for file in (path, ranges_file(path)):
        check_result(file, input, model)
    folder = checkpoint.resolve(model)
    settings |= {"model": _checksum(folder), "bertfast": __version__}
    with vectors(path, settings, restart) as rows:
        # "auto" goes by times: what it chose for the first rows is taken for the others.
        encoder = Encoder(folder, settings | {"precision": rows.mark["frozen"] or precision})
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
    for file in sorted(p for p in folder.rglob("*") if p.is_file()):
        name = file.relative_to(folder).as_posix()
        if file.suffix not in _UNUSED and not name.startswith((".", "onnx/", "openvino/")):
            digest.update(f"{name} {sha256(file)}\n".encode())
    return digest.hexdigest()[:16]


def load(folder: Path, precision: str | None, device: str):
    """A SentenceTransformer on our kernels."""
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError as e:
        raise ConfigError(f"embed needs sentence-transformers ({e}): pip install it") from e
    about = folder / "config_sentence_transformers.json"
    kind = read_json(about).get("model_type", KIND) if about.is_file() else KIND
    if kind != KIND:
        raise checkpoint.CheckpointError(f"{folder} is a {kind}, expected a {KIND}")
    if any(folder.rglob(MANIFEST)):
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


class Encoder:
    """A SentenceTransformer's `encode` in two halves, which can run at the same time."""

    def __init__(self, folder: Path, settings: dict):
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
    def vectors(self, batches, step) -> np.ndarray:
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
