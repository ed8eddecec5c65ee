"""BERT: transformers' classes and checkpoints over bertfast's packed encoder."""

from .bert import BertModel, BertPreTrainedModel
from .errors import CheckpointError
from .graphs import cuda_graphs
from .heads import BertForMaskedLM, BertForPreTraining, BertForSequenceClassification
from .token_heads import BertForQuestionAnswering, BertForTokenClassification
from .translation import BertEncoderDecoder

__all__ = [
    "BertEncoderDecoder",
    "BertForMaskedLM",
    "BertForPreTraining",
    "BertForQuestionAnswering",
    "BertForSequenceClassification",
    "BertForTokenClassification",
    "BertModel",
    "BertPreTrainedModel",
    "CheckpointError",
    "cuda_graphs",
]
