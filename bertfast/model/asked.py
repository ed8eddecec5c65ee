"""What a call asks of a model besides its inputs, in transformers' arguments."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from transformers.modeling_outputs import ModelOutput

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

Out = TypeVar("Out", bound=ModelOutput)


def refuse(arguments: Mapping[str, object]) -> None:
    """ValueError for one that asks for what no model of ours has."""
    for name, value in arguments.items():
        if value is not None and value is not False:
            raise ValueError(f"{name} is not supported: bertfast runs encoders without a cache")


def default(value: bool | None, config: "PreTrainedConfig", name: str) -> bool:
    """What is asked for, by the call or by the configuration."""
    return bool(getattr(config, name, False) if value is None else value)


def finish(
    output: Out, return_dict: bool | None, config: "PreTrainedConfig"
) -> Out | tuple[Any, ...]:
    """A ModelOutput, or its tuple where that is asked for."""
    if return_dict is None:
        return_dict = getattr(config, "return_dict", True)
    return output if return_dict else output.to_tuple()
