"""A decoder beside a BERT encoder: each layer sees the tokens before its own and the encoder's
states (Vaswani et al., arXiv:1706.03762); transformers' names, on packed tokens inside.

Modules are called one by one as transformers does, so that hooks and adapters see what they do
there; a kernel takes the place of plain linear layers and norms alone (watch.py).
"""

import copy
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from .. import ops
from ..encoder import watch
from ..encoder.batch import lowered
from ..encoder.spec import Seeds
from ..families.family import kernel_of, rate
from .bert import BertPreTrainedModel
from .config import check
from .encoder import BertEmbeddings, BertIntermediate, BertOutput, BertSelfAttention, Dropout
from .heads import BertLMPredictionHead, BertOnlyMLMHead

if TYPE_CHECKING:
    from transformers import BertConfig

_DROPOUTS = 5  # of a layer: probabilities and output of both attentions, output
IGNORED = -100  # a label that counts for nothing


class Sequences(NamedTuple):
    """Packed sequences: [tokens, ...] and where each of them is."""

    values: torch.Tensor  # ids int64 [tokens], or states [tokens, hidden]
    cu_seqlens: torch.Tensor  # int32 [sequences + 1]
    longest: int  # or a bound above it

    def positions(self) -> torch.Tensor:
        """int64 [tokens]: 0, 1, ... of each sequence."""
        n, device = self.values.shape[0], self.values.device
        starts = torch.repeat_interleave(
            self.cu_seqlens[:-1].long(), self.cu_seqlens.diff().long(), output_size=n
        )
        return torch.arange(n, device=device) - starts


def plain(modules: tuple, *types: type) -> bool:
    """Whether kernels may take their place; the modules are of these types, or all of one."""
    types = types * len(modules) if len(types) == 1 else types
    return not watch.global_hooks() and watch.limit(modules, types) is None


def side_by_side(x: torch.Tensor, *linears: nn.Linear) -> torch.Tensor:
    """[n, in] -> [n, len(linears), out]: several linear layers as one product."""
    if not plain(linears, nn.Linear):
        return torch.stack([linear(x) for linear in linears], 1)
    if len(linears) == 3:
        y = ops.qkv_linear(x, *(p for m in linears for p in (m.weight, m.bias)))
    else:
        y = ops.linear_act(x, *(torch.cat([getattr(m, p) for m in linears]) for p in _PARTS))
    return y.unflatten(1, (len(linears), -1))


_PARTS = "weight", "bias"


class BertCausalSelfAttention(BertSelfAttention):
    def forward(
        self, hidden: torch.Tensor, targets: Sequences, seed: torch.Tensor | None
    ) -> torch.Tensor:
        """[tokens, hidden] -> the same"""
        qkv = side_by_side(hidden, self.query, self.key, self.value)
        context = ops.attention(
            *(qkv.unflatten(2, (-1, self.attention_head_size)), *targets[1:]),
            dropout_p=rate(self.dropout, self),
            seed=seed,
            causal=True,
        )
        return context.flatten(1)


class BertCrossAttention(BertSelfAttention):
    def forward(
        self,
        hidden: torch.Tensor,
        targets: Sequences,
        sources: Sequences,
        seed: torch.Tensor | None,
    ) -> torch.Tensor:
        """[tokens, hidden], and the encoder's states in `sources` -> [tokens, hidden]"""
        query = side_by_side(hidden, self.query).unflatten(2, (-1, self.attention_head_size))
        context = ops.cross_attention(
            *(query.squeeze(1), self.keys_values(sources.values)),
            *(targets.cu_seqlens, sources.cu_seqlens, targets.longest, sources.longest),
            dropout_p=rate(self.dropout, self),
            seed=seed,
        )
        return context.flatten(1)

    def keys_values(self, states: torch.Tensor) -> torch.Tensor:
        """[tokens, hidden] -> [tokens, 2, heads, head_dim]"""
        kv = side_by_side(states, self.key, self.value)
        return kv.unflatten(2, (-1, self.attention_head_size))


class BertDecoderOutput(BertOutput):
    def forward(
        self, x: torch.Tensor, residual: torch.Tensor, seed: torch.Tensor | None
    ) -> torch.Tensor:
        """[n, size_in], [n, hidden] -> [n, hidden]"""
        dense, norm = self.dense, self.LayerNorm
        if not plain((dense, norm, self.dropout), nn.Linear, nn.LayerNorm, Dropout):
            return super().forward(x, residual, seed)
        return ops.add_layer_norm(
            *(ops.linear_act(x, dense.weight), residual, norm.weight, norm.bias, norm.eps),
            x_bias=dense.bias,
            dropout_p=rate(self.dropout),
            seed=seed,
        )


class BertDecoderAttention(nn.Module):
    """Attention, its output layer and the norm behind the residual."""

    def __init__(self, config: "BertConfig", kind: type) -> None:
        super().__init__()
        self.self = kind(config)
        self.output = BertDecoderOutput(config.hidden_size, config)

    def forward(self, hidden: torch.Tensor, *sequences: Sequences, seeds: Seeds) -> torch.Tensor:
        context = self.self(hidden, *sequences, seeds[0])
        return self.output(context, hidden, seeds[1])


class BertDecoderIntermediate(BertIntermediate):
    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """[n, hidden] -> [n, inner]"""
        dense, act = self.dense, self.intermediate_act_fn
        if kernel_of(act) is None or not plain((dense, act), nn.Linear, type(act)):
            return super().forward(hidden)
        return ops.linear_act(hidden, dense.weight, dense.bias, kernel_of(act))


class BertDecoderLayer(nn.Module):
    def __init__(self, config: "BertConfig") -> None:
        super().__init__()
        self.attention = BertDecoderAttention(config, BertCausalSelfAttention)
        self.crossattention = BertDecoderAttention(config, BertCrossAttention)
        self.intermediate = BertDecoderIntermediate(config)
        self.output = BertDecoderOutput(config.intermediate_size, config)

    def forward(
        self,
        hidden: torch.Tensor,
        targets: Sequences,
        sources: Sequences,
        seeds: Seeds,
    ) -> torch.Tensor:
        """hidden [tokens, hidden] of `targets` -> the same; seeds int64 [_DROPOUTS, 2]."""
        hidden = self.attention(hidden, targets, seeds=seeds[:2])
        hidden = self.crossattention(hidden, targets, sources, seeds=seeds[2:4])
        return self.output(self.intermediate(hidden), hidden, seeds[4])


class BertDecoder(nn.Module):
    def __init__(self, config: "BertConfig") -> None:
        super().__init__()
        layers = (BertDecoderLayer(config) for _ in range(config.num_hidden_layers))
        self.layer = nn.ModuleList(layers)
        self.gradient_checkpointing = False

    def forward(
        self,
        hidden: torch.Tensor,
        targets: Sequences,
        sources: Sequences,
        seeds: Seeds,
    ) -> torch.Tensor:
        """hidden [tokens, hidden] -> the same; seeds int64 [_DROPOUTS * layers, 2]."""
        again = self.gradient_checkpointing and self.training and torch.is_grad_enabled()
        for i, layer in enumerate(self.layer):
            arguments = hidden, targets, sources, seeds[_DROPOUTS * i : _DROPOUTS * (i + 1)]
            if again:
                # Seeds are arguments: equal masks need no RNG state, but those of others' dropouts.
                hidden = checkpoint(layer, *arguments, use_reentrant=False)
            else:
                hidden = layer(*arguments)
        return hidden


class BertDecoderModel(nn.Module):
    def __init__(self, config: "BertConfig") -> None:
        super().__init__()
        self.embeddings = BertEmbeddings(config)
        self.encoder = BertDecoder(config)  # transformers' name of the layers

    def forward(
        self, targets: Sequences, sources: Sequences, positions: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The states of target ids [tokens] beside the encoder's: [tokens, hidden].

        positions: int64 [tokens], each sequence's own 0, 1, ... where it is None.
        """
        ids = targets.values
        seeds = self._seeds(ids.device)
        positions = targets.positions() if positions is None else positions
        hidden = self.embeddings(ids, positions, torch.zeros_like(ids), seeds[0])
        return self.encoder(lowered(hidden), targets, sources, seeds[1:])

    def _seeds(self, device):
        n = 1 + _DROPOUTS * len(self.encoder.layer)
        return ops.draw_seeds(n, device) if self.training else [None] * n


class BertLMHeadModel(nn.Module):
    """As transformers' with is_decoder and add_cross_attention: the decoder and its head."""

    tied = {  # noqa: RUF012
        "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
        "cls.predictions.decoder.bias": "cls.predictions.bias",
    }

    def __init__(self, config: "BertConfig") -> None:
        super().__init__()
        check(as_encoder(config))
        self.config = config
        self.bert = BertDecoderModel(config)
        self.cls = BertOnlyMLMHead(config)
        BertPreTrainedModel.post_init(self)
        self.tie_weights()

    def tie_weights(self) -> None:
        predictions = self.cls.predictions
        if self.config.tie_word_embeddings:
            predictions.decoder.weight = self.bert.embeddings.word_embeddings.weight
        predictions.decoder.bias = predictions.bias


def as_encoder(config: "BertConfig") -> "BertConfig":
    """A decoder's configuration with what makes it one taken off: its sizes are an encoder's."""
    config = copy.deepcopy(config)
    config.is_decoder = config.add_cross_attention = False
    return config


def summed_loss(
    head: BertLMPredictionHead, hidden: torch.Tensor, labels: torch.Tensor, smoothing: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `BertEncoderDecoder.loss_packed`; hidden [tokens, hidden].

    -mean(log p) is lse - mean(logits), and -log p[label] is lse - logits[label]: smoothing adds
    smoothing * (logits[label] - mean(logits)), for which nobody needs all the logits.
    """
    given = labels != IGNORED
    count = given.sum()
    if not plain((head, head.decoder), BertLMPredictionHead, nn.Linear):
        scores = head(hidden).float()
        loss = F.cross_entropy(scores, labels, reduction="sum", label_smoothing=smoothing)
        return loss, count
    hidden, weight, bias = head.transform(hidden), head.decoder.weight, head.decoder.bias
    mean = ops.masked_cross_entropy(hidden, weight, bias, labels, labelled_only=True)
    loss = mean * count
    if smoothing:
        label = labels.clamp(min=0)
        apart = F.embedding(label, weight) - weight.mean(0)
        apart = (hidden.to(apart.dtype) * apart).sum(1) + bias[label] - bias.mean()
        loss = loss + smoothing * torch.where(given, apart, 0).sum()
    return loss, count
