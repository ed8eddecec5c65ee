# ruff: noqa: RUF001
"""Raw text to documents, sentences and words, in any script."""

import gzip
from itertools import pairwise

import pytest
from helpers import refused
from test_prepare import texts

from bertfast.data import DataError, corpus
from bertfast.data.sentences import split_sentences


def test_sentences():
    split = split_sentences
    assert split("One is here. Two is there!  (Three?) 4 ends") == [
        "One is here.",
        "Two is there!",
        "(Three?)",
        "4 ends",
    ]
    assert split("See e.g. Paris, i.e. there. Dr. Smith met J. Doe. it was 3.5 km.") == [
        "See e.g. Paris, i.e. there.",
        "Dr. Smith met J. Doe. it was 3.5 km.",
    ]
    assert split("他来了。她走了！") == ["他来了。", "她走了！"]
    assert split('He said "go." Then he left') == ['He said "go."', "Then he left"]
    assert split("သည်။ ဖြစ်သည်။ ပြည်") == ["သည်။", "ဖြစ်သည်။", "ပြည်"]
    assert split("   ") == [] and split("...") == ["..."]


def test_blocks_lose_nothing(tmp_path):
    """Cut between documents whatever the block's size; indented paragraphs stay with theirs."""
    documents = [
        d + ("\n\n   an indented paragraph" if i % 3 == 0 else "") for i, d in enumerate(texts(60))
    ]
    text = "\n\n".join(documents) + "\n"
    (tmp_path / "c.txt").write_bytes(text.replace("\n", "\r\n").encode())
    with gzip.open(tmp_path / "c.gz", "wb") as f:
        f.write(text.encode())
    for name in ("c.txt", "c.gz"):
        for size in (64, 500, 3000, 10**6):
            parts = list(corpus.blocks(tmp_path / name, size))
            found = [d.strip() for b in parts for d in corpus.documents(b, False)]
            assert found == documents
    (tmp_path / "cut.gz").write_bytes((tmp_path / "c.gz").read_bytes()[:-200])
    refused(DataError, "truncated", list, corpus.blocks(tmp_path / "cut.gz", 100))
    (tmp_path / "one.txt").write_text("no end " * 10_000)  # a document longer than memory allows
    assert max(map(len, corpus.blocks(tmp_path / "one.txt", 1000))) <= 17_000


def test_cleaning():
    text = "A\x00b cd\u200d stays.  ----- 12 34 -----\nNext  line here"
    words = corpus.split_words([text, "x", ""], min_words=2)
    sentences = [[words.table[w] for w in words.ids[a:b]] for a, b in pairwise(words.sentences)]
    assert sentences == [["Ab", "cd\u200d", "stays."], ["Next", "line", "here"]]
    assert words.documents.tolist() == [0, 2]
    assert words.counts["documents_too_short"] == 2 and words.counts["sentences_without_text"] == 1
    split = corpus.split_words(["日本 ok 语言"])
    assert [split.table[i] for i in split.ids] == ["日", "本", "ok", "语", "言"]


@pytest.mark.parametrize(
    "text",
    [
        "ရန်ကုန်မြို့သည် မြန်မာနိုင်ငံ၏ အကြီးဆုံးမြို့ ဖြစ်သည်။",
        "मैं ठीक हूँ।",
        "ภาษาไทยเป็นภาษาที่มีระดับเสียงของคำแน่นอน",
        "بِسْمِ ٱللَّهِ",
        "Việt",
        "خانه‌ها",
    ],
    ids=["burmese", "hindi", "thai", "arabic", "decomposed", "joiner"],
)
def test_marks_are_parts_of_letters(text):
    assert corpus.split_words([text]).counts["sentences_without_text"] == 0


def test_no_text_in_any_script():
    texts = ["१२३ ४५६ है", "— ☃ ☃ —", "❤️ ❤️", "๑๒๓๔"]
    assert corpus.split_words(texts).counts["sentences_without_text"] == 4


def test_letters_count_where_no_spaces_do():
    """--min-words: of Thai, kana and Chinese letters, of all else words."""
    kept = lambda text, n: len(corpus.split_words([text], n).documents) == 2
    for text, size in (("ไทยคำ", 5), ("日本の", 3), ("मैं ठीक हूँ", 3), ("one two", 2), ("ပြည်", 2)):
        assert kept(text, size) and not kept(text, size + 1), text
