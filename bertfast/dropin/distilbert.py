"""DistilBERT: its own names, no dropout behind the attention's projection."""

from torch import nn
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.distilbert import modeling_distilbert as theirs

from . import readers
from .fused import FusedEncoder, FusedLayer, Parts, rate


class TransformerBlock(FusedLayer, theirs.TransformerBlock):
    stock = theirs.TransformerBlock

    def parts(self) -> Parts:
        own = self._modules
        attention, ffn = own["attention"], own["ffn"]
        inner, outer = attention._modules, ffn._modules
        return Parts(
            (
                *(inner["q_lin"], inner["k_lin"], inner["v_lin"], inner["out_lin"]),
                *(own["sa_layer_norm"], outer["lin1"], outer["lin2"], own["output_layer_norm"]),
            ),
            activation=outer["activation"],
            head_dim=attention.attention_head_size,
            attention_dropout=rate(inner["dropout"], attention),
            projection_dropout=0.0,
            output_dropout=rate(outer["dropout"]),
            inside=(
                (attention, theirs.DistilBertSelfAttention),
                (ffn, theirs.FFN),
                (outer["dropout"], nn.Dropout),
            ),
        )

    def limit(self, parts):
        if self.ffn.chunk_size_feed_forward:
            return "chunk_size_feed_forward is set"
        return super().limit(parts)


class Transformer(FusedEncoder, theirs.Transformer):
    stock = theirs.Transformer

    def settings(self):
        return self.layer[0].attention.config

    def output(self, hidden, states, kwargs):
        return BaseModelOutput(last_hidden_state=hidden)


CLASSES = {c.stock: c for c in (TransformerBlock, Transformer)}
readers.register(
    theirs.DistilBertModel,
    first={
        theirs.DistilBertForSequenceClassification: None,
        theirs.DistilBertForMultipleChoice: None,
    },
    tokens=(theirs.DistilBertForMaskedLM, theirs.DistilBertForTokenClassification),
)
