"""`attn_implementation="bertfast"`: our attention for any transformers encoder that has a switch.

Importing `bertfast.dropin` registers it. It replaces the attention alone, on padded batches, so
`accelerate` gains more; what it can't serve (causal, other lengths of keys) is left to SDPA.
"""

from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from .. import ops
from ..encoder.watch import call_limit

NAME = "bertfast"


def attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """transformers' attention interface.

    query, key, value: [batch, heads, seqlen, head_dim], of key and value a part of the heads where
    several of the query share them; attention_mask: bool (true is seen) or added to the scores,
    [batch or 1, heads or 1, seqlen, seqlen], or None. kwargs: `sliding_window`, one more than how
    far a token sees to either side, which the mask says, too: what is beyond is left out.

    Returns: ([batch, seqlen, heads, head_dim], None). A row whose keys are all masked is zeros.
    """
    batch, heads, seqlen, head_dim = query.shape
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    shape = batch, key.shape[1], seqlen, head_dim
    if (
        causal
        or heads % max(key.shape[1], 1)
        or not key.shape == value.shape == shape
        or kwargs.get("position_bias") is not None
        or call_limit(query)
    ):
        return sdpa_attention_forward(
            *(module, query, key, value, attention_mask),
            dropout=dropout,
            scaling=scaling,
            is_causal=is_causal,
            **kwargs,
        )
    if key.shape[1] < heads:
        key, value = (t.repeat_interleave(heads // key.shape[1], 1) for t in (key, value))
    window = kwargs.get("sliding_window")
    qkv = torch.stack([query, key, value], 1).permute(0, 3, 1, 2, 4)  # [batch, seqlen, 3, ...]
    offsets = torch.arange(batch + 1, dtype=torch.int32, device=query.device) * seqlen
    out = ops.attention(
        *(qkv.reshape(batch * seqlen, 3, heads, head_dim), offsets, seqlen),
        scale=scaling,
        dropout_p=dropout,
        bias=_bias(attention_mask, query),
        window=None if window is None else window - 1,
    )
    return out.view(batch, seqlen, heads, head_dim), None


def _bias(mask, query):
    """The mask as what is added to the scores; one expanded over queries or heads stays so."""
    if mask is None or mask.dtype != torch.bool:
        return mask
    small = mask[tuple(slice(0, 1 if step == 0 else None) for step in mask.stride())]
    bias = torch.zeros(small.shape, dtype=query.dtype, device=query.device)
    return bias.masked_fill_(~small, -torch.inf).expand(mask.shape)


AttentionInterface.register(NAME, attention_forward)
AttentionMaskInterface.register(NAME, sdpa_mask)
