"""BERT: transformers' classes and checkpoints over bertfast's packed encoder."""

from .bert import BertModel, BertPreTrainedModel
from .checkpoint import CheckpointError
from .frozen import freeze
from .graphs import cuda_graphs
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
    "cuda_graphs",
    "encoder_layer",
    "freeze",
]
