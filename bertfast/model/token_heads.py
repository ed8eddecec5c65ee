"""BERT with a head on every token: tagging, and extractive question answering."""

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers.modeling_outputs import QuestionAnsweringModelOutput, TokenClassifierOutput

from .asked import finish
from .bert import BertModel, BertPreTrainedModel
from .heads import encoded, inputs, token_loss

if TYPE_CHECKING:
    from transformers import BertConfig


class _TokenHead(BertPreTrainedModel):
    """A linear layer on each token's state."""

    outputs: str

    def __init__(self, config):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.bert = BertModel(config, add_pooling_layer=False)

    def scores(self, hidden):
        """[tokens, hidden] -> [tokens, num_labels]"""
        return self.get_submodule(self.outputs)(hidden)

    def packed_logits(
        self,
        input_ids,
        cu_seqlens,
        max_seqlen: int,
        position_ids=None,
        token_type_ids=None,
        rows=None,
    ):
        """[tokens, num_labels] of packed sequences, or of the tokens `rows`; see
        `BertModel.encode_packed`."""
        packed = input_ids, cu_seqlens, max_seqlen, position_ids, token_type_ids
        return self.scores(self.bert.encode_packed(*packed, rows))


class BertForTokenClassification(_TokenHead):
    """labels int64 [batch, seqlen], -100 where there is none; padding never counts."""

    outputs = "classifier"

    def __init__(self, config: "BertConfig") -> None:
        super().__init__(config)
        dropout = config.classifier_dropout
        self.dropout = nn.Dropout(config.hidden_dropout_prob if dropout is None else dropout)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def scores(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.dropout(hidden))

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
    ) -> TokenClassifierOutput | tuple[Any, ...]:
        given = inputs(input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        found = encoded(self, output_attentions, output_hidden_states, given)
        logits = self.scores(found.hidden)
        output = TokenClassifierOutput(
            loss=token_loss(logits, labels, found.packing),
            logits=found.packing.unpack(logits),
            hidden_states=found.states,
            attentions=found.attentions,
        )
        return finish(output, return_dict, self.config)


class BertForQuestionAnswering(_TokenHead):
    """start_positions and end_positions int64 [batch]: columns of an answer's first and last token;
    a column beyond the row counts for nothing. Padding has no share in the loss, whose softmax in
    transformers runs over its scores too."""

    outputs = "qa_outputs"

    def __init__(self, config: "BertConfig") -> None:
        super().__init__(config)
        self.qa_outputs = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        start_positions: torch.Tensor | None = None,
        end_positions: torch.Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> QuestionAnsweringModelOutput | tuple[Any, ...]:
        given = inputs(input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        found = encoded(self, output_attentions, output_hidden_states, given)
        start, end = found.packing.unpack(self.scores(found.hidden)).unbind(-1)
        loss = None
        if start_positions is not None and end_positions is not None:
            mask = found.packing.mask
            both = (start, start_positions), (end, end_positions)
            loss = sum(_place_loss(scores, places, mask) for scores, places in both) / 2
        output = QuestionAnsweringModelOutput(
            loss=loss,
            start_logits=start.contiguous(),
            end_logits=end.contiguous(),
            hidden_states=found.states,
            attentions=found.attentions,
        )
        return finish(output, return_dict, self.config)


def _place_loss(scores, places, mask):
    """The mean cross entropy of scores [batch, seqlen] among real tokens."""
    scores, beyond = scores.float(), scores.shape[1]
    if mask is not None:
        scores = scores.masked_fill(mask == 0, -torch.inf)
    return F.cross_entropy(scores, places.view(-1).clamp(0, beyond), ignore_index=beyond)
