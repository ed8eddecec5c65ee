"""Inference at the best speed: the encoder's layers run by one call into C++, on a CPU with the
weights packed once, in fp32, bf16 or int8; frozen_cuda.py is a GPU's."""

import warnings
from itertools import groupby

import torch
from torch import nn

from .. import heap
from ..ops import registry
from ..ops.extension import C, error
from ..ops.library import CPU_DTYPES, CUDA_DEVICE, cuda_limit, is_bf16, plain
from ..ops.linear_act import ACTIVATIONS as OPERATOR_ACTIVATIONS
from . import watch
from .encoder import ENCODER_TYPES, BertEmbeddings, BertEncoder
from .layer import ACTIVATIONS, LayerWeights, rate
from .live import forward, serves
from .noise import NOISE_LIMIT, Sample, complaints

PRECISIONS = ("fp32", "bf16", "int8")


class _Packed:
    """The linear layers' weights side by side, packed; `pointer` is what C++ takes. In int8 the
    layer takes its input less `center`, [in_features]."""

    def __init__(self, layers, precision: int, center=None):
        weight = torch.cat([m.weight.detach().float() for m in layers])
        bias = torch.cat([m.bias.detach().float() for m in layers])
        if center is not None and PRECISIONS[precision] == "int8":
            bias += weight @ center.detach().float()
        n, k = weight.shape
        size = C.packed_bytes(n, k, precision) + 64
        self.storage = torch.empty(size, dtype=torch.uint8, device="cpu")
        self.pointer = -(-self.storage.data_ptr() // 64) * 64
        C.pack_weights(weight.data_ptr(), bias.data_ptr(), n, k, precision, self.pointer)


class _LayerWeights:
    """A layer's, packed; `center` is the bias of the LayerNorm before it."""

    def __init__(self, layer, precision: str, center):
        self.center, self.precision = center, PRECISIONS.index(precision)
        inner, out = layer.attention.self, layer.attention.output
        qkv, qkv_precision = (inner.query, inner.key, inner.value), C.qkv_precision(self.precision)
        self.packed = {
            "qkv": _Packed(qkv, qkv_precision, center),
            "out": _Packed((out.dense,), self.precision),
            "up": _Packed((layer.intermediate.dense,), self.precision, out.LayerNorm.bias),
            "down": _Packed((layer.output.dense,), self.precision),
        }
        self.norms = [
            tuple(p.detach().float().clone() for p in (norm.weight, norm.bias))
            for norm in (out.LayerNorm, layer.output.LayerNorm)
        ]

    def encoder(self, config, others=()):
        """Of this layer and those behind it; whoever holds it must hold them."""
        spec = C.LayerSpec(
            hidden=config.hidden_size,
            heads=config.num_attention_heads,
            inner=config.intermediate_size,
            activation=OPERATOR_ACTIVATIONS.index(ACTIVATIONS[config.hidden_act]),
            eps=config.layer_norm_eps,
        )
        layers = []
        for w in (self, *others):
            norm1, norm2 = (tuple(p.data_ptr() for p in norm) for norm in w.norms)
            matrices = {name: p.pointer for name, p in w.packed.items()}
            layers.append(C.PackedLayer(**matrices, norm1=norm1, norm2=norm2))
        return C.Encoder(spec, layers, self.precision, self.center.data_ptr())


class Frozen(nn.Module):
    """An encoder for inference alone. It has no parameters: the weights can't be trained, saved or
    moved any more."""

    def __init__(self, encoder, config, precision: str):
        super().__init__()
        self.precision, self.hidden, self.layers = precision, config.hidden_size, len(encoder.layer)
        self.dtype = next(encoder.parameters()).dtype  # of the result

    def forward(
        self, hidden, packing, seeds=None, collect=None, rows=None, keep_qkv=False, number=None
    ):
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

    def __reduce__(self):
        raise TypeError(
            "a frozen encoder can't be copied or pickled: copy the model before bertfast.freeze"
        )

    def extra_repr(self):
        return f"{self.layers} layers, {self.precision}"


class FrozenEncoder(Frozen):
    """What `freeze` puts in a BertEncoder's place on a CPU: the same results, for inference alone.

    fp32: every product in fp32. bf16: weights and activations of products in bf16, sums, softmax,
    layer norm and the residual stream in fp32. int8: weights per output channel, activations in
    uint8 between the least and the largest of a token as they come (no calibration; fp32 without
    AVX2), after a layer norm before its bias is added, attention and its queries, keys and values
    in bf16. Where the processor has no bf16 dot product, bf16 weights are widened as they are read
    and attention is in fp32; int8 with AVX2 then projects queries, keys and values in int8 too.
    Without VNNI int8 weights are scaled so that no sum in 16 bits overflows. A layer that int8 puts
    too much noise into, for its outliers, stays in bf16: `noise` has each layer's in int8 and
    `least_cosine` the whole's, see noise.py.
    """

    def __init__(self, encoder, config, precision: str, embeddings):
        super().__init__(encoder, config, precision)
        self.noise: list[float] = []
        center = embeddings.LayerNorm.bias.detach().float().clone()
        chosen = []  # of each layer: its precision, its weights, the bias of the norm before it
        sample = Sample.of(embeddings, config) if precision == "int8" else None
        for layer in encoder.layer:
            found, weights = precision, _LayerWeights(layer, precision, center)
            if sample is not None:
                sample, noise = sample.through(layer, weights.encoder(config))
                self.noise.append(noise)
                if not noise <= NOISE_LIMIT:  # or NaN
                    found, weights = "bf16", _LayerWeights(layer, "bf16", center)
            chosen.append((found, weights))
            center = weights.norms[-1][1]
            layer.to("meta")  # frees the originals, layer by layer
        self._keep, self._runs, first = [w for _, w in chosen], [], 0
        for _, group in groupby(chosen, key=lambda c: c[0]):
            weights = [w for _, w in group]
            last = first + len(weights)
            self._runs.append((first, last, weights[0].encoder(config, weights[1:])))
            first = last
        if sample is not None:
            self.least_cosine = sample.least_cosine(self)

    @property
    def kept(self) -> list[int]:
        """The layers that stayed in bf16 where int8 was asked for."""
        return [i for i, noise in enumerate(self.noise) if not noise <= NOISE_LIMIT]

    def complaints(self) -> list[str]:
        """What int8 does to this model that its user should know."""
        return [*complaints(self.noise, self.kept, self.least_cosine)]

    def extra_repr(self):
        kept = f", {len(self.kept)} in bf16" if self.kept else ""
        return super().extra_repr() + kept

    def _run(self, first, last, hidden, packing, rows):
        for start, end, encoder in self._runs:
            a, b = max(first, start), min(last, end)
            if a < b:
                done = b == last  # between runs the residual stream stays in fp32
                dtype, wanted = (self.dtype, rows) if done else (torch.float32, None)
                layers = a - start, b - start
                hidden = forward(encoder, self.hidden, *layers, hidden, dtype, packing, wanted)
        return hidden

    def texts(self, embeddings, ids, mask, types):
        """A padded batch from its ids to its states by one call, for which Python's own time for
        packing, embedding and unpacking is a third of a short text's.

        Args:
            embeddings: the model's `BertEmbeddings`.
            ids, mask, types: int64 [batch, seqlen]; the last two may be None.

        Returns: [batch, seqlen, hidden], zeros at the padding; None where somebody watches the
        modules or the arguments are others, for the modules to take or refuse.

        Raises: IndexError for ids out of range.
        """
        tables = embeddings.tables()
        if tables is None:
            return None
        words, positions, kinds = tables[:3]
        given = [t for t in (ids, mask, types) if t is not None]
        if not (
            len(self._runs) == 1
            and serves(words.detach())
            and not torch.is_autocast_enabled("cpu")
            and watch.limit((self, embeddings), (FrozenEncoder, BertEmbeddings)) is None
            and not (self.training or rate(embeddings.dropout))
            and all(
                type(t) is torch.Tensor
                and plain(t)
                and t.dtype == torch.int64
                and t.device.type == "cpu"
                and t.dim() == 2
                and t.shape == ids.shape
                and t.is_contiguous()
                for t in given
            )
            and ids.numel()
            and ids.shape[1] <= len(positions)
            and all(
                t.dtype == words.dtype
                and plain(t)
                and t.dim() == rank
                and t.shape[-1] == self.hidden
                and t.is_contiguous()
                for t, rank in zip(tables, (2, 2, 2, 1, 1), strict=True)
            )
        ):
            return None
        shape = (*ids.shape, self.hidden)
        x = torch.empty(shape, dtype=words.dtype, device="cpu")
        packed, states = (torch.empty(shape, dtype=self.dtype, device="cpu") for _ in range(2))
        self._runs[0][2].texts(
            *(
                [t.data_ptr() for t in tables],
                is_bf16(words),
                embeddings.LayerNorm.eps,
                len(words),
                len(kinds),
            ),
            *(ids.data_ptr(), *(0 if t is None else t.data_ptr() for t in (mask, types))),
            *(*ids.shape, x.data_ptr(), packed.data_ptr(), states.data_ptr(), is_bf16(states)),
        )
        return states


def _check_plain(encoder, model):
    """ValueError for an encoder that packed weights can't stand for."""
    name = next(name for name, m in model.named_modules() if m is encoder)
    for path, m in encoder.named_modules(prefix=name):
        known = type(m) in ENCODER_TYPES
        why = watch.plain(m, type(m)) if known else f"it is a {watch.class_name(m)}"
        if why:
            raise ValueError(
                f"{path} can't be frozen: {why}. Merge adapters (peft's merge_and_unload), remove "
                "hooks and parametrizations, or put a plain module back before bertfast.freeze"
            )
    config = model.config
    shapes = LayerWeights.shapes(config.hidden_size, config.intermediate_size)
    for i, layer in enumerate(encoder.layer):
        found, where = layer.arithmetic(), f"{name}.layer.{i} can't be frozen"
        if found is None or found[1].eps != config.layer_norm_eps:
            raise ValueError(
                f"{where}: its LayerNorms' eps are not the configuration's {config.layer_norm_eps}"
            )
        for role, p, shape in zip(LayerWeights._fields, found[0], shapes, strict=True):
            if p.shape != shape:
                raise ValueError(
                    f"{where}: {role} has shape {list(p.shape)}, expected {list(shape)} by the "
                    "configuration"
                )


def freeze(model, precision: str = "fp32"):
    """Make a model an inference model, in place, and return it.

    Args:
        model: a bertfast BERT model with any head.
        precision: of the encoder's weights and products. On a CPU "fp32", "bf16" or "int8", see
            `FrozenEncoder`, where layers that int8 suits ill stay in bf16, with a warning that
            names them; on a GPU (or where `bertfast.backend("cuda")` is forced) "bf16" or
            "fp16", see `FrozenCudaEncoder`. Below fp32 the embedding tables become bf16 (fp16) as
            well, unless a language model's head shares them.

    Raises: ValueError for an unknown precision or a model that can't be frozen (one whose encoder
    holds adapters, hooks or parametrizations), RuntimeError without the compiled extension.
    """
    from .frozen_cuda import PRECISIONS as CUDA_PRECISIONS
    from .frozen_cuda import FrozenCudaEncoder

    where = {p.device.type for p in model.parameters()}
    cuda = where == {"cuda"} or registry.forced() == "cuda"
    known = CUDA_PRECISIONS if cuda else PRECISIONS
    if precision not in known:
        raise ValueError(
            f"precision is {precision!r}, expected one of {', '.join(known)} on a "
            f"{'GPU' if cuda else 'CPU'}"
        )
    why = cuda_limit(CUDA_DEVICE, None, ()) if cuda else error if C is None else None
    if why:
        raise RuntimeError(f"freeze needs the C++ kernels: {why}")
    base = getattr(model, getattr(model, "base_model_prefix", ""), model)
    encoder = getattr(base, "encoder", None)
    if not isinstance(encoder, BertEncoder):
        raise ValueError(
            f"freeze takes a bertfast model that isn't frozen yet, not a {type(model).__name__} "
            f"with a {type(encoder).__name__}"
        )
    _check_plain(encoder, model)
    device = CUDA_DEVICE if cuda else "cpu"
    if where != {device}:
        raise ValueError(
            f"the model is on {', '.join(sorted(where))}, expected all of it on {device}: move it "
            "before bertfast.freeze"
        )
    dtypes = {p.dtype for p in model.parameters()}
    if not cuda and not dtypes <= set(CPU_DTYPES):
        raise ValueError(
            f"the model is in {', '.join(sorted(map(str, dtypes)))}, expected torch.float32 or "
            "torch.bfloat16 on a CPU: model.float() before bertfast.freeze"
        )
    config, model = model.config, model.eval()
    head_dim = config.hidden_size // config.num_attention_heads
    if not cuda and precision != "fp32" and head_dim % 2:
        raise ValueError(
            f"heads of {head_dim} can't be packed in {precision}, which takes pairs; use fp32"
        )
    if cuda:
        base.encoder = FrozenCudaEncoder(encoder, config, precision)
    else:
        base.encoder = FrozenEncoder(encoder, config, precision, base.embeddings)
    if precision != "fp32" and not hasattr(model, "get_output_embeddings"):
        base.embeddings.to(CUDA_PRECISIONS.get(precision, torch.bfloat16))
    heap.release_freed()
    model.requires_grad_(False).eval()
    # Last, for a warning may be made an error.
    for text in base.encoder.complaints() if precision == "int8" else ():
        warnings.warn(text, stacklevel=2)
    return model
