"""Swaps the classes of a model's encoders and layers for fused ones, and back.

The modules, their parameters and their names stay: only `__class__` changes, to one of the same
name, so checkpoints, deepcopy, pickle, Trainer and gradient checkpointing see the model they know.
"""

from contextlib import contextmanager

from torch import nn

from ..encoder import Unfit
from ..encoder.replay import NO_GRAPHS, Counts, Graphs
from ..encoder.watch import Seen
from ..ops import registry
from .classes import fused
from .fused import FOREIGN, FusedEncoder, FusedLayer


class AccelerationError(RuntimeError):
    """`strict` was asked for and something is not fused; the message says what and why."""


class Report:
    """What `accelerate` did. It looks at the model when asked or printed, so it knows what has
    changed since."""

    def __init__(self, encoders: dict[str, FusedEncoder]):
        self._encoders = encoders

    @property
    def layers(self) -> dict[str, str | None]:
        """Each encoder layer's name: None where it can run fused, else the reason."""
        found = {}
        for name, encoder in self._encoders.items():
            for i, layer in enumerate(encoder.layer):
                if isinstance(layer, FusedLayer):
                    fit = layer.describe()
                    why = str(fit) if isinstance(fit, Unfit) else None
                else:
                    why = FOREIGN.format(type(layer).__name__)
                found[f"{name}.layer.{i}".lstrip(".")] = why
        return found

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

    def __str__(self):
        if not self._encoders:
            return "bertfast: no encoder of a family that bertfast knows; nothing changed"
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


PADDING = ("auto", "stock", "zeros")


def accelerate(
    model: nn.Module,
    backend: str = "auto",
    strict: bool = False,
    padding: str = "auto",
    graphs: bool = True,
) -> Report:
    """Run the BERT-family encoders inside `model` on bertfast's kernels, in place.

    Args:
        model: any module that holds one: a transformers model with any head, a
            SentenceTransformer, a CrossEncoder. Accelerating twice is harmless.
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

    Raises: TypeError for what is no module, ValueError for an unknown backend, AccelerationError
    under `strict`.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"accelerate got a {type(model).__name__}, expected a torch.nn.Module; "
            "of a pipeline or a trainer, give its .model"
        )
    if backend != "auto" and backend not in registry.BACKENDS:
        raise ValueError(
            f"unknown backend {backend!r}; expected auto, {', '.join(registry.BACKENDS)}"
        )
    if padding not in PADDING:
        raise ValueError(f"unknown padding {padding!r}; expected {', '.join(PADDING)}")
    swapped = []
    for module in model.modules():
        cls = fused(type(module))
        if cls is not None:
            module.__class__ = cls
            swapped.append(module)
    encoders = {n: m for n, m in model.named_modules() if isinstance(m, FusedEncoder)}
    report = Report(encoders)
    reasons = [f"{name}: {reason}" for name, reason in report.layers.items() if reason]
    if strict and (reasons or not encoders):
        _restore(swapped)
        raise AccelerationError("\n".join(reasons) or str(report))
    for encoder in encoders.values():
        encoder.bertfast_backend, encoder.bertfast_padding = backend, padding
        encoder.bertfast_graphs = (encoder.bertfast_graphs or Graphs()) if graphs else None
        encoder.bertfast_seen = encoder.bertfast_seen or Seen()
    return report


def restore(model: nn.Module) -> None:
    """The exact inverse of `accelerate`; harmless on a model that isn't accelerated.

    Raises: ValueError where another class has been laid over ours since (FSDP2's `fully_shard`), or
    for a frozen encoder.
    """
    _restore(model.modules())


def _restore(modules):
    modules = [m for m in modules if isinstance(m, FusedEncoder | FusedLayer)]
    for module in modules:
        if type(module).stock not in type(module).__bases__:
            raise ValueError(
                f"a {type(module).__name__} has been made of an accelerated layer since: restore "
                "the model before it is sharded"
            )
        if isinstance(module, FusedEncoder) and module.packed is not None:
            raise ValueError(
                f"a {type(module).__name__} is frozen, its layers are gone: load the model anew"
            )
    for module in modules:
        for name in FusedEncoder.SETTINGS:
            vars(module).pop(name, None)
        module.__class__ = type(module).stock


def is_accelerated(model: nn.Module) -> bool:
    """Whether an encoder inside is accelerated."""
    return any(isinstance(m, FusedEncoder) for m in model.modules())


@contextmanager
def accelerated(model: nn.Module, *args, **options):
    """`with accelerated(model) as report:` accelerates inside the block; arguments as there."""
    was = is_accelerated(model)
    report = accelerate(model, *args, **options)
    try:
        yield report
    finally:
        if not was:
            restore(model)
