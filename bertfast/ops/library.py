"""How an operator becomes `torch.ops.bertfast.<name>`."""

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import forward_ad

from . import registry
from .declare import Declaration, Number, Tensor
from .extension import C, error
from .registry import Limit

LIBRARY = torch.library.Library("bertfast", "DEF")
CPU_DTYPES = (torch.float32, torch.bfloat16)
GPU_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
PLAIN = {torch.Tensor, torch.nn.Parameter}  # types that hide no behaviour of their own
TRITON_ROW = 8192  # the longest row that a Triton kernel keeps in registers
HAS_TRITON = importlib.util.find_spec("triton") is not None
DECLARED: dict[str, Declaration] = {}  # of every operator


def define(schema: str, fake: Callable[..., Any], **arguments: Tensor | Number) -> Declaration:
    """Define an operator whose calls go to the registry's backend; its first argument decides.

    `arguments` declares them: whoever calls, by whatever way, they are checked before a backend
    gets them.
    `torch.library.Library` costs half of `torch.library.custom_op` a call (7 against 17 us).
    """
    declared = Declaration(schema, **arguments)
    name, DECLARED[declared.name] = declared.name, declared
    LIBRARY.define(schema)

    def checked_fake(*args):
        declared.check(args, values=False)
        return fake(*args)

    for key in ("CPU", "CUDA"):
        LIBRARY.impl(name, functools.partial(serve, name), key)
    torch.library.register_fake(f"bertfast::{name}", checked_fake, lib=LIBRARY)
    return declared


def serve(name: str, *args: Any) -> Any:
    DECLARED[name].check(args)
    return registry.select(name, *args)(*args)


_FLAGS = tuple(getattr(torch._C.TensorBase, f) for f in ("is_neg", "is_conj", "_is_zerotensor"))


def lazy(*tensors: torch.Tensor) -> bool:
    """Whether one is negated, conjugated or zero by a flag that its memory knows nothing of; the
    dispatcher makes it real."""
    return any(True in map(flag, tensors) for flag in _FLAGS)


def real(t: torch.Tensor | None) -> torch.Tensor | None:
    """`t` dense and in memory: itself where it is, for who takes a pointer past the dispatcher."""
    if t is None or not lazy(t):
        return dense(t)
    return torch.empty(t.shape, dtype=t.dtype, device=t.device).copy_(t)


def plain(t: torch.Tensor) -> bool:
    """Whether a tensor's values lie where its pointer says, and its type hides no behaviour."""
    return (
        type(t) in PLAIN
        and (t.is_cpu or t.is_cuda)
        and t.layout is torch.strided
        and not (t.is_neg() or t.is_conj() or t._is_zerotensor())
    )


def unwatched() -> bool:
    """Whether nobody traces, transforms or watches operators through a dispatch mode."""
    return (
        not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and not torch._C._are_functorch_transforms_active()
        and forward_ad._current_level < 0
        and torch._C._len_torch_dispatch_stack() == 0
    )


def call(name: str, *args: Any) -> Any:
    """torch.ops.bertfast.<name>(*args), all of them given; straight to the backend where the
    dispatcher would do nothing else. On a GPU's host its Python is longer than most kernels."""
    tensors = [args[i] for i in DECLARED[name].tensor_positions if args[i] is not None]
    if (
        unwatched()
        and all(map(plain, tensors))
        and not (torch.is_grad_enabled() and any(t.requires_grad for t in tensors))
    ):
        return serve(name, *args)
    return getattr(torch.ops.bertfast, name)(*args)


def autograd(name: str, backward: Callable[..., Any], setup_context: Callable[..., None]) -> None:
    """Backward of an operator, on the backend that its forward was forced to, if on any."""

    def setup(ctx, inputs, output):
        ctx.forced = registry.forced()
        setup_context(ctx, inputs, output)

    def run(ctx, *grads):
        with registry.remembered(ctx.forced):
            return backward(ctx, *grads)

    torch.library.register_autograd(
        f"bertfast::{name}", once(name, run), setup_context=setup, lib=LIBRARY
    )


def once(name: str, backward: Callable[..., Any]) -> Callable[..., Any]:
    """`backward(ctx, *grads)`, whose own derivatives raise: the backward operators have none, and
    torch would take zeros for them."""

    def checked(ctx, *grads):
        if not torch.is_grad_enabled():
            return backward(ctx, *grads)
        with torch.no_grad():  # under create_graph
            found = backward(ctx, *grads)
        found = found if isinstance(found, tuple) else (found,)
        tensors = [g.detach().requires_grad_() for g in found if g is not None]
        refuse = torch._C._functions.DelayedError(
            f"bertfast::{name} has no second derivative; for one, run the stock model "
            "(bertfast.restore)",
            len(tensors),
        )
        marked = iter(refuse(*tensors)) if len(tensors) != 1 else iter([refuse(*tensors)])
        return tuple(None if g is None else next(marked) for g in found)

    return checked


def cpu_limit(device: str, dtype: torch.dtype, arguments: tuple[Any, ...]) -> str | None:
    """The limits that all C++ CPU kernels share."""
    if C is None:
        return error
    if device != "cpu":
        return f"the tensors are on {device}"
    if dtype not in CPU_DTYPES:
        return f"it takes float32 or bfloat16, not {dtype}"
    for a in _floats(arguments):
        if a.dtype not in CPU_DTYPES:
            return f"it takes float32 or bfloat16, not {a.dtype}"
    return None


def triton_limit(device: str, dtype: torch.dtype, arguments: tuple[Any, ...]) -> str | None:
    """The limits that all Triton kernels share."""
    if not HAS_TRITON:
        return "triton is not installed"
    # The interpreter runs kernels on CPU tensors: how the tests do without a GPU.
    if device != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"the tensors are on {device}"
    for d in (dtype, *(a.dtype for a in _floats(arguments))):
        if d not in GPU_DTYPES:
            return f"it takes float32, bfloat16 or float16, not {d}"
    return None


def triton_row_limit(device: str, dtype: torch.dtype, arguments: tuple[Any, ...]) -> str | None:
    """Of kernels that keep a row in registers: the last dimension of the first argument."""
    hidden = arguments[0].shape[-1] if arguments else 0
    if hidden > TRITON_ROW:
        return f"it takes hidden sizes up to {TRITON_ROW}, not {hidden}"
    return triton_limit(device, dtype, arguments)


def register_triton(operator: str, function: str, limit: Limit = triton_limit) -> None:
    """Backend "triton" of `operator` is `function`, "<file>.<name>" in kernels/; it and triton
    are imported at the first call."""
    file, name = function.split(".")

    @functools.cache
    def kernel():
        return getattr(importlib.import_module(f"bertfast.kernels.{file}"), name)

    def call(tensor, *args):
        if not tensor.is_cuda or tensor.get_device() == torch._C._cuda_getDevice():
            return kernel()(tensor, *args)
        with torch.cuda.device_of(tensor):  # a launch goes to the current device
            return kernel()(tensor, *args)

    call.kernel = kernel
    registry.register(operator, "triton", limit=limit)(call)


# A test build runs the CUDA kernels on CPU tensors (BERTFAST_CUDA_HOST in CMakeLists.txt).
CUDA_DEVICE = "cpu" if C is not None and C.build_info().get("cuda_host") else "cuda"


def cuda_limit(device: str, dtype: torch.dtype | None, arguments: tuple[Any, ...]) -> str | None:
    """The limits that all CUDA kernels share."""
    if C is None:
        return error
    if not hasattr(C, "cuda_gather_rows"):
        return "bertfast was built without CUDA; reinstall with BERTFAST_CUDA=on"
    return None if device == CUDA_DEVICE else f"the tensors are on {device}"


def cuda_float_limit(device: str, dtype: torch.dtype, arguments: tuple[Any, ...]) -> str | None:
    """`cuda_limit`, for kernels whose tensors are floats."""
    for d in (dtype, *(a.dtype for a in _floats(arguments))):
        if d not in GPU_DTYPES:
            return f"it takes float32, bfloat16 or float16, not {d}"
    return cuda_limit(device, dtype, arguments)


def cuda_queue(t: torch.Tensor) -> tuple[int, int]:
    """The device index and stream that a CUDA launcher takes last."""
    if CUDA_DEVICE == "cpu":
        return 0, 0
    return t.device.index, torch.cuda.current_stream(t.device).cuda_stream


def _floats(arguments):
    return (a for a in arguments if isinstance(a, torch.Tensor) and a.is_floating_point())


def dense(t: torch.Tensor | None) -> torch.Tensor | None:
    """Contiguous, or the tensor itself: what a kernel without strides reads."""
    return None if t is None else t.contiguous()


def ptr(t: torch.Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def is_bf16(t: torch.Tensor | None) -> bool:
    return t is not None and t.dtype == torch.bfloat16


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the reference's arithmetic: fp64 stays, all else is fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def check(
    condition: object, message: str | Callable[[], str], error: type[Exception] = ValueError
) -> None:
    if not condition:
        raise error(message() if callable(message) else message)
