"""Small models of every family that the drop-in knows, and inputs and comparisons for them."""

import copy
import importlib.util
import inspect

import torch
import transformers

FAMILIES = {
    "Bert": "bert",
    "Roberta": "roberta",
    "XLMRoberta": "xlm_roberta",
    "Camembert": "camembert",
    "Electra": "electra",
    "DistilBert": "distilbert",
    "MPNet": "mpnet",
    "ModernBert": "modernbert",
    "NomicBert": "nomic_bert",
    "Gte": "gte",
    "EuroBert": "eurobert",
    "DebertaV2": "deberta_v2",
    "Ernie": "ernie",
    "RoCBert": "roc_bert",
    "Data2VecText": "data2vec",
    "MegatronBert": "megatron_bert",
    "XLMRobertaXL": "xlm_roberta_xl",
    "RobertaPreLayerNorm": "roberta_prelayernorm",
    "Albert": "albert",
}
FAMILIES = {  # transformers 5.17 has not all of them
    name: folder
    for name, folder in FAMILIES.items()
    if importlib.util.find_spec(f"transformers.models.{folder}")
}
EAGER = ("MPNet", "DebertaV2", "MegatronBert")  # transformers has no SDPA for them
# Masks that are left to stock: distances between places are not those between tokens.
UNFUSED = {
    "MPNet": ("holes", "left", "row"),  # eager gives a row without tokens the mean of its padding
    "MegatronBert": ("row",),
    "ModernBert": ("holes", "left"),
    "DebertaV2": ("holes",),
}


def heads(family):
    """Every model class that transformers has for a family: "Model", "ForMaskedLM", ..."""
    module = getattr(transformers.models, FAMILIES[family])
    return sorted(
        name.removeprefix(family)
        for name, c in inspect.getmembers(module, inspect.isclass)
        if issubclass(c, transformers.PreTrainedModel)
        and name.startswith(family)
        and not name.endswith("PreTrainedModel")
        and name != "RoCBertForPreTraining"  # which takes three batches
    )


def layers_of(model):
    own = (
        getattr(m, n, None) for m in model.modules() for n in ("layer", "layers", "albert_layers")
    )
    return next(layers for layers in own if isinstance(layers, torch.nn.ModuleList))


# Parts of these are in fp32 whatever the model's dtype.
PARTLY_FP32 = ("ModernBert", "EuroBert")
MASKS = ("right", "left", "holes", "row", "none")
# Whose table of modules these have, too: what that is asked for every value, they are for few.
TWINS = dict.fromkeys(
    ("Roberta", "XLMRoberta", "Camembert", "Ernie", "RoCBert", "Data2VecText"), "Bert"
)
TWINS |= {"RobertaPreLayerNorm": "XLMRobertaXL", "Gte": "NomicBert"}


def few(family, values):
    """Of the values of a parameter those that a family is tested with."""
    return values[:1] if family in TWINS else values


def config(family, **options):
    tiny = dict(vocab_size=90, hidden_size=48, num_hidden_layers=2, num_attention_heads=3,
                intermediate_size=80, max_position_embeddings=64, type_vocab_size=2,
                initializer_range=0.3, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)  # fmt: skip
    if family == "Electra":
        tiny["embedding_size"] = 32
    if family == "Albert":  # two layers, which run twice each
        tiny |= dict(embedding_size=32, inner_group_num=2)
    if family == "RoCBert":
        kinds = ("pronunciation", "shape")
        tiny |= {f"{k}_{n}": s for k in kinds for n, s in (("vocab_size", 90), ("embed_dim", 48))}
    if family == "DistilBert":
        names = dict(hidden_size="dim", num_hidden_layers="n_layers", intermediate_size="hidden_dim",
                     num_attention_heads="n_heads", hidden_dropout_prob="dropout",
                     attention_probs_dropout_prob="attention_dropout")  # fmt: skip
        tiny = {names.get(k, k): v for k, v in tiny.items() if k != "type_vocab_size"}
    if family in ("ModernBert", "EuroBert"):
        gone = ("type_vocab_size", "hidden_dropout_prob", "attention_probs_dropout_prob")
        tiny = {k: v for k, v in tiny.items() if k not in gone}
        tiny |= dict.fromkeys(("eos_token_id", "bos_token_id", "sep_token_id", "cls_token_id"), 2)
        tiny["pad_token_id"] = 1
    if family == "ModernBert":  # its second layer sees 3 tokens to either side
        tiny |= dict(local_attention=6, global_attn_every_n_layers=2)
    if family == "EuroBert":
        tiny |= dict(num_key_value_heads=1)
    if family == "DebertaV2":  # as v3 is set
        tiny |= dict(relative_attention=True, pos_att_type=["p2c", "c2p"], share_att_key=True,
                     norm_rel_ebd="layer_norm", position_buckets=8, position_biased_input=False,
                     type_vocab_size=0)  # fmt: skip
    return getattr(transformers, f"{family}Config")(**tiny | options)


def build(family, head="Model", attention=None, **options):
    torch.manual_seed(0)
    c = config(family, **options)
    c._attn_implementation = attention or ("eager" if family in EAGER else "sdpa")
    return getattr(transformers, family + head)(c).eval()


def inputs_for(head="Model", kind="right"):
    g = torch.Generator().manual_seed(1)
    ids = torch.randint(5, 90, (4, 17), generator=g)
    mask = (torch.arange(17) < torch.tensor([17, 5, 11, 1])[:, None]).long()
    if kind == "left":
        mask = mask.flip(1)
    elif kind == "holes":
        mask = mask * (torch.rand(mask.shape, generator=g) < 0.6).long()
        mask[:, 0] = 1
    elif kind == "row":
        mask[2] = 0
    elif kind == "none":
        mask = torch.ones_like(mask)
    ids = torch.where(mask == 1, ids, 1)  # RoBERTa's positions follow the ids: 1 is its padding
    given = {"input_ids": ids, "attention_mask": mask}
    if head == "ForMultipleChoice":
        given = {k: v.view(2, 2, 17) for k, v in given.items()}
    return given


def real(output, mask):
    """The output at real tokens where it has them, of rows with any where it has not."""
    mask = mask.flatten(0, -2)
    if output.dim() >= 2 and output.shape[:2] == mask.shape:
        return output[mask == 1]
    if output.shape[0] == mask.shape[0]:
        return output[mask[:, 0] == 1]
    return output


def tensors(output):
    return [t for t in output.to_tuple() if isinstance(t, torch.Tensor)]


def gradients(model, given, mask):
    model.zero_grad()
    sum(real(t, mask).tanh().sum() for t in tensors(model(**given))).backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def close_gradients(ours, theirs, truth, floor=2e-5):
    """`helpers.close_to_truth` of every parameter's gradient, of a model's by `theirs`' error."""
    assert ours.keys() == theirs.keys() == truth.keys()
    whole = torch.stack([g.norm() for g in truth.values()]).norm()
    for name, g in truth.items():
        error, rounding = ((t[name].double() - g).norm() for t in (ours, theirs))
        # a gradient that is rounding alone (a key's bias, cancelling parts) has no relative error
        limit = floor * g.norm() + 2 * rounding + 1e-6 * whole
        assert error <= limit, f"{name}: error {error:.2e}, limit {limit:.2e}"


def same_gradients(ours, model, given, mask):
    """`ours` are the gradients that the stock `model` has, within its own error."""
    truth = gradients(copy.deepcopy(model).double(), given, mask)
    close_gradients(ours, gradients(model, given, mask), truth)
