"""BERT's WordPiece tokenizer over distinct words: trained on counts, applied through a table."""

import json
import re
import unicodedata
from collections import Counter
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..files import StrPath, os_errors
from .clean import UNSPACED
from .errors import DataError

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

SPECIALS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
_MOST_WORDS = 4_000_000  # distinct words counted; the rarest go beyond it, so memory stays flat
_TRAINING_WORDS = (
    60_000_000  # occurrences shown to the trainer; counts shrink to this in proportion
)


# BERT splits at punctuation, which in ASCII is all that is no letter or digit. Done here for ASCII
# words, it leaves far fewer distinct ones for the tokenizer.
_ASCII_PARTS = re.compile("[0-9A-Za-z]+|[^0-9A-Za-z]")
_NOT_PLAIN = re.compile("[^0-9A-Za-z ]")
_JOINED = 64  # plain parts encoded as one text
_LONGEST = 100  # characters of a word in BERT's tokenizer: a longer one is [UNK]
_LONGEST_UNSPACED = 1000  # where spaces separate phrases
_UNSPACED_SHARE = 0.001  # of the words, from which on that pays


class WordCounts:
    """How often each word occurs; beyond a limit the rarest are forgotten (lossy counting)."""

    def __init__(self, limit: int = _MOST_WORDS) -> None:
        self.counts, self.limit = Counter(), limit

    def add(self, table: list[str], counts: np.ndarray) -> None:
        for word, n in zip(table, counts.tolist(), strict=True):
            if n:
                self.counts[word] += n
        floor = 1
        while len(self.counts) > self.limit:
            self.counts = Counter({w: n for w, n in self.counts.items() if n > floor})
            floor *= 2


def _accents_are_signs(counts: Counter) -> bool:
    """Whether most marks are no accents of Latin, Greek and Cyrillic letters but signs of others,
    which words are not read without: Indic and Thai vowels and tones, voiced kana."""
    characters, balance = Counter(), 0
    for word, n in counts.items():
        for c in "" if word.isascii() else word:
            characters[c] += n
    for c, n in characters.items():
        parts = unicodedata.normalize("NFD", c)
        script = unicodedata.name(parts[0], "").split(" ")[0]
        if "Mn" in map(unicodedata.category, parts) and script != "VARIATION":  # of emoji
            balance += -n if script in ("LATIN", "GREEK", "CYRILLIC", "COMBINING") else n
    return balance > 0


def _has_forms(counts: Counter) -> bool:
    """Whether a word has another spelling in Unicode, which some keyboards and files have: with
    accents, dots below Bengali or Devanagari letters, Korean syllables."""
    characters = {c for word in counts if not word.isascii() for c in word}
    return any(unicodedata.combining(c) or unicodedata.normalize("NFD", c) != c for c in characters)


def _bert_settings(tokenizer) -> dict:
    """Of BERT's normalizer, alone or after NFC; {} where the tokenizer's is another."""
    state = json.loads(tokenizer.normalizer.__getstate__()) if tokenizer.normalizer else {}
    *before, last = state.get("normalizers") or [state]
    mine = last.get("type") == "BertNormalizer" and before in ([], [{"type": "NFC"}])
    return last if mine else {}


def train_tokenizer(
    counts: Counter, vocab_size: int, lowercase: bool, min_frequency: int = 2
) -> "Tokenizer":
    """A `tokenizers.Tokenizer` as BERT's, its vocabulary learnt from words and their counts.

    Three things are for other scripts than BERT's: accents go with the case, as BERT's do, unless
    most marks in the corpus are vowel signs and the like; where marks stay, text is read in the
    form (NFC) of the words, whichever it has; and in a corpus without spaces between words, what
    stands between two spaces may be longer.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from tokenizers.trainers import WordPieceTrainer

    if not counts:
        raise DataError("the corpus has no words left to train a tokenizer on")
    accents = False if lowercase and _accents_are_signs(counts) else None
    normalizer = normalizers.BertNormalizer(lowercase=lowercase, strip_accents=accents)
    if (accents is False or not lowercase) and _has_forms(counts):
        normalizer = normalizers.Sequence([normalizers.NFC(), normalizer])
    splitter = pre_tokenizers.BertPreTokenizer()
    words = Counter()
    for word, n in counts.items():
        if word.isascii():
            for part in _ASCII_PARTS.findall(word.lower() if lowercase else word):
                words[part] += n
        else:
            for part, _ in splitter.pre_tokenize_str(normalizer.normalize_str(word)):
                words[part] += n
    characters = Counter()
    for word, n in words.items():
        for c in word:
            characters[c] += n
    limit = max(1000, vocab_size // 3)
    alphabet = {c for c, _ in sorted(characters.items(), key=lambda x: (-x[1], x[0]))[:limit]}
    words = {w: n for w, n in sorted(words.items()) if alphabet.issuperset(w)}
    scale = min(1.0, _TRAINING_WORDS / sum(words.values()))

    def texts():
        for word, n in words.items():
            n = n if scale == 1 else max(round(n * scale), min(n, min_frequency))
            for start in range(0, n, 1000):
                yield " ".join([word] * min(1000, n - start))

    # Named beforehand, pieces inside words get the same ids in every run, and the trainer breaks
    # ties by id; otherwise it would number them in the order of a hash table.
    inner = ["##" + c for c in sorted({c for word in words for c in word[1:]})]
    learner = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    learner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trainer = WordPieceTrainer(
        vocab_size=vocab_size,
        min_frequency=min_frequency,
        special_tokens=SPECIALS + inner,
        continuing_subword_prefix="##",
        show_progress=False,
    )
    learner.train_from_iterator(texts(), trainer)
    unspaced = sum(n for w, n in words.items() if len(w) > _LONGEST and UNSPACED.search(w))
    longest = _LONGEST_UNSPACED if unspaced > _UNSPACED_SHARE * sum(words.values()) else _LONGEST
    limits = {"unk_token": "[UNK]", "max_input_chars_per_word": longest}
    model = models.WordPiece(learner.get_vocab(), **limits)
    tokenizer = Tokenizer(model)
    tokenizer.add_special_tokens(SPECIALS)
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, splitter
    tokenizer.decoder = decoders.WordPiece(prefix="##")
    cls, sep = (tokenizer.token_to_id(t) for t in ("[CLS]", "[SEP]"))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS]:0 $A:0 [SEP]:0",
        pair="[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1",
        special_tokens=[("[CLS]", cls), ("[SEP]", sep)],
    )
    return tokenizer


def save_tokenizer(tokenizer: "Tokenizer", folder: Path, max_length: int = 512) -> None:
    """tokenizer.json, tokenizer_config.json and vocab.txt, as transformers reads them: as its
    BertTokenizer where that, whose words have up to 100 characters and any Unicode form, tokenizes
    alike."""
    folder.mkdir()
    with os_errors(folder):
        tokenizer.save(str(folder / "tokenizer.json"))
    names = ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")
    normalizer = _bert_settings(tokenizer)
    settings = {"tokenizer_class": "BertTokenizer", "do_lower_case": normalizer["lowercase"]}
    settings |= {"model_max_length": max_length, "tokenize_chinese_chars": True}
    settings |= {"strip_accents": normalizer["strip_accents"]}
    settings |= dict(zip(names, SPECIALS, strict=True))
    alone = type(tokenizer.normalizer).__name__ == "BertNormalizer"
    if not alone or tokenizer.model.max_input_chars_per_word != _LONGEST:
        inputs = ["input_ids", "token_type_ids", "attention_mask"]
        settings |= {"tokenizer_class": "PreTrainedTokenizerFast", "model_input_names": inputs}
    text = json.dumps(settings, indent=2) + "\n"
    (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    text = "".join(f"{token}\n" for token, _ in vocabulary)
    (folder / "vocab.txt").write_text(text, encoding="utf-8")


def check_tokenizer(tokenizer: "PreTrainedTokenizerBase", name: StrPath) -> None:
    """Only BERT's splits text at every space, which tokenizing distinct words relies on."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    found = backend and (type(backend.model).__name__, type(backend.pre_tokenizer).__name__)
    if found != ("WordPiece", "BertPreTokenizer"):
        raise DataError(f"{name} is no WordPiece tokenizer as BERT's; train one (leave it out)")


class WordTable:
    """Token ids of words; those seen before, in the same process, come from a table."""

    def __init__(self, tokenizer_file: StrPath, limit: int = _MOST_WORDS // 2) -> None:
        from tokenizers import Tokenizer

        self.backend = Tokenizer.from_file(str(tokenizer_file))
        self.backend.encode_special_tokens = True  # "[MASK]" in a text is text
        self.backend.no_truncation()
        self.backend.no_padding()
        # What the tokenizer would do to ASCII words; done before, it leaves fewer distinct ones.
        lowers = _bert_settings(self.backend).get("lowercase", False)
        self.ascii = str.lower if lowers else str
        self.known, self.limit = {}, limit
        # Plain parts are encoded many in one text and told apart by the prefix of inner pieces.
        prefix = self.backend.model.continuing_subword_prefix
        self.starts = np.ones(self.backend.get_vocab_size(), bool)
        for token, i in self.backend.get_vocab().items():
            self.starts[i] = not token.startswith(prefix)
        added = self.backend.get_added_tokens_decoder().values()
        self.joins = bool(prefix) and all(_NOT_PLAIN.search(t.content) for t in added)

    def __call__(self, words: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """Token ids of all words one after another, int64, and offsets [words + 1]."""
        if len(self.known) > self.limit:
            self.known.clear()
        split = {
            w: _ASCII_PARTS.findall(self.ascii(w)) if w.isascii() else [w]
            for w in words
            if w not in self.known
        }
        new = list({p for parts in split.values() for p in parts if p not in self.known})
        plain = [p for p in new if self.joins and p.isascii() and p.isalnum()]
        chunks = [plain[i : i + _JOINED] for i in range(0, len(plain), _JOINED)]
        for chunk, ids in zip(chunks, self._encode(map(" ".join, chunks)), strict=True):
            cuts = [*np.flatnonzero(self.starts[ids]).tolist(), len(ids)]
            for part, start, end in zip(chunk, cuts[:-1], cuts[1:], strict=True):
                self.known[part] = ids[start:end]
        others = [p for p in new if p not in self.known]
        self.known.update(zip(others, self._encode(others), strict=True))
        for word, parts in split.items():
            if word not in self.known:
                self.known[word] = [i for p in parts for i in self.known[p]]
        ids = [self.known[w] for w in words]
        offsets = np.concatenate([[0], np.cumsum([len(i) for i in ids])]).astype(np.int64)
        return np.fromiter(chain.from_iterable(ids), np.int64, int(offsets[-1])), offsets

    def _encode(self, texts) -> list[list[int]]:
        found = self.backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [e.ids for e in found]


def gather(values: np.ndarray, offsets: np.ndarray, ids: np.ndarray) -> tuple:
    """The ranges `ids` of values, one after another, and their lengths."""
    lengths = np.diff(offsets)[ids]
    ends = np.cumsum(lengths)
    place = np.arange(ends[-1] if len(ends) else 0) - np.repeat(ends - lengths, lengths)
    return values[np.repeat(offsets[:-1][ids], lengths) + place], lengths
