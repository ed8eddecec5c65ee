"""An encoder's layers as CUDA graphs: a forward is one launch, its backward another.

A graph belongs to a bucket (graph.py) and reads weights, states, offsets and seeds where they are.
What else it bakes in is in its key, or compared at every call. As
`torch.cuda.make_graphed_callables`, but for packed sequences of changing lengths.
"""

import threading
import weakref
from collections import OrderedDict
from contextlib import nullcontext
from operator import attrgetter
from typing import Any, NamedTuple

import torch

from ..ops.library import once, plain
from . import watch
from .batch import Batch
from .graph import (
    MAX_GRAPHS,
    MAX_TOKENS,
    CudaGraph,
    Memory,
    bucket,
    is_paused,
    recorder,
    recording,
    rounded,
    settings,
)
from .recorded import Graph, Key, inputs
from .run import Choice, adapters_limit, forced
from .spec import Layer

LANES = 4  # forwards that may wait for their backward
SHARE = 0.25  # of the device's memory, for all encoders' graphs; a last one may be larger
WORTH = 64  # replays that pay for a recording
_SIGHTS = 1024  # keys that are remembered
_NEVER = 2**62  # calls
_every, _guard = weakref.WeakSet(), threading.Lock()  # `Graphs` of this process
_wanted, _version = attrgetter("requires_grad"), attrgetter("_version")


class Counts(NamedTuple):
    """Of an encoder's calls: replayed; recorded, and then replayed; launched, the first of their
    size. And what the graphs hold."""

    hits: int
    captures: int
    misses: int
    bytes: int


NO_GRAPHS = Counts(0, 0, 0, 0)


class Sight:
    """Of a key: how many calls to launch before it is recorded, and why it can't be."""

    WAIT = 1

    def __init__(self) -> None:
        self.wait, self.next, self.why = self.WAIT, self.WAIT, "the first batch of this size"

    def dropped(self, replays: int) -> None:
        """Its graph went with all others, for a weight that was replaced, say. Where that comes
        often the next one must be worth its recording."""
        self.wait = self.WAIT if replays >= WORTH else self.next
        self.next, self.why = 16 * max(self.wait, 1), "its graph was of a model that has changed"

    def made_room(self) -> None:
        self.wait = max(self.next, 16)
        self.next, self.why = 16 * self.wait, "its graph had to make room"


class Lane:
    """Graphs that share memory, one of which is in use: in training from a forward, which leaves
    its activations there, to its backward."""

    def __init__(self, record: type[CudaGraph]) -> None:
        self.pool, self.turn, self.grown = record.pool(), record.Turn(), 0
        self.graphs: OrderedDict[Key, Graph] = OrderedDict()  # the last used at the end
        self.use = None  # a weakref to the `Use`

    def bytes(self) -> int:
        graphs = [*self.graphs.values()]  # others may add some meanwhile
        shared = {id(t): t.nbytes for graph in graphs for *_, t in graph.groups}
        return self.grown + sum(shared.values()) + sum([graph.nbytes for graph in graphs])

    def free(self) -> bool:
        return self.use is None or self.use() is None


class Use:
    """Of a graph, from a forward to the end of its backward. Autograd holds it."""

    def __init__(self, graph: Graph, lane: Lane, batch: Batch, read: list[torch.Tensor]) -> None:
        self.graph, self.lane, self.read = graph, lane, read
        self.tokens = len(batch.hidden)
        self.bias = None if batch.bias is None else batch.bias.shape
        self.version, self.again = sum(map(_version, read)), False


class Graphs:
    """Of one encoder. A copy or a pickle starts without any."""

    def __init__(self, max_tokens: int = MAX_TOKENS, max_graphs: int = MAX_GRAPHS) -> None:
        self.max_tokens, self.max_graphs = max_tokens, max_graphs
        self.hits = self.captures = self.misses = 0
        self._lock, self._layers, self._memory = threading.RLock(), None, None
        self._sights: OrderedDict[Key, Sight] = OrderedDict()
        self._inference: list[Lane] = []
        self._training: list[Lane] = []
        with _guard:
            _every.add(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Graphs":
        return type(self)(self.max_tokens, self.max_graphs)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.max_tokens, self.max_graphs)

    def __str__(self) -> str:
        n = self.counts()
        return (
            f"{n.hits} calls replayed, {n.captures} recorded, {n.misses} the first of their size; "
            f"{n.bytes / 2**20:.0f} MiB"
        )

    def counts(self) -> Counts:
        held = sum(lane.bytes() for lane in self._lanes())
        return Counts(self.hits, self.captures, self.misses, held)

    def look(self) -> None:
        """After a `model.to(...)`: only where it has moved the weights are the graphs gone."""
        with self._lock:
            if self._memory is not None and not self._memory.there():
                self.release()

    def release(self) -> None:
        """All graphs, and weights that have been replaced since; what waits for its backward holds
        its own."""
        with self._lock:
            replays = {k: 0 for k, sight in self._sights.items() if sight.wait > _NEVER // 2}
            for lane in self._lanes():
                lane.turn.finish()
                for key, graph in lane.graphs.items():
                    replays[key] = replays.get(key, 0) + graph.replays
            self._layers = self._memory = None
            self._inference, self._training = [], []
            for key, count in replays.items():
                self._sight(key).dropped(count)

    def run(self, layers: list[Layer], batch: Batch) -> tuple[torch.Tensor, Choice] | str | None:
        """([tokens or rows, hidden], the `Choice` of who was recorded), or why the layers must be
        launched; None where a device has no graphs."""
        record = recorder(batch.hidden.device)
        if record is None:
            if self._memory is not None:
                self.release()
            return None
        why = self._limit(batch, record) or adapters_limit(layers)
        if why is not None:
            return why
        with self._lock, _device(batch.hidden):
            flat = self._follow(layers)
            key = self._key(batch, flat)
            lane = self._lane(record, key)
            if lane is None:
                return f"{LANES} forwards wait for their backward"
            with lane.turn:
                graph = lane.graphs.get(key)
                if graph is None:
                    graph = self._record(record, lane, key, layers, batch, flat)
                    if isinstance(graph, str):
                        return graph
                else:
                    self.hits, graph.replays = self.hits + 1, graph.replays + 1
                    lane.graphs.move_to_end(key)
                if key.wants is None:
                    return graph.forward(batch), graph.choice
                use = Use(graph, lane, batch, self._read)
                lane.use = weakref.ref(use)
                return _Replayed.apply(use, batch, *inputs(batch), *flat), graph.choice

    def _limit(self, batch, record) -> str | None:
        hidden, bias = batch.hidden, batch.bias
        if batch.captured or is_paused() or record.capturing():
            return "a graph of more than the layers is recorded"
        if not 0 < len(hidden) <= self.max_tokens:
            return f"there are {len(hidden)} tokens, a graph takes 1 to {self.max_tokens}"
        if bias is not None and not (plain(bias) and bias.shape[0] == 1):
            return "the bias on the scores is one of each sequence"
        if batch.even is not None and batch.even.share is None:
            return "there are rows of padding that see all places alike"
        if torch.is_anomaly_enabled():
            return "anomaly detection looks at each gradient"
        if torch._C._autograd._top_saved_tensors_default_hooks(False) is not None:
            return "what backward needs is hooked, as by checkpointing"
        return watch.dispatch_limit(hidden)

    def _follow(self, layers):
        """All parameters. No graph of others or of other settings is left."""
        if layers is not self._layers:
            self._flat = [p for layer in layers for p in layer.weights.present()]
            self._specs = [layer.spec for layer in layers]
            self._dropout = tuple([layer.dropout for layer in layers])
            self._layers = layers
        state, memory = (self._specs, forced(), settings()), self._memory
        if memory is None or state != self._state or not memory.holds(self._flat):
            self.release()
            self._layers, self._state, self._memory = layers, state, Memory(self._flat)
            self._read = [p for p in self._flat if not p.is_inference()]
        return self._flat

    def _key(self, batch, flat) -> Key:
        hidden, bias, rows, relative = batch.hidden, batch.bias, batch.rows, batch.relative
        wants = None
        if torch.is_grad_enabled():
            given = (t is not None and t.requires_grad for t in inputs(batch))
            wants = (*given, *map(_wanted, flat))
        even = batch.even is not None
        more = rows is not None or even  # one more token, for rows that nobody wants to be of
        return Key(
            bucket(len(hidden) + more, len(batch.cu_seqlens) - 1 + more, int(batch.longest)),
            None if rows is None else rounded(len(rows)),
            hidden.dtype,
            batch.seqused_k is not None,
            None if bias is None else (bias.shape[1], bias.dtype),
            tuple([(t.shape[1:], t.dtype) for t in batch.angles]),
            None if relative is None else (relative.embeddings.shape, relative.embeddings.dtype),
            even,
            self._dropout,
            wants if wants and any(wants) else None,
        )

    def _lane(self, record, key) -> Lane | None:
        lanes = self._inference if key.wants is None else self._training
        free = [lane for lane in lanes if lane.free()]
        if not free and len(lanes) < LANES:
            free = [Lane(record)]
            lanes += free
        return next((lane for lane in free if key in lane.graphs), free[0] if free else None)

    def _lanes(self):
        return [*self._inference, *self._training]

    def _sight(self, key) -> Sight:
        sight = self._sights.setdefault(key, Sight())
        self._sights.move_to_end(key)
        if len(self._sights) > _SIGHTS:
            self._sights.popitem(last=False)
        return sight

    def _record(self, record, lane, key, layers, batch, flat):
        """A `Graph` in the lane, or why not."""
        sight = self._sight(key)
        if sight.wait:
            sight.wait -= 1
            self.misses += 1
            # What is launched needs memory, too: here not even the last graph is kept.
            if self.counts().bytes > SHARE * record.memory():
                self._make_room(record, self.max_graphs, SHARE * record.memory())
            return sight.why
        if not recording.acquire(blocking=False):
            return "another thread records"
        try:
            graph = Graph(record, lane, key, layers, batch, flat)
        except RuntimeError as e:
            sight.wait, sight.why = _NEVER, f"recording failed: {str(e).splitlines()[0]}"
            if not lane.graphs:
                self._drop(lane)
            if torch.OutOfMemoryError in (type(e), type(e.__context__)):
                self._make_room(record, 0, -1)
                record.empty()
            return sight.why
        finally:
            recording.release()
        self.captures += 1
        lane.graphs[key], lane.grown = graph, lane.grown + graph.grown
        self._make_room(record, self.max_graphs, SHARE * record.memory(), lane)
        return graph

    def _make_room(self, record, graphs, size, own=None):
        """Drops graphs of free lanes beyond so many or so many bytes; of its own lane last, and
        not the one used last."""
        for lane in sorted([x for x in self._lanes() if x.free()], key=lambda x: x is own):
            while len(lane.graphs) > (lane is own):
                count = sum(len(x.graphs) for x in self._lanes())
                if count <= graphs and _held() <= size:
                    return
                lane.turn.finish()  # it may still run
                self._sight(lane.graphs.popitem(last=False)[0]).made_room()
            if lane is not own:
                self._drop(lane)

    def _drop(self, lane):
        """With its pool: torch gives none to a graph anew once all graphs in it are gone."""
        for lanes in (self._inference, self._training):
            lanes[:] = [x for x in lanes if x is not lane]


def _held() -> int:
    """Bytes of all encoders' graphs."""
    with _guard:
        every = [*_every]
    return sum([graphs.counts().bytes for graphs in every])


def _device(hidden):
    if not hidden.is_cuda or hidden.get_device() == torch._C._cuda_getDevice():
        return nullcontext()
    return torch.cuda.device_of(hidden)


class _Replayed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, use, batch, *inputs_and_parameters):
        ctx.use = use
        ctx.save_for_backward(batch.cu_seqlens)  # torch then says so where there is no graph left
        return use.graph.forward(batch)

    @staticmethod
    def backward(ctx, grad):
        return _backward(ctx, grad)


def _gradients(ctx, grad):
    _, use = ctx.saved_tensors, ctx.use
    if sum(map(_version, use.read)) != use.version:
        raise RuntimeError(
            "a parameter of an encoder's layers was changed in place between a forward and its "
            "backward, which needs it as it was"
        )
    with use.lane.turn:
        found = use.graph.backward(use, grad)
    if not torch._C._autograd._get_current_graph_task_keep_graph():
        ctx.use = None  # a loss that is kept keeps no memory of graphs
    return None, None, *found


_backward = once("encoder", _gradients)
