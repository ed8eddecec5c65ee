"""Gradients of the examples in a packed batch, none of a matrix made: only their norms and, by the
examples' weights, their sum.

A linear layer's gradient of example i is G_i^T X_i, X_i what its rows were and G_i what the loss's
gradient is by what they became. Its squared norm is that of this product, or the sum of
(X_i X_i^T) * (G_i G_i^T), whichever costs less (ghost norms: Goodfellow, arXiv:1510.01799; Li et
al., arXiv:2110.05679). With G's rows weighted, G^T X is the weighted sum (book-keeping: Bu et al.,
arXiv:2210.00038).
"""

from collections.abc import Callable
from itertools import pairwise
from typing import Any, NamedTuple, TypeVar

import torch

from ...ops.linear_act import _DW, _DX, ACTIVATIONS

_aten = torch.ops.aten
_BACKWARD = {
    "gelu": _aten.gelu_backward,
    "gelu_tanh": lambda grad, z: _aten.gelu_backward(grad, z, approximate="tanh"),
    "relu": lambda grad, z: _aten.threshold_backward(grad, z, 0),
    "silu": _aten.silu_backward,
}


class Segments:
    """Which rows are whose. starts: int32 or int64 [examples + 1], on any device."""

    def __init__(self, starts: torch.Tensor) -> None:
        self.starts, self.count = starts.tolist(), len(starts) - 1
        numbers = torch.arange(self.count, device=starts.device)
        self.owner = numbers.repeat_interleave(starts.diff().long(), output_size=self.starts[-1])

    def sums(self, x: torch.Tensor) -> torch.Tensor:
        """[rows, size] -> [examples, size]"""
        return x.new_zeros(self.count, x.shape[1]).index_add_(0, self.owner, x)

    def squares(self, x: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
        """The squared norms of G_i^T X_i, fp64 [examples]; x [rows, in], grad [rows, out]."""
        if len(self.owner) == self.count:
            return x.double().square().sum(1) * grad.double().square().sum(1)
        size, found = x.shape[1] + grad.shape[1], []
        for a, b in pairwise(self.starts):
            own, its = x[a:b], grad[a:b]
            if (b - a) * size <= x.shape[1] * grad.shape[1]:
                found.append(torch.dot((own @ own.T).view(-1), (its @ its.T).view(-1)))
            else:
                product = (its.T @ own).view(-1)
                found.append(torch.dot(product, product))
        return torch.stack(found).double().clamp_(min=0)


class Vector(NamedTuple):
    """A vector's gradients."""

    each: torch.Tensor  # [examples, size]

    def squares(self) -> torch.Tensor:
        return self.each.double().square().sum(1)

    def add_to(self, p: torch.Tensor, weights: torch.Tensor) -> None:
        """Their sum by `weights` [examples] to p.grad."""
        _add(p, weights @ self.each)

    def to(self, dtype: torch.dtype) -> "Vector":  # as `layer.backward` asks of a norm's bias
        return self


class Product(NamedTuple):
    """A matrix' gradients. x [rows, in], grad [rows, out], which `add_to` overwrites."""

    x: torch.Tensor
    grad: torch.Tensor
    segments: Segments
    backward: Callable  # the kernel `linear_act_backward`

    def squares(self) -> torch.Tensor:
        return self.segments.squares(self.x, self.grad)

    def add_to(self, p: torch.Tensor, weights: torch.Tensor) -> None:
        grad = self.grad.mul_(weights[self.segments.owner, None])
        _add(p, self.backward(grad, self.x, p.detach(), None, None, 0, _DW)[1])


class Lookup(NamedTuple):
    """A table's gradients. ids int64 [rows], grad [rows, size]."""

    ids: torch.Tensor
    grad: torch.Tensor
    segments: Segments
    size: int  # rows of the table

    def squares(self) -> torch.Tensor:
        """Rows of one example that read the same place add up."""
        keys, place = (self.segments.owner * self.size + self.ids).unique(return_inverse=True)
        rows = self.grad.new_zeros(len(keys), self.grad.shape[1]).index_add_(0, place, self.grad)
        found = self.grad.new_zeros(self.segments.count, dtype=torch.float64)
        return found.index_add_(0, keys // self.size, rows.double().square().sum(1))

    def add_to(self, p: torch.Tensor, weights: torch.Tensor) -> None:
        if p.grad is None:
            p.grad = torch.zeros_like(p)
        p.grad.index_add_(0, self.ids, self.grad * weights[self.segments.owner, None])


def _add(p, grad):
    if p.grad is None:
        p.grad = grad
    else:
        p.grad += grad


E = TypeVar("E", Vector, Product, Lookup)


class Kernels:
    """A layer's, for `layer.backward`: what they give as a parameter's gradient is by example, and
    `squares`, fp64 [examples], has the sums of their squared norms.

    segments: of all tokens, and of the rows that the last layer keeps, told apart by their number.
    """

    def __init__(self, kernels: Any, segments: list[Segments], eps: float) -> None:
        self.k, self.eps = kernels, eps
        self.segments = {len(s.owner): s for s in segments}
        self.squares = segments[0].owner.new_zeros(segments[0].count, dtype=torch.float64)
        self.attention_backward = kernels.attention_backward

    def counted(self, found: E) -> E:
        self.squares += found.squares()
        return found

    def vector(self, x: torch.Tensor) -> Vector:
        return self.counted(Vector(self.segments[len(x)].sums(x)))

    def product(self, x: torch.Tensor, grad: torch.Tensor) -> Product:
        return Product(x, grad, self.segments[len(x)], self.k.linear_act_backward)

    def linear_act_backward(
        self,
        grad: torch.Tensor,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        z: torch.Tensor | None,
        activation: int,
        need: int,
    ) -> tuple[Any, ...]:
        if activation:
            grad = _BACKWARD[ACTIVATIONS[activation]](grad, z)
        dx, *_ = self.k.linear_act_backward(grad, x, weight, None, None, 0, _DX)
        vector = None if bias is None else self.vector(grad)
        return dx, self.counted(self.product(x, grad)), vector

    def qkv_linear_backward(
        self,
        grad: torch.Tensor,
        x: torch.Tensor,
        wq: torch.Tensor,
        wk: torch.Tensor,
        wv: torch.Tensor,
        bq: torch.Tensor | None,
        need: int,
    ) -> tuple[Any, ...]:
        dx = None
        if need & _DX:
            dx, *_ = self.k.qkv_linear_backward(grad, x, wq, wk, wv, bq, _DX)
        self.counted(self.product(x, grad))  # of all three, whose X_i X_i^T is the same
        parts = grad.chunk(3, 1)
        biases = self.vector(grad).each.chunk(3, 1)
        return dx, *(self.product(x, part) for part in parts), *map(Vector, biases)

    def add_layer_norm_backward(
        self,
        grad: torch.Tensor,
        x: torch.Tensor,
        residual: torch.Tensor | None,
        weight: torch.Tensor | None,
        mean: torch.Tensor | None,
        rstd: torch.Tensor,
        x_bias: torch.Tensor | None,
        p: float,
        seed: torch.Tensor | None,
        rms: bool,
    ) -> tuple[Any, ...]:
        call = x, residual, torch.ones_like(weight), None, self.eps, x_bias, p, seed, rms
        normed = self.k.add_layer_norm(*call)[0]
        dx, ds, *_ = self.k.add_layer_norm_backward(
            grad, x, residual, weight, mean, rstd, x_bias, p, seed, rms
        )
        dx_bias = None if x_bias is None else self.vector(dx)
        return dx, ds, self.vector(grad * normed), self.vector(grad), dx_bias
