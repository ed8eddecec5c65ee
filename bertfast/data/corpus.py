"""Raw text in: files to blocks, blocks to documents, documents to sentences of words."""

import gzip
import json
import re
import unicodedata
import zlib
from collections import defaultdict
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..files import StrPath
from .clean import DROP, UNSPACED
from .errors import DataError
from .formats import open_stream
from .sentences import split_sentences

# BERT's "Chinese characters" (CJK ideographs): each a word of its own.
_CJK = re.compile(
    "([\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0002a6df\U0002a700-\U0002ceaf"
    "\U0002f800-\U0002fa1f])"
)
# A blank line ends a document unless what follows is indented: that is its next paragraph.
_DOCUMENT_END = re.compile(rb"\n[ \t]*\n(?=[^ \t\n])")
_LONGEST = 16  # blocks that one document may fill before it is cut
_LETTERS = 0.5  # a sentence with a smaller share of letters is a table, a rule, a list of numbers


class Words(NamedTuple):
    """Documents as numbers: `table[ids[i]]` is word i; offsets end with the total."""

    table: list[str]  # distinct words, as written
    ids: np.ndarray  # uint32 [words]
    sentences: np.ndarray  # int64 [sentences + 1], offsets into ids
    documents: np.ndarray  # int64 [documents + 1], offsets into sentences
    counts: dict[str, int]  # what was dropped and why


def blocks(path: StrPath, size: int) -> Iterator[bytes]:
    """Consecutive blocks of about `size` bytes, cut between documents, gzip'd or not.

    .jsonl files are cut between lines, all others where a document ends. A document of more than
    16 blocks is cut at a line's end, so that memory stays bounded.
    """
    jsonl = is_jsonl(path)
    rest = b""
    try:
        with open_stream(path) as f:
            while data := f.read(size):
                if data.endswith(b"\r"):  # its line feed, if any, comes with the next read
                    data += f.read(1)
                rest += data.replace(b"\r\n", b"\n")
                if len(rest) < size:
                    continue
                cut = _last_cut(rest, jsonl)
                if cut <= 0 and len(rest) >= _LONGEST * size:
                    cut = rest.rfind(b"\n") + 1 or len(rest)
                if cut > 0:
                    yield rest[:cut]
                    rest = rest[cut:]
    except (EOFError, gzip.BadGzipFile, zlib.error) as e:
        raise DataError(f"{path}: damaged or truncated gzip data ({e})") from e
    except OSError as e:
        raise DataError(f"{path}: cannot be read: {e.strerror or e}") from e
    if rest.strip():
        yield rest


def is_jsonl(path: StrPath) -> bool:
    return ".jsonl" in Path(path).suffixes[-2:]


def _last_cut(block: bytes, jsonl: bool) -> int:
    """Where the last document that is surely whole ends; 0 for nowhere."""
    if jsonl:
        return block.rfind(b"\n") + 1
    end = len(block)
    while (end := block.rfind(b"\n", 0, end)) > 0:
        # Searching a short tail from behind: a regular expression can't run backwards.
        m = _DOCUMENT_END.match(block, end)
        if m:
            return m.end()
    return 0


def documents(
    block: bytes, jsonl: bool, column: str = "text", name: str = "", encoding: str = "utf-8"
) -> list[str]:
    """The documents of a block, not yet cleaned; bytes that `encoding` lacks become U+FFFD."""
    if not jsonl:
        return [d.decode(encoding, "replace") for d in _DOCUMENT_END.split(block)]
    out = []
    for line in block.split(b"\n"):
        if line.strip():
            try:
                text = json.loads(line.decode(encoding).removeprefix("\ufeff"))[column]
            except UnicodeDecodeError as e:
                raise DataError(
                    f"{name}: {line[:80]!r} is not {encoding} ({e.reason}): give --encoding"
                ) from None
            except (ValueError, KeyError, TypeError) as e:
                raise DataError(
                    f"{name}: expected JSON objects with {column!r}, found {line[:80]!r} ({e!r})"
                ) from None
            if not isinstance(text, str):
                raise DataError(f"{name}: {column!r} is {text!r:.80}, expected text")
            out.append(text)
    return out


def split_words(texts: list[str], min_words: int = 1) -> Words:
    """Clean documents and split them into sentences (a line's end ends one too) and words.

    Words are what stands between spaces, and each CJK ideograph: BERT's tokenizer never looks
    across them, so a distinct word needs tokenizing only once. Cleaning: Unicode NFC, no control
    characters, no sentence with fewer letters than other characters, no document under `min_words`
    (see `select`).
    """
    table = defaultdict(count().__next__)
    words, lengths, sizes = [], [], []
    lost = [text.count("\ufffd") for text in texts]
    for text in texts:
        text = DROP.sub("", text)
        if not text.isascii():
            text = _CJK.sub(r" \1 ", unicodedata.normalize("NFC", text))
        before = len(lengths)
        for line in text.splitlines():
            for sentence in split_sentences(line):
                part = sentence.split()
                words += part
                lengths.append(len(part))
        sizes.append(len(lengths) - before)
    ids = np.fromiter(map(table.__getitem__, words), np.uint32, len(words))
    found = Words(list(table), ids, _offsets(lengths), _offsets(sizes), {})
    poor = _poor_sentences(found)
    kept = select(found, ~poor, min_words)
    counts = {
        "documents": len(texts),
        "documents_undecoded": sum(map(bool, lost)),
        "characters_undecoded": sum(lost),
        "documents_too_short": len(texts) - len(kept.documents) + 1,
        "sentences": len(lengths),
        "sentences_without_text": int(poor.sum()),
    }
    return kept._replace(counts=counts)


def _offsets(lengths) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(np.asarray(lengths, np.int64))]).astype(np.int64)


def sums(values: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Sums of values[offsets[i]:offsets[i + 1]], 0 for an empty range."""
    total = np.concatenate([[0], np.cumsum(values)])
    return total[offsets[1:]] - total[offsets[:-1]]


def _poor_sentences(words: Words) -> np.ndarray:
    """bool [sentences]: fewer letters than other characters."""
    if not words.table:
        return np.zeros(len(words.sentences) - 1, bool)
    surplus = np.array(list(map(_surplus, words.table)))
    return sums(surplus[words.ids], words.sentences) < 0


def _surplus(word: str) -> float:
    """Letters beyond half of the characters. Vowel signs, accents and joiners are parts of the
    character before them."""
    if word.isascii():
        return sum(map(str.isalpha, word)) - _LETTERS * len(word)
    kinds = list(map(unicodedata.category, word))
    letters = sum(k[0] == "L" for k in kinds)
    return letters - _LETTERS * sum(k[0] != "M" and k != "Cf" for k in kinds)


def select(words: Words, sentences: np.ndarray, min_words: int = 1) -> Words:
    """What is left with the sentences that are true; documents under `min_words` go. In scripts
    without spaces each letter counts as a word there, as each Chinese character does."""
    kept = sentences.copy()
    lengths = np.diff(words.sentences)
    count = lambda word: 1 if word.isascii() else max(1, len(UNSPACED.findall(word)))
    counted = sums(np.fromiter(map(count, words.table), np.int64)[words.ids], words.sentences)
    document = np.repeat(np.arange(len(words.documents) - 1), np.diff(words.documents))
    size = np.bincount(document, counted * kept, len(words.documents) - 1)
    full = size >= max(min_words, 1)
    kept &= full[document]
    return words._replace(
        ids=words.ids[np.repeat(kept, lengths)],
        sentences=_offsets(lengths[kept]),
        documents=_offsets(np.bincount(document[kept], minlength=len(full))[full]),
    )
