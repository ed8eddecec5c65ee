"""Who runs an encoder's layers: the first executor, in the order of `EXECUTORS`, whose `limit` lets
it."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias

import torch

from ..ops.library import unwatched
from ..ops.registry import Forcing
from . import watch
from .batch import Batch
from .executors import node, operators, whole_cpu, whole_cuda
from .spec import Layer, Unfit, of_layer

if TYPE_CHECKING:
    from .replay import Graphs

Executor: TypeAlias = Literal["whole_cpu", "whole_cuda", "node", "operators"]
EXECUTORS: dict[Executor, Any] = {  # the fastest first
    "whole_cpu": whole_cpu,
    "whole_cuda": whole_cuda,
    "node": node,
    "operators": operators,
}
_forcing = Forcing("executor", tuple(EXECUTORS))


def executor(name: Executor) -> AbstractContextManager[None]:
    """A block in which one executor runs every encoder of this thread.

    name: "whole_cpu", "whole_cuda" (all layers by one call, for inference), "node" (a node of
    autograd a layer) or "operators". One that can't serve a call raises RuntimeError naming the
    limit. The environment variable `BERTFAST_EXECUTOR` does the same for a whole process. Where
    kernels may not stand for a model's modules at all, the modules run.
    """
    return _forcing(name)


def forced() -> str | None:
    return _forcing.name()


class Choice(NamedTuple):
    name: str
    declined: dict[str, str]  # why each faster one can't

    def __str__(self) -> str:
        return "; ".join([self.name, *(f"{n}: {why}" for n, why in self.declined.items())])


def adapters_limit(layers: list[Layer]) -> str | None:
    """What keeps all but the operators, among which an adapter is called."""
    roles = dict.fromkeys([role for layer in layers for role in layer.adapters])
    return f"there is an adapter on {', '.join(roles)}" if roles else None


def choose(layers: list[Layer], batch: Batch) -> Choice:
    """Raises RuntimeError where one is forced that can't."""
    declined, wanted, device = {}, forced(), batch.hidden.device.type
    why = watch.dispatch_limit(batch.hidden) or adapters_limit(layers)
    for name, one in EXECUTORS.items():
        if name == wanted or (wanted is None and one.DEVICE in (None, device)):
            limit = why if one is not operators else None
            limit = limit or one.limit(layers, batch)
            if limit is None:
                return Choice(name, declined)
            declined[name] = limit
    raise RuntimeError(f"executor {wanted!r} can't run these layers: {declined[wanted]}")


def run(
    layers: list[Layer], batch: Batch, graphs: "Graphs | None" = None
) -> tuple[torch.Tensor, Choice]:
    """Packed tokens through all layers.

    graphs: the `replay.Graphs` of an encoder, whose calls may be replayed.

    Returns: [tokens or rows, hidden], and the `Choice` of who ran them: "node and operators" where
        some have adapters.

    Raises: TypeError, ValueError or IndexError for a batch that doesn't fit.
    """
    batch.check(layers[0].spec.hidden, values=unwatched())
    replayed = graphs is not None and not torch.compiler.is_compiling()
    found = graphs.run(layers, batch) if replayed else None
    if isinstance(found, tuple):
        return found
    names, declined, hidden, first = {}, {} if found is None else {"graph": found}, batch.hidden, 0
    for part in _parts(layers):
        last = first + len(part)
        own = batch._replace(
            hidden=hidden,
            rows=batch.rows if last == len(layers) else None,
            seeds=None if batch.seeds is None else of_layer(batch.seeds, first, last),
        )
        choice = choose(part, own)
        hidden, first = EXECUTORS[choice.name].run(part, own), last
        names[choice.name], declined = None, declined | choice.declined
    return hidden, Choice(" and ".join(names), declined)


def texts(
    layers: list[Layer],
    tables: Sequence[torch.Tensor],
    eps: float,
    ids: torch.Tensor,
    mask: torch.Tensor | None,
    types: torch.Tensor | None,
) -> torch.Tensor | None:
    """`whole_cpu.texts` by live layers, whose call `texts_fit`; None where others are to run it."""
    if not layers or any([isinstance(layer, Unfit) for layer in layers]):
        return None
    if not layers[0].spec.like_bert or tables[0].shape[1] != layers[0].spec.hidden:
        return None
    batch = Batch(tables[0], ids, ids.shape[1])  # stands for the call's: of its dtype and device
    if forced() not in (None, "whole_cpu") or adapters_limit(layers):
        return None
    if whole_cpu.limit(layers, batch):
        return None
    return whole_cpu.live_texts(layers, tables, eps, ids, mask, types)


def _parts(layers: list[Layer]) -> list[list[Layer]]:
    """As they follow each other, those with adapters and those without apart."""
    if not any([layer.adapters for layer in layers]):
        return [layers]  # itself, of which an executor keeps something
    parts = [[layers[0]]]  # by hand: dynamo can't trace itertools.groupby
    for layer in layers[1:]:
        if bool(layer.adapters) == bool(parts[-1][0].adapters):
            parts[-1].append(layer)
        else:
            parts.append([layer])
    return parts


def served() -> dict[str, str | None]:
    """Each executor: why it can't serve on this machine, or None."""
    from ..ops.extension import C, error
    from ..ops.library import cuda_limit

    gpu = None if torch.cuda.is_available() else "no GPU"
    return {
        "whole_cpu": error if C is None else None,
        "whole_cuda": gpu or cuda_limit("cuda", None, ()),
        "node": None,
        "operators": None,
    }
