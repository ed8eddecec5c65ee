"""CUDA graphs without a GPU: what a function calls, recorded once and called again with the same
tensors and numbers, into the same memory.

As a graph's: a recording changes nothing, a number that was read on the host is baked in, waiting
for the device is an error, memory that graphs of a pool share holds nothing once another has run.
"""

import weakref
from contextlib import nullcontext

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_aten = torch.ops.aten
_WAITS = {_aten._local_scalar_dense, _aten.nonzero, _aten.masked_select, _aten.unique_dim}
_WAITS |= {_aten._unique2, _aten.is_nonzero, _aten.equal}


def _tensors(tree):
    return [t for t in tree_leaves(tree) if isinstance(t, torch.Tensor)]


def _pointers(tree):
    return [(t.untyped_storage().data_ptr(), t) for t in _tensors(tree)]


def _written(func, args, kwargs):
    """Those of the arguments that the operator writes to."""
    given = zip(func._schema.arguments, args, strict=False)
    named = [(a, kwargs[a.name]) for a in func._schema.arguments if a.name in kwargs]
    return [v for a, v in [*given, *named] if a.alias_info is not None and a.alias_info.is_write]


def _poison(t):
    if t.numel() and not t.is_inference():
        t.detach().fill_(float("nan") if t.is_floating_point() else -(10**6))


class Pool:
    """What tapes share. As torch's, it can't be used again once all of them are gone."""

    def __init__(self):
        self.tapes, self.used = weakref.WeakSet(), False

    def add(self, tape):
        if self.used and not self.tapes:
            raise RuntimeError("a pool whose graphs are gone was given to another")
        self.used = True
        self.tapes.add(tape)


class Tape(TorchDispatchMode):
    """`graph.CudaGraph`, on a CPU. limit: bytes that the tapes of a process may take."""

    limit, _on = None, False

    def __init__(self, function, pool):
        super().__init__()
        pool.add(self)
        self.calls, self.pool, self.new, self.before = [], pool, set(), {}
        self.inner, self.read = {}, set()
        random, Tape._on = torch.get_rng_state(), True
        try:
            with self:
                self.result = function()
        finally:
            Tape._on = False
            for storage, value in self.before.values():
                storage.copy_(value)
            torch.set_rng_state(random)
        kept = {t.untyped_storage().data_ptr() for t in _tensors(self.result)}
        read, made = {}, {}
        for _, args, kwargs, out in self.calls:
            for t in _tensors((args, kwargs)):
                read.setdefault(t.untyped_storage().data_ptr(), t)
            for t in _tensors(out):
                if t.untyped_storage().data_ptr() not in read:
                    made.setdefault(t.untyped_storage().data_ptr(), t)
        self.read = set(read) - set(made)
        self.inner = {p: t for p, t in made.items() if p not in kept}
        self.bytes = sum(t.untyped_storage().nbytes() for t in self.inner.values())

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in _WAITS:
            raise RuntimeError(f"operation not permitted when stream is capturing: {func}")
        for pointer, t in _pointers(_written(func, args, kwargs or {})):
            if pointer not in self.new:
                storage = t.untyped_storage()
                self.before.setdefault(pointer, (storage, storage.clone()))
        out = func(*args, **(kwargs or {}))
        known = {pointer for pointer, _ in _pointers((args, kwargs))}
        self.new |= {pointer for pointer, _ in _pointers(out)} - known
        self.calls.append((func, args, kwargs or {}, out))
        size = sum(t.nbytes for _, _, _, o in self.calls for t in _tensors(o))
        if Tape.limit is not None and size > Tape.limit:
            raise torch.OutOfMemoryError("out of memory, says the tape")
        return out

    @torch.no_grad()
    def replay(self):
        for other in self.pool.tapes:
            if other is not self:
                for pointer, t in other.inner.items():
                    if pointer not in self.read:
                        _poison(t)
        for func, args, kwargs, out in self.calls:
            found = func(*args, **kwargs)
            for old, new in zip(_tensors(out), _tensors(found), strict=True):
                if old.data_ptr() != new.data_ptr():
                    old.detach().copy_(new)
        for other in self.pool.tapes:  # a backward gives a forward's memory back as it goes
            if other is not self:
                for pointer in self.read & set(other.inner):
                    _poison(other.inner[pointer])

    @staticmethod
    def pool():
        return Pool()

    @staticmethod
    def warm_up(function):
        function()

    @staticmethod
    def capturing():
        return Tape._on

    @staticmethod
    def memory():
        return 2**40

    @staticmethod
    def empty():
        pass

    class Turn(nullcontext):
        def finish(self):
            pass
