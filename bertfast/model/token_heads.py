"""BERT with a head on every token: tagging, and extractive question answering."""

import torch
from torch import nn
from torch.nn import functional as F
from transformers.modeling_outputs import QuestionAnsweringModelOutput, TokenClassifierOutput

from .bert import BertModel, BertPreTrainedModel, finish
from .heads import encoded, inputs, token_loss


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

    def __init__(self, config):
        super().__init__(config)
        dropout = config.classifier_dropout
        self.dropout = nn.Dropout(config.hidden_dropout_prob if dropout is None else dropout)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def scores(self, hidden):
        return self.classifier(self.dropout(hidden))

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

    def __init__(self, config):
        super().__init__(config)
        self.qa_outputs = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        token_type_ids=None,
        position_ids=None,
        inputs_embeds=None,
        start_positions=None,
        end_positions=None,
        output_attentions=None,
        output_hidden_states=None,
        return_dict=None,
    ):
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
