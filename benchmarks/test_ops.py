"""Each operator on each backend: MiniLM's shapes, 32 natural-length sequences, dropout 0.1.

    pytest benchmarks/test_ops.py          (`make bench`)

"forward" is inference; "training" is forward and backward. Before it is timed, a backend's
output and gradients are held against the reference in fp64, with DESIGN's bound: fp32 within
1e-5 relative, bf16 within twice the error of PyTorch's own kernels in bf16.
"""

from functools import cache

import pytest
import torch

from bertfast import ops
from bertfast.bench.measure import natural_lengths, origin, synchronize
from bertfast.bench.ops import DROPOUT, OPERATORS, STEPS, Shape, bounds, build, errors, make
from bertfast.bench.rivals import torch_dtype

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPE = Shape(tuple(natural_lengths(32)), device=DEVICE)


@cache
def case(operator):
    return make(operator, SHAPE)


def prepare(operator, step, dtype):
    dropout = DROPOUT if step == "training" else 0.0
    return build(case(operator), SHAPE, step, dtype, dropout)


@pytest.mark.parametrize("backend", ops.registry.BACKENDS)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("operator", OPERATORS)
def test_operator(benchmark, operator, step, dtype, backend):
    with ops.backend("reference"):
        exact = prepare(operator, step, torch.float64)()
        plain = errors(prepare(operator, step, torch_dtype(dtype))(), exact)
    with ops.backend(backend):
        try:
            run = prepare(operator, step, torch_dtype(dtype))
            got = run()
        except RuntimeError as error:
            if "can't serve" not in str(error):
                raise
            pytest.skip(str(error))
        found, limits = errors(got, exact), bounds(torch_dtype(dtype), plain)
        assert all(e <= limit for e, limit in zip(found, limits, strict=True)), (found, limits)

        def timed():
            run.raw()
            synchronize(DEVICE)

        benchmark.group = f"{operator} {step} {dtype}"
        benchmark.extra_info |= {**origin(), "backend": backend, "max_relative_error": max(found)}
        benchmark(timed)
