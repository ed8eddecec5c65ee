"""Models of a task, of any family, run on packed batches."""

from collections.abc import Callable
from functools import cache
from inspect import signature
from itertools import takewhile

import numpy as np
import torch
from torch import nn

from .. import data
from ..dropin import accelerate
from ..dropin.fused import FusedEncoder
from ..encoder.packed import Freezable
from ..model import BertPreTrainedModel
from .config import ConfigError
from .packed import Packed
from .ranks import Ranks, full

EVAL_TOKENS = 16384  # in a batch without gradients


@cache
def _takes(cls: type) -> frozenset[str]:
    return frozenset(signature(cls.forward).parameters)


def takes_types(model: nn.Module) -> bool:
    """Whether the model has embeddings of token types."""
    size = getattr(model.config, "type_vocab_size", None)
    return "token_type_ids" in _takes(type(model)) and size != 0


def padded(model: nn.Module) -> bool:
    """Whether a model takes its sequences in padded rows."""
    return not isinstance(model, BertPreTrainedModel)


def logits(model: nn.Module, batch: Packed, per_token: bool = False) -> torch.Tensor:
    """[sequences, outputs]; per_token: [tokens, outputs], or of `batch.positions` where there are.
    A question answering head's two outputs are its start and its end."""
    if batch.rows is None:
        packed = batch.input_ids, batch.cu_seqlens, batch.max_seqlen
        inputs = (*packed, batch.position_ids, batch.token_type_ids)
        return model.packed_logits(*inputs, *((batch.positions,) if per_token else ()))
    rows = batch.rows
    types = rows.token_type_ids if takes_types(model) else None
    more = {} if types is None else {"token_type_ids": types}
    out = model(input_ids=rows.input_ids, attention_mask=rows.attention_mask, **more)
    if not per_token:
        return out.logits
    both = "start_logits" in out
    found = torch.stack([out.start_logits, out.end_logits], -1) if both else out.logits
    index = rows.index if batch.positions is None else rows.index[batch.positions]
    return found.flatten(0, 1)[index]


def layers(model: nn.Module) -> list[nn.Module]:
    """The layers of its encoder, in their order, each once."""
    encoders = [m for m in model.modules() if isinstance(m, Freezable)]
    return list(dict.fromkeys(layer for m in encoders for layer in m.layer))


def freeze(model: nn.Module, count: int | None) -> None:
    """Freeze the embeddings and the first `count` layers; None freezes nothing."""
    if count is None:
        return
    own = layers(model)
    if not 0 <= count <= len(own):
        raise ConfigError(f"freeze_layers is {count}, the model has {len(own)} layers")
    base = model.base_model
    embeddings = getattr(base, "embeddings", None) or base.get_input_embeddings()
    for module in (embeddings, *own[:count]):
        module.requires_grad_(False)
    inside = {p for layer in own for p in layer.parameters()}
    if inside:  # what projects ELECTRA's and ALBERT's embeddings stands before the layers
        for p in takewhile(lambda p: p not in inside, base.parameters()):
            p.requires_grad_(False)


def longest(model: nn.Module) -> int | None:
    """Tokens that there are positions for; None where any number is."""
    limit = getattr(model.config, "max_position_embeddings", None)
    embeddings = getattr(model.base_model, "embeddings", None)
    table = getattr(embeddings, "position_embeddings", None)
    first = getattr(table, "padding_idx", None)  # RoBERTa's positions begin behind the padding's
    if limit is None or limit < 0:  # XLNet's -1
        return None
    return limit if first is None else limit - first - 1


def gathered(model: nn.Module, ranks: Ranks) -> nn.Module | None:
    """On rank 0 a plain model with the weights of a perhaps sharded one, None on the others; all
    ranks together."""
    if not ranks.sharded:
        return None if ranks.rank else model
    with torch.no_grad():
        tensors = {name: full(p) for name, p in model.named_parameters()}
    if ranks.rank:
        return None
    plain = type(model)(model.config)
    plain.load_state_dict(tensors, strict=False)
    if padded(plain):
        accelerate(plain)
    return plain.eval()


def unfused(model: nn.Module) -> list[str]:
    """What of the encoder doesn't run on our kernels, and why; for people."""
    if isinstance(model, BertPreTrainedModel):
        return []
    report = accelerate(model)
    if not any(isinstance(m, FusedEncoder) for m in model.modules()):
        return [f"{type(model).__name__} runs as transformers has it: its family is not known here"]
    return [f"{name}: {why}" for name, why in report.layers.items() if why]


def outputs(
    model: nn.Module,
    rows: list[dict],
    pad: int,
    per_token: bool = False,
    *,
    tokens: int = EVAL_TOKENS,
    score: Callable[[Packed], torch.Tensor] | None = None,
    ranks: Ranks | None = None,
) -> list[np.ndarray]:
    """fp32 logits of encoded rows, in their order, computed in order of length: of each [outputs],
    or per_token [tokens (those of its `places`, where it has them), outputs].

    tokens: in a batch. score: runs a batch, in place of `logits`; ranks: `Ranks` that share the
    batches and all get the result.
    """
    found, own = {}, pad if padded(model) else None
    score = score or (lambda batch: logits(model, batch, per_token))
    batches = data.batches([len(row["input_ids"]) for row in rows], 1, tokens=tokens)
    for chosen, factor in ((b, 1.0) for b in batches) if ranks is None else ranks.share(batches):
        batch = Packed.of_rows([_unlabelled(rows[i]) for i in chosen], own)
        with torch.no_grad():
            values = score(batch.to(model.device)).float().cpu().numpy()
        if per_token:
            ends = np.cumsum([len(rows[i].get("places", rows[i]["input_ids"])) for i in chosen])
            values = np.split(values, ends[:-1])
        if factor:
            found |= zip(chosen, values, strict=True)
    for others in () if ranks is None else ranks.gather(found):
        found |= others
    return [found[i] for i in range(len(rows))]


def _unlabelled(row: dict) -> dict:
    return {name: row[name] for name in ("input_ids", "token_type_ids", "places") if name in row}
