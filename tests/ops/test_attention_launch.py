"""How Triton's attention is launched, without launching it."""

import pytest
import torch
from helpers import offsets

launch = pytest.importorskip("bertfast.kernels.attention_launch")


def test_tf32_only_where_asked():
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    assert launch.precision() == "ieee"
    try:
        matmul.fp32_precision = "tf32"
        assert launch.precision() == "tf32"
    finally:
        matmul.fp32_precision = before


def test_work_covers_every_length():
    """As many items as blocks, and few more, whichever way they are numbered."""
    assert launch.work(8 * 512, offsets([512] * 8), 512, 128) == (32, 4)
    assert launch.work(100 + 512, offsets([1] * 100 + [512]), 512, 128) == (105, None)
    assert launch.work(0, offsets([]), 0, 128) == (0, 0)
