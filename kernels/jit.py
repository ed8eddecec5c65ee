"""Triton kernels whose launches cost little time on the host."""

import functools

import torch
import triton

WARPS, STAGES = 4, 3  # Triton's own defaults


class Kernel:
    """A `triton.jit` function: kernel[grid](*arguments, num_warps=4, num_stages=3).

    Triton binds and specialises every argument anew at each launch, which takes longer than many
    of our kernels run. Here the first launch of a specialisation goes through Triton; later ones
    find its compiled kernel by all that Triton specialises on: types, dtypes, 16-byte alignment,
    integers that are 1 or multiples of 16, constants.
    """

    def __init__(self, function):
        self.function = function
        self.names = function.arg_names
        self.params = getattr(function, "params", ())  # Triton's interpreter has none
        self.bound = {}  # types of the arguments -> (`binder`, compiled kernels by its key)

    def __getitem__(self, grid):
        return functools.partial(self.launch, grid)

    def launch(self, grid, *args, num_warps=WARPS, num_stages=STAGES):
        types = tuple(map(type, args))
        found = self.bound.get(types)
        if found is None:
            found = self.bound[types] = binder(self.params, types), {}
        bind, kernels = found
        if bind is None:
            self.function[grid](*args, num_warps=num_warps, num_stages=num_stages)
            return
        key, values = bind(*args)
        if key is None:  # a tensor on a CPU, which Triton refuses
            self.function[grid](*args, num_warps=num_warps, num_stages=num_stages)
            return
        device = torch._C._cuda_getDevice()
        key = device, num_warps, num_stages, key
        compiled = kernels.get(key)
        if compiled is None:
            kernels[key] = self.function[grid](*args, num_warps=num_warps, num_stages=num_stages)
            return
        stream = torch._C._cuda_getCurrentRawStream(device)
        grid = (*grid, 1, 1)[:3]
        hooks = triton.knobs.runtime
        if not (_watches(hooks.launch_enter_hook) or _watches(hooks.launch_exit_hook)):
            # what `compiled[grid]` does then
            compiled.run(
                *(*grid, stream, compiled.function, compiled.packed_metadata),
                *(None, None, None, *values),
            )
        else:
            compiled[grid](*values, stream=stream)


def _watches(hook) -> bool:
    return hook is not None and bool(getattr(hook, "calls", True))


def binder(params, types):
    """bind(*arguments) -> (what the compiled kernel depends on, the arguments with addresses for
    tensors), or None twice where a tensor is on no GPU; written for arguments of these types.
    None for what Triton itself must launch: tensor descriptors, and all in its interpreter."""
    key, values, addresses, lines = [], [], [], []
    for i, (p, kind) in enumerate(zip(params, types, strict=False)):
        name = f"a{i}"
        values.append(name)
        if p.is_constexpr:
            key.append(name)
        elif issubclass(kind, torch.Tensor):
            values[-1] = f"p{i}"
            addresses.append(f"p{i}")
            lines.append(f"if not {name}.is_cuda: return None, None")
            lines.append(f"p{i} = {name}.data_ptr()")
            key.append(f"{name}.dtype")
        elif issubclass(kind, int):
            key.append(f"{name} >> 31")  # what is more than 32 bits
            if not p.do_not_specialize:
                key.append(f"({name} == 1) - ({name} % 16 == 0)")
        elif kind not in (float, type(None)):
            return None
    if not params:
        return None
    low = " | ".join(addresses) or "0"
    each = "".join(f"{p} % 16 == 0, " for p in addresses)
    key.append(f"({low}) % 16 and ({each})")
    arguments = ", ".join(f"a{i}" for i in range(len(types)))
    body = [*lines, f"return ({', '.join(key)},), ({', '.join(values)},)"]
    made = {}
    exec(f"def bind({arguments}):\n    " + "\n    ".join(body), made)
    return made["bind"]


def jit(function=None, **options):
    """Decorator of kernels that are launched; what kernels call is `triton.jit`."""
    if function is None:
        return functools.partial(jit, **options)
    return Kernel(triton.jit(function, **options))


def cdiv(a: int, b: int) -> int:
    """ceil(a / b) on the host, where `triton.cdiv` takes microseconds."""
    return -(-a // b)


def power_of_2(n: int) -> int:
    """The next at or above n, likewise."""
    return 1 << max(n - 1, 0).bit_length()
