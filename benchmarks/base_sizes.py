"""Families other than BERT in base size, as their checkpoints are configured, with the vocabulary
of the tokenizer that is here."""

FAMILIES = {  # name: transformers' prefix, and what is not that configuration's default
    "ModernBERT-base": ("ModernBert", {}),
    "DeBERTa-v3-base": (
        "DebertaV2",
        dict(
            hidden_size=768,
            num_hidden_layers=12,
            num_attention_heads=12,
            intermediate_size=3072,
            relative_attention=True,
            position_buckets=256,
            norm_rel_ebd="layer_norm",
            share_att_key=True,
            pos_att_type=["p2c", "c2p"],
            position_biased_input=False,
            type_vocab_size=0,
        ),
    ),
    "NomicBERT-base": ("NomicBert", {}),
    "GTE-base": ("Gte", {}),
    "EuroBERT-210m": ("EuroBert", {}),
}
EAGER = "DebertaV2"  # transformers has nothing else for it
TINY = dict(
    initializer_range=0.15,
    hidden_size=48,
    num_hidden_layers=2,
    num_attention_heads=3,
    intermediate_size=80,
)
SPECIAL = dict(pad_token_id=0, bos_token_id=101, cls_token_id=101, eos_token_id=102)


def config_of(name: str, **changes):
    """A family's configuration in base size; changes: TINY, a vocabulary."""
    import transformers

    prefix, own = FAMILIES[name]
    sizes = dict(vocab_size=30522, sep_token_id=102) | SPECIAL | own | changes
    config = getattr(transformers, f"{prefix}Config")(**sizes)
    config._attn_implementation = "eager" if prefix == EAGER else "sdpa"
    return config
