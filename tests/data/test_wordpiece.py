"""The tokenizer that `prepare` trains, for any script, and its table of words."""

import random
import unicodedata
from collections import Counter

import numpy as np
import pytest
from transformers import AutoTokenizer

from bertfast.data.wordpiece import WordCounts, WordTable, save_tokenizer, train_tokenizer


def test_counts_stay_bounded():
    counts = WordCounts(limit=100)
    for i in range(50):
        table = ["often"] + [f"w{i}-{j}" for j in range(20)]
        counts.add(table, np.array([5] + [1] * 20))
    assert len(counts.counts) <= 100 and counts.counts["often"] == 250


def test_ascii_words_by_hand_as_by_the_library():
    """The shortcut for ASCII words learns the vocabulary, and gives the ids, of the library's way."""
    r = random.Random(2)
    printable = [chr(i) for i in range(33, 127)]
    words = ["".join(r.choice(printable) for _ in range(r.randint(1, 9))) for _ in range(400)]
    for lowercase in (True, False):
        tokenizer = train_tokenizer(dict.fromkeys(words, 3), 300, lowercase)
        parts = [
            p
            for w in words
            for p, _ in tokenizer.pre_tokenizer.pre_tokenize_str(
                tokenizer.normalizer.normalize_str(w)
            )
        ]
        again = train_tokenizer({p: 3 * parts.count(p) for p in parts}, 300, lowercase)
        assert again.get_vocab() == tokenizer.get_vocab()


@pytest.mark.parametrize("added", [[], ["net"], ["##s"], ["new york"]])
@pytest.mark.parametrize("lowercase", [True, False])
def test_word_table(tmp_path, lowercase, added):
    """The tokens of each word by itself, whatever words are encoded beside it."""
    text = "The Network of new york nets, and networks' nettle e-mails, (x86_64)! 中文 Éléphant"
    counts = dict.fromkeys(text.split(), 5)
    tokenizer = train_tokenizer(Counter(counts), 120, lowercase)
    tokenizer.add_tokens(added)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    r = random.Random(0)
    pieces = [*text.split(), "new", "york", "net", "[MASK]", "s", "a" * 101, "\ufffd"]
    words = ["".join(r.choices(pieces, k=r.randint(1, 3))) for _ in range(500)]
    words = list(dict.fromkeys(pieces + words))
    table = WordTable(tmp_path / "tokenizer.json")
    tokenizer.encode_special_tokens = True
    for part in (words[:200], words):  # the second time some are known
        tokens, offsets = table(part)
        assert len(offsets) == len(part) + 1
        for word, start, end in zip(part, offsets[:-1], offsets[1:], strict=True):
            expected = tokenizer.encode(word, add_special_tokens=False).ids
            assert tokens[start:end].tolist() == expected, word


def saved(folder, texts, lowercase=True):
    """A tokenizer of the words of texts as transformers reads it."""
    words = Counter(word for text in texts for word in text.split())
    folder.mkdir(exist_ok=True)
    save_tokenizer(train_tokenizer(words, 300, lowercase, 1), folder / "t")
    return AutoTokenizer.from_pretrained(folder / "t")


HINDI = ["यह एक परीक्षण वाक्य है", "दिल्ली भारत की राजधानी है", "मैं ठीक हूँ"]
FRENCH = ["Être là où l'été naît", "Čeština, ΑΘΉΝΑ и ёлка"]


@pytest.mark.parametrize(
    "texts, words",
    [
        (HINDI, {"हैं": "हैं", "दिल्ली": "दिल्ली"}),
        (["がぎぐ ざじず"], {"がぎ": "がぎ"}),
        (FRENCH, {"Été": "ete", "ΑΘΉΝΑ": "αθηνα"}),
        (HINDI * 3 + FRENCH, {"हैं": "हैं", "Été": "été"}),  # most marks decide
        ([*FRENCH, "\u2764\ufe0f " * 99], {"Été": "ete"}),
        (HINDI[:1] + FRENCH * 3, {"है": "ह", "Été": "ete"}),
    ],
    ids=["hindi", "kana", "accents", "more signs", "emoji", "more accents"],
)
def test_accents_go_and_vowel_signs_stay(tmp_path, texts, words):
    tokenizer = saved(tmp_path, texts)
    lost = "Été" in words and words["Été"] == "ete"  # with the accents, every spelling of them
    assert (type(tokenizer).__name__ == "BertTokenizer") == lost
    normalize = tokenizer.backend_tokenizer.normalizer.normalize_str
    assert {w: normalize(w) for w in words} == words
    for text in texts:
        assert tokenizer.unk_token_id not in tokenizer(text)["input_ids"]


def test_case_and_accents_stay_together(tmp_path):
    tokenizer = saved(tmp_path, FRENCH, lowercase=False)
    assert tokenizer.backend_tokenizer.normalizer.normalize_str("Été") == "Été"


SPELLINGS = {  # what Unicode's NFC takes apart (all these signs with a dot), or puts together
    "bengali": "\u09b9\u09df \u09ac\u09dc \u0986\u09b7\u09be\u09dd",
    "hindi": "\u0932\u093f\u095e\u093e\u095e\u093e \u092c\u095d\u0928\u093e",
    "punjabi": "\u0a26\u0a38\u0a24\u0a3e\u0a35\u0a47\u0a5b",
    "tamil": "\u0b95\u0bca\u0b9f\u0bc1 \u0baa\u0bcb\u0ba9",
    "kana": "\u304c\u304e\u3050",
    "french": "\u00c9t\u00e9 na\u00eft",
    "korean": "\ud55c\uad6d\uc5b4",
}


@pytest.mark.parametrize("lowercase", [True, False])
@pytest.mark.parametrize("text", SPELLINGS.values(), ids=SPELLINGS)
def test_every_spelling_is_the_same_text(tmp_path, text, lowercase):
    """`prepare` counts words in NFC; other files, and what people type, have other spellings."""
    normal = unicodedata.normalize("NFC", text)
    tokenizer = saved(tmp_path, [normal], lowercase)
    ids = tokenizer(normal)["input_ids"]
    assert tokenizer.unk_token_id not in ids
    assert tokenizer(unicodedata.normalize("NFD", text))["input_ids"] == ids
    found = tokenizer(text, return_offsets_mapping=True)
    assert found["input_ids"] == ids
    covered = {i for start, end in found["offset_mapping"] for i in range(start, end)}
    assert covered == {i for i, c in enumerate(text) if not c.isspace()}
    table = WordTable(tmp_path / "t" / "tokenizer.json")
    assert table(normal.split())[0].tolist() == ids[1:-1]


def test_words_of_scripts_without_spaces(tmp_path):
    """What stands between spaces may be longer than a word of BERT's."""
    r = random.Random(0)
    thai = ["ภาษา", "ไทย", "เป็น", "ที่", "มี", "ระดับ", "เสียง", "คำ", "แน่นอน"]
    phrases = ["".join(r.choices(thai, k=40)) for _ in range(30)]
    tokenizer = saved(tmp_path, phrases)
    assert tokenizer.unk_token_id not in tokenizer(phrases[0])["input_ids"]
    assert tokenizer("".join(phrases))["input_ids"][1:-1] == [tokenizer.unk_token_id]
    assert tokenizer.decode(tokenizer(phrases[0])["input_ids"][1:-1]) == phrases[0]
    pair = tokenizer("ไทย", "คำ")
    assert set(pair) == {"input_ids", "token_type_ids", "attention_mask"}
    assert sum(pair["token_type_ids"]) > 1 and tokenizer.mask_token == "[MASK]"
    table = WordTable(tmp_path / "t" / "tokenizer.json")
    assert table(phrases[:1])[0].tolist() == tokenizer(phrases[0])["input_ids"][1:-1]
    latin = saved(tmp_path / "latin", [*["word"] * 2000, "x" * 200, phrases[0]])
    assert latin.backend_tokenizer.model.max_input_chars_per_word == 100
    assert latin("x" * 200)["input_ids"][1:-1] == [latin.unk_token_id]
