"""What int8 does to a layer, tried on texts or tokens at random when a model is frozen."""

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from inspect import signature
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from ..ops.extension import C
from ..ops.library import call
from .batch import Batch
from .executors import operators
from .executors.whole_cpu import forward

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from .packed import Freezable
    from .spec import Layer

# Of int8's noise in a layer's states, see `_noise`; above it the layer stays in bf16. A healthy
# MiniLM's layers have 1.6 to 2.5%, bf16 has 0.3 to 0.4%. Where products are added in 16 bits,
# weights have fewer: twice the noise, and twice the limit.
NOISE_LIMIT = 0.12 if C is not None and C.build_info()["int8_sums16"] else 0.06
COSINE_LIMIT = 0.97  # of a token's last states to those in fp32; MiniLM's least is 0.995


def _noise(states, expected) -> float:
    """The root mean square of the error [tokens, hidden] with each channel's spread over the
    tokens as its unit: a cosine would see an outlier's channel alone."""
    if not (states.isfinite().all() and expected.isfinite().all()):
        return math.nan
    spread = expected.std(0)
    moving = spread > 0  # a pruned channel tells nothing apart
    if not moving.any():
        return 0.0
    spread = spread[moving].clamp(min=spread[moving].median() / 100)
    return ((states - expected)[:, moving] / spread).square().mean().sqrt().item()


class Sample(NamedTuple):
    """Texts to try a precision on, or tokens at random: outliers of weights show with any."""

    batch: Batch  # what comes to the first layer
    hidden: torch.Tensor  # [tokens, hidden], behind the layers that it has come through

    @classmethod
    @torch.no_grad()
    def of(
        cls,
        owner: nn.Module,
        encoder: "Freezable",
        config: "PreTrainedConfig",
        inputs: Mapping[str, Any] | None = None,
        texts: int = 4,
    ) -> "Sample":
        """What `owner`, the base model, gives its encoder for `inputs`, its arguments by name."""
        if inputs is None:
            inputs = {"input_ids": cls._at_random(owner, config, texts)}
        taken = signature(owner.forward).parameters  # a tokenizer may make more than it takes
        encoder.packed = _Catcher(config)
        before, encoder.bertfast_padding = encoder.bertfast_padding, "zeros"
        try:
            owner(**{name: t for name, t in inputs.items() if name in taken})
        except _Caught as caught:
            (batch,) = caught.args
        finally:
            encoder.packed, encoder.bertfast_padding = None, before
        if not len(batch.hidden):
            raise ValueError("texts have no tokens: give some that have")
        return cls(batch, batch.hidden)

    @staticmethod
    def _at_random(owner, config, texts):
        seqlen = min(32, config.max_position_embeddings)
        vocabulary = owner.get_input_embeddings().weight.shape[0]
        return torch.randint(
            *(0, vocabulary, (texts, seqlen)), generator=torch.Generator().manual_seed(0)
        )

    @torch.no_grad()
    def reach(self, layer: "Layer", center: torch.Tensor | None) -> torch.Tensor | None:
        """fp32 [hidden]: how far each channel of the layer's first product goes, of its input less
        the bias of the norm before, the layer's own or `center`, which may be None; None where
        there is no norm at all."""
        spec, norm, x = layer.spec, layer.weights.norm1, self.hidden
        if spec.pre_norm:
            if norm.weight is None:
                return None
            x = call("add_layer_norm", x, None, *norm, spec.eps, None, 0.0, None, spec.rms)[0]
            center = norm.bias
        return (x if center is None else x - center).float().abs().amax(0)

    @torch.no_grad()
    def through(self, layer: "Layer", packed: Any) -> "tuple[Sample, float]":
        """-> the sample behind the layer, and the noise of `packed`'s."""
        batch = self.batch._replace(hidden=self.hidden)
        expected = operators.run([layer], batch)
        states = forward(packed, 0, 1, batch, torch.float32)
        return self._replace(hidden=expected), _noise(states, expected.float())

    @torch.no_grad()
    def least_cosine(self, run: Callable[[Batch], torch.Tensor]) -> float:
        """Of a token's states by `run`, all of the frozen layers, to those here."""
        states = run(self.batch)
        return torch.cosine_similarity(states.float(), self.hidden.float(), dim=1).min().item()


class _Catcher:
    """In the place of an encoder's packed layers."""

    def __init__(self, config):
        self.config = config

    def run(self, batch, *_):
        raise _Caught(batch)


class _Caught(Exception):  # noqa: N818  nobody sees it
    pass


def complaints(noise: Sequence[float], kept: Collection[int], least_cosine: float) -> Iterator[str]:
    """What to warn of: layers `kept` in bf16, and what the others still do."""
    if kept:
        names = ", ".join(f"encoder.layer.{i} ({noise[i]:.1%})" for i in kept)
        yield (
            f"int8 has too much noise in {names}: above {NOISE_LIMIT:.0%} of what sets tokens "
            "apart, for outliers of weights or activations; these layers stay in bf16"
        )
    rest = [i for i in range(len(noise)) if i not in kept]
    if rest and not least_cosine >= COSINE_LIMIT:
        worst = max(rest, key=noise.__getitem__)
        yield (
            f"int8 turns a token's states: a least cosine of {least_cosine:.3f} on tokens at "
            f"random (healthy models: above {COSINE_LIMIT}), most noise from encoder.layer.{worst} "
            f"({noise[worst]:.1%}): freeze to bf16, or try `bertfast quantize --check` on your text"
        )
