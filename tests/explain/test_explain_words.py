"""Words with the characters of raw texts, and the tokens that are of each."""

import random

import numpy as np
import pytest
import tiny
import tiny_families
from helpers import refused
from transformers import AutoTokenizer, BertTokenizer

from bertfast.data import clean_text, encode
from bertfast.explain.words import cleaned, read
from bertfast.train import ConfigError

RAW = "  Caf\u00e9,\tcafe\u0301 \x00red\ufeff dog--blue \u4e2d\u6587 \U0001f468\u200d\U0001f469 x\u200dy"


@pytest.mark.parametrize("seed", range(3))
def test_cleaned_knows_where_its_characters_come_from(seed):
    r = random.Random(seed)
    alphabet = "ab \u00e9e\u0301\u0323\x00\x85\ufeff\u200d\u00ad \t\n\u3000\uac00\u1100\u1161\u11a8\u0995\u09c7\u09be\u4e2d\u2126\u2000\u0344\u1e9b\u0338.,"
    for _ in range(1000):
        raw = "".join(r.choice(alphabet) for _ in range(r.randrange(14)))
        text, places = cleaned(raw)
        assert text == clean_text(raw) and len(places) == len(text)
        assert (np.diff(places[:, 0]) >= 0).all() and (places[:, 0] < places[:, 1]).all()
        for at, word in zip(
            np.flatnonzero([c != " " for c in text]), text.replace(" ", ""), strict=True
        ):
            a, b = places[at]
            assert word in clean_text(raw[a:b])


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    out = {}
    for family in ("DistilBert", "Roberta"):
        folder = tmp_path_factory.mktemp(family)
        out[family] = AutoTokenizer.from_pretrained(tiny_families.checkpoint(folder, family))
    return out


@pytest.mark.parametrize("family", ("DistilBert", "Roberta"))
def test_words_and_their_tokens(tokenizers, family):
    tokenizer = tokenizers[family]
    (text,) = read(tokenizer, [RAW], None, 200)
    words = [RAW[a:b] for _, a, b in text.spans]
    assert words[:3] == ["Caf\u00e9", ",", "cafe\u0301"] and "dog" in words and "blue" in words
    assert text.row == encode(tokenizer, [clean_text(RAW)], None, 200)[0]
    assert text.read().all() and text.word[0] == text.word[-1] == -1
    # Each token's characters, by the tokenizer, lie in the word that it is given.
    marks = tokenizer(clean_text(RAW), return_offsets_mapping=True)["offset_mapping"]
    clean = clean_text(RAW)
    for word, (a, b) in zip(text.word, marks, strict=True):
        if word >= 0:
            assert clean[a:b].strip() in clean_text(words[word])
    scores = np.random.default_rng(0).normal(size=len(text.word))
    total = text.total(scores)
    for i in range(len(words)):
        assert total[i] == pytest.approx(
            sum(s for s, w in zip(scores, text.word, strict=True) if w == i)
        )


def test_what_is_cut_off_is_not_read(tokenizers):
    (text,) = read(tokenizers["DistilBert"], ["red cat dog bird stone"], None, 5)
    assert text.read().tolist() == [True, True, True, False, False]
    assert np.isnan(text.total(np.ones(5))).tolist() == [False, False, False, True, True]


def test_pairs_have_two_sides(tokenizers):
    (text,) = read(tokenizers["DistilBert"], ["red  cat"], ["dog, \n blue"], 20)
    sides = ["red  cat", "dog, \n blue"]
    assert [sides[s][a:b] for s, a, b in text.spans] == ["red", "cat", "dog", ",", "blue"]
    assert text.word.tolist() == [-1, 0, 1, -1, 2, 3, 4, -1]
    assert text.row == encode(tokenizers["DistilBert"], ["red cat"], ["dog, blue"], 20)[0]


def test_words_of_one_token_are_one(tmp_path):
    """An unknown word of BERT's, and signs without a space between."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    own = Tokenizer(models.WordLevel({"[UNK]": 0, "red-dog": 1, "cat": 2}, unk_token="[UNK]"))
    own.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=own, unk_token="[UNK]")
    (text,) = read(tokenizer, ["cat red-dog cat"], None, 9)
    assert ["cat red-dog cat"[a:b] for _, a, b in text.spans] == ["cat", "red-dog", "cat"]
    assert text.word.tolist() == [0, 1, 2]


def test_slow_tokenizers_are_refused(tmp_path):
    slow = type("Slow", (), {"is_fast": False})()
    refused(ConfigError, "fast tokenizer", read, slow, ["a"], None, 9)
    tiny.checkpoint(tmp_path)
    assert BertTokenizer.from_pretrained(tmp_path).is_fast  # transformers 5 has them fast alone
