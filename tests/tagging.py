"""Tiny models of several families that tag words, each with a tokenizer of its family's kind."""

from collections import Counter
from itertools import pairwise

import families
import transformers
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

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


PIECES = [
    "lovelace",
    "debian",
    "the",
    "to",
    "tool",
    "lib",
    "in",
    "es",
    "on",
    "ain",
    "ar",
    "ha",
    "ra",
    "ch",
]


def merges(text, count):
    """Pairs of a byte-level BPE; of equals the first in order, where its trainer takes any."""
    split = pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str(text)
    words, found = [list(word) for word, _ in split], []
    while len(found) < count:
        pairs = Counter(pair for word in words for pair in pairwise(word))
        if not pairs:
            break
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        found.append(best)
        for word in words:
            for i in range(len(word) - 2, -1, -1):
                if (*word[i : i + 2],) == best:
                    word[i : i + 2] = ["".join(best)]
    return found


def tokenizer(kind, length=64, text=TEXT):
    """As BERT's, RoBERTa's, ModernBERT's (whose offsets hold the space before) and DeBERTa-v2's."""
    specials = list(SPECIALS[kind])
    name = lambda part: next(s for s in specials if s.lower().strip("[]<>") in part)
    pad, unknown, mask = name(("pad",)), name(("unk",)), name(("mask",))
    first, last = name(("cls", "s")), name(("sep", "/s"))
    numbered = lambda pieces: {p: i for i, p in enumerate(dict.fromkeys([*specials, *pieces]))}
    letters = sorted({*text.replace(" ", "")})
    if kind == "wordpiece":
        letters = sorted({*text.lower().replace(" ", "")})
        pieces = [p + c for c in (*letters, *PIECES) for p in ("", "##")]
        made = Tokenizer(models.WordPiece(numbered(pieces), unk_token=unknown))
        made.normalizer = normalizers.BertNormalizer(lowercase=True)
        made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        made.decoder = decoders.WordPiece()
    elif kind == "pieces":
        pieces = [
            *letters,
            "▁",
            *PIECES,
            *("▁" + p for p in ("A", "L", "C", "to", "tool", "the", "Lovelace")),
        ]
        scores = [(p, 0.0 if p in specials else -10.0 + len(p)) for p in numbered(pieces)]
        made = Tokenizer(models.Unigram(scores, unk_id=specials.index(unknown)))
        made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
        made.decoder = decoders.Metaspace()
    else:
        learnt = merges(text, 70)
        pieces = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *map("".join, learnt)]
        made = Tokenizer(models.BPE(numbered(pieces), learnt))
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        made.decoder = decoders.ByteLevel()
    made.add_special_tokens(specials)
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
    made = getattr(transformers, f"{family}ForTokenClassification")(config).eval()
    if made.classifier.bias is not None:
        made.classifier.bias.data[0] = -5.0  # so that there are entities
    return made, read


def checkpoint(folder, family, **options):
    """A model of a family, saved."""
    made, read = model(family, **options)
    made.save_pretrained(folder)
    read.save_pretrained(folder)
    return folder
