"""How a kernel's variant is named for ahead-of-time compilation."""

from typing import Any, NamedTuple


class Spec(NamedTuple):
    """A variant of a kernel as its launcher starts it.

    types: each runtime argument's Triton type by name ("*bf16", "i32", "fp32",
    "tensordesc<bf16[128, 64]>"; pointers count as 16-byte aligned); constants: each constexpr
    argument's value, None for an absent pointer; arch: the oldest compute capability it runs on.
    """

    kernel: Any
    types: dict[str, str]
    constants: dict[str, Any]
    num_warps: int
    num_stages: int = 2
    arch: int = 80
