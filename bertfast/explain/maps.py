"""What attention maps say: their rollout (Abnar and Zuidema 2020), and their relevance by gradients
(Chefer, Gur and Wolf 2021, the rule for self-attention). Neither has a sign.

A native BERT's kernels keep no maps. They are made anew from each layer's queries and keys, a
text at a time without padding, and the gradient of a map from that of the context behind it:
context = A V, hence dA = dcontext Vᵀ. Of a model of transformers they are its own, by eager
attention.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from .. import data
from ..data.errors import ConfigError
from ..model import BertPreTrainedModel
from ..train import networks
from ..train.packed import Packed
from .gradients import TOKENS, embedded

if TYPE_CHECKING:
    from .words import Text

Map = tuple[torch.Tensor, torch.Tensor | None]  # [heads, queries, keys], and its gradient


def scores(
    model: nn.Module, texts: "Sequence[Text]", targets: Sequence[int], gradients: bool
) -> list[np.ndarray]:
    """Of each text's tokens, fp64 [tokens]: `gradient_attention` of the target's logit, or
    `attention_rollout`. targets: int, of each text."""
    rule, mean, found = gradient_attention if gradients else attention_rollout, _mean(model), {}
    for chosen in data.batches([len(text.word) for text in texts], 1, tokens=TOKENS):
        own = [texts[i] for i in chosen], [targets[i] for i in chosen]
        for i, layers in zip(chosen, maps(model, *own, gradients), strict=True):
            found[i] = rule(layers, mean)
    return [found[i] for i in range(len(texts))]


def maps(
    model: nn.Module, texts: "Sequence[Text]", targets: Sequence[int], gradients: bool
) -> Iterator[Iterator[Map]]:
    """For each text its layers' maps, the first layer's first; with `gradients` also those of the
    target's logit."""
    if isinstance(model, BertPreTrainedModel):
        return _native(model, texts, targets, gradients)
    return (_stock(model, *one, gradients) for one in zip(texts, targets, strict=True))


def _native(model, texts, targets, gradients):
    kept = []  # of each layer: context [tokens, hidden], qkv [tokens, 3, heads, head_dim]

    def keep(module, args, out):
        if gradients and not kept:
            out[0].requires_grad_()  # the model's parameters are not asked
        kept.append(out)

    batch = Packed.of_rows([text.row for text in texts]).to(model.device)
    with ExitStack() as stack:
        for layer in networks.layers(model):
            hook = layer.attention.self.register_forward_hook(keep)
            stack.callback(hook.remove)
        stack.enter_context(torch.set_grad_enabled(gradients))
        logits = networks.logits(model, batch)
    grads = [None] * len(kept)
    if gradients:
        chosen = logits.gather(1, torch.tensor(targets, device=logits.device)[:, None])
        grads = torch.autograd.grad(chosen.sum(), [context for context, _ in kept])
    layers = [(qkv.detach(), grad) for (_, qkv), grad in zip(kept, grads, strict=True)]
    ends = batch.cu_seqlens.tolist()
    for part in map(slice, ends[:-1], ends[1:]):
        yield (_map(qkv[part], None if grad is None else grad[part]) for qkv, grad in layers)


def _map(qkv, grad) -> Map:
    """Of a text's qkv [tokens, 3, heads, head_dim] and the gradient of its context."""
    query, key, value = qkv.unbind(1)
    scores = torch.einsum("qhd,khd->hqk", query, key) / qkv.shape[3] ** 0.5
    if grad is not None:
        grad = torch.einsum("qhd,khd->hqk", grad.unflatten(1, value.shape[1:]), value)
    return scores.softmax(-1), grad


def _stock(model, text, target, gradients):
    x, _ = embedded(model, torch.tensor([text.row["input_ids"]], device=model.device), text.row)
    more = {"inputs_embeds": x.requires_grad_(gradients), "output_attentions": True}
    if networks.takes_types(model) and "token_type_ids" in text.row:
        more["token_type_ids"] = torch.tensor([text.row["token_type_ids"]], device=model.device)
    with eager(model), torch.set_grad_enabled(gradients):
        out = model(**more)
    found = [a for a in out.attentions or () if a is not None]
    if not found:
        raise ConfigError(
            f"a {type(model).__name__} gives no attention maps: give --method "
            "integrated_gradients or occlusion"
        )
    grads = torch.autograd.grad(out.logits[0, target], found) if gradients else [None] * len(found)
    for a, grad in zip(found, grads, strict=True):
        yield a[0].detach(), None if grad is None else grad[0]


@contextmanager
def eager(model: nn.Module) -> Iterator[None]:
    """A model of transformers with the attention that makes maps."""
    was = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(was)


def attention_rollout(layers: Iterator[Map], mean: bool) -> np.ndarray:
    """fp32 [tokens]: the product of all layers' (mean over heads A + I) / 2, as the decision reads
    it: the row of column 0, or with `mean` the mean of all rows. It is the same for every class."""
    rolled = None
    for a, _ in layers:
        step = (a.float().mean(0) + torch.eye(a.shape[1], device=a.device)) / 2
        rolled = step if rolled is None else step @ rolled
    return _row(rolled, mean)


def gradient_attention(layers: Iterator[Map], mean: bool) -> np.ndarray:
    """fp32 [tokens]: R = I, then of each layer R += mean over heads of max(0, dA * A), times R; of
    R - I the row that the decision reads, see `attention_rollout`."""
    relevance = one = None
    for a, grad in layers:
        one = torch.eye(a.shape[1], device=a.device) if one is None else one
        relevance = one if relevance is None else relevance
        relevance = relevance + (grad * a).clamp(min=0).float().mean(0) @ relevance
    return _row(relevance - one, mean)


def _row(table, mean):
    return (table.mean(0) if mean else table[0]).double().cpu().numpy()


def _mean(model) -> bool:
    """Whether the head takes the mean of all tokens, not the first one's state."""
    return getattr(model.config, "classifier_pooling", None) in ("mean", "late")
