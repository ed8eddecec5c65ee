"""Masking: shares, the 80/10/10 rule, whole words, spans, phrases, independence of the batch."""

import itertools

import numpy as np
import pytest
import tiny
from helpers import refused
from transformers import BertTokenizer

from bertfast.data import DataError, masking

SIZE = 400
INNER = np.arange(SIZE) % 3 == 0
WORDS = masking.Vocabulary(SIZE, 2, 3, 4, INNER, np.arange(5, SIZE))


def batch(lengths, seed=0):
    """Random sequences between [CLS] and [SEP]."""
    r = np.random.default_rng(seed)
    offsets = np.cumsum([0, *lengths])
    ids = r.integers(5, SIZE, offsets[-1])
    special = np.zeros(len(ids), bool)
    ids[offsets[:-1]], ids[offsets[1:] - 1] = 2, 3
    special[offsets[:-1]] = special[offsets[1:] - 1] = True
    keys = r.integers(0, 2**63, len(lengths)).astype(np.uint64)
    return ids, offsets, special, keys


def words_of(ids, offsets, special):
    """The word that each token is of, by a plain loop; -1 for special tokens."""
    out, word = [], -1
    for i, t in enumerate(ids):
        if special[i]:
            out.append(-1)
            continue
        word += special[i - 1] or not INNER[t]
        out.append(word)
    return np.array(out)


@pytest.mark.parametrize("kind", ["token", "whole_word", "span"])
def test_shares(kind):
    ids, offsets, special, keys = batch(list(np.random.default_rng(1).integers(20, 129, 400)))
    seen, positions = masking.mask(ids, offsets, special, keys, WORDS, kind, 0.15)
    assert not special[positions].any() and (np.diff(positions) > 0).all()
    untouched = np.ones(len(ids), bool)
    untouched[positions] = False
    assert (seen[untouched] == ids[untouched]).all()
    for a, b in itertools.pairwise(offsets):
        n, chosen = b - a - 2, ((positions >= a) & (positions < b)).sum()
        budget = max(1, round(n * 0.15))
        assert chosen == budget if kind == "token" else 1 <= chosen <= budget + 8
    share = len(positions) / (~special).sum()
    assert abs(share - 0.15) < (0.003 if kind == "token" else 0.02)
    masked = (seen[positions] == 4).mean()
    same = (seen[positions] == ids[positions]).mean()
    tolerance = 4 * np.sqrt(0.25 / len(positions)) * (2 if kind == "span" else 1)
    assert abs(masked - 0.8) < tolerance and abs(same - 0.1) < tolerance
    assert (np.isin(seen[positions], WORDS.regular) | (seen[positions] == 4)).all()


def test_replacements_are_of_the_whole_vocabulary():
    ids, offsets, special, keys = batch([100] * 2000)
    seen, positions = masking.mask(ids, offsets, special, keys, WORDS, "token", 0.15)
    shown, true = seen[positions], ids[positions]
    counts = np.histogram(shown[(shown != 4) & (shown != true)], 5, (5, SIZE))[0]
    assert (abs(counts - counts.mean()) < 5 * np.sqrt(counts.mean())).all()


def test_every_token_is_drawn_alike():
    lengths = [12] * 6000
    ids, offsets, special, keys = batch(lengths)
    _, positions = masking.mask(ids, offsets, special, keys, WORDS, "token", 0.15)
    counts = np.bincount(positions % 12, minlength=12)
    assert counts[0] == counts[11] == 0
    expected = len(positions) / 10
    assert (abs(counts[1:11] - expected) < 5 * np.sqrt(expected)).all()


@pytest.mark.parametrize("kind", ["whole_word", "span"])
def test_words_stay_whole(kind):
    ids, offsets, special, keys = batch([60] * 200)
    _, positions = masking.mask(ids, offsets, special, keys, WORDS, kind, 0.15)
    word = words_of(ids, offsets, special)
    chosen = np.isin(word, word[positions]) & ~special
    assert set(np.flatnonzero(chosen)) == set(positions.tolist())
    runs = np.split(positions, np.flatnonzero(np.diff(positions) > 1) + 1)
    neighbours = np.mean([len(set(word[r])) for r in runs])
    assert (neighbours > 1.7) if kind == "span" else (neighbours < 1.5)


def test_longest_span_is_half_the_budget():
    """A budget of two tokens is two spans, which stand side by side by chance alone."""
    ids, offsets, special, keys = batch([16] * 3000)
    plain = WORDS._replace(inner=np.zeros(SIZE, bool))
    _, positions = masking.mask(ids, offsets, special, keys, plain, "span", 0.15)
    assert len(positions) == 2 * 3000
    touching = (np.diff(positions.reshape(-1, 2)) == 1).mean()
    assert abs(touching - 13 / (14 * 13 / 2)) < 5 * np.sqrt(0.25 / 3000)


def test_span_has_one_fate():
    ids, offsets, special, keys = batch([100] * 300)
    seen, positions = masking.mask(ids, offsets, special, keys, WORDS, "span", 0.15)
    runs = np.split(positions, np.flatnonzero(np.diff(positions) > 1) + 1)
    pure = [len({seen[p] == 4 for p in r}) == 1 for r in runs if len(r) > 1]
    assert np.mean(pure) > 0.85  # but for spans that happen to touch


def test_short_sequences():
    """One token or more each, also where a word is longer than the share; none to hide, none."""
    ids, offsets, special, keys = batch([3, 4, 2, 5])
    ids[4:6] = 5, 6  # 6 is an inner piece: one word of two tokens
    for kind in ("token", "whole_word", "span"):
        _, positions = masking.mask(ids, offsets, special, keys, WORDS, kind, 0.15)
        per = [((positions >= a) & (positions < b)).sum() for a, b in itertools.pairwise(offsets)]
        assert per[0] == 1 and per[2] == 0 and per[3] >= 1
        assert per[1] == (1 if kind == "token" else 2)


@pytest.mark.parametrize("kind", masking.KINDS[:3])
def test_batch_does_not_matter(kind):
    """A sequence is masked by its key, whatever stands beside it; another key masks otherwise."""
    ids, offsets, special, keys = batch([40, 50, 60, 33])
    together, positions = masking.mask(ids, offsets, special, keys, WORDS, kind, 0.15)
    for i in (3, 1):
        part = slice(offsets[i], offsets[i + 1])
        alone, p = masking.mask(
            ids[part],
            np.array([0, offsets[i + 1] - offsets[i]]),
            special[part],
            keys[i : i + 1],
            WORDS,
            kind,
            0.15,
        )
        assert (alone == together[part]).all()
        inside = (positions >= offsets[i]) & (positions < offsets[i + 1])
        assert (p + offsets[i] == positions[inside]).all()
    other, _ = masking.mask(ids, offsets, special, keys + np.uint64(1), WORDS, kind, 0.15)
    assert (other != together).any()


def test_entities(tmp_path):
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *tiny.WORDS, "#", "##s"]
    (tmp_path / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
    tokenizer = BertTokenizer(str(tmp_path / "vocab.txt"))
    words = masking.vocabulary(tokenizer)
    assert [vocabulary[i] for i in np.flatnonzero(words.inner)] == ["##s"]
    assert words.regular.tolist() == list(range(5, len(vocabulary)))
    (tmp_path / "lexicon.txt").write_text("Red Cat\nred cat dog\n\nriver\n")
    lexicon = masking.Lexicon(tmp_path / "lexicon.txt", tokenizer, words.inner)
    ids = np.array(
        tokenizer("stone red cat run red cat dogs red cat dog rivers river")["input_ids"]
    )
    text = tokenizer.convert_ids_to_tokens(ids)
    phrases = [text[a:b] for a, b in lexicon.find(ids)]
    # Whole words only: "dogs" and "rivers" are others; of two phrases the longer.
    assert phrases == [["red", "cat"], ["red", "cat"], ["red", "cat", "dog"], ["river"]]
    n = 3000
    flat, offsets = np.tile(ids, n), np.arange(n + 1) * len(ids)
    special = np.isin(flat, [2, 3])
    keys = np.random.default_rng(0).integers(0, 2**63, n).astype(np.uint64)
    _, positions = masking.mask(flat, offsets, special, keys, words, "entity", 0.2, lexicon)
    hidden = np.zeros(len(flat), bool)
    hidden[positions] = True
    hidden = hidden.reshape(n, -1)
    for a, b in lexicon.find(ids):
        assert (hidden[:, a:b].any(1) == hidden[:, a:b].all(1)).all()  # all or nothing
    river, stone = len(ids) - 2, 1
    assert hidden[:, river].mean() > 1.5 * hidden[:, stone].mean()
    (tmp_path / "empty.txt").write_text("\n")
    refused(DataError, "no phrase", masking.Lexicon, tmp_path / "empty.txt", tokenizer, words.inner)
    refused(DataError, "cannot be read", masking.Lexicon, tmp_path / "none", tokenizer, words.inner)
