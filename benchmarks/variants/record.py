"""A variant's launch as a `Spec`, for compiling without a GPU."""

from typing import NamedTuple

import torch
from bertfast.kernels.spec import Spec

_TYPES = {torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.int32: "*i32", torch.int64: "*i64"}


class Box(NamedTuple):
    """Stands for a tensor descriptor where there is nothing to describe."""

    rows: int
    columns: int


def spec_of(kernel, arguments: dict, warps, stages) -> Spec:
    types, constants = {}, {}
    for parameter in kernel.params:
        name, value = parameter.name, arguments[parameter.name]
        if isinstance(value, Box):
            types[name] = f"tensordesc<bf16{list(value)}>"
        elif parameter.is_constexpr or value is None:
            constants[name] = value
        elif isinstance(value, torch.Tensor):
            types[name] = _TYPES[value.dtype]
        else:
            types[name] = "fp32" if isinstance(value, float) else "i32"
    boxed = any(kind.startswith("tensordesc") for kind in types.values())
    return Spec(kernel, types, constants, warps, stages, 90 if boxed else 80)
