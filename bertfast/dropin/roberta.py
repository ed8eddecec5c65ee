"""RoBERTa; its embeddings, which place the positions, stay as they are."""

from transformers.models.roberta import modeling_roberta as theirs

from . import readers
from .fused import BertLikeLayer, FusedEncoder


class RobertaLayer(BertLikeLayer, theirs.RobertaLayer):
    stock = theirs.RobertaLayer
    classes = (
        theirs.RobertaAttention,
        theirs.RobertaSelfAttention,
        theirs.RobertaSelfOutput,
        theirs.RobertaIntermediate,
        theirs.RobertaOutput,
    )


class RobertaEncoder(FusedEncoder, theirs.RobertaEncoder):
    stock = theirs.RobertaEncoder


CLASSES = {c.stock: c for c in (RobertaLayer, RobertaEncoder)}
readers.register(
    theirs.RobertaModel,
    first={
        theirs.RobertaForSequenceClassification: ("classifier", theirs.RobertaClassificationHead),
        theirs.RobertaForMultipleChoice: ("roberta.pooler", theirs.RobertaPooler),
    },
    tokens=(theirs.RobertaForMaskedLM, theirs.RobertaForTokenClassification),
)
