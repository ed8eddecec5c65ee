"""Each operator on each backend: MiniLM's shapes, 32 natural-length sequences, dropout 0.1.

    pytest benchmarks/test_ops.py          (`make bench`)

"forward" is inference; "training" is forward and backward. Before it is timed, a backend's
output and gradients are held against the reference in fp64, with DESIGN's bound: fp32 within
1e-5 relative, bf16 within twice the error of PyTorch's own kernels in bf16.
"""

from functools import cache, lru_cache

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


@lru_cache(1)  # what shares it follows each other
def exact(operator, step):
    with ops.backend("reference"):
        return prepare(operator, step, torch.float64)()


@lru_cache(1)
def plain(operator, step, dtype):
    """The error of PyTorch's own kernels."""
    with ops.backend("reference"):
        return errors(prepare(operator, step, dtype)(), exact(operator, step))


@pytest.mark.parametrize("backend", ops.registry.BACKENDS)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("operator", OPERATORS)
def test_operator(benchmark, operator, step, precision, backend):
    dtype = torch_dtype(precision)
    with ops.backend(backend):
        try:
            run = prepare(operator, step, dtype)
            got = run()
        except RuntimeError as error:
            if "can't serve" not in str(error):
                raise
            pytest.skip(str(error))
        limits = bounds(dtype, plain(operator, step, dtype))
        found = errors(got, exact(operator, step))
        assert all(e <= limit for e, limit in zip(found, limits, strict=True)), (found, limits)

        def timed():
            run.raw()
            synchronize(DEVICE)

        benchmark.group = f"{operator} {step} {precision}"
        benchmark.extra_info |= {**origin(), "backend": backend, "max_relative_error": max(found)}
        benchmark(timed)
