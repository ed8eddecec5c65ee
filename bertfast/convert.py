"""Checkpoints of TensorFlow, Flax and Keras as folders that transformers and bertfast load."""

import secrets
import shutil
from collections.abc import Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from .data.errors import ConfigError
from .files import StrPath, check_folder, put, sync
from .model.config import CONFIG
from .model.foreign import classes, names, source, vocabulary, weights, write
from .model.foreign.classes import some
from .model.foreign.stored import FLOATS
from .model.tensors import SAFETENSORS, opened
from .progress import Say

_GELU = (
    "hidden_act gelu is by erf, as in transformers and the first BERT; google-research's code has "
    "the tanh formula since February 2019: for a model trained with that set it to gelu_new in "
    "config.json"
)
_TEXTS = (
    "output_weights is taken for a classifier of texts; one of tokens has the same names: for that "
    "say --architecture BertForTokenClassification"
)


def convert(
    src: StrPath,
    out: StrPath,
    *,
    config: StrPath | None = None,
    vocab: StrPath | None = None,
    lowercase: bool | None = None,
    architecture: str | None = None,
    ignore: Sequence[str] = (),
    say: Say = lambda text: None,
) -> dict:
    """Write a checkpoint of TensorFlow (google-research's BERT), or of transformers' former Flax
    and Keras classes, as model.safetensors, config.json and a tokenizer, without these frameworks.

    Args:
        src: its folder, or its file there; of TensorFlow's also the prefix before .index.
        out: a folder that isn't there, or is empty. It appears whole or not at all.
        config: the configuration's file (default: bert_config.json or config.json beside it).
        vocab: WordPiece's vocabulary (default: the tokenizer's files beside it).
        lowercase: whether the tokenizer lower-cases (default: as the files say, or show).
        architecture: the class, of those that the tensors make (default: the one with every head).
        ignore: names of tensors to leave out; * stands for any letters.
        say: is called with each line of progress.

    Returns: what was written (class, tensors, parameters, dtype), and what was not.

    Raises: ConfigError for an argument; CheckpointError for what is missing, damaged, or has no
    place in the model; OSError. Nothing is written then.
    """
    found = source.find(src)
    out = _check_out(Path(out), found.folder)
    stored = found.read(found.path)
    say(f"{found.path}: a checkpoint of {found.format}, {len(stored)} tensors")
    kept, ignored = names.split(stored, ignore)
    given = weights.renamed(found, stored, kept)
    said, path = weights.values(found, config)
    settings = weights.settings(found, path, said, given)
    known = classes.candidates(settings)
    given = classes.prefixed(known, given)
    chosen = classes.choose(found.path, given, known, architecture, said.get("architectures"))
    classes.check_known(found.path, given, known, settings)
    weights.check_shapes(found, path, settings, chosen, given)

    files = {chosen.own_name(n): given[n] for n in sorted(given) if n in chosen.shapes}
    dtypes = {FLOATS[weight.stored.dtype] for weight in files.values()}
    # Of several, float32 holds every number.
    dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
    settings.architectures, settings.dtype = [chosen.name], str(dtype).removeprefix("torch.")
    count = sum(weight.stored.size for weight in files.values())
    say(f"{chosen.name}: {len(files)} tensors, {count:,} parameters, {settings.dtype}")
    with _whole(out) as folder:
        (folder / CONFIG).write_text(settings.to_json_string(), encoding="utf-8")
        own = found.folder, vocab and Path(vocab)
        tokenizer = vocabulary.write(*own, settings, said, lowercase, folder)
        write.save(folder / SAFETENSORS, files, dtype)
        with opened(folder / SAFETENSORS):
            pass  # the header's sizes must add up to the file's
    left = sorted(weight.own for name, weight in given.items() if name not in chosen.shapes)
    notes = _notes(found, chosen, settings, left, tokenizer, architecture, out)
    for note in notes:
        say(f"note: {note}")
    result = {"source": str(found.path), "format": found.format, "out": str(out)}
    result |= {"class": chosen.name, "tensors": len(files), "parameters": count}
    result |= {"dtype": settings.dtype, "tokenizer": tokenizer, "ignored": ignored}
    return result | {"left_out": left, "notes": notes}


def _notes(found, chosen, settings, left, tokenizer, architecture, out) -> list[str]:
    """What the reader has to know, or to check."""
    google = found.model_type is not None
    texts = chosen.name == "BertForSequenceClassification" and not architecture
    notes = {
        f"a {chosen.name} has no place for {some(left)}": left,
        _GELU: google and settings.hidden_act == "gelu",
        _TEXTS: google and texts,
        f"{found.folder} has no tokenizer's files: put them into {out}": tokenizer is None,
    }
    return [note for note, holds in notes.items() if holds]


def _check_out(out: Path, folder: Path) -> Path:
    out = out.resolve()
    if out == folder.resolve():
        raise ConfigError(f"out is {out}, the folder of the checkpoint itself: give another")
    check_folder(out)
    there = sorted(p.name for p in out.iterdir()) if out.exists() else []
    if there:
        raise ConfigError(f"out is {out}, which holds {some(there)}: give a new folder")
    return out


@contextmanager
def _whole(out: Path):
    """A folder beside `out`, which takes its name at the end, or is removed."""
    folder = out.with_name(f".{out.name}.{secrets.token_hex(4)}.tmp")
    try:
        folder.mkdir(parents=True)
        yield folder
        for path in folder.iterdir():
            sync(path)
        put(folder, out)
    except BaseException as e:
        shutil.rmtree(folder, ignore_errors=True)
        if isinstance(e, OSError):
            raise OSError(f"{out} can't be written: {e}") from None
        raise
