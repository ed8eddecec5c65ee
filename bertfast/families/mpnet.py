"""MPNet: one relative position bias shared by all layers."""

from .family import Family, Readers, no_holes, padding_last, states_output

MPNET = Family(
    module="transformers.models.mpnet.modeling_mpnet",
    encoder="MPNetEncoder",
    layer="MPNetLayer",
    roles={
        "query": "attention.attn.q",
        "key": "attention.attn.k",
        "value": "attention.attn.v",
        "out": "attention.attn.o",
        "norm1": "attention.LayerNorm",
        "up": "intermediate.dense",
        "down": "output.dense",
        "norm2": "output.LayerNorm",
    },
    bypassed={
        "attention": "MPNetAttention",
        "attention.attn": "MPNetSelfAttention",
        "intermediate": "MPNetIntermediate",
        "output": "MPNetOutput",
    },
    activation="intermediate.intermediate_act_fn",
    attention="attention.attn",
    dropouts=("attention.attn.dropout", "attention.dropout", "output.dropout"),
    reads_dropout=False,
    tail=(),
    output=states_output(False),
    gives_states=True,
    more=lambda encoder, hidden: {"bias": encoder.compute_position_bias(hidden[:1])},
    mask_limit=no_holes,
    padding_limit=padding_last,
    readers=Readers(
        "MPNetModel",
        {
            "MPNetForSequenceClassification": ("classifier", "MPNetClassificationHead"),
            "MPNetForMultipleChoice": ("mpnet.pooler", "MPNetPooler"),
        },
        ("MPNetForMaskedLM", "MPNetForTokenClassification"),
    ),
)
