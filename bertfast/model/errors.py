"""The one exception of what is read of a checkpoint."""

from collections.abc import Iterator
from contextlib import contextmanager


class CheckpointError(ValueError):
    """A checkpoint that is missing, damaged, unsafe or made for another model: its configuration,
    weights or tokenizer. The message names the file or the value, what was expected, what to do."""


@contextmanager
def unreadable(what: object = "") -> Iterator[None]:
    """Whatever a reader of another library raises, as the one documented kind, in one line, `what`
    before it."""
    try:
        yield
    except (CheckpointError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as e:  # a panic in Rust is no Exception
        text = " ".join(str(e).split())[:1000]
        text = text.encode(errors="backslashreplace").decode()  # lone surrogates of what was read
        if not isinstance(e, ValueError | OSError):  # some say a key alone, or nothing
            text = f"{type(e).__name__}: {text}"
        raise CheckpointError(f"{what}: {text}" if what else text) from None
