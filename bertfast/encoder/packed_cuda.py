"""Weights for inference on a GPU, in bf16 or fp16."""

from itertools import chain
from typing import TYPE_CHECKING, Any

import torch

from ..ops.extension import C
from . import watch
from .batch import Relative
from .executors import whole_cuda
from .packed import CUDA_PRECISIONS, Packed
from .run import Choice, forced
from .run import run as run_layers
from .weights import addresses

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from .spec import Layer


class PackedCuda(Packed):
    """Everything in bf16 or fp16. A few tokens take one call, more the layers one by one."""

    def __init__(
        self, layers: "list[Layer]", precision: str, dtype: torch.dtype, config: "PreTrainedConfig"
    ) -> None:
        super().__init__([layer.spec for layer in layers], precision, dtype, config)
        self.low, self.device = CUDA_PRECISIONS[precision], layers[0].weights.query.weight.device
        flat = [layer.weights.present() for layer in layers]
        low = {p: p.detach().to(self.low).contiguous() for p in chain.from_iterable(flat)}
        self.layers = [
            layer._replace(weights=layer.weights.filled(map(low.get, own)))
            for layer, own in zip(layers, flat, strict=True)
        ]
        self.choice = Choice(f"frozen in {precision}", {})
        self._why_not_whole = whole_cuda.weights_limit(self.layers, self.low, self.device)
        self._addresses = addresses([layer.weights for layer in self.layers])

    def __reduce__(self) -> tuple[Any, ...]:
        raise TypeError("an encoder frozen on a GPU can't be pickled: pickle it before freezing")

    def _run(self, first, last, batch, graphs=None):
        hidden = batch.hidden
        if hidden.device != self.device:
            raise RuntimeError(
                f"the input is on {hidden.device}, a frozen encoder stays on {self.device}: move "
                "the model before bertfast.freeze"
            )
        batch, spec = batch._replace(hidden=hidden.to(self.low)), self.layers[0].spec
        if batch.relative is not None:
            relative = batch.relative.embeddings.to(self.low), batch.relative.index
            batch = batch._replace(relative=Relative(*relative))
        found = None if graphs is None else graphs.run(self.layers, batch)
        if isinstance(found, tuple):
            hidden, self.choice = found
            return hidden.to(self.dtype)
        why = self._why_not_whole or watch.dispatch_limit(batch.hidden)
        why = why or whole_cuda.call_limit(spec, batch)
        if why is None and forced() in (None, "whole_cuda"):
            at = self._addresses.buffer_info()[0] + first * C.LAYER_BYTES
            hidden = whole_cuda.forward(spec, at, last - first, batch)
            self.choice = Choice("whole_cuda", {})
        else:
            hidden, self.choice = run_layers(self.layers[first:last], batch)
        return hidden.to(self.dtype)
