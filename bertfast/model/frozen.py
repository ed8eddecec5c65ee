"""Inference at the best speed a CPU allows: the encoder's weights packed once, in fp32, bf16 or
int8, and run by one call into C++."""

import ctypes
from contextlib import suppress

import torch
from torch import nn

from ..ops.extension import C, error
from ..ops.library import is_bf16
from ..ops.linear_act import ACTIVATIONS as OPERATOR_ACTIVATIONS
from .layer import ACTIVATIONS

PRECISIONS = ("fp32", "bf16", "int8")


class _Packed:
    """The linear layers' weights side by side, packed; `pointer` is what C++ takes."""

    def __init__(self, layers, precision: str, low: float = 0.0):
        precision = PRECISIONS.index(precision)
        weight = torch.cat([m.weight.detach().float() for m in layers])
        bias = torch.cat([m.bias.detach().float() for m in layers])
        n, k = weight.shape
        self.storage = torch.empty(C.packed_bytes(n, k, precision) + 64, dtype=torch.uint8)
        self.pointer = -(-self.storage.data_ptr() // 64) * 64
        C.pack_weights(weight.data_ptr(), bias.data_ptr(), n, k, precision, low, self.pointer)


class FrozenEncoder(nn.Module):
    """What `freeze` puts in a BertEncoder's place: the same results, for inference alone.

    fp32: every product in fp32. bf16: weights and activations of products in bf16, sums, softmax,
    layer norm and the residual stream in fp32. int8: weights per output channel, activations per
    token as they come (no calibration), attention and its queries, keys and values in bf16. Where
    the processor has no int8 or bf16 dot product, weights are stored so and widened as they are
    read.

    It has no parameters: the weights can't be trained, saved or moved any more.
    """

    def __init__(self, encoder, config, precision: str):
        super().__init__()
        self.precision, self.hidden, self.layers = precision, config.hidden_size, len(encoder.layer)
        activation = ACTIVATIONS[config.hidden_act]
        # The activations are bounded below, so their int8 need no sign: a bit more for each.
        low = -0.1701 if activation.startswith("gelu") else 0.0
        self.dtype = next(encoder.parameters()).dtype  # of the result
        self._keep, rows = [], []
        for layer in encoder.layer:
            inner, out = layer.attention.self, layer.attention.output
            packed = [
                _Packed(
                    (inner.query, inner.key, inner.value),
                    "bf16" if precision == "int8" else precision,
                ),
                _Packed((out.dense,), precision),
                _Packed((layer.intermediate.dense,), precision),
                _Packed((layer.output.dense,), precision, low),
            ]
            norms = [
                p.detach().float().clone()
                for norm in (out.LayerNorm, layer.output.LayerNorm)
                for p in (norm.weight, norm.bias)
            ]
            self._keep += packed + norms
            rows.append([p.pointer for p in packed] + [n.data_ptr() for n in norms])
            layer.to("meta")  # frees the originals, layer by layer
        self._encoder = C.Encoder(
            rows,
            config.num_attention_heads,
            config.hidden_size,
            config.intermediate_size,
            OPERATOR_ACTIVATIONS.index(activation),
            config.layer_norm_eps,
            low,
            PRECISIONS.index(precision),
        )

    def forward(self, hidden, packing, seeds=None, collect=None, rows=None):
        """As BertEncoder's, but `collect` gets no queries, keys and values."""
        if self.training or (torch.is_grad_enabled() and hidden.requires_grad):
            raise RuntimeError(
                "a frozen model is for inference: call it in eval mode under "
                "torch.inference_mode(), or train the model before bertfast.freeze"
            )
        if collect is None:
            return self._run(0, self.layers, hidden, packing, rows)
        for i in range(self.layers):
            hidden = self._run(i, i + 1, hidden, packing, None)
            collect(hidden, None)
        return hidden if rows is None else hidden[rows]

    def _run(self, first, last, hidden, packing, rows):
        hidden, offsets = hidden.contiguous(), packing.cu_seqlens
        count = len(hidden) if rows is None else len(rows)
        out = torch.empty((count, self.hidden), dtype=self.dtype)
        self._encoder.forward(
            *(first, last, hidden.data_ptr(), is_bf16(hidden), out.data_ptr(), is_bf16(out)),
            *(offsets.data_ptr(), len(offsets) - 1, len(hidden)),
            *((0, 0) if rows is None else (rows.data_ptr(), len(rows))),
        )
        return out

    def __reduce__(self):
        raise TypeError(
            "a frozen encoder can't be copied or pickled: copy the model before bertfast.freeze"
        )

    def extra_repr(self):
        return f"{self.layers} layers, {self.precision}"


def _release_freed():
    """Gives the system what the original weights took: glibc keeps freed blocks that lie below
    others (BERT-base: 118 MB)."""
    with suppress(AttributeError, OSError, TypeError):  # of another C library
        ctypes.CDLL(None).malloc_trim(0)


def freeze(model, precision: str = "fp32"):
    """Make a model on the CPU an inference model, in place, and return it.

    Args:
        model: a bertfast BERT model with any head.
        precision: "fp32", "bf16" or "int8" of the encoder's weights and products, see
            `FrozenEncoder`. With bf16 and int8 the embedding tables become bf16 as well, unless
            a language model's head shares them.

    Raises: ValueError for an unknown precision or a model that can't be frozen, RuntimeError
    without the compiled extension.
    """
    from .encoder import BertEncoder

    if precision not in PRECISIONS:
        raise ValueError(f"precision is {precision!r}, expected one of {', '.join(PRECISIONS)}")
    if C is None:
        raise RuntimeError(f"freeze needs the C++ kernels: {error}")
    base = getattr(model, getattr(model, "base_model_prefix", ""), model)
    encoder = getattr(base, "encoder", None)
    if not isinstance(encoder, BertEncoder):
        raise ValueError(
            f"freeze takes a bertfast model that isn't frozen yet, not a {type(model).__name__} "
            f"with a {type(encoder).__name__}"
        )
    where = {p.device.type for p in model.parameters()}
    if where != {"cpu"}:
        raise ValueError(f"the model is on {', '.join(sorted(where))}, freeze takes the cpu's")
    config = model.config
    if precision != "fp32" and config.hidden_size // config.num_attention_heads % 2:
        raise ValueError(
            f"heads of {config.hidden_size // config.num_attention_heads} can't be packed in "
            f"{precision}, which takes pairs; use fp32"
        )
    base.encoder = FrozenEncoder(encoder, config, precision)
    if precision != "fp32" and not hasattr(model, "get_output_embeddings"):
        base.embeddings.to(torch.bfloat16)
    _release_freed()
    model.requires_grad_(False)
    return model.eval()
