"""MPNet: one relative position bias shared by all layers."""

from transformers.modeling_outputs import BaseModelOutput

from .family import Family, Readers


def _output(hidden, states, kwargs):
    all_states = tuple(states) if kwargs.get("output_hidden_states") else None
    if not kwargs.get("return_dict"):
        return (hidden,) if all_states is None else (hidden, all_states)
    return BaseModelOutput(last_hidden_state=hidden, hidden_states=all_states)


def _mask_limit(keys):
    # The kernel's positions are those among a sequence's real tokens.
    real = keys != 0
    starts = real[:, 0].long() + (real[:, 1:] & ~real[:, :-1]).sum(1)
    return "the attention mask has holes" if bool((starts > 1).any()) else None


def _padding_limit(keys):
    # Padded rows come last, at the positions that they have.
    if bool((keys[:, 1:] != 0).logical_and(keys[:, :-1] == 0).any()):
        return "padded rows are read and are not on the right"
    return None


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
    mask_limit=_mask_limit,
    padding_limit=_padding_limit,
    readers=Readers(
        "MPNetModel",
        {
            "MPNetForSequenceClassification": ("classifier", "MPNetClassificationHead"),
            "MPNetForMultipleChoice": ("mpnet.pooler", "MPNetPooler"),
        },
        ("MPNetForMaskedLM", "MPNetForTokenClassification"),
    ),
)
