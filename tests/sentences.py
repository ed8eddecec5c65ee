"""Texts of a small vocabulary and saved models whose tokenizer knows it."""

import pytest
import transformers
from families import build

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
