"""MPNet: one relative position bias shared by all layers."""

from transformers.modeling_outputs import BaseModelOutput

from .family import Family, Readers, no_holes, padding_last


def _output(hidden, states, kwargs):
    all_states = tuple(states) if kwargs.get("output_hidden_states") else None
    if not kwargs.get("return_dict"):
        return (hidden,) if all_states is None else (hidden, all_states)
    return BaseModelOutput(last_hidden_state=hidden, hidden_states=all_states)


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
    in_tuple=True,
    output=_output,
    gives_states=True,
    bias=lambda encoder, hidden_states: encoder.compute_position_bias(hidden_states[:1]),
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
