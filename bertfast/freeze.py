"""Inference at the best speed: an encoder's weights laid out once."""

import warnings

import torch

from . import heap
from .encoder import Layer, Unfit, adapters, watch
from .encoder.noise import Sample
from .encoder.packed import CUDA_PRECISIONS, PRECISIONS, Freezable, PackedCpu, PackedCuda
from .encoder.weights import FLAT, shapes
from .ops import registry
from .ops.extension import C, error
from .ops.library import CPU_DTYPES, CUDA_DEVICE, cuda_limit


def freeze(model, precision: str = "fp32"):
    """Make a model an inference model, in place, and return it.

    Args:
        model: a bertfast BERT model with any head, or one that `accelerate` has taken on.
        precision: of the encoder's weights and products. On a CPU "fp32", "bf16" or "int8", see
            `PackedCpu`, where layers that int8 suits ill stay in bf16, with a warning that names
            them; on a GPU (or where `bertfast.backend("cuda")` is forced) "bf16" or "fp16". Below
            fp32 the embedding tables of a bertfast model become bf16 (fp16) as well, unless a
            language model's head shares them.

    The encoder's layers are gone: it can't be trained, saved, copied or moved any more.

    Raises: TypeError for what is no module, ValueError for an unknown precision or a model that
    can't be frozen (one whose encoder holds adapters, hooks or parametrizations), RuntimeError
    without the compiled extension.
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(
            f"freeze got a {watch.class_name(model)}, expected a torch.nn.Module: of what holds a "
            "model, as a pipeline does, give that"
        )
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
    encoders = {
        name: m
        for name, m in model.named_modules()
        if isinstance(m, Freezable) and m.packed is None
    }
    if not encoders:
        raise ValueError(
            f"freeze found no encoder that isn't frozen yet in a {type(model).__name__}: give a "
            "model of bertfast, or one that bertfast.accelerate has taken on"
        )
    found = {name: _layers(name, encoder) for name, encoder in encoders.items()}
    _check_device(model, where, cuda)
    head_dim = max(layers[0].spec.head_dim for layers in found.values())
    if not cuda and precision != "fp32" and head_dim % 2:
        raise ValueError(
            f"heads of {head_dim} can't be packed in {precision}, which takes pairs; use fp32"
        )
    model.eval()
    for name, encoder in encoders.items():
        owner = model.get_submodule(name.rpartition(".")[0])
        _pack(encoder, owner, found.pop(name), precision, cuda)
        embeddings = getattr(owner, "embeddings", None)
        own = hasattr(embeddings, "tables") and not hasattr(model, "get_output_embeddings")
        if precision != "fp32" and own:
            embeddings.to(CUDA_PRECISIONS.get(precision, torch.bfloat16))
    heap.release_freed()
    model.requires_grad_(False).eval()
    # Last, for a warning may be made an error.
    for encoder in encoders.values():
        for text in encoder.packed.complaints():
            warnings.warn(text, stacklevel=2)
    return model


def _pack(encoder, owner, layers: list[Layer], precision, cuda) -> None:
    config, dtype = encoder.settings(), layers[0].weights.query.weight.dtype
    center = _center(owner, layers[0].spec.hidden)
    int8, relative = precision == "int8", layers[0].spec.relative
    sample = Sample.of(owner, encoder, config) if int8 or relative else None
    embeddings = sample.batch.relative.embeddings if relative else None
    del encoder.get_submodule(encoder.LAYERS)[:]  # so that `layers` alone has the weights
    encoder.bertfast_seen = None
    if encoder.bertfast_graphs is not None:
        encoder.bertfast_graphs.release()
    given = layers, precision, dtype, config
    if cuda:
        encoder.packed = PackedCuda(*given)
    else:
        encoder.packed = PackedCpu(*given, center, sample if int8 else None, embeddings)


def _center(owner, size):
    """The bias of the LayerNorm right before the first layer, where that is known; zeros do too."""
    norm = getattr(getattr(owner, "embeddings", None), "LayerNorm", None)
    known = type(norm) is torch.nn.LayerNorm and norm.normalized_shape == (size,)
    return norm.bias if known and not hasattr(owner, "embeddings_project") else torch.zeros(size)


def _layers(name: str, encoder) -> list[Layer]:
    """An encoder's. Raises ValueError for what packed weights can't stand for."""
    for path, m in encoder.named_modules(prefix=name):
        if adapters.unmerged(m):
            _refuse(path, f"it is a {watch.class_name(m)} that is not merged")
    watched = {name: encoder, encoder.path(name): encoder.get_submodule(encoder.LAYERS)}
    watched |= {encoder.path(name, i): layer for i, layer in enumerate(encoder.layer)}
    for path, m in watched.items():
        _refuse(path, watch.untouched(m, type(m)))
    found = encoder.read()
    for i, layer in enumerate(found):
        path = encoder.path(name, i)
        if isinstance(layer, Unfit):
            _refuse(f"{path}.{layer.where}".rstrip("."), layer.why)
        spec = found[0].spec
        if not spec.alike(layer.spec) or spec.width != spec.hidden:
            _refuse(path, f"it is {layer.spec}, expected {spec}, all heads")
        flat = layer.apart().flat()
        for p, shape, (role, _) in zip(flat, shapes(layer.spec), FLAT, strict=True):
            if p is not None and p.shape != shape:
                _refuse(path, f"{role} has shape {list(p.shape)}, expected {list(shape)}")
    if not found:
        _refuse(name, "it has no layers")
    return found


def _refuse(path, why):
    if why:
        raise ValueError(
            f"{path} can't be frozen: {why}. Merge adapters (peft's merge_and_unload), remove "
            "hooks and parametrizations, or put a plain module back before bertfast.freeze"
        )


def _check_device(model, where, cuda):
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
