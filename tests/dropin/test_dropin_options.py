"""Every option of a family's configuration, one by one with another value than the default: the
accelerated model is stock's, by kernels or with a reason in the report. Options are transformers'
own: one that it adds is untested until it has a row here."""

import inspect

import pytest
import transformers
from families import FAMILIES as ALL
from families import TWINS, build
from padded import assert_same, every, labels, observe, padded, three

FAMILIES = (
    *("Albert", "MegatronBert", "XLMRobertaXL", "RobertaPreLayerNorm", "Ernie", "RoCBert"),
    *("Data2VecText", "ModernBert", "NomicBert", "Gte", "EuroBert"),
)
FAMILIES = tuple(family for family in FAMILIES if family in ALL)
ACTIVATIONS = ("gelu", "gelu_new", "gelu_pytorch_tanh", "relu", "silu", "quick_gelu", "mish")
LINEAR = {"rope_type": "linear", "factor": 2.0}
YARN = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 8}
DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 8}
ROTARY = [{"rope_theta": 3.0} | more for more in ({"rope_type": "default"}, LINEAR, YARN, DYNAMIC)]
FULL, SLIDING = "full_attention", "sliding_attention"
OPTIONS = {
    # sizes
    "hidden_size": (24, 96),
    "num_hidden_layers": (1, 5),
    "num_attention_heads": (1, 4),
    "intermediate_size": (37, 96),
    "embedding_size": (24, 48),
    "num_hidden_groups": (2,),
    "inner_group_num": (1, 3),
    "head_dim": (8, 32),
    "num_key_value_heads": (3,),
    # layers
    "hidden_act": ACTIVATIONS,
    "hidden_activation": ACTIVATIONS,
    "layer_norm_eps": (0.1,),
    "norm_eps": (0.1,),
    "rms_norm_eps": (0.1,),
    "norm_bias": (True,),
    "attention_bias": (True,),
    "mlp_bias": (True,),
    "chunk_size_feed_forward": (1, 17),
    "is_decoder": (True,),
    "add_cross_attention": (True,),
    "use_cache": (False,),
    "pretraining_tp": (2,),
    "deterministic_flash_attn": (True,),
    # rates, of a model that doesn't train
    **dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob"), (0.3,)),
    **dict.fromkeys(("attention_dropout", "embedding_dropout", "mlp_dropout"), (0.3,)),
    **dict.fromkeys(("classifier_dropout", "classifier_dropout_prob"), (0.3,)),
    # positions
    "max_position_embeddings": (40,),
    "rope_parameters": (*ROTARY, *({FULL: one, SLIDING: {"rope_theta": 2.0}} for one in ROTARY)),
    "local_attention": (0, 2, 12, 64),
    "layer_types": ([FULL, FULL], [SLIDING, SLIDING], [SLIDING, FULL]),
    # embeddings
    "pad_token_id": (3,),
    "type_vocab_size": (1, 3),
    "task_type_vocab_size": (5,),
    "use_task_id": (True,),
    **dict.fromkeys(("enable_pronunciation", "enable_shape", "concat_input"), (False,)),
    **dict.fromkeys(("pronunciation_embed_dim", "shape_embed_dim"), (32,)),
    **dict.fromkeys(("pronunciation_vocab_size", "shape_vocab_size"), (95,)),
    # heads
    "tie_word_embeddings": (False, True),
    "decoder_bias": (False,),
    "sparse_prediction": (True,),
    "classifier_pooling": ("mean", "bos", "late"),
    "classifier_bias": (True,),
    "classifier_activation": ("relu",),
}
SKIPPED = {  # what no forward reads
    *("vocab_size", "initializer_range", "initializer_cutoff_factor", "sparse_pred_ignore_index"),
    *("bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id", "mask_token_id"),
}
WITH = {  # what an option means nothing without
    "add_cross_attention": {"is_decoder": True},
    "num_hidden_groups": {"num_hidden_layers": 4},
    "task_type_vocab_size": {"use_task_id": True},
    "rope_parameters": {"max_position_embeddings": 8},  # which "dynamic" is then beyond
}
HEAD = dict.fromkeys(("tie_word_embeddings", "decoder_bias", "sparse_prediction"), "ForMaskedLM")
HEAD |= dict.fromkeys(
    [n for n in OPTIONS if n.startswith("classifier")], "ForSequenceClassification"
)
UNFUSED = {  # by the option or its value: why not
    "quick_gelu": "no kernel has QuickGELU",
    "mish": "no kernel has Mish",
    "chunk_size_feed_forward": "chunk_size_feed_forward is set",
    "is_decoder": "decoder",
    "add_cross_attention": "decoder",
    f"{[SLIDING, SLIDING]}": "no layer's kind is 'full_attention'",
}
ROTARY_FAMILIES = ("ModernBert", "NomicBert", "Gte", "EuroBert")


def options(family):
    """Names -> defaults: the family's own, and of those that any model has what a forward reads."""
    cls = getattr(transformers, f"{family}Config")
    given = inspect.signature(cls).parameters.values()
    shared = inspect.signature(transformers.PreTrainedConfig).parameters
    names = {p.name for p in given if p.kind is not p.VAR_KEYWORD} - shared.keys()
    names |= {"tie_word_embeddings", "chunk_size_feed_forward"}
    return {name: getattr(cls(), name, None) for name in sorted(names)}


def fits(family, name, value):
    if name == "rope_parameters":
        return (FULL in value) == (family == "ModernBert")
    if name == "classifier_pooling":
        return value in (("mean",) if family == "ModernBert" else ("mean", "bos"))
    # a twin's layers were asked as Bert's
    return TWINS.get(family) != "Bert" or name not in options("Bert")


CASES = [
    pytest.param(family, name, value, id=f"{family}-{name}-{i}")
    for family in FAMILIES
    for name, default in options(family).items()
    for i, value in enumerate(OPTIONS.get(name, ()))
    if value != default and fits(family, name, value)
]


@pytest.mark.parametrize("family", FAMILIES)
def test_no_option_is_left_out(family):
    left = options(family).keys() - OPTIONS.keys() - SKIPPED
    assert not left, f"untested options of {family}: give them values in OPTIONS here"


@pytest.mark.parametrize("family, name, value", CASES)
def test_an_option(family, name, value):
    head = HEAD.get(name, "Model")
    models, report = three(build(family, head, **WITH.get(name, {}), **{name: value}))
    given = padded(head)
    if name == "sparse_prediction":
        given |= labels(models[1], given)
    assert_same(*(observe(m, given, every) for m in models))
    why = UNFUSED.get(name) or UNFUSED.get(str(value))
    if why is None or (name == "chunk_size_feed_forward" and family in ROTARY_FAMILIES):
        assert report.fused and not any([*report.layers.values(), *report.fallbacks.values()])
    else:
        assert report.fallbacks and all(why in said for said in report.fallbacks.values()), report
