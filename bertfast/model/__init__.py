"""BERT: transformers' classes and checkpoints over bertfast's packed encoder."""

from .bert import BertModel, BertPreTrainedModel
from .checkpoint import CheckpointError
from .frozen import freeze
from .heads import BertForMaskedLM, BertForPreTraining, BertForSequenceClassification
from .layer import LayerOptions, LayerWeights, encoder_layer

__all__ = [
    "BertForMaskedLM",
    "BertForPreTraining",
    "BertForSequenceClassification",
    "BertModel",
    "BertPreTrainedModel",
    "CheckpointError",
    "LayerOptions",
    "LayerWeights",
    "encoder_layer",
    "freeze",
]
