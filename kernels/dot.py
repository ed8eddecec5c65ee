"""tl.dot for kernels that also run in Triton's interpreter."""

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a @ b, fp32; PRECISION for fp32 operands: "ieee" or "tf32"."""
    if INTERPRETED:  # which multiplies the bits of bfloat16 as integers; fp32 products are exact
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)
