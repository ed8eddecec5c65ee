"""Settings of `add_layer_norm`'s Triton kernels on a GPU, timed: 16,384 x 768 in bf16, and the
forward also at 128 rows, where a launch's own latency counts.

    python benchmarks/gpu_tune_norm.py [--smoke]

A setting is (rows, warps) of the forward, (rows, warps, programs on a processor, stages) of the
backward, see `kernels/rows.py`. Each is called from a CUDA graph over rotating inputs and checked:
against fp32 PyTorch, with dropout against what the shipped setting gives. Processes compile them
beforehand. --smoke: tiny sizes in Triton's interpreter, plain calls.
"""

import argparse
import os
import sys
import time
from multiprocessing import get_context

import torch
from gpu_ops import CALLS, DROPOUT, Graph, errors

HIDDEN, ROUNDS, WORKERS = 768, 7, 12
FORWARD = [(1, 1), (2, 1), (4, 1), (1, 2), (2, 2), (1, 4), (2, 4), (4, 4), (1, 8)]
BACKWARD = [(1, 4, 4, 1), (1, 4, 6, 1), (2, 4, 4, 1), (1, 8, 3, 1), (1, 8, 4, 1), (2, 8, 2, 1)]
BACKWARD += [(1, 2, 6, 1), (1, 4, 4, 3), (1, 4, 6, 3), (1, 8, 3, 3)]
CASES = [("_FORWARD", s, p) for s in FORWARD for p in (0.0, DROPOUT)]
CASES += [("_BACKWARD", s, p) for s in BACKWARD for p in (0.0, DROPOUT)]


def call(kernel, setting, p, sets, device):
    """(run(*inputs) with the setting, inputs): of a backward with the forward's statistics."""
    from bertfast.kernels import add_layer_norm as module

    seed = torch.tensor([7, 9], device=device) if p else None

    def forward(x, residual, weight, bias, x_bias, grad):
        return module.add_layer_norm(x, residual, weight, bias, 1e-12, x_bias, p, seed)

    def backward(x, residual, weight, bias, x_bias, grad, mean, rstd):
        dx, ds, *rest = module.add_layer_norm_backward(
            grad, x, residual, weight, mean, rstd, x_bias, p, seed
        )
        return dx, ds if p else dx, *rest

    if kernel == "_BACKWARD":
        sets = [(*inputs, *forward(*inputs)[1:]) for inputs in sets]
    if setting:
        setattr(module, kernel, setting)
    return forward if kernel == "_FORWARD" else backward, sets


def draw(tokens, count, device):
    def one(*shape):
        return torch.randn(*shape, device=device).bfloat16()

    vectors = 1 + 0.1 * one(HIDDEN), one(HIDDEN), one(HIDDEN)
    return [
        (one(tokens, HIDDEN), one(tokens, HIDDEN), *vectors, one(tokens, HIDDEN))
        for _ in range(count)
    ]


def exact(kernel, inputs):
    """What PyTorch computes in fp32, without dropout: y; or dx, ds, dweight, dbias, dx_bias."""
    leaves = [t.float().requires_grad_() for t in inputs[:5]]
    x, residual, weight, bias, x_bias = leaves
    y = torch.nn.functional.layer_norm(residual + x + x_bias, (HIDDEN,), weight, bias, 1e-12)
    if kernel == "_FORWARD":
        return [y.detach()]
    return torch.autograd.grad(y, leaves, inputs[5].float())


def compile_some(worker):
    """Into Triton's cache on disk; what fails here is reported where it is timed."""
    sets = draw(64, 1, "cuda")
    for case in CASES[worker::WORKERS]:
        try:
            run, inputs = call(*case, sets, "cuda")
            run(*inputs[0])
        except Exception as error:
            print(f"worker {worker}, {case}: {type(error).__name__}", flush=True)


def compile_all():
    # Forked, which spares the imports; this process has not touched the GPU yet.
    workers = [get_context("fork").Process(target=compile_some, args=(i,)) for i in range(WORKERS)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
        if worker.is_alive():
            worker.terminate()


def seconds(run, sets, smoke):
    if smoke:
        start = time.perf_counter()
        run(*sets[0])
        return time.perf_counter() - start
    graph = Graph(run, sets)
    return sorted(graph.seconds() for _ in range(ROUNDS))[ROUNDS // 2]


def measure(kernel, settings, tokens, p, device, smoke):
    """[(seconds, setting)], sorted; prints what fails."""
    from bertfast.kernels import add_layer_norm as module

    sets, shipped = draw(tokens, 1 if smoke else min(4, CALLS), device), getattr(module, kernel)
    if p:
        run, inputs = call(kernel, None, p, sets, device)
        truth = [t.float() for t in run(*inputs[0])]
    else:
        truth = exact(kernel, sets[0])
    found = []
    for setting in settings:
        try:
            run, inputs = call(kernel, setting, p, sets, device)
            wrong = max(errors(run(*inputs[0])[: len(truth)], truth))
            if not wrong < 1e-2:
                raise ValueError(f"relative error {wrong:.1e}")
            found.append((seconds(run, inputs, smoke), setting))
        except Exception as error:
            first = (str(error).splitlines() or [""])[0][:200]
            print(f"{kernel} {setting} p={p}: {type(error).__name__}: {first}", flush=True)
        finally:
            setattr(module, kernel, shipped)
    return sorted(found)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true")
    smoke = parser.parse_args().smoke
    started = time.perf_counter()
    if smoke:
        os.environ["TRITON_INTERPRET"] = "1"  # read when kernels are imported, so not above
    else:
        compile_all()
        print(f"compiled after {time.perf_counter() - started:.0f} s", flush=True)
        if not torch.cuda.is_available():
            parser.error("torch sees no GPU here")
    device, large = ("cpu", 6) if smoke else ("cuda", 16384)
    from bertfast.kernels import add_layer_norm as module

    jobs = [("_FORWARD", FORWARD, large, p, 6) for p in (0.0, DROPOUT)]
    jobs += [("_FORWARD", FORWARD, min(large, 128), 0.0, 6)]
    jobs += [("_BACKWARD", BACKWARD, large, p, 10 if p else 8) for p in (0.0, DROPOUT)]
    for kernel, settings, tokens, p, size in jobs:
        for took, setting in measure(kernel, settings, tokens, p, device, smoke):
            gbs = size * tokens * HIDDEN / took / 1e9
            mark = " shipped" if setting == getattr(module, kernel) else ""
            name = kernel.strip("_").lower()
            print(
                f"{name:8} {tokens:5} rows p={p:.1f} {setting!s:14} {1e6 * took:8.2f} us "
                f"{gbs:6.0f} GB/s{mark}",
                flush=True,
            )
    print(f"{time.perf_counter() - started:.0f} s in all", flush=True)


if __name__ == "__main__":
    sys.exit(main())
