"""Inference at the best speed: an encoder's weights laid out once."""

import logging
import sys
import warnings
from collections.abc import Iterable, Mapping
from contextlib import contextmanager
from typing import NamedTuple, TypeAlias, TypeVar

import torch

from . import heap
from .encoder import Layer, Unfit, adapters, choice, watch
from .encoder.noise import Sample
from .encoder.packed import CUDA_PRECISIONS, PRECISIONS, Freezable, Lost, Precision
from .encoder.packed_cpu import PackedCpu
from .encoder.packed_cuda import PackedCuda
from .encoder.weights import FLAT, shapes
from .ops import registry
from .ops.extension import C, error
from .ops.library import CPU_DTYPES, CUDA_DEVICE, cuda_limit

M = TypeVar("M")
Texts: TypeAlias = str | Iterable[str] | Mapping[str, torch.Tensor]

_TEXTS, _TOKENS = 64, 512  # of a sample: how many, and how long at most


def freeze(model: M, precision: Precision = "fp32", texts: Texts | None = None) -> M:
    """Make a model an inference model, in place, and return it.

    Args:
        model: a bertfast BERT model with any head, or whatever `accelerate` takes, which it need
            not have taken yet: a model of transformers, a SentenceTransformer, a CrossEncoder, a
            SparseEncoder, a pipeline.
        precision: of the encoder's weights and products. On a CPU "fp32", "bf16" or "int8", where
            layers that int8 suits ill stay in bf16, with a warning that names them; on a GPU (or
            where `bertfast.backend("cuda")` is forced) "bf16" or "fp16". Below fp32 the embedding
            tables of a bertfast model become bf16 (fp16) as well, unless a language model's head
            shares them. "auto": the fastest of them here that keeps the states of `texts`, by a
            mean cosine of 0.998 to fp32's; logged, and in `accelerate`'s report.
        texts: for "auto", and for int8's noise and what smooths its inputs: strings, for the
            model's tokenizer, or what a tokenizer returned, tensors by name. None: a sample of
            English, or tokens at random for a model without a tokenizer, and for "int8".

    The encoder's layers are gone: it can't be trained or moved any more, and is saved by
    `save_frozen`. Copies share the packed weights.

    Raises: TypeError for what neither is nor has a module, ValueError for an unknown precision or a
    model that can't be frozen (one whose encoder holds adapters, hooks or parametrizations),
    RuntimeError without the compiled extension, and what the model raises for `texts`. The model is
    left as it was, but where packing itself is stopped, by Ctrl-C say: its calls then raise.
    """
    roots = _roots(model)
    where = {p.device.type for root in roots.values() for p in root.parameters()}
    cuda = where == {"cuda"} or registry.forced() == "cuda"
    known = CUDA_PRECISIONS if cuda else PRECISIONS
    if precision not in (*known, "auto"):
        raise ValueError(
            f"precision is {precision!r}, expected one of {', '.join(known)} on a "
            f"{'GPU' if cuda else 'CPU'}, or auto"
        )
    why = cuda_limit(CUDA_DEVICE, None, ()) if cuda else error if C is None else None
    if why:
        raise RuntimeError(f"freeze needs the C++ kernels: {why}")
    with _as_it_was(model, roots):
        if not _freezable(roots):
            from .dropin import accelerate

            accelerate(model)
        found = _found(roots)
        _check_device(roots, where, cuda)
        head_dim = max(one.layers[0].spec.head_dim for one in found)
        if not cuda and precision in ("bf16", "int8") and head_dim % 2:
            raise ValueError(
                f"heads of {head_dim} can't be packed in {precision}, which takes pairs; use fp32"
            )
        for root in roots.values():
            root.requires_grad_(False).eval()
        samples = [_sample(one, model, precision, texts) for one in found]
    encoders = [one.encoder for one in found]
    while found:
        _pack(found.pop(), precision, cuda, samples.pop())
    heap.release_freed()
    if "sentence_transformers" in sys.modules:
        _savable(roots)
    # Last, for a warning may be made an error.
    for encoder in encoders:
        if encoder.packed.why:
            logging.getLogger("bertfast").info(encoder.packed.why)
        for text in encoder.packed.complaints():
            warnings.warn(text, stacklevel=2)
    if precision == "bf16" and not cuda and not C.build_info()["bf16_products"]:
        warnings.warn(
            f"this processor ({C.build_info()['cpu_isa']}) has no products of bf16: frozen in bf16 "
            "a model is no faster than in fp32 and saves memory alone; int8 is faster, or auto",
            stacklevel=2,
        )
    return model


def _roots(model) -> dict[str, torch.nn.Module]:
    if isinstance(model, torch.nn.Module):
        return {"": model}
    from .dropin.holders import modules  # which brings transformers' models: 200 MB

    return modules(model)


@contextmanager
def _as_it_was(model, roots):
    """Where something stops `freeze` before it packs; it holds the layers, which packing frees."""
    was = _freezable(roots)
    modes = {m: m.training for root in roots.values() for m in root.modules()}
    grads = {p: p.requires_grad for root in roots.values() for p in root.parameters()}
    try:
        yield
    except BaseException:
        if not was:
            from .dropin import restore

            restore(model)
        for m, training in modes.items():
            m.training = training
        for p, asked in grads.items():
            p.requires_grad_(asked)
        raise


def _freezable(roots) -> list[Freezable]:
    return [m for root in roots.values() for m in root.modules() if isinstance(m, Freezable)]


class _Found(NamedTuple):
    root: torch.nn.Module
    owner: torch.nn.Module  # of the encoder
    around: list[torch.nn.Module]  # all that the encoder is in, the nearest first
    encoder: Freezable
    layers: list[Layer]


def _found(roots) -> list[_Found]:
    """Raises ValueError where there is none to freeze, or one can't be."""
    found = {}
    for path, root in roots.items():
        for name, m in root.named_modules():
            if isinstance(m, Freezable) and m.packed is None and m not in found:
                around = [root]
                for part in name.split(".")[:-1]:
                    around.insert(0, getattr(around[0], part))
                layers = _layers(".".join(filter(None, (path, name))), m)
                found[m] = _Found(root, around[0], around, m, layers)
    if not found:
        names = ", ".join(type(root).__name__ for root in roots.values())
        raise ValueError(
            f"freeze found no encoder that isn't frozen yet in a {names}: give a model of "
            "bertfast, or one that bertfast.accelerate takes"
        )
    return [*found.values()]


def _sample(found: _Found, model, precision, texts) -> Sample | None:
    """What the precision is tried on, where it is."""
    relative = found.layers[0].spec.relative
    if precision not in ("int8", "auto") and not relative:
        return None
    asked = texts is not None or precision == "auto"
    inputs = _inputs(found, model, texts) if asked else None
    return Sample.of(found.owner, found.encoder, found.encoder.settings(), inputs)


def _inputs(found: _Found, model, texts) -> dict | None:
    """What the encoder's own tokenizer makes of texts; None for tokens at random."""
    if hasattr(texts, "keys"):
        return dict(texts)
    holders = (*found.around, model, *found.root.modules())
    tokenizer = next(filter(callable, (getattr(m, "tokenizer", None) for m in holders)), None)
    if tokenizer is None:
        if texts is None:
            return None
        raise ValueError(
            "freeze was given texts for a model without a tokenizer: give what its tokenizer "
            'returns, tokenizer(texts, padding=True, truncation=True, return_tensors="pt")'
        )
    texts = [texts] if isinstance(texts, str) else [*(texts or choice.TEXTS)]
    if not texts or not all(isinstance(t, str) for t in texts):
        raise ValueError("texts are expected to be strings, one or more, or a tokenizer's tensors")
    texts = texts[:: -(-len(texts) // _TEXTS)]
    longest = min(tokenizer.model_max_length, _TOKENS)
    given = {"padding": True, "truncation": True, "max_length": longest, "return_tensors": "pt"}
    return dict(tokenizer(texts, **given))


def _pack(found: _Found, precision, cuda, sample) -> None:
    root, owner, _, encoder, layers = found
    config, dtype = encoder.settings(), layers[0].weights.query.weight.dtype
    center = _center(owner, layers[0].spec.hidden)
    auto, relative = precision == "auto", layers[0].spec.relative
    embeddings = sample.batch.relative.embeddings if relative else None

    def packed(layers, precision):
        given = layers, precision, dtype, config
        if cuda:
            return PackedCuda(*given)
        noticed = sample if precision == "int8" else None
        return PackedCpu.pack(*given, center, noticed, embeddings)

    why = None
    if auto and cuda:
        precision, why = "bf16", "auto: bf16 on a GPU"
    elif auto:
        narrow = PRECISIONS if layers[0].spec.head_dim % 2 == 0 else ("fp32",)
        all_of_them = {name: packed([*layers], name) for name in narrow}
        precision, why = choice.choose(all_of_them, sample.batch)
        encoder.packed = all_of_them[precision]
        encoder.empty()
    if encoder.packed is None:
        encoder.packed = Lost(config)  # for whoever is stopped here
        encoder.empty()  # so that `layers` alone has the weights
        encoder.packed = packed(layers, precision)
    encoder.packed.why = why
    embeddings = getattr(owner, "embeddings", None)
    own = hasattr(embeddings, "tables") and not hasattr(root, "get_output_embeddings")
    if precision != "fp32" and own:
        embeddings.to(CUDA_PRECISIONS.get(precision, torch.bfloat16))


def _savable(roots) -> None:
    """Of sentence-transformers' modules: `save_frozen` goes through their own `save`."""
    try:
        from .dropin.sentences import FrozenTransformer
    except ImportError:  # another version than those that have its module
        return
    for root in roots.values():
        for m in root.modules():
            if type(m) is FrozenTransformer.__base__:
                m.__class__ = FrozenTransformer


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


def _check_device(roots, where, cuda):
    device = CUDA_DEVICE if cuda else "cpu"
    if where != {device}:
        raise ValueError(
            f"the model is on {', '.join(sorted(where))}, expected all of it on {device}: move it "
            "before bertfast.freeze"
        )
    dtypes = {p.dtype for root in roots.values() for p in root.parameters()}
    if not cuda and not dtypes <= set(CPU_DTYPES):
        raise ValueError(
            f"the model is in {', '.join(sorted(map(str, dtypes)))}, expected torch.float32 or "
            "torch.bfloat16 on a CPU: model.float() before bertfast.freeze"
        )
