"""What of a call to a transformers encoder keeps kernels from running; what of its modules does is
in ../encoder/watch.py."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def asked(config: "PreTrainedConfig", kwargs: Mapping[str, Any], name: str) -> bool:
    """Whether the call, or else the configuration, asks for an output."""
    value = kwargs.get(name)
    value = getattr(config, name, False) if value is None else value
    return value is not False and value is not None  # a list of layers counts, too


def key_mask(
    attention_mask: torch.Tensor | None, hidden_states: torch.Tensor
) -> tuple[str | None, torch.Tensor | None]:
    """The 0/1 mask [batch, seqlen] that transformers made `attention_mask` from.

    Returns (None, mask or None for no padding), or (why not, None) for a mask that is none of
    keys alone.
    """
    batch, seqlen = hidden_states.shape[:2]
    if attention_mask is None:
        return None, None
    if not isinstance(attention_mask, torch.Tensor):
        return f"the attention mask is a {type(attention_mask).__name__}", None
    if attention_mask.shape == (batch, seqlen):
        return None, attention_mask
    if attention_mask.shape != (batch, 1, seqlen, seqlen):
        return f"the attention mask has shape {list(attention_mask.shape)}", None
    keys = attention_mask[:, 0, 0]
    # SDPA's masks are expanded over the queries, so that no value needs comparing.
    expanded = attention_mask.stride(2) == 0
    if not expanded and not bool((attention_mask[:, 0] == keys[:, None]).all()):
        return "the attention mask differs between queries", None
    if keys.dtype == torch.bool:
        return None, keys
    if not keys.is_floating_point():
        return f"the attention mask is {keys.dtype}", None
    seen = keys == 0
    if not bool((seen | (keys <= torch.finfo(keys.dtype).min)).all()):
        return "the attention mask holds values other than 0 and the lowest", None
    return None, seen
