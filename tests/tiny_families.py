"""Tiny checkpoints of several families with their kinds of tokenizer."""

import families
import tiny
import torch
import transformers
from tokenizers import ByteLevelBPETokenizer, Tokenizer, models, normalizers, pre_tokenizers
from tokenizers.processors import RobertaProcessing, TemplateProcessing

BYTES = ("Roberta", "ModernBert")  # byte-level BPE; of the others WordPiece
FAMILIES = tuple(
    f for f in ("Roberta", "DistilBert", "ModernBert", "DebertaV2") if f in families.FAMILIES
)


def _bytes(texts):
    made = ByteLevelBPETokenizer(add_prefix_space=False)
    specials = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    made.train_from_iterator(texts, vocab_size=400, special_tokens=specials, show_progress=False)
    own = made._tokenizer
    own.post_processor = RobertaProcessing(("</s>", 2), ("<s>", 0), add_prefix_space=False)
    names = dict(zip(("cls", "pad", "sep", "unk", "mask"), specials, strict=True))
    return own, names | {"bos": "<s>", "eos": "</s>"}


def _words(words):
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    letters = [p + c for c in "abcdefghijklmnopqrstuvwxyz0123456789.,?" for p in ("", "##")]
    vocabulary = {w: i for i, w in enumerate(dict.fromkeys([*specials, *words, *letters]))}
    own = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    own.normalizer = normalizers.BertNormalizer()
    own.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    pair = "[CLS] $A [SEP] $B:1 [SEP]:1"
    own.post_processor = TemplateProcessing("[CLS] $A [SEP]", pair, [("[CLS]", 2), ("[SEP]", 3)])
    return own, dict(zip(("pad", "unk", "cls", "sep", "mask"), specials, strict=True))


def checkpoint(folder, family: str, head: str = "Model", words=tiny.WORDS, **options):
    """A folder as `from_pretrained` reads it, of random weights; the words are whole tokens where the
    tokenizer is WordPiece."""
    own, names = _bytes([" ".join(words)] * 3) if family in BYTES else _words(words)
    types = family not in (*BYTES, "DistilBert")
    inputs = ["input_ids", *["token_type_ids"] * types, "attention_mask"]
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=own,
        model_input_names=inputs,
        **{f"{name}_token": token for name, token in names.items()},
    )
    tokenizer.save_pretrained(folder)
    sizes = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
    torch.manual_seed(0)
    families.build(family, head, **sizes | options).save_pretrained(folder)
    return folder
