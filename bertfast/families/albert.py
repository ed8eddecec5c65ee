"""ALBERT (Lan et al., arXiv:1909.11942): few layers, in groups, each of which runs many times."""

from transformers.modeling_outputs import BaseModelOutput

from ..encoder.watch import untouched
from .family import Family, Readers

_GROUPS = "albert_layer_groups"


def _order(encoder):
    config = encoder.config
    count, share = config.num_hidden_layers, config.num_hidden_layers / config.num_hidden_groups
    groups = [
        [((i, "albert_layers", j), layer) for j, layer in enumerate(group.albert_layers)]
        for i, group in enumerate(encoder.get_submodule(_GROUPS))
    ]
    return [one for i in range(count if groups else 0) for one in groups[int(i / share)]]


def _limit(encoder):
    for i, group in enumerate(encoder.get_submodule(_GROUPS)):
        why = untouched(group, ALBERT.named("AlbertLayerGroup"))
        if why:
            return f"{_GROUPS}.{i}: {why}"
    return None


ALBERT = Family(
    module="transformers.models.albert.modeling_albert",
    encoder="AlbertTransformer",
    groups=_GROUPS,
    order=_order,
    entry=lambda encoder, hidden: encoder.embedding_hidden_mapping_in(hidden),
    limit=_limit,
    layer="AlbertLayer",
    roles={
        "query": "attention.query",
        "key": "attention.key",
        "value": "attention.value",
        "out": "attention.dense",
        "norm1": "attention.LayerNorm",
        "up": "ffn",
        "down": "ffn_output",
        "norm2": "full_layer_layer_norm",
    },
    bypassed={"attention": "AlbertAttention"},
    activation="activation",
    attention="attention",
    dropouts=("attention.attention_dropout", "attention.output_dropout", None),
    output=lambda hidden, states, kwargs: BaseModelOutput(last_hidden_state=hidden),
    readers=Readers(
        "AlbertModel",
        {"AlbertForSequenceClassification": None, "AlbertForMultipleChoice": None},
        ("AlbertForMaskedLM", "AlbertForTokenClassification"),
    ),
)
