"""Floating-point operations of a training step: those of its matrix products, a multiply-add being
two, over real tokens. A product's backward is one more for each factor that has a gradient, so that
where all is trained a step has three times its forward's. What is computed over again
(`gradient_checkpointing`) and projections of relative positions don't count.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from torch import nn

from ..encoder.packed import Freezable
from ..encoder.spec import LayerSpec, Unfit


def pairs(lengths: Sequence[int] | np.ndarray, window: int | None = None) -> float:
    """Pairs of tokens of which the first sees the second, in sequences of these lengths, int [n];
    window: how far a token sees to either side."""
    n = np.asarray(lengths, np.int64)
    near = n - 1 if window is None else np.minimum(n - 1, window)
    return float((n * (2 * near + 1) - near * (near + 1)).sum())


def _passes(trained: bool, below: bool) -> int:
    """Products to one of the forward: it, its weight's gradient, and its input's."""
    return 1 + bool(trained) + bool(below)


class LayerWork(NamedTuple):
    """A layer's operations, forward and backward."""

    inward: float  # of a token: queries, keys, values
    pair: float  # of a pair of tokens: its score, and its share of the context
    outward: float  # of a token: what is behind the attention
    window: int | None = None

    @classmethod
    def of(cls, spec: LayerSpec, trained: bool = True, below: bool = True) -> "LayerWork":
        """trained, below: whether its weights are, and whether something below it is."""
        hidden, width, inner = spec.hidden, spec.width, spec.inner
        inward = hidden * width * (1 + 2 / spec.groups)
        outward = hidden * width + (2 + spec.gated) * hidden * inner
        some = trained or below
        return cls(
            2 * inward * _passes(trained, below),
            2 * width * (2 + len(spec.relative)) * _passes(some, some),
            2 * outward * _passes(trained, some),
            spec.window,
        )


class Products:
    """An encoder's and its head's.

    layers: in their order. before, head: operations of a token before the layers, and of a row that
    the head is for. whole: whether the scores of all layers are among them.
    """

    def __init__(
        self, layers: list[LayerWork], before: float = 0.0, head: float = 0.0, whole: bool = True
    ) -> None:
        self.layers, self.before, self.head, self.whole = layers, before, head, whole

    @classmethod
    def of(cls, model: nn.Module) -> "Products":
        """Of a model as it is frozen now. A layer that bertfast doesn't know counts by its linear
        layers, without its scores."""
        encoders = [m for m in model.modules() if isinstance(m, Freezable)]
        layers = [layer for m in encoders for layer in m.layer]
        found = [one for m in encoders for one in m.describe()]
        if not layers:
            layers, found = [model.base_model], [Unfit("", "")]
        inside = {m for layer in layers for m in layer.modules()}
        first, behind = [], []
        for m in model.modules():
            if m in inside:
                first, behind = first + behind, []
            elif isinstance(m, nn.Linear):
                behind.append(m)
        below = model.get_input_embeddings().weight.requires_grad
        before, work = sum(_linear(m, below) for m in first), []
        for layer, one in zip(layers, found, strict=True):
            trained = any(p.requires_grad for p in layer.parameters())
            if isinstance(one, Unfit):
                own = (m for m in layer.modules() if isinstance(m, nn.Linear))
                work.append(LayerWork(sum(_linear(m, below) for m in own), 0.0, 0.0))
            else:
                norm = one.weights.norm1.weight  # trained ahead of the products, pre-norm
                ahead = one.spec.pre_norm and norm is not None and norm.requires_grad
                work.append(LayerWork.of(one.spec, trained, below or ahead))
            below = below or trained
        head = sum(_linear(m, below) for m in behind)
        return cls(work, before, head, not any(isinstance(one, Unfit) for one in found))

    def flops(
        self, lengths: Sequence[int] | np.ndarray, rows: int, last: int | None = None
    ) -> float:
        """Of sequences of these lengths, int [n].

        rows: that the head is for. last: tokens that the last layer's outward part is for, None for
        all.
        """
        tokens = float(np.sum(lengths))
        seen = {window: pairs(lengths, window) for window in {w.window for w in self.layers}}
        total = self.before * tokens + self.head * rows
        for layer in self.layers:
            total += (layer.inward + layer.outward) * tokens + layer.pair * seen[layer.window]
        if last is not None and self.layers:
            total -= self.layers[-1].outward * (tokens - last)
        return total


def _linear(m: nn.Linear, below: bool) -> float:
    return 2.0 * m.weight.numel() * _passes(m.weight.requires_grad, below)


class Translation:
    """A `BertEncoderDecoder`'s, whose target's token sees those up to it and all of its source."""

    whole = True

    def __init__(self, model: nn.Module) -> None:
        self.encoder, c = Products.of(model.encoder), model.config.decoder
        h, inner, layers = c.hidden_size, c.intermediate_size, c.num_hidden_layers
        self.pair = 6.0 * layers * 2 * h
        self.target = 6.0 * (layers * (6 * h * h + 2 * h * inner) + h * h + h * c.vocab_size)
        self.source = 6.0 * layers * 2 * h * h
        between = getattr(model, "enc_to_dec_proj", None)
        if between is not None:
            self.source += _linear(between, True)

    def flops(
        self, sources: Sequence[int] | np.ndarray, targets: Sequence[int] | np.ndarray
    ) -> float:
        """sources, targets: lengths int [n] of each pair."""
        s, t = np.asarray(sources, np.int64), np.asarray(targets, np.int64)
        seen = float((t * (t + 1) // 2 + s * t).sum())
        decoder = self.target * float(t.sum()) + self.source * float(s.sum()) + self.pair * seen
        return self.encoder.flops(s, 0) + decoder
