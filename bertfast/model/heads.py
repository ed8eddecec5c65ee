"""BERT with a head: masked language model, pre-training, sequence classification."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F
from transformers.modeling_outputs import MaskedLMOutput, ModelOutput, SequenceClassifierOutput

from .. import ops
from ..encoder import watch
from ..encoder.batch import Packing
from ..families.family import kernel_of
from .asked import default, finish
from .bert import BertModel, BertPreTrainedModel
from .encoder import activation

if TYPE_CHECKING:
    from transformers import BertConfig


@dataclass
class BertForPreTrainingOutput(ModelOutput):
    """transformers' own would bring its modelling code and torch's compiler: 200 MB, seconds."""

    loss: torch.FloatTensor | None = None
    prediction_logits: torch.FloatTensor | None = None  # [batch, seqlen, vocabulary]
    seq_relationship_logits: torch.FloatTensor | None = None  # [batch, 2]
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None


class BertPredictionHeadTransform(nn.Module):
    def __init__(self, config: "BertConfig") -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.transform_act_fn = activation(config)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """[tokens, hidden] -> the same"""
        dense, act, norm = self.dense, self.transform_act_fn, self.LayerNorm
        types, kernel = (nn.Linear, type(act), nn.LayerNorm), kernel_of(act)
        if watch.global_hooks() or watch.limit((dense, act, norm), types) or kernel is None:
            return norm(act(dense(hidden)))
        x = ops.linear_act(hidden, dense.weight, dense.bias, kernel)
        return ops.add_layer_norm(x, None, norm.weight, norm.bias, norm.eps)


class BertLMPredictionHead(nn.Module):
    def __init__(self, config: "BertConfig") -> None:
        super().__init__()
        self.transform = BertPredictionHeadTransform(config)
        self.decoder = nn.Linear(config.hidden_size, config.vocab_size)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))
        self.decoder.bias = self.bias

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """[tokens, hidden] -> [tokens, vocabulary]"""
        hidden, decoder = self.transform(hidden), self.decoder
        if watch.global_hooks() or watch.limit((decoder,), (nn.Linear,)):
            return decoder(hidden)
        return ops.linear_act(hidden, decoder.weight, decoder.bias)

    def loss(self, hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """The mean cross entropy of hidden [tokens, hidden] and labels int64 [tokens], nearly all
        of them targets (-100 of others): without the logits in memory where nobody could tell."""
        decoder, types = self.decoder, (BertLMPredictionHead, nn.Linear)
        if watch.global_hooks() or watch.limit((self, decoder), types):
            total = F.cross_entropy(self(hidden).float(), labels, reduction="sum")
            return total / (labels != -100).sum().clamp(min=1)
        return ops.masked_cross_entropy(
            *(self.transform(hidden), decoder.weight, decoder.bias, labels), labelled_only=True
        )


class BertOnlyMLMHead(nn.Module):
    def __init__(self, config: "BertConfig") -> None:
        super().__init__()
        self.predictions = BertLMPredictionHead(config)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """[tokens, hidden] -> [tokens, vocabulary]"""
        return self.predictions(hidden)


class BertPreTrainingHeads(BertOnlyMLMHead):
    def __init__(self, config: "BertConfig") -> None:
        super().__init__(config)
        self.seq_relationship = nn.Linear(config.hidden_size, 2)

    def forward(
        self, hidden: torch.Tensor, pooled: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """[tokens, hidden], [batch, hidden] -> [tokens, vocabulary], [batch, 2]"""
        return self.predictions(hidden), self.seq_relationship(pooled)


class _MaskedLMBase(BertPreTrainedModel):
    tied = {  # noqa: RUF012
        "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
        "cls.predictions.decoder.bias": "cls.predictions.bias",
    }

    def tie_weights(self):
        if getattr(self.config, "tie_word_embeddings", True):
            predictions = self.cls.predictions
            predictions.decoder.weight = self.bert.embeddings.word_embeddings.weight
        self.cls.predictions.decoder.bias = self.cls.predictions.bias

    def get_output_embeddings(self):
        return self.cls.predictions.decoder


class _Encoded(NamedTuple):
    """What a head takes of its `bert`."""

    packing: Packing
    hidden: torch.Tensor  # [tokens, hidden], or of column 0 alone [batch, hidden]
    pooled: torch.Tensor | None  # [batch, hidden]
    states: tuple[torch.Tensor, ...] | None
    attentions: tuple[torch.Tensor, ...] | None


def encoded(
    model: nn.Module,
    output_attentions: bool | None,
    output_hidden_states: bool | None,
    given: dict[str, torch.Tensor | None],
    first_only: bool = False,
) -> _Encoded:
    """Arguments as of `BertModel.encode`, the inputs of a head in a dict."""
    bert, config = model.bert, model.config
    wanted = {
        "output_attentions": default(output_attentions, config, "output_attentions"),
        "output_hidden_states": default(output_hidden_states, config, "output_hidden_states"),
    }
    if watch.global_hooks() or watch.untouched(bert, BertModel):
        last, pooled, states, attentions = _called(bert, given | wanted)
        packing = Packing(*last.shape[:2], given["attention_mask"], last.device)
        hidden = last[:, 0] if first_only else packing.pack(last)
        return _Encoded(packing, hidden, pooled, states, attentions)
    packing, hidden, states, attentions = bert.encode(**given, **wanted, first_only=first_only)
    pooled = None
    if bert.pooler is not None:
        pooled = bert.pooler(hidden if first_only else packing.first(hidden))
    return _Encoded(packing, hidden, pooled, states, attentions)


def _called(bert, arguments):
    """What `bert` gives to whoever calls it, for those who watch it."""
    output = bert(**arguments, return_dict=True)
    names = ("last_hidden_state", "pooler_output", "hidden_states", "attentions")
    return [getattr(output, name, None) for name in names]


def token_loss(
    scores: torch.Tensor, labels: torch.Tensor | None, packing: Packing
) -> torch.Tensor | None:
    if labels is None:
        return None
    if labels.shape != (packing.batch, packing.seqlen):
        raise ValueError(
            f"labels has shape {list(labels.shape)}, expected [{packing.batch}, {packing.seqlen}]"
        )
    return F.cross_entropy(scores.float(), packing.pack(labels))


class BertForMaskedLM(_MaskedLMBase):
    """labels [batch, seqlen], -100 where nothing is to predict; padding is never a target."""

    def __init__(self, config: "BertConfig") -> None:
        super().__init__(config)
        self.bert = BertModel(config, add_pooling_layer=False)
        self.cls = BertOnlyMLMHead(config)
        self.post_init()
        self.tie_weights()

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> MaskedLMOutput | tuple[Any, ...]:
        arguments = inputs(input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        found = encoded(self, output_attentions, output_hidden_states, arguments)
        scores = self.cls(found.hidden)
        output = MaskedLMOutput(
            loss=token_loss(scores, labels, found.packing),
            logits=found.packing.unpack(scores),
            hidden_states=found.states,
            attentions=found.attentions,
        )
        return finish(output, return_dict, self.config)

    def packed_logits(
        self,
        input_ids: torch.Tensor,
        cu_seqlens: torch.Tensor,
        max_seqlen: int,
        position_ids: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        rows: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """[tokens, vocabulary] of packed sequences, or of the tokens `rows`; see
        `BertModel.encode_packed`."""
        packed = input_ids, cu_seqlens, max_seqlen, position_ids, token_type_ids
        return self.cls(self.bert.encode_packed(*packed, rows))


class BertForPreTraining(_MaskedLMBase):
    """labels as in BertForMaskedLM; next_sentence_label [batch], 0 where B follows A."""

    def __init__(self, config: "BertConfig") -> None:
        super().__init__(config)
        self.bert = BertModel(config)
        self.cls = BertPreTrainingHeads(config)
        self.post_init()
        self.tie_weights()

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        next_sentence_label: torch.Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> BertForPreTrainingOutput | tuple[Any, ...]:
        arguments = inputs(input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        found = encoded(self, output_attentions, output_hidden_states, arguments)
        scores, relation = self.cls(found.hidden, found.pooled)
        loss = token_loss(scores, labels, found.packing)
        if loss is not None and next_sentence_label is not None:
            loss = loss + F.cross_entropy(relation.float(), next_sentence_label.view(-1))
        elif next_sentence_label is None or labels is None:
            loss = None  # as in transformers: a total needs both
        output = BertForPreTrainingOutput(
            loss=loss,
            prediction_logits=found.packing.unpack(scores),
            seq_relationship_logits=relation,
            hidden_states=found.states,
            attentions=found.attentions,
        )
        return finish(output, return_dict, self.config)


class BertForSequenceClassification(BertPreTrainedModel):
    """labels [batch] (class ids, or floats to regress), or [batch, classes] floats for multi-label.

    The loss follows config.problem_type, which the labels decide where it is unset.
    """

    def __init__(self, config: "BertConfig") -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.bert = BertModel(config)
        dropout = config.classifier_dropout
        self.dropout = nn.Dropout(config.hidden_dropout_prob if dropout is None else dropout)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> SequenceClassifierOutput | tuple[Any, ...]:
        arguments = inputs(input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        found = encoded(self, output_attentions, output_hidden_states, arguments, first_only=True)
        logits = self.classifier(self.dropout(found.pooled))
        output = SequenceClassifierOutput(
            loss=None if labels is None else self._loss(logits, labels),
            logits=logits,
            hidden_states=found.states,
            attentions=found.attentions,
        )
        return finish(output, return_dict, self.config)

    def packed_logits(
        self,
        input_ids: torch.Tensor,
        cu_seqlens: torch.Tensor,
        max_seqlen: int,
        position_ids: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """[sequences, num_labels] of packed sequences; see `BertModel.encode_packed`."""
        first = cu_seqlens[:-1].long().clamp(max=len(input_ids) - 1)  # any token, of an empty one
        packed = input_ids, cu_seqlens, max_seqlen, position_ids, token_type_ids
        hidden = self.bert.encode_packed(*packed, first)
        return self.classifier(self.dropout(self.bert.pooler(hidden)))

    def _loss(self, logits, labels):
        if self.config.problem_type is None:
            if logits.shape[1] == 1:
                self.config.problem_type = "regression"
            elif labels.dtype in (torch.int64, torch.int32):
                self.config.problem_type = "single_label_classification"
            else:
                self.config.problem_type = "multi_label_classification"
        logits = logits.float()
        if self.config.problem_type == "regression":
            return F.mse_loss(logits.squeeze(), labels.squeeze().float())
        if self.config.problem_type == "single_label_classification":
            return F.cross_entropy(logits, labels.view(-1).long())
        return F.binary_cross_entropy_with_logits(logits, labels.float())


def inputs(
    input_ids: torch.Tensor | None,
    attention_mask: torch.Tensor | None,
    token_type_ids: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    inputs_embeds: torch.Tensor | None,
) -> dict[str, torch.Tensor | None]:
    return {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "token_type_ids": token_type_ids,
        "position_ids": position_ids,
        "inputs_embeds": inputs_embeds,
    }
