"""DistilBERT: its own names, no dropout behind the attention's projection."""

from transformers.modeling_outputs import BaseModelOutput

from .family import Family, Readers

DISTILBERT = Family(
    module="transformers.models.distilbert.modeling_distilbert",
    encoder="Transformer",
    layer="TransformerBlock",
    roles={
        "query": "attention.q_lin",
        "key": "attention.k_lin",
        "value": "attention.v_lin",
        "out": "attention.out_lin",
        "norm1": "sa_layer_norm",
        "up": "ffn.lin1",
        "down": "ffn.lin2",
        "norm2": "output_layer_norm",
    },
    bypassed={"attention": "DistilBertSelfAttention", "ffn": "FFN"},
    activation="ffn.activation",
    attention="attention",
    dropouts=("attention.dropout", None, "ffn.dropout"),
    config=lambda encoder: encoder.layer[0].attention.config,
    output=lambda hidden, states, kwargs: BaseModelOutput(last_hidden_state=hidden),
    readers=Readers(
        "DistilBertModel",
        {"DistilBertForSequenceClassification": None, "DistilBertForMultipleChoice": None},
        ("DistilBertForMaskedLM", "DistilBertForTokenClassification"),
    ),
)
