"""MegatronBERT, XLM-RoBERTa-XL, RoBERTa-PreLayerNorm: BERT's modules, normed before they run."""

from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

from ..encoder.watch import hooked
from .bert import CLASSIFIER, NEXT, choice, pooled, theirs


def _pre_norm(layer):
    return {"pre_norm": True}


def _megatron(layer):
    return "a hook sees its attention maps" if hooked(layer) else _pre_norm(layer)


def _output(hidden, states, kwargs):
    """Of MegatronBERT, the last of all states behind the last norm."""
    states = (*states[:-1], hidden) if kwargs.get("output_hidden_states") else None
    out = BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=hidden, hidden_states=states)
    return out if kwargs.get("return_dict", True) else out.to_tuple()


PRE_NORM = (
    theirs(
        "megatron_bert",
        "MegatronBert",
        pooled("bert", NEXT),
        norms={"norm1": "attention.ln", "norm2": "ln"},
        last="ln",
        spec=_megatron,
        reads_dropout=False,
        tail=(),
        output=_output,
        gives_states=True,
    ),
    theirs(
        "xlm_roberta_xl",
        "XLMRobertaXL",
        CLASSIFIER | choice("roberta"),
        norms={"norm1": "attention.self_attn_layer_norm", "norm2": "LayerNorm"},
        dropouts=("attention.self.dropout", "attention.output.dropout", None),
        last="LayerNorm",
        spec=_pre_norm,
    ),
    theirs(
        "roberta_prelayernorm",
        "RobertaPreLayerNorm",
        CLASSIFIER | choice("roberta_prelayernorm"),
        norms={"norm1": "attention.LayerNorm", "norm2": "intermediate.LayerNorm"},
        spec=_pre_norm,
    ),
)
