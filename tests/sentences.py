"""sentence-transformers' models of random weights, and texts of the few words that they know."""

import copy

import pytest
import torch
import transformers
from families import build
from padded import flat

import bertfast

WIDTH, VOCABULARY = 48, 90  # of families' small models

WORDS = [
    "a",
    "b",
    "c",
    "d",
    "the",
    "cat",
    "sat",
    "on",
    "mat",
    "dog",
    "ran",
    "far",
    "away",
    "from",
    "sun",
    "sea",
]
TEXTS = [" ".join(WORDS[i % 7 : i % 7 + 2 + i % 9]) for i in range(21)]


def checkpoint(folder, family="Bert", head="Model", **options):
    """A saved model of random weights with a tokenizer of words."""
    tokenizers = pytest.importorskip("tokenizers")
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words = {w: i for i, w in enumerate(special + WORDS)}
    raw = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    raw.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    raw.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B [SEP]",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    names = ("pad", "unk", "cls", "sep", "mask")
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw,
        model_max_length=32,
        model_input_names=["input_ids", "attention_mask"],
        **{f"{name}_token": token for name, token in zip(names, special, strict=True)},
    )
    tokenizer.save_pretrained(folder)
    build(family, head, pad_token_id=0, **options).save_pretrained(folder)
    return str(folder)


def copies(model, **options):
    """The model accelerated, as it is, and in fp64, all without dropout; and the report."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    ours = copy.deepcopy(model)
    report = bertfast.accelerate(ours, **options)
    assert report.fused >= 2
    return (ours, model, copy.deepcopy(model).double()), report


def features(model, texts=TEXTS[:6], **options):
    """A batch for the model's forward, which changes what it is given."""
    given = model.preprocess(texts, **options)
    return {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in given.items()}


def floats(found):
    return {k: t for k, t in flat("", found).items() if t.is_floating_point()}
