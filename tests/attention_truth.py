"""What the tests of attention share: inputs, and the truth by plain formulas."""

import math

import torch
from helpers import DEVICES, INTERPRETED, close_to_truth, keep, offsets

from bertfast import ops

LENGTHS = [0, 1, 13, 40, 0, 77, 130]


def few_tiles(backend, lengths, dtype=torch.float32):
    """For the interpreter those that take three tiles at most, of 32 or 16 keys in fp32."""
    if backend != INTERPRETED or dtype != torch.float32:
        return lengths
    return [n for n in lengths if n <= 77] or [77]


def plain(qkv, lengths, scale=None, causal=False, bias=None, masks=None, used=None, window=None,
          rel_key=None, rel_query=None, rel_index=None):  # fmt: skip
    """Attention by autograd on each sequence; `masks` drop probabilities (already scaled)."""
    out, start = [], 0
    for b, n in enumerate(lengths):
        q, k, v = qkv[start : start + n].transpose(0, 2).unbind(1)  # [heads, n, dim]
        s, apart = q @ k.transpose(1, 2), torch.arange(n)[:, None] - torch.arange(n)
        if rel_index is not None:
            r = rel_index[apart + rel_index.shape[0] // 2].long()
        if rel_key is not None:
            s = s + torch.einsum("hid,ijhd->hij", q, rel_key[r])
        if rel_query is not None:
            s = s + torch.einsum("hjd,ijhd->hij", k, rel_query[r])
        s = s * (scale or 1 / math.sqrt(qkv.shape[3]))
        if bias is not None:
            s = s + bias[b % bias.shape[0], :, :n, :n]
        if causal:
            s = s.masked_fill(apart < 0, -math.inf)
        if used is not None:
            s = s.masked_fill(torch.arange(n) >= used[b], -math.inf)
        if window is not None:
            s = s.masked_fill(apart.abs() > window, -math.inf)
        p = s.softmax(-1).nan_to_num(0)  # a row without keys
        if masks is not None:
            p = p * masks[b].to(p.dtype)
        out.append((p @ v).transpose(0, 1))
        start += n
    return torch.cat(out)


def masks_of(lengths, heads, p):
    """Of each sequence [heads, n, n], scaled, by the numbers of the seed (12345678901, 7)."""
    masks, start = [], 0
    for n in lengths:
        rows = [
            [keep(12345678901, 7, (start + q) * heads + h, n, p) for q in range(n)]
            for h in range(heads)
        ]
        mask = [torch.stack(r) if r else torch.zeros(0, 0) for r in rows]
        masks.append(torch.stack(mask) / (1 - p))
        start += n
    return masks


def inputs(dim, heads=3, lengths=LENGTHS, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(sum(lengths), 3, heads, dim, generator=g).bfloat16().float()


def starts(lengths, backend):
    return offsets(lengths).to(DEVICES[backend])


def stay_apart(backend, value, **options):
    """A NaN or inf stays in its sequence, and company doesn't change a sequence by one bit."""
    cu = starts([30, 50, 21], backend)
    qkv = inputs(32, 3, [30, 50, 21]).to(cu.device)
    bad = qkv.clone()
    bad[40, 0, 1, 3] = value
    bad[41, 1, 1, 3] = value
    bad.requires_grad_()
    options = {n: t.to(cu.device) if torch.is_tensor(t) else t for n, t in options.items()}
    with ops.backend(backend):
        good, out = (ops.attention(t, cu, 50, **options) for t in (qkv, bad))
        alone = ops.attention(qkv[30:80], starts([50], backend), 50, **options)
        out.sum().backward()
    assert out[40, 1].isnan().all()
    for part in (slice(0, 30), slice(80, 101)):
        assert torch.equal(out[part], good[part]) and torch.isfinite(bad.grad[part]).all()
    options = {n: t.cpu() if torch.is_tensor(t) else t for n, t in options.items()}
    options |= {n: t.double() for n, t in options.items() if n in ("rel_key", "rel_query")}
    close_to_truth(alone, plain(qkv[30:80].cpu().double(), [50], **options), floor=1e-5)
    if backend != "reference":  # whose products are torch's
        assert torch.equal(alone, good[30:80])
