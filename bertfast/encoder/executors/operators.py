"""The layers operator by operator, by torch's dispatcher: serves every spec, for whoever watches,
traces or transforms."""

from functools import partial
from types import SimpleNamespace

import torch

from ...ops.library import call
from .. import layer as arithmetic
from ..batch import Batch
from ..spec import Layer, Seeds

_STEMS = ("attention", "linear_act", "qkv_linear", "add_layer_norm")
_MORE = ("gated_act", "rotary", "cross_attention")
KERNELS = SimpleNamespace(**{name: partial(call, name) for name in (*_STEMS, *_MORE)})
# with the backwards, as the dispatcher has them: it takes batched gradients too (torch.func)
DISPATCHED = SimpleNamespace(
    **{n + end: getattr(torch.ops.bertfast, n + end) for n in _STEMS for end in ("", "_backward")}
)
DEVICE = None


def limit(layers: list[Layer], batch: Batch) -> str | None:
    return None


def run(layers: list[Layer], batch: Batch) -> torch.Tensor:
    return arithmetic.each(layers, batch, lambda *args: one(*args)[0])


def one(
    layer: Layer, batch: Batch, hidden: torch.Tensor, seeds: Seeds | None, rows: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """-> [tokens or rows, hidden], and the query, key and value [tokens, 3, heads, head_dim]"""
    wanted = [t for t in (hidden, batch.bias, *layer.weights.present()) if t is not None]
    wanted += [p for adapter in layer.adapters.values() for p in adapter.parameters()]
    wanted += [] if batch.relative is None else [batch.relative.embeddings]
    save = torch.is_grad_enabled() and any([t.requires_grad for t in wanted])
    seeds = arithmetic.seeds_of(layer, seeds, hidden.device)
    y, (qkv, *_) = arithmetic.forward(KERNELS, layer, batch, hidden, seeds, rows, save)
    return y, qkv
