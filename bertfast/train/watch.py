"""A run seen from outside: asked to stop, and logged."""

import os
import signal
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..files import json_text


class Stop:
    """SIGTERM as a flag, so that the step under way ends and is saved."""

    def __enter__(self) -> "Stop":
        self.asked = self.at_once = False
        try:
            self.old = signal.signal(signal.SIGTERM, self._ask)
        except ValueError:  # not the main thread: no handler can be set
            self.old = None
        return self

    def _ask(self, *_):
        self.asked = True
        if self.at_once:
            raise StoppedError

    def __exit__(self, *_: object) -> None:
        if self.old is not None:
            signal.signal(signal.SIGTERM, self.old)


class StoppedError(Exception):
    """SIGTERM came where nothing is lost by leaving."""


_TAIL = 2**20  # bytes: longer than any record


class Log:
    """metrics.jsonl and TensorBoard; a resumed run cuts off what came after its checkpoint.

    size: of metrics.jsonl at that checkpoint. warn: hears of records that are missing, and of a
    TensorBoard that fails, which ends no run.
    """

    def __init__(self, out: Path, size: int, on: bool, warn: Callable = print) -> None:
        self.file = self.board = None
        self.warn = warn
        if not on:
            return
        path = out / "metrics.jsonl"
        self.file = open(path, "ab+")  # noqa: SIM115
        end = min(size, self.file.seek(0, os.SEEK_END))
        self.file.seek(max(0, end - _TAIL))
        tail = self.file.read(end - self.file.tell())
        end -= len(tail) - (tail.rfind(b"\n") + 1)
        if end != size:
            warn(f"warning: {path} is not what it was at the checkpoint: records are missing")
        self.file.truncate(end)
        try:
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(str(out / "tensorboard"), flush_secs=30)
        except ImportError:
            pass

    def write(self, **record: Any) -> None:
        if self.file is None:
            return
        self.file.write((json_text(record) + "\n").encode())
        self.file.flush()
        with self._board_may_fail():
            for name, value in record.items() if self.board else ():
                if isinstance(value, float):
                    self.board.add_scalar(name, value, record["step"])

    @contextmanager
    def _board_may_fail(self):
        try:
            yield
        except Exception as e:
            self.board = None
            self.warn(f"warning: TensorBoard stops here: {e}")

    def size(self) -> int:
        if self.file is None:
            return 0
        os.fsync(self.file.fileno())
        return self.file.seek(0, os.SEEK_END)

    def close(self) -> None:
        if self.file:
            self.file.close()
        with self._board_may_fail():
            if self.board:
                self.board.close()


def line(record: dict, steps: int) -> str:
    """A log line for people."""
    left = time.strftime("%H:%M:%S", time.gmtime(record["eta_seconds"]))
    mfu = f", MFU {record['mfu']:.1%}" if "mfu" in record else ""
    losses = "".join(f"{k} {v:.4f}, " for k, v in record.items() if k.endswith("loss"))
    return (
        f"step {record['step']}/{steps}: {losses}lr {record['lr']:.2e}, "
        f"{record['tokens_per_second']:,.0f} tokens/s{mfu}, "
        f"{record['tokens_seen']:,} tokens seen, {left} left"
    )
