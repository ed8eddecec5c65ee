"""What a CUDA graph of an encoder's layers is recorded on: buffers that stay."""

from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch._utils import _unflatten_dense_tensors as unflatten

from ..ops.dropout import draw_seeds
from .batch import Batch, Even, Relative
from .executors.node import is_batched
from .graph import Bucket, CudaGraph
from .run import EXECUTORS, Choice, choose
from .spec import DROPOUTS, Layer

if TYPE_CHECKING:
    from .replay import Lane, Use


class Key(NamedTuple):
    """What a graph bakes in and another batch may have otherwise."""

    size: Bucket
    rows: int | None
    dtype: torch.dtype
    used: bool  # whether there is a seqused_k
    bias: tuple | None  # its heads and dtype
    angles: tuple  # each table's sizes and dtype
    relative: tuple | None  # the embeddings' sizes and dtype
    even: bool  # whether a row of each sequence is its padding
    dropout: tuple  # each layer's rates
    wants: tuple[bool, ...] | None  # gradients of `inputs` and parameters; None for inference


def inputs(batch: Batch) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """What may have gradients besides parameters."""
    return batch.hidden, batch.bias, None if batch.relative is None else batch.relative.embeddings


_INPUTS = 3


class Graph:
    """The buffers of a key, and what was recorded on them. `choice`: who runs the layers there."""

    replays = 0  # counted by who replays it

    def __init__(
        self,
        record: type[CudaGraph],
        lane: "Lane",
        key: Key,
        layers: list[Layer],
        batch: Batch,
        flat: list[torch.Tensor],
    ) -> None:
        (tokens, sequences, longest), hidden = key.size, batch.hidden
        training, device = key.wants is not None, hidden.device
        with torch.inference_mode(False), torch.no_grad():

            def zeros(*shape, dtype=torch.int64):
                return torch.zeros(shape, dtype=dtype, device=device)

            self.hidden = zeros(tokens, hidden.shape[1], dtype=key.dtype)
            self.starts = zeros(sequences + 1, dtype=torch.int32)
            self.filling = torch.arange(1, sequences + 1, device=device).int() * longest
            self.used = zeros(sequences, dtype=torch.int32) if key.used else None
            self.rows = None if key.rows is None else zeros(key.rows)
            self.seeds = zeros(DROPOUTS * len(layers), 2) if any(map(any, key.dropout)) else None
            self.bias = None
            if key.bias is not None:
                self.bias = zeros(1, key.bias[0], longest, longest, dtype=key.bias[1])
            self.angles = tuple(zeros(tokens, *size, dtype=dtype) for size, dtype in key.angles)
            self.relative = None
            if key.relative is not None:
                embeddings = zeros(*key.relative[0], dtype=key.relative[1])
                self.relative = Relative(embeddings, zeros(2 * longest - 1, dtype=torch.int32))
            self.even = None
            if key.even:
                places, share = zeros(sequences), zeros(sequences, dtype=torch.float64)
                one = torch.arange(sequences + 1, dtype=torch.int32, device=device)
                self.even = Even(places, one, 1, share)
            count = tokens if key.rows is None else key.rows
            self.grad = zeros(count, hidden.shape[1], dtype=key.dtype) if training else None
            # Not the parameters: no hook of theirs may see a recording.
            leaves = [p.detach() for p in flat]
            self.batch = Batch(
                *(self.hidden, self.starts, longest, self.used, self.rows, self.bias, self.seeds),
                *(self.angles, self.relative, True, self.even),
            )
            hidden, bias, embeddings = given = [
                None if t is None else t.detach() for t in inputs(self.batch)
            ]
            self.leaves = [*given, *leaves]
            self.groups = []
            self.wanted = [i for i, wanted in enumerate(key.wants or ()) if wanted]
            for i in self.wanted:
                self.leaves[i].requires_grad_()
            own = iter(leaves)
            self.layers = [layer._replace(weights=layer.weights.filled(own)) for layer in layers]
            if embeddings is not None:
                self.batch = self.batch._replace(relative=Relative(embeddings, self.relative.index))
            self.batch = self.batch._replace(hidden=hidden, bias=bias)
            self._fill(batch)  # a warm-up reads it
        with torch.inference_mode(False), torch.set_grad_enabled(training):
            self._record(record, lane, training)
        held = self.hidden, self.starts, self.used, self.rows, self.bias, self.grad, self.out
        held += (*self.angles, *(self.relative or ()))
        self.nbytes = sum(t.nbytes for t in held if t is not None)

    def _run(self):
        self.choice = choose(self.layers, self.batch)
        return EXECUTORS[self.choice.name].run(self.layers, self.batch)

    def _gradients(self, out, grad):
        return torch.autograd.grad(out, [self.leaves[i] for i in self.wanted], grad)

    def _record(self, record, lane, training):
        if not training:
            record.warm_up(self._run)
            self._forward = record(self._run, lane.pool)
            self.out, self.grown = self._forward.result, self._forward.bytes
        else:
            self._group(lane)
            record.warm_up(lambda: self._gathered(self._run()))
            self._forward = record(self._run, lane.pool)
            out, self.out = self._forward.result, self._forward.result.detach()
            self._forward.result = self.out  # what autograd keeps goes with its backward
            self._backward = record(lambda: self._gathered(out), lane.pool)
            self.grown = self._forward.bytes + self._backward.bytes
        self.choice = Choice(f"graph of {self.choice.name}", {})

    def _group(self, lane):
        """The parameters by dtype, whose gradients leave together, and where a lane's graphs put
        them, the same memory for as many: [(places, parameters, [n])]."""
        shared = {(t.dtype, len(t)): t for graph in lane.graphs.values() for *_, t in graph.groups}
        found = {}
        for i in self.wanted:
            if i >= _INPUTS:
                found.setdefault(self.leaves[i].dtype, []).append(i)
        for dtype, places in found.items():
            parts = [self.leaves[i].detach() for i in places]
            n = sum(p.numel() for p in parts)
            whole = shared.get((dtype, n))
            if whole is None:
                whole = self.hidden.new_empty(n, dtype=dtype)
            self.groups.append((places, parts, whole))

    def _gathered(self, out):
        """The gradients of `inputs`, where they are wanted; the others in their buffers."""
        found = dict(zip(self.wanted, self._gradients(out, self.grad), strict=True))
        with torch.no_grad():
            for places, _, whole in self.groups:
                torch.cat([found[i].reshape(-1) for i in places], out=whole)
        return [*map(found.get, range(_INPUTS))]

    def _fill(self, batch):
        """What isn't the batch's is zeros, in sequences of their own: no value or gradient comes
        from there."""
        tokens, sequences = len(self.hidden), len(self.filling)
        n, b = len(batch.hidden), len(batch.cu_seqlens) - 1
        _put(self.hidden, batch.hidden)
        self.starts[: b + 1].copy_(batch.cu_seqlens)
        if b < sequences:
            torch.add(self.filling[: sequences - b], n, out=self.starts[b + 1 :]).clamp_(max=tokens)
        if self.used is not None:
            _put(self.used, batch.seqused_k)
        if self.rows is not None:
            _put(self.rows, batch.rows, tokens - 1)
        if self.seeds is not None:
            seeds = batch.seeds
            if not isinstance(seeds, torch.Tensor):
                seeds = draw_seeds(len(self.seeds), self.seeds.device)
            self.seeds.copy_(seeds)
        if self.bias is not None:
            n = min(batch.bias.shape[2], self.bias.shape[2])
            self.bias.zero_()[..., :n, :n].copy_(batch.bias[..., :n, :n])
        if self.even is not None:
            _put(self.even.rows, batch.even.rows, tokens - 1)
            _put(self.even.share, batch.even.share)
        for own, given in zip(self.angles, batch.angles, strict=True):
            _put(own, given)
        if self.relative is not None:
            self.relative.embeddings.copy_(batch.relative.embeddings)
            own, given = self.relative.index, batch.relative.index
            n = min(len(own), len(given)) // 2  # as far as both go, to either side
            (own.zero_()[len(own) // 2 - n :][: 2 * n + 1]).copy_(
                given[len(given) // 2 - n :][: 2 * n + 1]
            )

    def forward(self, batch: Batch) -> torch.Tensor:
        """[tokens or rows, hidden], in memory of its own."""
        self._fill(batch)
        self._forward.replay()
        count = len(batch.hidden if batch.rows is None else batch.rows)
        return self.out[:count].clone()

    def backward(self, use: "Use", grad: torch.Tensor) -> list[torch.Tensor | None]:
        """The gradients of `inputs` and parameters."""
        found = [None] * len(self.leaves)
        if is_batched(grad):
            rest = grad.new_zeros((len(self.grad) - len(grad), grad.shape[1]))
            with torch.enable_grad():
                out = self._run()
            for i, g in zip(
                self.wanted, self._gradients(out, torch.cat([grad, rest])), strict=True
            ):
                found[i] = g
        else:
            if use.again:  # the activations' memory is gone, what they came from is there
                self._forward.replay()
            use.again = True
            _put(self.grad, grad)
            self._backward.replay()
            found[:_INPUTS] = [None if g is None else g.clone() for g in self._backward.result]
            for places, parts, whole in self.groups:
                for i, g in zip(places, unflatten(whole.clone(), parts), strict=True):
                    found[i] = g
        if found[0] is not None:
            found[0] = found[0][: use.tokens]
        if found[1] is not None:
            more = use.bias[2] - found[1].shape[2]
            found[1] = F.pad(found[1], (0, more, 0, more))
        return found


def _put(buffer, values, rest=0):
    n = len(values)
    buffer[:n].copy_(values)
    if n < len(buffer):
        buffer[n:].fill_(rest)
