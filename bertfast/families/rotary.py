"""ModernBERT, NomicBERT, GTE, EuroBERT: rotary positions (Su et al., arXiv:2104.09864) and gated
activations; their models have no encoder of its own, but go through their layers themselves."""

from .family import Family, Readers, no_holes, padding_last

_GATED = {"gated": True, "rotary": 0}
_KINDS = ("full_attention", "sliding_attention")  # whose angles are the batch's first and second


def _readers(prefix: str, pooler, *more: str) -> Readers:
    """pooler: see `Readers.first`; None of heads that take column 0 or weigh by the mask."""
    heads = [prefix + head for head in ("ForSequenceClassification", *more)]
    tokens = f"{prefix}ForMaskedLM", f"{prefix}ForTokenClassification"
    return Readers(f"{prefix}Model", dict.fromkeys(heads, pooler), tokens)


def _modernbert(layer):
    own, kind = vars(layer.attn), vars(layer)["attention_type"]
    window = own["sliding_window"]
    if kind not in _KINDS or (window is None) != (kind == _KINDS[0]):
        return f"its attention is {kind!r} with a window of {window}"
    window = None if window is None else window - 1  # which is one more, for flash attention's mask
    return _GATED | {"pre_norm": True, "rotary": _KINDS.index(kind), "window": window}


MODERNBERT = Family(
    module="transformers.models.modernbert.modeling_modernbert",
    encoder="ModernBertModel",
    layers="layers",
    layer="ModernBertEncoderLayer",
    kinds=_KINDS,
    kind=lambda layer: vars(layer)["attention_type"],
    config=lambda layers: layers[0].config,
    roles={
        ("query", "key", "value"): "attn.Wqkv",
        "out": "attn.Wo",
        "norm1": "attn_norm",
        ("up", "gate"): "mlp.Wi",
        "down": "mlp.Wo",
        "norm2": "mlp_norm",
    },
    bypassed={"attn": "ModernBertAttention", "mlp": "ModernBertMLP"},
    activation="mlp.act",
    attention="attn",
    dropouts=("attn", "attn.out_drop", None, "mlp.drop"),
    reads_dropout="attention_dropout",
    biased=False,
    optional=("attn_norm", "attn.out_drop"),
    spec=_modernbert,
    mask_limit=no_holes,
    padding_limit=padding_last,
    readers=_readers("ModernBert", None, "ForMultipleChoice"),
)


def _theirs(name: str, prefix: str, more, readers: Readers, **own) -> Family:
    def spec(layer):
        attention = layer.self_attn
        groups = attention.q_proj.out_features // attention.k_proj.out_features
        return _GATED | {"groups": groups} | more

    return Family(
        module=f"transformers.models.{name}.modeling_{name}",
        encoder=f"{prefix}Model",
        layers="layers",
        config=lambda layers: layers[0].self_attn.config,
        bypassed={"self_attn": f"{prefix}Attention", "mlp": f"{prefix}MLP"},
        activation="mlp.act_fn",
        attention="self_attn",
        reads_dropout="attention_dropout",
        biased=False,
        spec=spec,
        readers=readers,
        **own,
    )


def _roles(norm1: str, norm2: str) -> dict[str, str]:
    return {
        "query": "self_attn.q_proj",
        "key": "self_attn.k_proj",
        "value": "self_attn.v_proj",
        "out": "self_attn.o_proj",
        "norm1": norm1,
        "up": "mlp.gate_proj",  # the field's words: what the activation is of is its gate
        "gate": "mlp.up_proj",
        "down": "mlp.down_proj",
        "norm2": norm2,
    }


_POST = "post_attention_layernorm", "post_mlp_layernorm"
_DROPOUTS = "self_attn", "post_attention_dropout", "post_mlp_dropout"
NOMIC = _theirs(
    "nomic_bert",
    "NomicBert",
    {},
    _readers("NomicBert", ("nomic_bert.pooler", "NomicBertPooler")),
    layer="NomicBertLayer",
    roles=_roles(*_POST),
    dropouts=_DROPOUTS,
)
GTE = _theirs(
    "gte",
    "Gte",
    {},
    _readers("Gte", ("gte.pooler", "GtePooler")),
    layer="GteLayer",
    roles=_roles(*_POST),
    dropouts=(*_DROPOUTS, "mlp.dropout"),
)
EUROBERT = _theirs(
    "eurobert",
    "EuroBert",
    {"pre_norm": True, "rms": True},
    _readers("EuroBert", None),
    layer="EuroBertDecoderLayer",
    norm="EuroBertRMSNorm",
    roles=_roles("input_layernorm", "post_attention_layernorm"),
    dropouts=("self_attn", None, None),
)
ROTARY = (MODERNBERT, NOMIC, GTE, EUROBERT)
