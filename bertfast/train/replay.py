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

    counts: hits (replays), captures, misses (launched, to be recorded the next time), launched
    (never to be). A recording that fails ends all recording: what runs from then on is launched.
    """

    def __init__(self, device: torch.device, say: Callable):
        self.device, self.say, self.recorder = device, say, graph.recorder(device)
        self.seen: OrderedDict[Hashable, _Seen] = OrderedDict()  # the last used at the end
        self.counts = Counter(hits=0, captures=0, misses=0, launched=0)
        self.pool, self.most = None, self.recorder.memory() // 2

    def run(self, key: Hashable, function: Callable, values: torch.Tensor | None = None) -> None:
        """`function(buffer)`, the buffer holding `values`."""
        if self.recorder is None:
            self.counts["launched"] += 1
            with graph.paused():
                function(None if values is None else values.to(self.device, non_blocking=True))
            return
        one = self.seen.get(key)
        known = one is not None
        if not known:
            self._release(graph.MAX_GRAPHS - 1)
            buffer = None if values is None else torch.empty_like(values, device=self.device)
            one = self.seen[key] = _Seen(buffer)
        self.seen.move_to_end(key)
        if values is not None:  # from pinned memory, which torch gives out again once it is copied
            one.buffer.copy_(values, non_blocking=True)
        if known and one.graph is None:
            self._record(one, function)
        elif known:
            self.counts["hits"] += 1
        if one.graph is not None:
            one.graph.replay()
            return
        self.counts["misses" if self.recorder else "launched"] += 1
        with graph.paused():
            function(one.buffer)

    def _record(self, one: _Seen, function: Callable) -> None:
        self.pool = self.recorder.pool() if self.pool is None else self.pool
        try:
            with graph.paused():
                one.graph = self.recorder(lambda: function(one.buffer), self.pool)
        except RuntimeError as e:  # out of memory, or what can't be recorded
            self.recorder.finish()
            self.recorder = self.pool = None
            self.seen.clear()
            self.say(f"warning: steps are launched from here on, not replayed: {e!s:.200}")
            return
        self.counts["captures"] += 1
        self._release(graph.MAX_GRAPHS, self.most)

    def _release(self, graphs: int, most: int | None = None) -> None:
        """Keep so many, and so many bytes, but always the last."""

        def size():
            return sum(s.graph.bytes for s in self.seen.values() if s.graph is not None)

        while len(self.seen) > max(1, graphs) or (most and len(self.seen) > 1 and size() > most):
            self.recorder.finish()
            self.seen.popitem(last=False)

    def __str__(self):
        c = self.counts
        return (
            f"graphs: {c['hits'] + c['captures']:,} micro-batches and updates replayed, "
            f"{c['captures']} recorded, {c['misses'] + c['launched']:,} launched"
        )
