"""Tiny models of several families that tag words, each with a tokenizer of its family's kind."""

import families
import tokenizers
import transformers
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

TEXT = (
    "Ada Lovelace wrote to Charles Babbage in London, of the Analytical Engine (1843). "
    "Debian ships C++ and Python libraries; the GNU toolchain, too: gcc's front-ends, Qt6, GTK. "
    "Lovelace's notes reached Turin. Où est la bibliothèque? Im Süden Münchens — 東京 日本 naïve."
)
LABELS = ("O", "B-PER", "I-PER", "B-LOC", "I-LOC")
KINDS = {
    "Bert": "wordpiece",
    "DistilBert": "wordpiece",
    "Roberta": "byte",
    "ModernBert": "byte untrimmed",
    "DebertaV2": "pieces",
}
SPECIALS = {
    "wordpiece": ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"),
    "byte": ("<s>", "<pad>", "</s>", "<unk>", "<mask>"),
    "byte untrimmed": ("[CLS]", "[PAD]", "[SEP]", "[UNK]", "[MASK]"),
    "pieces": ("[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]"),
}


def tokenizer(kind, length=64, text=TEXT):
    """As BERT's, RoBERTa's, ModernBERT's (whose offsets hold the space before) and DeBERTa-v2's."""
    specials = list(SPECIALS[kind])
    name = lambda part: next(s for s in specials if s.lower().strip("[]<>") in part)
    pad, unknown, mask = name(("pad",)), name(("unk",)), name(("mask",))
    first, last = name(("cls", "s")), name(("sep", "/s"))
    if kind == "wordpiece":
        made = Tokenizer(models.WordPiece(unk_token=unknown))
        made.normalizer = normalizers.BertNormalizer(lowercase=True)
        made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        made.decoder = decoders.WordPiece()
        trainer = trainers.WordPieceTrainer(
            vocab_size=120, special_tokens=specials, show_progress=False
        )
    elif kind == "pieces":
        made = Tokenizer(models.Unigram())
        made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
        made.decoder = decoders.Metaspace()
        trainer = trainers.UnigramTrainer(
            vocab_size=120, special_tokens=specials, unk_token=unknown, show_progress=False
        )
    else:
        made = Tokenizer(models.BPE())
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        made.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=330, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
        )
    made.train_from_iterator([text], trainer)
    ends = [(t, made.token_to_id(t)) for t in (last, first)]
    if kind == "byte":
        made.post_processor = processors.RobertaProcessing(*ends, add_prefix_space=False)
    else:
        template = {"single": f"{first} $A {last}", "pair": f"{first} $A {last} $B:1 {last}:1"}
        made.post_processor = processors.TemplateProcessing(**template, special_tokens=ends)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token=pad, unk_token=unknown, mask_token=mask, cls_token=first,
        sep_token=last, model_max_length=length,
    )  # fmt: skip


def model(family, labels=LABELS, **options):
    """(model, tokenizer), on a family's head for tokens, with weights that tell labels apart."""
    read = tokenizer(KINDS[family])
    options = {
        "vocab_size": len(read),
        "pad_token_id": read.pad_token_id,
        "num_labels": len(labels),
    } | options
    config = families.config(
        family,
        **options,
        id2label=dict(enumerate(labels)),
        label2id={n: i for i, n in enumerate(labels)},
    )
    families.torch.manual_seed(0)
    config._attn_implementation = "eager" if family in families.EAGER else "sdpa"
    return getattr(transformers, f"{family}ForTokenClassification")(config).eval(), read


def checkpoint(folder, family, **options):
    """A model of a family, saved."""
    made, read = model(family, **options)
    made.save_pretrained(folder)
    read.save_pretrained(folder)
    return folder


__all__ = ["KINDS", "LABELS", "TEXT", "checkpoint", "model", "tokenizer", "tokenizers"]
