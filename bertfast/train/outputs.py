"""What a run leaves in its folder: first the model, then what may fail with a warning."""

import json
import sys
from contextlib import contextmanager
from pathlib import Path

from ..files import check_folder, os_errors, write_text
from .config import ConfigError


def say(text):
    print(text, file=sys.stderr, flush=True)


def check(out: Path, model: str | None) -> None:
    """Before a run: OSError where `out` can't be written, ConfigError where it is `model`."""
    check_folder(out)
    if model and Path(model).resolve() == out.resolve():
        raise ConfigError(
            f"out is {out}, the folder of the model, whose weights would be lost: give another"
        )


def save(model, tokenizer, out: Path) -> None:
    """The model and its tokenizer. Raises OSError, which says what is left of the run."""
    try:
        with os_errors(out):
            model.save_pretrained(out)
            tokenizer.save_pretrained(out)
    except OSError as e:
        raise OSError(
            f"the trained model can't be saved in {out} ({e}); its weights are kept in "
            f"{out / 'checkpoints'}: the same command with --resume auto saves it without training"
        ) from e


@contextmanager
def optional(path: Path):
    """Around what is written to `path` after the model: a failure is a warning."""
    try:
        yield path
    except Exception as e:
        say(f"warning: {path} is not written: {type(e).__name__}: {e}; the model is saved")


def write_json(path: Path, value) -> None:
    write_text(path, json.dumps(value, indent=2) + "\n")


def write_yaml(path: Path, config) -> None:
    import yaml

    write_text(path, yaml.safe_dump(config.as_dict(), sort_keys=False))
