"""ELECTRA; what projects its embeddings stays outside the encoder."""

from transformers.models.electra import modeling_electra as theirs

from . import readers
from .fused import BertLikeLayer, FusedEncoder


class ElectraLayer(BertLikeLayer, theirs.ElectraLayer):
    stock = theirs.ElectraLayer
    classes = (
        theirs.ElectraAttention,
        theirs.ElectraSelfAttention,
        theirs.ElectraSelfOutput,
        theirs.ElectraIntermediate,
        theirs.ElectraOutput,
    )


class ElectraEncoder(FusedEncoder, theirs.ElectraEncoder):
    stock = theirs.ElectraEncoder


CLASSES = {c.stock: c for c in (ElectraLayer, ElectraEncoder)}
readers.register(
    theirs.ElectraModel,
    first={
        theirs.ElectraForSequenceClassification: ("classifier", theirs.ElectraClassificationHead),
    },
    tokens=(theirs.ElectraForMaskedLM, theirs.ElectraForTokenClassification),
)
