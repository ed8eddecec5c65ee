"""DeBERTa-v2, DeBERTa-v3: disentangled relative positions (He et al., arXiv:2006.03654), in buckets
that widen with the distance."""

from dataclasses import replace
from functools import cache

import torch

from ..encoder.batch import Relative
from ..encoder.graph import bucket
from ..ops.library import unwatched
from .bert import bert_like
from .family import Family, Readers, no_holes, states_output

_KINDS = {
    "c2p": {"pos_key": "attention.self.pos_key_proj"},
    "p2c": {"pos_query": "attention.self.pos_query_proj"},
}


def _variant(layer) -> Family:
    own = vars(layer.attention.self)
    kinds = tuple(kind for kind in _KINDS if kind in own["pos_att_type"])
    return _table(kinds, bool(own["relative_attention"]), bool(own["share_att_key"]))


@cache
def _table(kinds: tuple[str, ...], relative: bool, shared: bool) -> Family:
    """Of a layer by its kinds of relative positions; shared: the key's and the query's matrices
    take these, too."""
    roles, dropouts, spec = DEBERTA_V2.roles, DEBERTA_V2.dropouts, {"relative": kinds}
    if kinds and not relative:
        spec = "its scores are scaled for relative positions, which it has not"
    elif kinds:
        dropouts = (*dropouts, None, "attention.self.pos_dropout")
        for kind in () if shared else kinds:
            roles = roles | _KINDS[kind]
    return replace(DEBERTA_V2, roles=roles, dropouts=dropouts, spec=lambda _: spec, variant=None)


def _span(encoder) -> int:
    buckets = encoder.position_buckets
    return buckets if buckets > 0 else encoder.max_relative_positions


def _limit(encoder):
    if encoder.conv is not None:
        return "its encoder has a convolution behind the first layer"
    if encoder.relative_attention:
        own = [getattr(m, "attention", None) for m in encoder.layer]
        spans = {getattr(getattr(m, "self", None), "pos_ebd_size", None) for m in own}
        if spans - {None, _span(encoder)}:
            return "its encoder has relative positions of another range"
    return None


def _more(encoder, hidden):
    if not encoder.relative_attention:
        return {}
    n = bucket(0, 1, hidden.shape[1] + 1).longest  # one more, for a row of padding
    sizes = encoder.position_buckets, encoder.max_relative_positions
    make = _buckets if unwatched() else _buckets.__wrapped__
    index, first, last = make(n, _span(encoder), *sizes, hidden.device)
    embeddings = encoder.get_rel_embedding().to(hidden.dtype)
    if encoder.packed is not None:  # it has them all, projected
        return {"relative": Relative(embeddings, index + first)}
    return {"relative": Relative(embeddings[first : last + 1], index)}


@cache
def _buckets(n: int, span: int, buckets: int, longest: int, device):
    """`Relative.index` by transformers' own function, among the embeddings [first, last] that it
    needs, which each layer projects: of short texts they are few."""
    with torch.inference_mode(False):
        distances = torch.arange(1 - n, n, device=device)
        if buckets > 0 and longest > 0:
            own = DEBERTA_V2.named("make_log_bucket_position")
            distances = own(distances, buckets, longest).long()
        index = (distances + span).clamp(0, 2 * span - 1).int()
        first, last = torch.stack(index.aminmax()).tolist()
        return index - first, first, last


def _arguments(encoder, mask, more):
    places = mask.unsqueeze(-1)  # as wide as the states, which is all that is looked at
    relative = encoder.get_rel_pos(places), encoder.get_rel_embedding()
    positions = dict(zip(("relative_pos", "rel_embeddings"), relative, strict=True))
    return (encoder.get_attention_mask(mask),), positions


_BERT = bert_like("transformers.models.deberta_v2.modeling_deberta_v2", "DebertaV2")
DEBERTA_V2 = replace(
    _BERT,
    roles=_BERT.roles | {role: f"attention.self.{role}_proj" for role in ("query", "key", "value")},
    bypassed=_BERT.bypassed | {"attention.self": "DisentangledSelfAttention"},
    reads_dropout=False,
    variant=_variant,
    tail=(None,),
    output=states_output(True),
    gives_states=True,
    reads_states=lambda own: own["output_hidden_states"] or own["self"].z_steps > 1,
    config=lambda encoder: encoder.layer[0].attention.config,
    more=_more,
    arguments=_arguments,
    limit=_limit,
    even=True,
    mask_limit=no_holes,
    readers=Readers(
        "DebertaV2Model",
        dict.fromkeys(
            ("DebertaV2ForSequenceClassification", "DebertaV2ForMultipleChoice"),
            ("pooler", "ContextPooler"),
        ),
        ("DebertaV2ForMaskedLM", "DebertaV2ForTokenClassification"),
    ),
)
