"""DistilBERT: its own names, no dropout behind the attention's projection."""

from torch import nn
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.distilbert import modeling_distilbert as theirs

from .fused import FusedEncoder, FusedLayer, Parts, rate


class TransformerBlock(FusedLayer, theirs.TransformerBlock):
    stock = theirs.TransformerBlock

    def parts(self) -> Parts:
        attention, ffn = self.attention, self.ffn
        return Parts(
            *(attention.q_lin, attention.k_lin, attention.v_lin, attention.out_lin),
            *(self.sa_layer_norm, ffn.lin1, ffn.lin2, self.output_layer_norm),
            activation=ffn.activation,
            head_dim=attention.attention_head_size,
            attention_dropout=attention.dropout.p if attention.training else 0.0,
            projection_dropout=0.0,
            output_dropout=rate(ffn.dropout),
            inside=(
                (attention, theirs.DistilBertSelfAttention),
                (ffn, theirs.FFN),
                (ffn.dropout, nn.Dropout),
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
