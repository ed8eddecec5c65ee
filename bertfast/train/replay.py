"""Graphs of a training run: micro-batches by their layout, and the update, each launched the first
time, recorded the second and replayed from then on."""

from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable

import torch

from ..encoder import graph


class _Seen:
    """What was run once: the buffer that it reads, and its graph once it was run again."""

    def __init__(self, buffer):
        self.buffer, self.graph = buffer, None


class Replay:
    """`run(key, function)` for functions that launch the same for the same key.

    Args:
        device: where the buffers are; one that has a recorder.
        say: hears why nothing is recorded any more.

    counts: hits (replays), captures (recorded, then replayed), misses (launched, to be recorded the
    next time), launched (never to be). A recording that fails ends all recording: what runs from
    then on is launched.
    """

    def __init__(self, device: torch.device, say: Callable) -> None:
        self.device, self.say, self.recorder = device, say, graph.recorder(device)
        self.counts = Counter(hits=0, captures=0, misses=0, launched=0)
        self.turn = self.recorder.Turn()
        self.seen: OrderedDict[Hashable, _Seen] = OrderedDict()  # the last used at the end
        self.pool, self.bytes = self.recorder.pool(), 0

    def run(self, key: Hashable, function: Callable, values: torch.Tensor | None = None) -> None:
        """`function(buffer)`, the buffer holding `values`."""
        one, known = self.seen.get(key), key in self.seen
        if not known:
            one = self._first(key, values)
        if values is not None:  # from pinned memory, which torch gives out again once it is copied
            one.buffer.copy_(values, non_blocking=True)
        if known and one.graph is None and self.recorder is not None:
            self._record(key, one, function)
        elif known:
            self.seen.move_to_end(key)
            self.counts["hits"] += one.graph is not None
        if one.graph is not None:
            with self.turn:
                one.graph.replay()
            return
        self.counts["launched" if self.recorder is None else "misses"] += 1
        with graph.paused():
            function(one.buffer)

    def _first(self, key, values) -> _Seen:
        one = _Seen(None if values is None else torch.empty_like(values, device=self.device))
        if self.recorder is not None:
            while len(self.seen) >= graph.MAX_GRAPHS:
                self.turn.finish()  # it may still run
                self.seen.popitem(last=False)
            self.seen[key] = one
        return one

    def _record(self, key: Hashable, one: _Seen, function: Callable) -> None:
        if self.bytes > self.recorder.memory() // 2:  # of a pool, which is given back as a whole
            self._forget()
        self.seen[key] = one
        self.seen.move_to_end(key)
        try:
            with graph.paused(), graph.recording:
                one.graph = self.recorder(lambda: function(one.buffer), self.pool)
        except RuntimeError as e:  # out of memory, or what can't be recorded
            self.stop(f"{e!s:.200}")
            return
        self.counts["captures"] += 1
        self.bytes += one.graph.bytes

    def _forget(self) -> None:
        self.turn.finish()
        self.seen.clear()
        self.pool, self.bytes = self.recorder.pool(), 0
        self.recorder.empty()

    def stop(self, why: str) -> None:
        """No more recordings, for a reason that is said once."""
        if self.recorder is not None:
            self._forget()
            self.recorder = None
            self.say(f"warning: steps are launched, not replayed: {why}")

    def __str__(self) -> str:
        c = self.counts
        return (
            f"graphs: {c['hits'] + c['captures']:,} micro-batches and updates replayed, "
            f"{c['captures']} recorded, {c['misses'] + c['launched']:,} launched"
        )
