"""Weights laid out once, for inference alone: what has them in the place of layers."""

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, NoReturn, TypeAlias, get_args

import torch

from .batch import Batch
from .replay import Graphs
from .run import Choice
from .spec import Layer, Layers, LayerSpec, Unfit
from .watch import Seen

if TYPE_CHECKING:
    from torch.nn import Module as Mixed  # what it is mixed into
    from transformers import PreTrainedConfig
else:
    Mixed = object

PRECISIONS = ("fp32", "bf16", "int8")
Precision: TypeAlias = Literal["fp32", "bf16", "fp16", "int8", "auto"]
Padding: TypeAlias = Literal["auto", "stock", "zeros"]  # see `accelerate`
PADDING: tuple[Padding, ...] = get_args(Padding)
CUDA_PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Freezable(Mixed):
    """Mixed into an encoder's class: what was read off its layers, and their graphs.
    `bertfast.freeze` takes the layers and sets `packed`."""

    LAYERS = "layer"  # where they are
    layer: Any
    packed: Any = None  # a `Packed`: the encoder's layers are gone
    bertfast_padding = "auto"  # one of `PADDING`; bertfast's own models have zeros there
    bertfast_graphs: Graphs | None = None  # None: it is never replayed
    bertfast_seen: Seen | None = None  # what was read off the layers

    def settings(self) -> "PreTrainedConfig":
        """The model's configuration."""
        raise NotImplementedError

    def read(self) -> list[Layer | Unfit]:
        """What kernels take in the layers' places, or why they can't."""
        raise NotImplementedError

    def path(self, name: str, *layer: int) -> str:
        """Of its layers, or of one, where `name` is the encoder's."""
        return ".".join(map(str, [*filter(None, (name, self.LAYERS)), *layer]))

    def sizes(self) -> object:
        """What `read` depends on besides the layers."""

    def describe(self) -> list[Layer | Unfit]:
        """`read`, asked at every forward: a model can change between two."""
        if self.bertfast_seen is None or torch.compiler.is_compiling():
            return self.read()
        root = self.get_submodule(self.LAYERS)
        return self.bertfast_seen.get(root, self.sizes(), lambda: Layers(self.read()))

    def empty(self) -> None:
        """Takes the layers out, for `packed` to take their place."""
        del self.get_submodule(self.LAYERS)[:]
        self.bertfast_seen = None
        if self.bertfast_graphs is not None:
            self.bertfast_graphs.release()

    def _save_to_state_dict(self, *args):
        if self.packed is not None:
            raise ValueError(
                "a frozen model has no state_dict, its layers' weights are packed: save it by "
                "bertfast.save_frozen, or before bertfast.freeze"
            )
        super()._save_to_state_dict(*args)

    def _replicate_for_data_parallel(self):
        replica = super()._replicate_for_data_parallel()
        replica.bertfast_graphs = replica.bertfast_seen = None  # those are of other weights
        return replica

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        if self.bertfast_graphs is not None:
            self.bertfast_graphs.look()
        return self


class Packed:
    """An encoder's layers for inference.

    size, count: the hidden size, and of how many layers. dtype: of the results. config: the
    model's. why: this precision was chosen, where `freeze` chose it.
    """

    choice: Choice
    why: str | None = None

    def __init__(
        self, specs: list[LayerSpec], precision: str, dtype: torch.dtype, config: "PreTrainedConfig"
    ) -> None:
        self.precision, self.dtype, self.config = precision, dtype, config
        self.size, self.count = specs[0].hidden, len(specs)

    def run(
        self,
        batch: Batch,
        training: bool,
        collect: Callable[[torch.Tensor], object] | None = None,
        graphs: Graphs | None = None,
    ) -> torch.Tensor:
        """[tokens or rows, hidden]; `collect(hidden)` sees each layer's; graphs: see `run.run`.

        Raises: RuntimeError in training mode, or where gradients are wanted.
        """
        if training or (torch.is_grad_enabled() and batch.hidden.requires_grad):
            raise RuntimeError(
                "a frozen model is for inference: call it in eval mode under "
                "torch.inference_mode(), or train the model before bertfast.freeze"
            )
        batch.check(self.size)
        if collect is None:
            return self._run(0, self.count, batch, graphs)
        hidden, rows = batch.hidden, batch.rows
        for i in range(self.count):
            hidden = self._run(i, i + 1, batch._replace(hidden=hidden, rows=None))
            collect(hidden)
        return hidden if rows is None else hidden[rows]

    def complaints(self) -> list[str]:
        """What the precision does to this model that its user should know."""
        return []

    def __deepcopy__(self, memo: dict[int, Any]) -> "Packed":
        new = object.__new__(type(self))
        new.__dict__ |= self.__dict__ | {"config": copy.deepcopy(self.config, memo)}
        return new

    def __str__(self) -> str:
        return f"{self.count} layers, {self.precision}" + (f" ({self.why})" if self.why else "")


class Lost:
    """In the place of layers that `freeze` had taken out to pack when it was stopped."""

    def __init__(self, config: "PreTrainedConfig") -> None:
        self.config = config

    def __str__(self) -> str:
        return "stopped before its layers were packed: load the model anew"

    def run(self, *_: object) -> NoReturn:
        raise RuntimeError(
            "bertfast.freeze was stopped while it packed these layers, which are gone: load the "
            "model anew"
        )
