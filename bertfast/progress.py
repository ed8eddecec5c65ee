"""How far a long run is."""

import time
from collections.abc import Callable
from datetime import timedelta
from typing import TypeAlias

Say: TypeAlias = Callable[[str], object]  # is told a line


class Progress:
    """Says now and then how many texts are done, how many a second, and how long the rest takes.

    Args:
        say: called with the line; None for silence.
        done: texts that an earlier run did.
    """

    EVERY = 5.0  # seconds

    def __init__(self, say: Say | None, done: int = 0) -> None:
        self.say, self.done, self.before = say, done, done
        self.start = self.said = time.monotonic()

    def step(self, texts: int, total: float | None = None) -> None:
        """`texts` more are done, of about `total`, where that is known."""
        self.done += texts
        now = time.monotonic()
        if self.say and now - self.said >= self.EVERY:
            self.said = now
            left = ""
            if total is not None:
                seconds = round(max(0.0, total - self.done) / self.rate())
                left = f", {timedelta(seconds=seconds)} left"
            self.say(f"{self}{left}")

    def rate(self) -> float:
        """Texts a second of this run."""
        return max(self.done - self.before, 1) / max(time.monotonic() - self.start, 1e-9)

    def __str__(self) -> str:
        return f"{self.done:,} texts, {self.rate():,.0f} texts/s"
