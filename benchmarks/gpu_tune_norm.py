"""`add_layer_norm`'s Triton kernels on a GPU: settings that may ship, the variants of
benchmarks/variants/add_layer_norm.py, and PyTorch's kernels, in the same run.

    python benchmarks/gpu_tune_norm.py [--only backward ...] [--seconds 60]

16,384 x 768 and x 1024 in bf16, the forward also at 128 rows, where a launch's own latency counts.
A setting is (rows, warps) of the forward, (rows, warps, programs on a processor, stages) of the
backward, see `kernels/rows.py`. By CUDA graph over rotating inputs; results are held against
PyTorch's in fp32, with dropout against the shipped kernels'. "copy" reads and writes as many bytes
as the case's rows say. --smoke: tiny sizes on the CPU, with TRITON_INTERPRET=1, without times.
"""

import contextlib
import sys

import gpu_tune
import torch
from bertfast.kernels import add_layer_norm as kernel
from gpu_ops import DROPOUT
from variants import add_layer_norm as variants

FORWARD = [(1, 1), (2, 1), (4, 1), (1, 2), (2, 2), (1, 4), (2, 4), (4, 4)]
BACKWARD = [(2, 4, 4, 1), (1, 4, 4, 1), (1, 4, 6, 1), (1, 8, 3, 1), (2, 8, 2, 1), (1, 2, 6, 1)]
BACKWARD += [(1, 1, 8, 1), (1, 1, 12, 1), (1, 2, 8, 1), (1, 4, 4, 3), (1, 4, 6, 3), (1, 8, 3, 3)]
SHIPPED = {"forward": kernel._FORWARD, "backward": kernel._BACKWARD}
EPS = 1e-12


@contextlib.contextmanager
def shipping(which, setting):
    name = f"_{which.upper()}"
    kept = getattr(kernel, name)
    setattr(kernel, name, setting)
    try:
        yield
    finally:
        setattr(kernel, name, kept)


def draw(tokens, hidden, device):
    """x, residual, weight, bias, x_bias and the output's gradient."""
    shapes = [(tokens, hidden)] * 2 + [(hidden,)] * 3 + [(tokens, hidden)]
    made = [torch.randn(*shape, device=device) for shape in shapes]
    made[2] = 1 + 0.1 * made[2]
    return [t.bfloat16() for t in made]


def exact(x, residual, weight, bias, x_bias, grad, *_):
    """What PyTorch computes in fp32, without dropout: y; dx, ds, dweight, dbias, dx_bias."""
    leaves = [t.float().requires_grad_() for t in (x, residual, weight, bias, x_bias)]
    x, residual, weight, bias, x_bias = leaves
    y = torch.nn.functional.layer_norm(residual + x + x_bias, x.shape[-1:], weight, bias, EPS)
    return [y.detach()], list(torch.autograd.grad(y, leaves, grad.float()))


def case_of(which, tokens, hidden, p, device, sets):
    where = "cpu" if device == "meta" else device
    seed = torch.tensor([7, 9], device=where) if p else None

    def forward(x, residual, weight, bias, x_bias, *_):
        return kernel.add_layer_norm(x, residual, weight, bias, EPS, x_bias, p, seed, False)

    def both(found):
        dx, ds, *rest = found
        return [dx, ds if p else dx, *rest]

    def backward(x, residual, weight, bias, x_bias, grad, mean, rstd):
        args = grad, x, residual, weight, mean, rstd, x_bias, p, seed
        return both(kernel.add_layer_norm_backward(*args, False))

    def variant(options):
        def call(x, residual, weight, bias, x_bias, grad, mean, rstd):
            args = grad, x, residual, weight, mean, rstd, x_bias, p, seed
            return both(variants.run(*args, options))

        return call

    def set_to(setting, run):
        def call(*inputs):
            with shipping(which, setting):
                return run(*inputs)

        return call

    run = backward if which == "backward" else lambda *inputs: [forward(*inputs)[0]]
    settings = FORWARD if which == "forward" else BACKWARD
    calls = {"shipped": run}
    for setting in settings if device != "cpu" else settings[:2]:
        calls[str(setting)] = set_to(setting, run)
    if which == "backward":
        for options in variants.CANDIDATES if device != "cpu" else variants.CANDIDATES[::5]:
            calls[f"variant {tuple(options)}"] = variant(options)
    values = (6 if which == "forward" else 10 if p else 8) * tokens * hidden
    if device == "cuda":
        half = torch.empty(values // 4, dtype=torch.bfloat16, device=device)
        calls["copy"] = lambda *_: [torch.mul(half, 1.5)]
    inputs = []
    for _ in range(sets if device != "meta" else 0):
        made = draw(tokens, hidden, device)
        inputs.append((*made, *forward(*made)[1:]))
    truth = None if p else lambda: exact(*inputs[0])[which == "backward"]

    def paste(name):
        if name == "copy":
            return None
        if name.startswith("variant"):
            return f"Variant{name.removeprefix('variant ')}"
        return f"_{which.upper()} = {SHIPPED[which] if name == 'shipped' else name}"

    rate = lambda seconds: f"{values / seconds / 1e9:6.0f} GB/s"
    return gpu_tune.Case(calls, inputs, truth, rate, paste, loose=("copy",))


def cases(tokens, hiddens):
    found = {}

    def add(which, rows, hidden, p):
        title = f"{which}, {rows} x {hidden}, p={p}"
        found[title] = lambda device, sets: case_of(which, rows, hidden, p, device, sets)

    for hidden in hiddens:
        for p in (DROPOUT, 0.0):
            add("backward", tokens, hidden, p)
    for p in (DROPOUT, 0.0):
        add("forward", tokens, hiddens[0], p)
    add("forward", min(tokens, 128), hiddens[0], 0.0)
    return found


def main():
    sizes = (6, (300,)) if "--smoke" in sys.argv else (16384, (768, 1024))
    return gpu_tune.main("norm", __doc__, cases(*sizes))


if __name__ == "__main__":
    sys.exit(main())
