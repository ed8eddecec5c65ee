"""What a run leaves in its folder: first the model, then what may fail with a warning."""

import os
import shutil
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from torch import nn

from ..files import (
    StrPath,
    check_file,
    check_folder,
    json_text,
    os_errors,
    put,
    read_json,
    sync,
    write_text,
    write_whole,
)
from ..verify import MANIFEST, READ, WEIGHTS
from ..verify import write as write_manifest
from . import card
from .config import ConfigError, RunConfig
from .opening import quiet

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


RUN_CONFIG = "run_config.yaml"
DECISION = "decision.json"  # what a task's outputs are decided by, beside the largest
_READ = {RUN_CONFIG, DECISION, MANIFEST, "README.md", *READ}
_MADE = {RUN_CONFIG, DECISION, "config.json", "generation_config.json", "model.safetensors"}
_MADE |= {"tokenizer.json", "tokenizer_config.json", "metrics.jsonl", "data_report.json"}
_MADE |= {"eval_results.json", "seeds.json", "training_curve.png"}
_MADE |= {"confusion_matrix.csv", "confusion_matrix.png", "scores.png", "score_diffs.png"}
_MADE |= {"entity_f1.png", "entity_scores.png", MANIFEST}
_BEFORE = {RUN_CONFIG, "config.json", "model.safetensors", "tokenizer.json"}  # it is evaluated
_BEFORE |= {"tokenizer_config.json", "metrics.jsonl", "data_report.json"}


def say(text: object) -> None:
    print(text, file=sys.stderr, flush=True)


def check(out: Path, model: str | None, inputs: Iterable[str | None] = ()) -> None:
    """Before a run: OSError where its files can't be written to `out`, ConfigError where one would
    take the place of `model`, of an input, or of what no run made."""
    check_folder(out)
    if model and Path(model).resolve() == out.resolve():
        raise ConfigError(
            f"out is {out}, the folder of the model, whose weights would be lost: give another"
        )
    for path in filter(None, inputs):
        if Path(path).resolve().parent == out.resolve() and Path(path).name in _MADE:
            raise ConfigError(f"{path} is a name of the run's own files in {out}: give another out")
    there = sorted(name for name in _MADE if (out / name).exists())
    if there and RUN_CONFIG not in there:
        raise ConfigError(
            f"out is {out}, which holds {', '.join(there)} but no {RUN_CONFIG}: they are of no run "
            "and would be lost; give another"
        )
    for name in there:
        check_file(out / name)
    for name in ("checkpoints", "tensorboard"):
        check_folder(out / name)


def check_result(path: StrPath | None, *inputs: StrPath) -> None:
    """Before the work whose result goes to the file `path` (None or "-": to stdout): OSError where
    it can't be written, ConfigError where it would take the place of an input, a file or one of
    those that make a model's folder."""
    if path in (None, "-"):
        return
    check_file(path)
    path = Path(path)
    for given in map(Path, inputs):
        own = path.name in _READ or path.suffix in WEIGHTS
        inside = own and given.is_dir() and path.resolve().parent == given.resolve()
        if inside or (given.is_file() and path.is_file() and path.samefile(given)):
            raise ConfigError(f"{path} is read from, and would be overwritten: give another file")


def write_result(path: StrPath, text: str) -> None:
    """Into a file, or to stdout (None, "-"); there too where the file fails, for it took long."""
    try:
        if path not in (None, "-"):
            return write_text(path, text)
    except OSError:
        sys.stdout.write(text)
        raise
    sys.stdout.write(text)


def write_lines(path: StrPath, lines: Iterable[str]) -> None:
    """Lines as they are made, to stdout (None, "-") or into a file: those done are in PATH.partial,
    which takes the place of `path` when all are, and is what an error or a kill leaves."""
    if path in (None, "-"):
        for line in lines:
            print(line, flush=True)
        return
    path = Path(path).resolve()
    partial = path if path.exists() and not path.is_file() else Path(f"{path}.partial")
    count = 0
    try:
        with open(partial, "w", encoding="utf-8", buffering=1) as f:
            for line in lines:
                f.write(line + "\n")
                count += 1
            if partial != path:
                os.fsync(f.fileno())
    except BaseException:
        if partial != path and count:
            say(f"the {count:,} rows that were done are in {partial}")
        raise
    if partial != path:
        put(partial, path)


def save(model: nn.Module, tokenizer: "PreTrainedTokenizerBase", out: Path) -> list[str]:
    """The model and its tokenizer, in place of an older run's and of what that one found; their
    files' names. Raises OSError, which says what is left of the run."""
    try:
        with os_errors(out), TemporaryDirectory(dir=out, prefix=".model") as aside:
            # transformers' own would leave half of a model where it is stopped.
            with quiet():
                model.save_pretrained(aside)
            tokenizer.save_pretrained(aside)
            for name in _MADE - _BEFORE:
                (out / name).unlink(missing_ok=True)
            made = sorted(Path(aside).iterdir())
            for path in made:
                sync(path)
                put(path, out / path.name)
            return [path.name for path in made]
    except OSError as e:
        raise OSError(
            f"the trained model can't be saved in {out} ({e}); its weights are kept in "
            f"{out / 'checkpoints'}: the same command with --resume auto saves it without training"
        ) from e


def finish(out: Path, saved: Iterable[str], inputs: Iterable[Any]) -> None:
    """The manifest, when all else is written. saved: of `save`; inputs: see `verify.entry`."""
    with optional(out / MANIFEST):
        names = {*_MADE, *saved}
        if (out / "README.md").is_file() and card.ours(out / "README.md"):
            names.add("README.md")
        write_manifest(out, names, inputs)


def bring(folder: Path, out: Path) -> None:
    """A run's files, without its checkpoints, card and manifest, into another folder too, in place
    of an older run's."""
    (out / MANIFEST).unlink(missing_ok=True)
    for name in _MADE:
        if not (folder / name).exists():
            (out / name).unlink(missing_ok=True)
    for path in sorted(folder.iterdir(), key=lambda path: path.name != RUN_CONFIG):
        own = path.name.startswith(".") or path.name in ("README.md", MANIFEST)
        if path.is_file() and not own:
            write_whole(out / path.name, lambda aside, path=path: shutil.copyfile(path, aside))


def read_decision(folder: Path) -> dict:
    """What `FinetuneTask.tune` found for the model in a folder; {} of none."""
    path = folder / DECISION
    if not path.is_file():
        return {}
    found = read_json(path)
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds {found!r:.100}, expected names and values in braces")
    return found


@contextmanager
def optional(path: Path) -> Iterator[Path]:
    """Around what is written to `path` after the model: a failure is a warning."""
    try:
        yield path
    except Exception as e:
        say(f"warning: {path} is not written: {type(e).__name__}: {e}; the model is saved")


def write_json(path: Path, value: object) -> None:
    write_text(path, json_text(value, indent=2) + "\n")


def write_yaml(path: Path, config: RunConfig) -> None:
    import yaml

    write_text(path, yaml.safe_dump(config.as_dict(), sort_keys=False))
