"""Counter-based dropout: Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as
1, 2, 3", SC 2011), so that a mask is never stored and is the same in every backend."""

from typing import TypeAlias

import torch

from .library import check, ptr

Seed: TypeAlias = int | torch.Tensor  # int64 [2], with an offset

_M0, _M1 = 0xD2511F53, 0xCD9E8D57
_W0, _W1 = 0x9E3779B9, 0xBB67AE85
_MASK = 0xFFFFFFFF


def draw_seeds(n: int, device: torch.device | str | None = None) -> torch.Tensor:
    """`n` (seed, offset) pairs, int64 [n, 2]: one seed from torch's default generator for
    `device`, offsets 0 to n - 1."""
    seed = torch.randint(2**63 - 1, (1, 1), dtype=torch.int64, device=device)
    return torch.cat([seed.expand(n, 1), torch.arange(n, device=device).unsqueeze(1)], 1)


def as_seed(seed: Seed | None, dropout_p: float, device: torch.device | str) -> torch.Tensor | None:
    """The seed argument of an operator as int64 [2] (seed, offset), None where p is 0."""
    check(0.0 <= dropout_p < 1.0, lambda: f"dropout_p is {dropout_p}, expected 0 <= p < 1")
    if dropout_p == 0.0:
        return None
    if seed is None:
        return draw_seeds(1, device)[0]
    if isinstance(seed, int):
        return torch.tensor([seed, 0], dtype=torch.int64, device=device)
    expected = f"expected an int or int64 [2] (seed, offset) on {device}"
    check(isinstance(seed, torch.Tensor), lambda: f"seed is {seed!r}, {expected}", TypeError)
    check(
        seed.dtype == torch.int64 and seed.shape == (2,) and seed.device == device,
        lambda: f"seed is {seed.dtype} {list(seed.shape)} on {seed.device}, {expected}",
    )
    return seed


def threshold(dropout_p: float) -> int:
    """A value is kept where its 32 random bits are >= this."""
    return min(int(dropout_p * 2**32 + 0.5), _MASK)


def dropout_arguments(dropout_p: float, seed: torch.Tensor | None) -> tuple[int, float, int]:
    """What C++'s Dropout takes: the seed's pointer, the scale of what is kept, the threshold."""
    if seed is None:
        return 0, 1.0, 0
    return ptr(seed), 1 / (1 - dropout_p), threshold(dropout_p)


def philox(seed: torch.Tensor, rows: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
    """Random uint32 in int64: rows [...] and blocks [...] (column // 4) broadcast; -> [..., 4].

    key = seed's low and high words; counter = (block, row low, row high, offset).
    """
    value, offset = seed[0], seed[1]
    key0, key1 = value & _MASK, (value >> 32) & _MASK
    rows, blocks = torch.broadcast_tensors(rows, blocks)
    c0, c1, c2 = blocks & _MASK, rows & _MASK, (rows >> 32) & _MASK
    c3 = (offset & _MASK).expand_as(c0)
    for i in range(10):
        if i:
            key0, key1 = (key0 + _W0) & _MASK, (key1 + _W1) & _MASK
        hi0, lo0 = _mul(c0, _M0)
        hi1, lo1 = _mul(c2, _M1)
        c0, c1, c2, c3 = hi1 ^ c1 ^ key0, lo1, hi0 ^ c3 ^ key1, lo0
    return torch.stack([c0, c1, c2, c3], -1)


def _mul(a, m: int):
    """High and low words of a 32 x 32 bit product, without overflowing int64."""
    low, high = a * (m & 0xFFFF), a * (m >> 16)
    total = low + ((high & 0xFFFF) << 16)
    return ((high >> 16) + (total >> 32)) & _MASK, total & _MASK


def keep_mask(
    seed: torch.Tensor, rows: torch.Tensor, columns: int, dropout_p: float
) -> torch.Tensor:
    """Bool [*rows.shape, columns], true where a value is kept; `rows` int64."""
    blocks = torch.arange((columns + 3) // 4, device=rows.device)
    bits = philox(seed, rows.unsqueeze(-1), blocks)
    return bits.flatten(-2)[..., :columns] >= threshold(dropout_p)


def dropped(
    x: torch.Tensor, dropout_p: float, seed: torch.Tensor | None, rows: torch.Tensor | None = None
) -> torch.Tensor:
    """dropout(x) by plain PyTorch: the mask that a kernel draws for x [n, columns].

    rows: int64 [n], the rows of the mask; None for 0 to n - 1.
    """
    seed = as_seed(seed, dropout_p, x.device)
    if seed is None:
        return x
    rows = torch.arange(x.shape[0], device=x.device) if rows is None else rows
    return torch.where(keep_mask(seed, rows, x.shape[1], dropout_p), x / (1 - dropout_p), 0)
