import pytest
import torch
from helpers import backends, refused

from bertfast import ops

pytestmark = pytest.mark.usefixtures("guarded")
MASKS = {
    "right": [[1, 1, 0, 0], [1, 1, 1, 1]],
    "left": [[0, 0, 1, 1], [0, 1, 1, 1]],
    "holes": [[1, 0, 1, 0], [0, 1, 0, 1]],
    "empty row": [[0, 0, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0]],
    "all padding": [[0, 0, 0, 0]],
    "none": [[1, 1, 1, 1], [1, 1, 1, 1]],
}


@pytest.mark.parametrize("mask_dtype", [torch.int64, torch.bool, torch.float32])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("backend", backends("gather_rows"))
def test_round_trip(backend, mask, mask_dtype):
    mask = torch.tensor(MASKS[mask])
    kept = mask.bool()
    x = torch.randn(*mask.shape, 3, 5, requires_grad=True)
    with ops.backend(backend):
        packed, indices, cu_seqlens, max_seqlen = ops.pack(x, mask.to(mask_dtype))
        back = ops.unpack(packed, indices, *mask.shape)
        (packed * 2 + ops.pack(back, mask)[0]).sum().backward()
    assert torch.equal(packed, x[kept]) and packed.shape[0] == mask.sum()
    assert cu_seqlens.dtype == torch.int32 and indices.dtype == torch.int64
    assert cu_seqlens.tolist() == [0, *mask.sum(1).cumsum(0).tolist()]
    assert max_seqlen == mask.shape[1]
    assert torch.equal(back, torch.where(kept[..., None, None], x, 0))
    assert torch.equal(x.grad, torch.where(kept[..., None, None], 3.0, 0.0).expand_as(x))


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("backend", backends("gather_rows"))
def test_dtypes_and_views(backend, dtype):
    mask = torch.tensor(MASKS["holes"])
    x = torch.randn(4, 2).T.mul(3).to(dtype)
    with ops.backend(backend):
        packed, indices, *_ = ops.pack(x, mask)
        assert torch.equal(packed, x[mask.bool()])
        assert torch.equal(ops.unpack(packed, indices, 2, 4), torch.where(mask.bool(), x, 0))


@pytest.mark.parametrize("backend", backends("gather_rows"))
def test_no_rows(backend):
    with ops.backend(backend):
        packed, indices, cu_seqlens, _ = ops.pack(torch.zeros(0, 4, 2), torch.zeros(0, 4))
        assert packed.shape == (0, 2) and cu_seqlens.tolist() == [0]
        assert ops.unpack(packed, indices, 0, 4).shape == (0, 4, 2)


@pytest.mark.parametrize("backend", backends("gather_rows"))
def test_refusals(backend):
    x = torch.zeros(2, 4, 3)
    with ops.backend(backend):
        refused(ValueError, r"\[2, 3\]", ops.pack, x, torch.ones(2, 3))
        refused(ValueError, "differ in tokens", ops.unpack, x[0], torch.zeros(3, dtype=int), 2, 4)
    with ops.backend("cpu"):
        refused(ValueError, "0 to 7", ops.unpack, x[0, :1], torch.tensor([8]), 2, 4)
