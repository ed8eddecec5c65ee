"""BERT: transformers' classes and checkpoints over bertfast's packed encoder."""

from .bert import BertModel, BertPreTrainedModel
from .errors import CheckpointError
from .graphs import cuda_graphs
from .heads import BertForMaskedLM, BertForPreTraining, BertForSequenceClassification
from .translation import BertEncoderDecoder

__all__ = [
    "BertEncoderDecoder",
    "BertForMaskedLM",
    "BertForPreTraining",
    "BertForSequenceClassification",
    "BertModel",
    "BertPreTrainedModel",
    "CheckpointError",
    "cuda_graphs",
]
