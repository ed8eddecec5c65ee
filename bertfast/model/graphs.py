"""CUDA graphs: a whole forward as one launch, for batches whose time is their launches'.

A captured graph repeats its kernels with the same pointers and sizes, so a batch runs in the
smallest bucket that holds it: its packed tokens, its sequences and its longest one rounded up, the
rest filled with sequences of padding. Everything else that a capture bakes in - where the weights
are, their dtypes and shapes, the modules, precision settings, the forced backend - is compared
before each replay; a difference captures anew.
"""

import threading
from collections import OrderedDict
from typing import NamedTuple

import torch

from .. import ops
from ..ops.embedding_layer_norm import _check_ids
from .bert import BertModel, BertPreTrainedModel, PackedInputs, _default, finish
from .encoder import Packing


def cuda_graphs(model, *, max_tokens: int = 4096, max_graphs: int = 64):
    """`model`'s forward in inference, replayed from CUDA graphs.

        fast = bertfast.cuda_graphs(model.eval().cuda())
        fast(**tokenizer(texts, padding=True, return_tensors="pt")).last_hidden_state

    Args:
        model: a BertModel or one of its heads, in eval mode, on a GPU. Weights may change in
            place, be replaced or converted at any time.
        max_tokens: larger batches run without a graph: their launches are hidden behind the work.
        max_graphs: as many buckets stay captured; the one unused for longest makes room.

    Returns: a callable with the model's own result for (input_ids, attention_mask,
    token_type_ids, position_ids, return_dict), without gradients. The first batch of a bucket
    captures. Inputs on the CPU are packed there, which spares the GPU's synchronisation; the
    results are on the model's device.

    Raises: TypeError for another model, ValueError for one on a CPU.
    """
    if not isinstance(model, BertPreTrainedModel):
        raise TypeError(f"model is a {type(model).__name__}, expected a model of bertfast")
    _require_gpu(model)
    return GraphedModel(model, max_tokens, max_graphs)


def _require_gpu(model):
    if model.device.type != "cuda":
        raise ValueError(f"the model is on {model.device}, CUDA graphs need it on a GPU: .cuda()")


class Bucket(NamedTuple):
    """Sizes that a graph bakes in."""

    tokens: int
    sequences: int
    longest: int


def bucket(tokens: int, sequences: int, longest: int) -> Bucket:
    """The sizes that a batch of these runs with: at most an eighth more tokens (and 15).

    Padding tokens form sequences of their own, of at most `longest`, so that every token is in one.
    """
    step = max(16, 1 << max(tokens.bit_length() - 4, 0))
    padded = -(-tokens // step) * step
    longest = next((n for n in (16, 32) if longest <= n), -(-longest // 64) * 64)
    sequences += -(-(padded - tokens) // longest)
    return Bucket(padded, 1 << (sequences - 1).bit_length(), longest)


class StaticPacking(Packing):
    """A bucket's tokens, which stay packed in the model's results; `kept` are those results."""

    def __init__(self, cu_seqlens, longest: int, first):
        self.cu_seqlens, self.seqlen, self.batch = cu_seqlens, longest, first.shape[0]
        self.mask, self.kept = first.unsqueeze(1), []

    def unpack(self, x):
        self.kept.append(x)
        return x


class Static:
    """A bucket's buffers and, once captured, its graph."""

    def __init__(self, model, size: Bucket, device):
        self.model, self.size, self.graph, self.output = model, size, None, None
        # One buffer, so that a batch from the CPU takes one copy.
        self.buffer = torch.zeros(
            3 * size.tokens + 2 * size.sequences + 1, dtype=torch.int64, device=device
        )

    def views(self, buffer):
        """ids, positions and types [tokens], offsets [sequences + 1], and which sequences have
        their column 0 [sequences]."""
        t, s = self.size.tokens, self.size.sequences
        return buffer.split([t, t, t, s + 1, s])

    def fill(self, packed: PackedInputs):
        packing, tokens = packed.packing, packed.ids.shape[0]
        size, batch, device = self.size, packing.batch, packed.ids.device
        here = torch.zeros_like(self.buffer, device=device)  # id 0 is valid everywhere
        *rows, offsets, first = self.views(here)
        for view, values in zip(rows, packed[1:4], strict=True):
            view[:tokens] = values
        offsets[: batch + 1] = packing.cu_seqlens
        ends = torch.arange(1, size.sequences - batch + 1, device=device) * size.longest + tokens
        offsets[batch + 1 :] = ends.clamp_(max=size.tokens)
        first[:batch] = packing.mask[:, 0] != 0
        self.buffer.copy_(here)

    def forward(self):
        ids, positions, types, offsets, first = self.views(self.buffer)
        packing = StaticPacking(offsets.int(), self.size.longest, first)
        output = self.model(
            PackedInputs(packing, ids, positions, types),
            output_attentions=False,
            output_hidden_states=False,
            return_dict=True,
        )
        self.output = output
        self.by_token = {k for k, v in output.items() if any(v is kept for kept in packing.kept)}

    def capture(self, pool):
        device = self.buffer.device
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):  # compiles kernels, sets cuBLAS up
            for _ in range(2):
                self.forward()
        torch.cuda.current_stream(device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            self.forward()
        self.graph = graph

    def imitate(self):
        """A replay by an ordinary call: new values in the same memory."""
        output = self.output
        self.forward()
        if output is not None:
            for name, value in output.items():
                value.copy_(self.output[name])
            self.output = output

    def result(self, packed: PackedInputs):
        """The outputs for the batch, in memory of their own: the next replay overwrites these."""
        packing, tokens = packed.packing, packed.ids.shape[0]
        batch, seqlen, indices = packing.batch, packing.seqlen, None
        if self.by_token and tokens < batch * seqlen:
            indices = packing.indices.to(self.buffer.device)

        def own(name, value):
            if name not in self.by_token:
                return value[:batch].clone()
            if indices is None:
                return value[:tokens].clone().unflatten(0, (batch, seqlen))
            return ops.unpack(value[:tokens], indices, batch, seqlen)

        return type(self.output)(**{k: own(k, v) for k, v in self.output.items()})


class Baked:
    """What a capture takes from a model besides the batch: `unchanged` since `take`?

    Asked at every call, so it looks each thing up in the shortest way.
    """

    def __init__(self, model):
        self.model = model
        self.take()

    def take(self):
        self.modules = list(self.model.modules())
        self.norms = [m for m in self.modules if hasattr(m, "eps")]
        self.children = [m._modules for m in self.modules if m._modules]
        self.tensors = [d for m in self.modules for d in (m._parameters, m._buffers) if d]
        self.state = self._state()

    def unchanged(self) -> bool:
        return self.state == self._state()

    def _state(self):
        device, matmul = self.model.device.type, torch.backends.cuda.matmul
        config = self.model.config
        return (
            [list(modules.values()) for modules in self.children],
            [type(m) for m in self.modules],
            [m.__dict__.get("forward") for m in self.modules],
            [m.eps for m in self.norms],
            [
                (p.data_ptr(), p.dtype, p.shape, p.stride())
                for tensors in self.tensors
                for p in tensors.values()
                if p is not None
            ],
            (config.num_attention_heads, config.hidden_act, config.layer_norm_eps),
            (ops.registry.forced(), torch.are_deterministic_algorithms_enabled()),
            (torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)),
            matmul.fp32_precision,
            matmul.allow_bf16_reduced_precision_reduction,
            matmul.allow_fp16_reduced_precision_reduction,
        )


class GraphedModel:
    """See `cuda_graphs`. Without `capture` a bucket's forward is an ordinary call."""

    def __init__(self, model, max_tokens, max_graphs, capture=True):
        for name, value in (("max_tokens", max_tokens), ("max_graphs", max_graphs)):
            if value < 1:
                raise ValueError(f"{name} is {value}, expected at least 1")
        self.model, self.max_tokens, self.max_graphs = model, max_tokens, max_graphs
        self.graphs: OrderedDict[Bucket, Static] = OrderedDict()  # the last used at the end
        self._capture, self._lock, self._done = capture, threading.Lock(), None
        self._baked, self._pool = Baked(model), None

    @torch.inference_mode(False)  # its buffers would refuse to be written outside
    @torch.no_grad()
    def __call__(
        self,
        input_ids,
        attention_mask=None,
        token_type_ids=None,
        position_ids=None,
        return_dict=None,
    ):
        self._check()
        model, given = self.model, (input_ids, attention_mask, token_type_ids, position_ids)
        inner = model if isinstance(model, BertModel) else model.bert
        packed = inner._inputs(*given, None)
        tokens, packing = packed.ids.shape[0], packed.packing
        if not 0 < tokens <= self.max_tokens:
            there = (None if t is None else t.to(model.device) for t in given)
            return model(*there, return_dict=return_dict)
        embeddings = inner.embeddings
        _check_ids(
            input_ids=(packed.ids, embeddings.word_embeddings.weight),
            position_ids=(packed.positions, embeddings.position_embeddings.weight),
            token_type_ids=(packed.types, embeddings.token_type_embeddings.weight),
        )
        longest = packing.seqlen
        if packed.ids.device.type == "cpu":  # where reading it needs no synchronisation
            longest = int(packing.cu_seqlens.diff().max())
        with self._lock, torch.cuda.device_of(embeddings.word_embeddings.weight):
            static = self._static(bucket(tokens, packing.batch, longest))
            if self._done is not None:  # a replay on another stream may still run
                torch.cuda.current_stream().wait_event(self._done)
            static.fill(packed)
            if not self._capture:
                static.imitate()
            else:
                if static.graph is None:
                    static.capture(self._pool)
                static.graph.replay()
            output = static.result(packed)
            if self._capture:
                self._done = torch.cuda.current_stream().record_event()
        return finish(output, return_dict, model.config)

    def _check(self):
        if self._capture:
            _require_gpu(self.model)
        for module in self._baked.modules:
            if module.training:
                raise RuntimeError("the model is in training mode; call model.eval() first")
            if module._forward_hooks or module._forward_pre_hooks:
                raise RuntimeError(
                    f"a {type(module).__name__} has forward hooks, which a graph would not run: "
                    "remove them or call the model itself"
                )
        for name in ("output_attentions", "output_hidden_states"):
            if _default(None, self.model.config, name):
                raise RuntimeError(f"config.{name} is set; call the model itself for those")

    def _static(self, size: Bucket) -> Static:
        if not self._baked.unchanged():
            self._wait()
            self.graphs.clear()
            self._baked.take()
            self._pool = None
        static = self.graphs.pop(size, None)
        if static is None:
            while len(self.graphs) >= self.max_graphs:
                self._wait()
                self.graphs.popitem(last=False)
            if self._capture and self._pool is None:
                self._pool = torch.cuda.graph_pool_handle()
            static = Static(self.model, size, self.model.device)
        self.graphs[size] = static
        return static

    def _wait(self):
        """Before a graph's memory is given back: its last replay may be on another stream."""
        if self._done is not None:
            self._done.synchronize()
