"""Swaps the classes of a model's encoders and layers for fused ones, and back.

The modules, their parameters and their names stay: only `__class__` changes, to one of the same
name, so checkpoints, deepcopy, Trainer and gradient checkpointing see the model they know; a pickle
holds the stock model.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from itertools import chain, islice
from typing import Any, Literal

from torch import nn

from .. import families, ops
from ..encoder import Unfit
from ..encoder.packed import PADDING, Freezable, Padding
from ..encoder.replay import NO_GRAPHS, Counts, Graphs
from ..encoder.watch import Seen, class_name, kernel_limit
from ..ops import registry
from ..ops.registry import Backend
from .classes import fused
from .fused import FOREIGN, FusedEncoder, FusedLayer
from .holders import modules


class AccelerationError(RuntimeError):
    """`strict` was asked for and something is not fused; the message says what and why."""


class Report:
    """What `accelerate` did. It looks at the model when asked or printed, so it knows what has
    changed since."""

    def __init__(self, encoders: dict[str, FusedEncoder], models: dict[str, nn.Module]) -> None:
        self._encoders, self._models = encoders, models

    @property
    def layers(self) -> dict[str, str | None]:
        """Each encoder layer's name, once if it runs several times: None where it can run fused,
        else the reason."""
        return _layers(self._encoders)

    @property
    def fallbacks(self) -> dict[str, str | None]:
        """Each encoder's name: why its last forward ran unfused in all or some layers, or None."""
        return {name: encoder.bertfast_last.fallback for name, encoder in self._encoders.items()}

    @property
    def executors(self) -> dict[str, str | None]:
        """Each encoder's name: who ran the fused layers of its last forward (`bertfast.executor`
        has the names), and why nobody faster could."""
        return {name: encoder.bertfast_last.executor for name, encoder in self._encoders.items()}

    @property
    def graphs(self) -> dict[str, Counts]:
        """Each encoder's name: how many calls were replayed from CUDA graphs, and what these hold;
        `executors` says why the last call was not."""
        return {
            name: NO_GRAPHS if encoder.bertfast_graphs is None else encoder.bertfast_graphs.counts()
            for name, encoder in self._encoders.items()
        }

    @property
    def padding(self) -> dict[str, str | None]:
        """Each encoder's name: what became of the padded rows in its last forward and why, or None
        where that had no padding or ran unfused."""
        return {name: encoder.bertfast_last.padded for name, encoder in self._encoders.items()}

    @property
    def fused(self) -> int:
        """How many layers can run fused."""
        return sum(reason is None for reason in self.layers.values())

    def __str__(self) -> str:
        if not self._encoders:
            return _unknown(self._models)
        layers = self.layers
        lines = [f"bertfast: {self.fused} of {len(layers)} layers fused"]
        lines += [f"  {name}: {reason or 'fused'}" for name, reason in layers.items()]
        for name, encoder in self._encoders.items():
            name = name or "encoder"
            if encoder.packed is not None:
                lines.append(f"  {name}: frozen, {encoder.packed}")
            last = encoder.bertfast_last
            lines += [f"  {name}, last call: {last.fallback}"] * bool(last.fallback)
            lines += [f"  {name}, run by: {last.executor}"] * bool(last.executor)
            lines += [f"  {name}, padded rows: {last.padded}"] * bool(last.padded)
            graphs = encoder.bertfast_graphs
            lines += [f"  {name}, CUDA graphs: {graphs}"] * bool(graphs and any(graphs.counts()))
        return "\n".join(lines)

    __repr__ = __str__


def _layers(encoders, backend=None) -> dict[str, str | None]:
    """`Report.layers`, as by a backend that an encoder is to have."""
    found = {}
    for name, encoder in encoders.items():
        forced = backend or encoder.bertfast_backend
        with nullcontext() if forced == "auto" else ops.backend(forced):
            why = encoder.family.limit(encoder)
            for i, layer in enumerate(encoder.layer):
                found[encoder.path(name, i)] = why or _unfit(layer)
    return found


def _unfit(layer) -> str | None:
    """Why a layer can't run fused now, or None."""
    if not isinstance(layer, FusedLayer):
        return FOREIGN.format(class_name(layer))
    fit = layer.describe()
    if isinstance(fit, Unfit):
        return str(fit)
    weight = fit.weights.query.weight
    return kernel_limit(weight.device.type, weight.dtype)


def _unknown(models: dict[str, nn.Module]) -> str:
    """What is said of models without an encoder that is known."""
    from transformers import PreTrainedModel

    names = {class_name(m): None for m in models.values()}
    if any(isinstance(m, Freezable) for m in _inside(models)):
        return f"bertfast: nothing changed: {', '.join(names)} runs on these kernels as it is"
    for model in models.values():
        inside = (class_name(m) for m in model.modules() if isinstance(m, PreTrainedModel))
        names |= dict.fromkeys(islice(inside, 1))
    known = ", ".join(family.module.rpartition("modeling_")[2] for family in families.known())
    return (
        f"bertfast: no encoder of a family that is known here ({known}) in {', '.join(names)}: "
        "nothing changed. Other models of transformers can have their attention replaced: import "
        'bertfast.dropin and load them with attn_implementation="bertfast"'
    )


def accelerate(
    model: object,
    backend: Backend | Literal["auto"] = "auto",
    strict: bool = False,
    padding: Padding = "auto",
    graphs: bool = True,
) -> Report:
    """Run the BERT-family encoders inside `model` on bertfast's kernels, in place.

    Args:
        model: any module that holds one: a transformers model with any head, a
            SentenceTransformer, a CrossEncoder; or an object that has such modules in its
            attributes, or in theirs: a pipeline, a Trainer, a SetFitModel, embeddings of LangChain
            and LlamaIndex. Accelerating twice is harmless.
        backend: "auto", or the operators' backend to force ("reference", "cpu", ...).
        strict: raise if a layer can't be fused now, and change nothing.
        padding: of the rows of hidden states at padding. "auto": the stock model's, where anyone
            may read them; left out where what called the encoder is known not to look, as
            classifiers of column 0 and poolings with the mask are. "stock": never left out.
            "zeros": always left out, and zeros, which is faster and differs for who reads them.
        graphs: on a GPU, replay the layers' forward and backward from CUDA graphs, which are
            recorded when a size of batch comes for the second time. False, or the environment
            variable `BERTFAST_GRAPHS=0` for a whole process: launch every kernel, and keep no
            graph's memory.

    Returns: a `Report`; print it. What a layer can't do fused it does by its own class, as before.

    Raises: TypeError for what neither is nor has a module, ValueError for an unknown backend,
    AccelerationError under `strict`.
    """
    models = modules(model)
    if backend != "auto" and backend not in registry.BACKENDS:
        raise ValueError(
            f"unknown backend {backend!r}; expected auto, {', '.join(registry.BACKENDS)}"
        )
    if padding not in PADDING:
        raise ValueError(f"unknown padding {padding!r}; expected {', '.join(PADDING)}")
    swapped = []
    for module in _inside(models):
        for one, cls in fused(module):
            one.__class__ = cls
            swapped.append(one)
    encoders = {}
    for path, one in models.items():
        for name, module in one.named_modules(prefix=path):
            if isinstance(module, FusedEncoder) and module not in encoders.values():
                encoders[name] = module
    report, layers = Report(encoders, models), _layers(encoders, backend)
    reasons = [f"{name}: {reason}" for name, reason in layers.items() if reason]
    if strict and (reasons or not encoders):
        _restore(swapped)
        raise AccelerationError("\n".join(reasons) or str(report))
    for encoder in encoders.values():
        encoder.bertfast_backend, encoder.bertfast_padding = backend, padding
        encoder.bertfast_graphs = (encoder.bertfast_graphs or Graphs()) if graphs else None
        encoder.bertfast_seen = encoder.bertfast_seen or Seen()
    return report


def _inside(models: dict[str, nn.Module]) -> list[nn.Module]:
    """All modules, each once: a Trainer's two may be one in the other."""
    return [*dict.fromkeys(chain.from_iterable(m.modules() for m in models.values()))]


def restore(model: object) -> None:
    """The exact inverse of `accelerate`; harmless on a model that isn't accelerated.

    Raises: ValueError where another class has been laid over ours since (FSDP2's `fully_shard`), or
    for a frozen encoder.
    """
    _restore(_inside(modules(model)))


def _restore(candidates):
    swapped = [m for m in candidates if isinstance(m, FusedEncoder | FusedLayer)]
    for module in swapped:
        if type(module).stock not in type(module).__bases__:
            raise ValueError(
                f"a {type(module).__name__} has been made of an accelerated layer since: restore "
                "the model before it is sharded"
            )
        if isinstance(module, FusedEncoder) and module.packed is not None:
            raise ValueError(
                f"a {type(module).__name__} is frozen, its layers are gone: load the model anew"
            )
    for module in swapped:
        for name in getattr(module, "SETTINGS", ()):
            vars(module).pop(name, None)
        module.__class__ = type(module).stock


def is_accelerated(model: object) -> bool:
    """Whether an encoder inside is accelerated."""
    return any(isinstance(m, FusedEncoder) for m in _inside(modules(model)))


@contextmanager
def accelerated(model: object, *args: Any, **options: Any) -> Iterator[Report]:
    """`with accelerated(model) as report:` accelerates inside the block; arguments as there."""
    was = is_accelerated(model)
    report = accelerate(model, *args, **options)
    try:
        yield report
    finally:
        if not was:
            restore(model)
