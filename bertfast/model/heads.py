"""BERT with a head: masked language model, pre-training, sequence classification."""

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F
from transformers.modeling_outputs import MaskedLMOutput, ModelOutput, SequenceClassifierOutput

from .. import ops
from .bert import BertModel, BertPreTrainedModel, _default, finish
from .layer import ACTIVATIONS


@dataclass
class BertForPreTrainingOutput(ModelOutput):
    """transformers' own would bring its modelling code and torch's compiler: 200 MB, seconds."""

    loss: torch.FloatTensor | None = None
    prediction_logits: torch.FloatTensor | None = None  # [batch, seqlen, vocabulary]
    seq_relationship_logits: torch.FloatTensor | None = None  # [batch, 2]
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None


class BertPredictionHeadTransform(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.activation = ACTIVATIONS[config.hidden_act]

    def forward(self, hidden):
        """[tokens, hidden] -> the same"""
        x = ops.linear_act(hidden, self.dense.weight, self.dense.bias, self.activation)
        norm = self.LayerNorm
        return ops.add_layer_norm(x, None, norm.weight, norm.bias, norm.eps)


class BertLMPredictionHead(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.transform = BertPredictionHeadTransform(config)
        self.decoder = nn.Linear(config.hidden_size, config.vocab_size)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))
        self.decoder.bias = self.bias

    def forward(self, hidden):
        """[tokens, hidden] -> [tokens, vocabulary]"""
        return ops.linear_act(self.transform(hidden), self.decoder.weight, self.decoder.bias)


class BertOnlyMLMHead(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.predictions = BertLMPredictionHead(config)


class BertPreTrainingHeads(BertOnlyMLMHead):
    def __init__(self, config):
        super().__init__(config)
        self.seq_relationship = nn.Linear(config.hidden_size, 2)


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

    def _run(self, labels, output_attentions, output_hidden_states, arguments):
        """(packing, hidden, loss or None, logits [batch, seqlen, vocabulary], states, maps)."""
        packing, hidden, states, attentions = self.bert.encode(
            **arguments,
            output_attentions=_default(output_attentions, self.config, "output_attentions"),
            output_hidden_states=_default(
                output_hidden_states, self.config, "output_hidden_states"
            ),
        )
        scores = self.cls.predictions(hidden)
        loss = None
        if labels is not None:
            if labels.shape != (packing.batch, packing.seqlen):
                raise ValueError(
                    f"labels has shape {list(labels.shape)}, expected "
                    f"[{packing.batch}, {packing.seqlen}]"
                )
            loss = F.cross_entropy(scores.float(), packing.pack(labels))
        return packing, hidden, loss, packing.unpack(scores), states, attentions


class BertForMaskedLM(_MaskedLMBase):
    """labels [batch, seqlen], -100 where nothing is to predict; padding is never a target."""

    def __init__(self, config):
        super().__init__(config)
        self.bert = BertModel(config, add_pooling_layer=False)
        self.cls = BertOnlyMLMHead(config)
        self.post_init()
        self.tie_weights()

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        token_type_ids=None,
        position_ids=None,
        inputs_embeds=None,
        labels=None,
        output_attentions=None,
        output_hidden_states=None,
        return_dict=None,
    ):
        arguments = _inputs(input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        _, _, loss, logits, states, attentions = self._run(
            labels, output_attentions, output_hidden_states, arguments
        )
        output = MaskedLMOutput(
            loss=loss, logits=logits, hidden_states=states, attentions=attentions
        )
        return finish(output, return_dict, self.config)


class BertForPreTraining(_MaskedLMBase):
    """labels as in BertForMaskedLM; next_sentence_label [batch], 0 where B follows A."""

    def __init__(self, config):
        super().__init__(config)
        self.bert = BertModel(config)
        self.cls = BertPreTrainingHeads(config)
        self.post_init()
        self.tie_weights()

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        token_type_ids=None,
        position_ids=None,
        inputs_embeds=None,
        labels=None,
        next_sentence_label=None,
        output_attentions=None,
        output_hidden_states=None,
        return_dict=None,
    ):
        arguments = _inputs(input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        packing, hidden, loss, logits, states, attentions = self._run(
            labels, output_attentions, output_hidden_states, arguments
        )
        relation = self.cls.seq_relationship(self.bert.pooler(packing.first(hidden)))
        if loss is not None and next_sentence_label is not None:
            loss = loss + F.cross_entropy(relation.float(), next_sentence_label.view(-1))
        elif next_sentence_label is None or labels is None:
            loss = None  # as in transformers: a total needs both
        output = BertForPreTrainingOutput(
            loss=loss,
            prediction_logits=logits,
            seq_relationship_logits=relation,
            hidden_states=states,
            attentions=attentions,
        )
        return finish(output, return_dict, self.config)


class BertForSequenceClassification(BertPreTrainedModel):
    """labels [batch] (class ids, or floats to regress), or [batch, classes] floats for multi-label.

    The loss follows config.problem_type, which the labels decide where it is unset.
    """

    def __init__(self, config):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.bert = BertModel(config)
        dropout = config.classifier_dropout
        self.dropout = nn.Dropout(config.hidden_dropout_prob if dropout is None else dropout)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        token_type_ids=None,
        position_ids=None,
        inputs_embeds=None,
        labels=None,
        output_attentions=None,
        output_hidden_states=None,
        return_dict=None,
    ):
        _, first, states, attentions = self.bert.encode(
            **_inputs(input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds),
            output_attentions=_default(output_attentions, self.config, "output_attentions"),
            output_hidden_states=_default(
                output_hidden_states, self.config, "output_hidden_states"
            ),
            first_only=True,
        )
        pooled = self.bert.pooler(first)
        logits = self.classifier(self.dropout(pooled))
        output = SequenceClassifierOutput(
            loss=None if labels is None else self._loss(logits, labels),
            logits=logits,
            hidden_states=states,
            attentions=attentions,
        )
        return finish(output, return_dict, self.config)

    def _loss(self, logits, labels):
        if self.config.problem_type is None:
            if self.num_labels == 1:
                self.config.problem_type = "regression"
            elif labels.dtype in (torch.int64, torch.int32):
                self.config.problem_type = "single_label_classification"
            else:
                self.config.problem_type = "multi_label_classification"
        logits = logits.float()
        if self.config.problem_type == "regression":
            return F.mse_loss(logits.squeeze(), labels.squeeze().float())
        if self.config.problem_type == "single_label_classification":
            return F.cross_entropy(logits.view(-1, self.num_labels), labels.view(-1).long())
        return F.binary_cross_entropy_with_logits(logits, labels.float())


def _inputs(input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds):
    return {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "token_type_ids": token_type_ids,
        "position_ids": position_ids,
        "inputs_embeds": inputs_embeds,
    }
