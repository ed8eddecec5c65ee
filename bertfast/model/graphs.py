"""CUDA graphs: a whole forward as one launch, for batches whose time is their launches'.

A captured graph repeats its kernels with the same pointers and sizes, so a batch runs in the
smallest bucket that holds it: its packed tokens, its sequences and its longest one rounded up, the
rest filled with sequences of padding. Everything else that a capture bakes in is compared at each
call: where the weights are before a replay, which so reads no memory that is gone; their dtypes and
shapes, the modules, precision settings, the forced backend while the GPU works, before the result
is given out. A difference drops the result and captures anew.
"""

import operator
import threading
from collections import OrderedDict
from itertools import pairwise
from typing import Any, TypeVar

import numpy as np
import torch
from torch import nn

from .. import ops
from ..encoder import watch
from ..encoder.batch import Packing
from ..encoder.graph import (
    MAX_GRAPHS,
    MAX_TOKENS,
    RECORDERS,
    Bucket,
    CudaGraph,
    Memory,
    bucket,
    recording,
    settings,
    uncached,
)
from ..ops.library import HAS_TRITON
from .asked import default, finish
from .bert import BertModel, BertPreTrainedModel, PackedInputs
from .bucket import OnCPU, OnGPU

OUTPUTS = 4 * 2**30  # bytes of results that graphs may keep; those unused for longest make room


def cuda_graphs(
    model: nn.Module, *, max_tokens: int = MAX_TOKENS, max_graphs: int = MAX_GRAPHS
) -> "GraphedModel":
    """`model`'s forward in inference, replayed from CUDA graphs.

        fast = bertfast.cuda_graphs(model.eval().cuda())
        fast(**tokenizer(texts, padding=True, return_tensors="pt")).last_hidden_state

    Args:
        model: a BertModel or one of its heads, in eval mode, on a GPU. Weights may change in
            place, be replaced or converted at any time.
        max_tokens: larger batches run without a graph of the whole model.
            A bucket keeps its results' memory (50 MB for 32768 states of BERT-base in bf16, but
            2 GB for as many tokens' logits over its vocabulary) and one bucket's activations.
        max_graphs: as many buckets stay captured, fewer where their results take over 4 GiB; the
            ones unused for longest make room.

    Returns: a callable with the model's own result for (input_ids, attention_mask,
    token_type_ids, position_ids, return_dict), without gradients. The first batch of a bucket
    captures. Inputs on the CPU are packed there, which spares waiting for the GPU, as does no
    attention_mask; the results are on the model's device. A weight that another takes the place of
    stays in memory until the next call.

    Raises: TypeError for another model, ValueError for one on a CPU.
    """
    if not isinstance(model, BertPreTrainedModel):
        raise TypeError(f"model is a {type(model).__name__}, expected a model of bertfast")
    return GraphedModel(model, max_tokens, max_graphs)


def _recorder(device):
    if device.type not in RECORDERS:
        raise ValueError(f"the model is on {device}, CUDA graphs need it on a GPU: .cuda()")
    return RECORDERS[device.type]


B = TypeVar("B", torch.Tensor, np.ndarray)


class StaticPacking(Packing):
    """A bucket's tokens, which stay packed in the model's results; `kept` are those results."""

    captured = True

    def __init__(self, cu_seqlens: torch.Tensor, longest: int, first: torch.Tensor) -> None:
        self.cu_seqlens, self.seqlen, self.batch = cu_seqlens, longest, first.shape[0]
        self.mask, self.kept = first.unsqueeze(1), []

    def unpack(self, x: torch.Tensor) -> torch.Tensor:
        self.kept.append(x)
        return x


class Static:
    """A bucket's buffers and, once captured, its graph."""

    @torch.inference_mode(False)  # they would refuse to be written outside
    def __init__(self, model: nn.Module, size: Bucket, device: torch.device | str) -> None:
        self.model, self.size, self.graph = model, size, None
        # One buffer, so that a batch from the CPU takes one copy.
        self.buffer = torch.zeros(
            4 * size.tokens + 2 * size.sequences + 1, dtype=torch.int64, device=device
        )

    def views(self, buffer: B) -> list[B]:
        """ids, positions and types [tokens], offsets [sequences + 1], which sequences have their
        column 0 [sequences]; where the tokens are in a padded batch that came from the CPU."""
        t, s = self.size.tokens, self.size.sequences
        ends = (0, t, 2 * t, 3 * t, 3 * t + s + 1, 3 * t + 2 * s + 1, 4 * t + 2 * s + 1)
        return [buffer[a:b] for a, b in pairwise(ends)]

    @torch.inference_mode(False)
    @torch.no_grad()
    def forward(self) -> Any:
        ids, positions, types, offsets, first, _ = self.views(self.buffer)
        packing = StaticPacking(offsets.int(), self.size.longest, first)
        output = self.model(
            PackedInputs(packing, ids, positions, types),
            output_attentions=False,
            output_hidden_states=False,
            return_dict=True,
        )
        self.by_token = {k for k, v in output.items() if any(v is kept for kept in packing.kept)}
        return output

    def capture(self, record: type[CudaGraph], pool: Any) -> None:
        with recording, uncached():
            record.warm_up(self.forward)
            self.graph = record(self.forward, pool)
        self.output = self.graph.result

    def replay(self, batch: Any) -> None:
        batch.fill(self)
        self.graph.replay()

    def result(self, batch: Any) -> Any:
        """The outputs for the batch, in memory of their own: the next replay overwrites these."""
        shape = batch.sequences, batch.seqlen

        def own(name, value):
            if name not in self.by_token:
                return value[: batch.sequences].clone()
            value = value[: batch.tokens]
            if batch.indices is None:
                return value.clone().unflatten(0, shape)
            return ops.unpack(value, batch.indices, *shape)

        return type(self.output)(**{k: own(k, v) for k, v in self.output.items()})


_KNOWN = "torch.nn.", "bertfast.", "transformers.activations"


def _tables(model):
    embeddings = (model if isinstance(model, BertModel) else model.bert).embeddings
    tables = (
        *(embeddings.word_embeddings, embeddings.position_embeddings),
        embeddings.token_type_embeddings,
    )
    return [table.weight for table in tables]


class Baked:
    """What a capture takes from a model besides the batch: `unchanged` since `take`?"""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.take()

    def take(self) -> None:
        self.modules = watch.Snapshot(self.model)
        # What decides over an adapter (which one, its scale) is in attributes that nobody compares.
        self.foreign = [
            (name, m)
            for name, m in self.model.named_modules()
            if name and not type(m).__module__.startswith(_KNOWN)
        ]
        self.tables, tensors = (
            _tables(self.model),
            [*self.model.parameters(), *self.model.buffers()],
        )
        self.memory, self.state = Memory(tensors), self._state()

    def there(self) -> bool:
        """Whether all that a graph reads is still in memory, where it was, and ids that the model
        takes are in its tables."""
        same = all(map(operator.is_, self.tables, _tables(self.model)))
        return same and self.memory.there()

    def unchanged(self) -> bool:
        """And the rest as it was, if they are `there`."""
        same = self.modules.holds() and self.memory.formed()
        return same and self.state == self._state()

    def unfit(self) -> list[nn.Module]:
        """The modules that a graph can't stand for, as they are."""
        modules = self.model.modules()
        return [m for m in modules if m.training or watch.hooked(m, ())]

    def _state(self):
        device, config = self.tables[0].device.type, self.model.config
        return (
            (config.num_attention_heads, config.hidden_act),
            (torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)),
            settings(),
        )


class GraphedModel:
    """See `cuda_graphs`."""

    def __init__(self, model: nn.Module, max_tokens: int, max_graphs: int) -> None:
        record = _recorder(model.device)
        for name, value in (("max_tokens", max_tokens), ("max_graphs", max_graphs)):
            if value < 1:
                raise ValueError(f"{name} is {value}, expected at least 1")
        self.model, self.max_tokens, self.max_graphs = model, max_tokens, max_graphs
        self.graphs: OrderedDict[Bucket, Static] = OrderedDict()  # the last used at the end
        self._lock, self._turn = threading.Lock(), record.Turn()
        self._baked, self._pool = Baked(model), None

    def __call__(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        return_dict: bool | None = None,
    ) -> Any:
        model, given = self.model, (input_ids, attention_mask, token_type_ids, position_ids)
        inner = model if isinstance(model, BertModel) else model.bert
        shape = inner._sizes(*given, None)
        weight = inner.embeddings.word_embeddings.weight
        device = weight.device
        batch = self._batch(inner, shape, device, given)
        if not 0 < batch.tokens <= self.max_tokens:
            self._check(device, closely=True)
            there = (None if t is None else t.to(device) for t in given)
            with torch.no_grad():
                return model(*there, return_dict=return_dict)
        size = bucket(batch.tokens, batch.sequences, batch.longest)
        with self._lock, torch.cuda.device_of(weight), self._turn:
            output = self._run(size, batch, device)
        return finish(output, return_dict, model.config)

    def _batch(self, inner, shape, device, given):
        if all(t is None or t.device.type == "cpu" for t in given):
            return OnCPU(inner, shape, *given)
        device, read = (device, OnGPU) if HAS_TRITON else ("cpu", OnCPU)
        return read(inner, shape, *(None if t is None else t.to(device) for t in given))

    def _check(self, device, closely: bool):
        _recorder(device)
        for module in self._baked.unfit() if closely else ():
            if module.training:
                raise RuntimeError("the model is in training mode; call model.eval() first")
            raise RuntimeError(
                f"a {type(module).__name__} has hooks, which a graph would not run: remove them or "
                "call the model itself"
            )
        if watch.global_hooks():
            raise RuntimeError(
                "there are global module hooks, which a graph would not run: remove them or call "
                "the model itself"
            )
        for name, module in self._baked.foreign:
            raise RuntimeError(
                f"{name} is a {watch.class_name(module)}, whose settings a graph would not follow: "
                "merge the adapter first (peft's merge_and_unload) or call the model itself"
            )
        for name in ("output_attentions", "output_hidden_states"):
            if default(None, self.model.config, name):
                raise RuntimeError(f"config.{name} is set; call the model itself for those")

    def _run(self, size: Bucket, batch, device):
        """The batch's outputs, from its bucket's graph."""
        static, there = self.graphs.get(size), self._baked.there()
        ahead = static is not None and there
        if ahead:  # the GPU works while the host looks closer
            static.replay(batch)
            output = static.result(batch)
        if not (there and self._baked.unchanged()):
            self._release(0)
            self._baked.take()
            static, ahead = None, False
        self._check(device, closely=static is None)
        if ahead:
            self.graphs.move_to_end(size)
            return output
        if static is None:
            self._release(self.max_graphs - 1)
            record = _recorder(device)
            if not self.graphs:  # torch gives no pool anew once all graphs in it are gone
                self._pool = record.pool()
            static = Static(self.model, size, device)
            batch.fill(static)  # a warm-up reads ids
            static.capture(record, self._pool)
            self.graphs[size] = static
            self._release(self.max_graphs, OUTPUTS)
        static.replay(batch)
        return static.result(batch)

    def _release(self, graphs: int, outputs: int | None = None):
        """Keep so many graphs, and so many bytes of their outputs, but the last."""

        def kept():
            return sum(v.nbytes for s in self.graphs.values() for v in s.output.values())

        while len(self.graphs) > graphs or (
            outputs is not None and len(self.graphs) > 1 and kept() > outputs
        ):
            self._turn.finish()  # it may still run
            self.graphs.popitem(last=False)
