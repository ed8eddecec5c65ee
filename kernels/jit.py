"""Triton kernels whose launches cost little time on the host."""

import functools
from operator import itemgetter

import torch
import triton

WARPS, STAGES = 4, 3  # Triton's own defaults


class Kernel:
    """A `triton.jit` function: kernel[grid](*arguments, num_warps=4, num_stages=3, **named).

    Triton binds and specialises every argument anew at each launch, which takes longer than many
    of our kernels run. Here the first launch of a specialisation goes through Triton; later ones
    find its compiled kernel by all that Triton specialises on: dtypes, 16-byte alignment, integers
    that are 1 or multiples of 16, constants.
    """

    def __init__(self, function):
        self.function, self.compiled = function, {}
        # Its interpreter has neither.
        self.params = getattr(function, "params", ())
        self.names = function.arg_names
        fixed = [p.num for p in self.params if p.is_constexpr]
        # An itemgetter of one index gives no tuple, so the first comes twice.
        self.constants = itemgetter(*fixed[:1], *fixed) if fixed else lambda _: ()
        self.arguments = [
            (p.num, not p.do_not_specialize) for p in self.params if not p.is_constexpr
        ]

    def __getitem__(self, grid):
        return functools.partial(self.launch, grid)

    def launch(self, grid, *args, num_warps=WARPS, num_stages=STAGES, **named):
        if named:
            args = (*args, *map(named.__getitem__, self.names[len(args) :]))
        key, values = self.specialisation(args)
        if key is not None:
            key = (torch.cuda.current_device(), num_warps, num_stages, *key)
            compiled = self.compiled.get(key)
            if compiled is not None:
                compiled[(*grid, 1, 1)[:3]](*values)
                return
        compiled = self.function[grid](*args, num_warps=num_warps, num_stages=num_stages)
        if key is not None:
            self.compiled[key] = compiled

    def specialisation(self, args):
        """What the compiled kernel depends on, and the arguments with addresses for tensors; None
        for what Triton itself must launch: tensor descriptors, and all in its interpreter."""
        if not self.params:
            return None, args
        key, values = [], list(args)
        for i, specialised in self.arguments:
            a = args[i]
            if isinstance(a, torch.Tensor):
                values[i] = address = a.data_ptr()
                key += a.dtype, address % 16 == 0
            elif isinstance(a, int):
                key += type(a), max(a.bit_length(), 31), specialised and (a == 1, a % 16 == 0)
            elif a is None or isinstance(a, float):
                key.append(type(a))
            else:
                return None, args
        return (*key, *self.constants(args)), values


def jit(function=None, **options):
    """Decorator of kernels that are launched; what kernels call is `triton.jit`."""
    if function is None:
        return functools.partial(jit, **options)
    return Kernel(triton.jit(function, **options))
