"""BERT, mBERT, bert-base-chinese, E5, BGE, MiniLM."""

from transformers.models.bert import modeling_bert as theirs

from . import readers
from .fused import BertLikeLayer, FusedEncoder


class BertLayer(BertLikeLayer, theirs.BertLayer):
    stock = theirs.BertLayer
    classes = (
        theirs.BertAttention,
        theirs.BertSelfAttention,
        theirs.BertSelfOutput,
        theirs.BertIntermediate,
        theirs.BertOutput,
    )


class BertEncoder(FusedEncoder, theirs.BertEncoder):
    stock = theirs.BertEncoder


CLASSES = {c.stock: c for c in (BertLayer, BertEncoder)}
readers.register(
    theirs.BertModel,
    first={
        theirs.BertForSequenceClassification: ("bert.pooler", theirs.BertPooler),
        theirs.BertForMultipleChoice: ("bert.pooler", theirs.BertPooler),
        theirs.BertForNextSentencePrediction: ("bert.pooler", theirs.BertPooler),
    },
    tokens=(theirs.BertForMaskedLM, theirs.BertForTokenClassification),
)
