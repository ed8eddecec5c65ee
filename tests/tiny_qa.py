"""Small tokenizers of each kind, and questions over contexts whose answers can be learned."""

import random

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    BertTokenizer,
    DebertaV2Tokenizer,
    PreTrainedTokenizerFast,
    RobertaTokenizer,
)

WORDS = [
    "who",
    "what",
    "where",
    "is",
    "was",
    "the",
    "of",
    "in",
    "by",
    "at",
    "Ada",
    "Bob",
    "Eve",
    "Paris",
    "Rome",
    "Oslo",
    "lives",
    "works",
    "sings",
    "red",
    "blue",
    "stone",
    "river",
    "12",
    "in.",
    "café",
]
LETTERS = [chr(c) for c in range(33, 127)]
KINDS = ("wordpiece", "bytes", "modern", "unigram")


def tokenizer(kind):
    """WordPiece with pairs in one separator and types; RoBERTa's bytes with two and none;
    ModernBERT's, whose offsets hold the space before a word; DeBERTa's pieces, too."""
    if kind == "wordpiece":
        vocab = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *dict.fromkeys([*WORDS, *LETTERS])]
        vocab += [f"##{c}" for c in LETTERS]
        return BertTokenizer({w: i for i, w in enumerate(vocab)}, do_lower_case=False)
    if kind == "unigram":
        pieces = [(t, 0.0) for t in ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")]
        pieces += [(f"▁{w}", -2.0) for w in WORDS] + [(c, -9.0) for c in ["▁", *LETTERS]]
        return DebertaV2Tokenizer(list(dict(pieces).items()))
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    named = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    if kind == "bytes":
        vocab = {w: i for i, w in enumerate([*named, *symbols])}
        return RobertaTokenizer(vocab, [])
    vocab = {w: i for i, w in enumerate(["[CLS]", "[PAD]", "[SEP]", "[UNK]", *symbols])}
    merges = []
    for word in WORDS:
        if word.isascii():
            done = "Ġ"
            for c in word:
                if (done, c) not in merges:
                    merges.append((done, c))
                    vocab.setdefault(done + c, len(vocab))
                done += c
    inner = Tokenizer(models.BPE(vocab, merges, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B [SEP]",
        special_tokens=[("[CLS]", 0), ("[SEP]", 2)],
    )
    tokens = {f"{n.lower()}_token": f"[{n}]" for n in ("CLS", "PAD", "SEP", "UNK")}
    inputs = ["input_ids", "attention_mask"]
    return PreTrainedTokenizerFast(tokenizer_object=inner, model_input_names=inputs, **tokens)


def text(words: int, seed: int) -> str:
    """Random words with single spaces between."""
    r = random.Random(seed)
    return " ".join(r.choice(WORDS) for _ in range(words))


ASKED = {"who": ("Ada", "Bob", "Eve"), "where": ("Paris", "Rome", "Oslo")}
FILL = ("is", "was", "the", "of", "in", "by", "at", "red", "blue", "stone", "river")


def rows(n, seed=0, impossible=0.25, longest=12):
    """Questions "who" and "where" over words of which one is a name and one a place, or lacks."""
    r = random.Random(seed)
    out = []
    for i in range(n):
        question = r.choice([*ASKED])
        words = [r.choice(FILL) for _ in range(r.randint(4, longest))]
        for asked, answers in ASKED.items():
            if asked != question or r.random() >= impossible:
                words.insert(r.randrange(len(words) + 1), r.choice(answers))
        context = " ".join(words)
        given = [w for w in words if w in ASKED[question]]
        answers = [{"text": w, "answer_start": len(context.split(w)[0])} for w in given]
        out.append(
            {"id": f"q{seed}-{i}", "question": question, "context": context, "answers": answers}
        )
    return out


def squad(rows) -> dict:
    """The same as SQuAD's JSON."""
    paragraphs = []
    for row in rows:
        qa = {"id": row["id"], "question": row["question"], "answers": row["answers"]}
        qa["is_impossible"] = not row["answers"]
        paragraphs.append({"context": row["context"], "qas": [qa]})
    return {"version": "v2.0", "data": [{"title": "", "paragraphs": paragraphs}]}
