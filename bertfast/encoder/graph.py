"""CUDA graphs: a function's launches recorded once and replayed as one, and the sizes of batches
that they are recorded for.

A graph repeats its kernels with the same pointers, sizes and numbers. So a batch runs in the
smallest `Bucket` that holds it: its packed tokens, its sequences and its longest one rounded up,
the rest filled with sequences of padding, in buffers that stay.
"""

import operator
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from operator import attrgetter
from typing import Any, NamedTuple

import torch

from ..ops import registry

_pointer, _stride = torch.Tensor.data_ptr, torch.Tensor.stride
_layout = attrgetter("dtype", "shape")
MAX_TOKENS = 32768  # launches of a larger batch are hidden behind its work
MAX_GRAPHS = 64
_thread = threading.local()


class Bucket(NamedTuple):
    """Sizes that a graph bakes in."""

    tokens: int
    sequences: int
    longest: int


def bucket(tokens: int, sequences: int, longest: int) -> Bucket:
    """The sizes that a batch of these runs with: at most an eighth more tokens (and 15).

    Padding tokens form sequences of their own, of at most `longest`, so that every token is in one.
    """
    padded = rounded(tokens)
    longest = next((n for n in (16, 32) if longest <= n), -(-longest // 64) * 64)
    sequences += -(-(padded - tokens) // longest)
    return Bucket(padded, 1 << (sequences - 1).bit_length(), longest)


def rounded(n: int) -> int:
    """At most an eighth more, and 15."""
    step = max(16, 1 << max(n.bit_length() - 4, 0))
    return -(-n // step) * step


def _side():
    """The thread's stream to warm up and record on, of the current device (torch's own is of the
    device that recorded first). One: cuBLAS keeps a workspace for each that it ever ran on."""
    streams, device = vars(_thread).setdefault("streams", {}), torch.cuda.current_device()
    if device not in streams:
        streams[device] = torch.cuda.Stream()
    return streams[device]


class CudaGraph:
    """What `function()` launches, recorded on the current device, whose memory is `pool`'s.

    result: what it returned, in memory that a replay writes anew. bytes: by how much the pool grew.
    """

    def __init__(self, function: Callable, pool: Any) -> None:
        graph, stream, device = torch.cuda.CUDAGraph(), _side(), torch.cuda.current_device()
        # thread_local: other threads may allocate meanwhile, as those that pin memory do.
        options = dict(pool=pool, stream=stream, capture_error_mode="thread_local")
        try:
            # Where a recording can't end, torch leaves its stream on: the outer block takes it off.
            with torch.cuda.stream(stream), torch.cuda.graph(graph, **options):
                before = torch.cuda.memory_reserved()
                self.result = function()
        except RuntimeError:
            with suppress(RuntimeError):  # and its allocator would give from the pool ever after
                torch._C._cuda_endAllocateToPool(device, pool)
                torch._C._cuda_releasePool(device, pool)
            raise
        self.bytes, self.replay = torch.cuda.memory_reserved() - before, graph.replay

    @staticmethod
    def pool() -> Any:
        """Memory for graphs of which one runs at a time: what none gives out they share."""
        return torch.cuda.graph_pool_handle()

    @staticmethod
    def warm_up(function: Callable) -> None:
        """Compiles kernels and sets libraries up, neither of which may happen in a recording."""
        stream, current = _side(), torch.cuda.current_stream()
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            for _ in range(2):
                function()
        current.wait_stream(stream)

    @staticmethod
    def capturing() -> bool:
        return torch.cuda.is_current_stream_capturing()

    @staticmethod
    def memory() -> int:
        """Bytes of the current device."""
        return torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory

    @staticmethod
    def empty() -> None:
        """Gives memory that nothing uses back to the device."""
        torch.cuda.empty_cache()

    class Turn:
        """`with turn:` around each use of memory that graphs share: on whatever streams, one waits
        for the one before."""

        def __init__(self) -> None:
            self.stream, self.done = None, torch.cuda.Event()

        def __enter__(self) -> None:
            current = torch.cuda.current_stream()
            if self.stream not in (None, current):
                current.wait_event(self.done)
            self.stream = current

        def __exit__(self, *_: object) -> None:
            self.done.record(self.stream)

        def finish(self) -> None:
            """Waits for the last use."""
            if self.stream is not None:
                self.stream.synchronize()


@contextmanager
def uncached() -> Iterator[None]:
    """A block to record in: autocast keeps no copy of a weight, which a replay would find as it was
    or gone."""
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)


def settings() -> tuple:
    """Of torch and of ours, what decides over the kernels that a recording holds."""
    matmul = torch.backends.cuda.matmul
    return (
        registry.forced(),
        torch.are_deterministic_algorithms_enabled(),
        matmul.fp32_precision,
        matmul.allow_bf16_reduced_precision_reduction,
        matmul.allow_fp16_reduced_precision_reduction,
    )


class Memory:
    """Where tensors lie, and how. While this is kept nothing else gets their memory."""

    def __init__(self, tensors: list[torch.Tensor]) -> None:
        self.tensors, self.matrices = tensors, [t for t in tensors if t.dim() > 1]
        self.kept = [t.detach() for t in tensors]
        self.pointers, self.forms = [*map(_pointer, tensors)], self._forms()

    def _forms(self):
        return [*map(_stride, self.tensors)], [*map(_layout, self.matrices)]

    def there(self) -> bool:
        """Whether the tensors are where they were, so that what was recorded can read them."""
        return self.pointers == [*map(_pointer, self.tensors)]

    def formed(self) -> bool:
        """Whether they have the strides, dtypes and shapes that they had."""
        return self.forms == self._forms()

    def holds(self, tensors: list[torch.Tensor]) -> bool:
        """Whether these are the tensors, where and as they were."""
        mine = tensors is self.tensors or all(map(operator.is_, tensors, self.tensors))
        return mine and self.there() and self.formed()


RECORDERS = {"cuda": CudaGraph}  # by type of device; on others everything is launched
# Held by who records: another thread that did so, and waits for the device, would break both.
recording = threading.Lock()


def recorder(device: torch.device) -> type[CudaGraph] | None:
    """Of the device's type, or None where there is none or `BERTFAST_GRAPHS` is 0."""
    return None if os.environ.get("BERTFAST_GRAPHS") == "0" else RECORDERS.get(device.type)


@contextmanager
def paused() -> Iterator[None]:
    """A block in which encoders launch, in this thread: whoever calls them records more."""
    before, _thread.paused = is_paused(), True
    try:
        yield
    finally:
        _thread.paused = before


def is_paused() -> bool:
    return getattr(_thread, "paused", False)
