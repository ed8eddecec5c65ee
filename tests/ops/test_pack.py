import pytest
import torch
from helpers import DEVICES, backends, refused

from bertfast import ops
from bertfast.encoder.batch import Packing

pytestmark = pytest.mark.usefixtures("guarded")
each_backend = pytest.mark.parametrize("backend", backends("gather_rows"))
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
@each_backend
def test_round_trip(backend, mask, mask_dtype):
    mask = torch.tensor(MASKS[mask], device=DEVICES[backend])
    kept = mask.bool()
    x = torch.randn(*mask.shape, 3, 5, device=mask.device, requires_grad=True)
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
@each_backend
def test_dtypes_and_views(backend, dtype):
    mask = torch.tensor(MASKS["holes"], device=DEVICES[backend])
    x = torch.randn(4, 2, device=mask.device).T.mul(3).to(dtype)
    with ops.backend(backend):
        packed, indices, *_ = ops.pack(x, mask)
        assert torch.equal(packed, x[mask.bool()])
        assert torch.equal(ops.unpack(packed, indices, 2, 4), torch.where(mask.bool(), x, 0))


@pytest.mark.parametrize("width", [1, 3, 768, 1500])
@pytest.mark.parametrize("dtype", [torch.int8, torch.bfloat16, torch.int64])
@each_backend
def test_row_sizes(backend, dtype, width):
    """Rows in any order, shorter and longer than a tile; what no index names becomes zeros."""
    x = torch.randn(40, width, device=DEVICES[backend]).mul(9).to(dtype)
    rows = torch.randperm(40, generator=torch.Generator().manual_seed(0))[:25].to(x.device)
    with ops.backend(backend):
        packed = torch.ops.bertfast.gather_rows(x, rows)
        back = torch.ops.bertfast.scatter_rows(packed, rows, 40)
    assert torch.equal(packed, x[rows])
    assert torch.equal(back, torch.zeros_like(x).index_copy(0, rows, x[rows]))


@each_backend
def test_known_tokens(backend):
    mask = torch.tensor(MASKS["holes"], device=DEVICES[backend])
    x = torch.randn(2, 4, 3, device=mask.device)
    with ops.backend(backend):
        known, unknown = ops.pack(x, mask, tokens=4), ops.pack(x, mask)
    assert all(torch.equal(a, b) for a, b in zip(known[:3], unknown[:3], strict=True))
    refused(ValueError, "tokens is 5, yet the mask keeps 4", ops.pack, x.cpu(), mask.cpu(), 5)


@each_backend
def test_no_rows(backend):
    with ops.backend(backend):
        x = torch.zeros(0, 4, 2, device=DEVICES[backend])
        packed, indices, cu_seqlens, _ = ops.pack(x, x[..., 0])
        assert packed.shape == (0, 2) and cu_seqlens.tolist() == [0]
        assert ops.unpack(packed, indices, 0, 4).shape == (0, 4, 2)


@each_backend
def test_refusals(backend):
    x = torch.zeros(2, 4, 3, device=DEVICES[backend])
    with ops.backend(backend):
        refused(ValueError, r"\[2, 3\].*seqlen is 4", ops.pack, x, x[:, :3, 0])
        refused(
            ValueError,
            r"indices has shape \[3\], expected \[tokens\], where tokens is 4",
            ops.unpack,
            x[0],
            torch.zeros(3, dtype=int, device=x.device),
            2,
            4,
        )
    with ops.backend("cpu"):
        refused(IndexError, "0 to 7", ops.unpack, x[0, :1].cpu(), torch.tensor([8]), 2, 4)


def test_devices_must_agree():
    """Else one's address would be read on the other."""
    there = torch.zeros(2, 3, device="meta")
    ids = torch.zeros(2, 3, dtype=torch.int64)
    refused(ValueError, "indices is on meta", ops.unpack, ids[0], there[0].long(), 1, 3)
    refused(ValueError, "attention_mask is on meta, expected cpu", Packing, 2, 3, there, "cpu")
