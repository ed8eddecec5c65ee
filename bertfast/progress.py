"""How far a long run is."""

import time
from datetime import timedelta


class Progress:
    """Says now and then how many texts are done, how many a second, and how long the rest takes.

    Args:
        say: called with the line; None for silence.
        done: texts that an earlier run did.
    """

    EVERY = 5.0  # seconds

    def __init__(self, say, done: int = 0):
        self.say, self.done, self.before = say, done, done
        self.start = self.said = time.monotonic()
        self.share = None  # of the input, when the first texts of this run were done

    def step(self, texts: int, share: float | None = None) -> None:
        """`texts` more are done, and `share` of the input, where that is known."""
        self.done += texts
        if share is not None and self.share is None:
            self.share = share, time.monotonic()
        now = time.monotonic()
        if self.say and now - self.said >= self.EVERY:
            self.said = now
            self.say(f"{self}{self._left(share, now)}")

    def rate(self) -> float:
        """Texts a second of this run."""
        return (self.done - self.before) / max(time.monotonic() - self.start, 1e-9)

    def __str__(self):
        return f"{self.done:,} texts, {self.rate():,.0f} texts/s"

    def _left(self, share, now) -> str:
        first, then = self.share or (None, now)
        if share is None or share <= first:
            return ""
        seconds = (now - then) * (1 - share) / (share - first)
        return f", {timedelta(seconds=round(seconds))} left"
