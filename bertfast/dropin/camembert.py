"""CamemBERT."""

from transformers.models.camembert import modeling_camembert as theirs

from . import readers
from .fused import BertLikeLayer, FusedEncoder


class CamembertLayer(BertLikeLayer, theirs.CamembertLayer):
    stock = theirs.CamembertLayer
    classes = (
        theirs.CamembertAttention,
        theirs.CamembertSelfAttention,
        theirs.CamembertSelfOutput,
        theirs.CamembertIntermediate,
        theirs.CamembertOutput,
    )


class CamembertEncoder(FusedEncoder, theirs.CamembertEncoder):
    stock = theirs.CamembertEncoder


CLASSES = {c.stock: c for c in (CamembertLayer, CamembertEncoder)}
readers.register(
    theirs.CamembertModel,
    first={
        theirs.CamembertForSequenceClassification: (
            "classifier",
            theirs.CamembertClassificationHead,
        ),
        theirs.CamembertForMultipleChoice: ("roberta.pooler", theirs.CamembertPooler),
    },
    tokens=(theirs.CamembertForMaskedLM, theirs.CamembertForTokenClassification),
)
