"""XLM-RoBERTa, multilingual-E5, BGE-M3."""

from transformers.models.xlm_roberta import modeling_xlm_roberta as theirs

from . import readers
from .fused import BertLikeLayer, FusedEncoder


class XLMRobertaLayer(BertLikeLayer, theirs.XLMRobertaLayer):
    stock = theirs.XLMRobertaLayer
    classes = (
        theirs.XLMRobertaAttention,
        theirs.XLMRobertaSelfAttention,
        theirs.XLMRobertaSelfOutput,
        theirs.XLMRobertaIntermediate,
        theirs.XLMRobertaOutput,
    )


class XLMRobertaEncoder(FusedEncoder, theirs.XLMRobertaEncoder):
    stock = theirs.XLMRobertaEncoder


CLASSES = {c.stock: c for c in (XLMRobertaLayer, XLMRobertaEncoder)}
readers.register(
    theirs.XLMRobertaModel,
    first={
        theirs.XLMRobertaForSequenceClassification: (
            "classifier",
            theirs.XLMRobertaClassificationHead,
        ),
        theirs.XLMRobertaForMultipleChoice: ("roberta.pooler", theirs.XLMRobertaPooler),
    },
    tokens=(theirs.XLMRobertaForMaskedLM, theirs.XLMRobertaForTokenClassification),
)
