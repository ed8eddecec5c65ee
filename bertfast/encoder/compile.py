"""What `watch.outside_graphs` needs of torch's compiler; imported while that traces, for it brings
200 MB."""

from collections.abc import Callable
from typing import Any

import torch
from torch._dynamo.symbolic_convert import InstructionTranslator


@torch.compiler.assume_constant_result
def unbroken() -> bool:
    """Whether the graph that is being traced may not break (`fullgraph=True`)."""
    tracer = InstructionTranslator.current_tx()
    return bool(tracer.one_graph or getattr(tracer, "error_on_graph_break", False))


@torch.compiler.disable
def outside(method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return method(*args, **kwargs)
