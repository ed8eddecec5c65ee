"""Sequences from shards: nothing lost, sentence pairs, packing, parts of a step."""

from itertools import pairwise

import numpy as np
import pytest
from helpers import refused
from test_masking import WORDS

from bertfast.data import DataError
from bertfast.data.sequences import Sequences, _cut_pair, _pairs
from bertfast.data.shards import Shard, Shards, read_index, write_json, write_shard


def folder(path, documents, per_shard=8):
    """A prepared folder whose documents are lists of sentences of token ids."""
    path.mkdir()
    entries = []
    for i in range(0, len(documents), per_shard):
        part = documents[i : i + per_shard]
        sentences = [s for d in part for s in d]
        tokens = np.array([t for s in sentences for t in s], np.uint16)
        offsets = lambda sizes: np.cumsum([0, *sizes]).astype(np.int64)
        shard = Shard(tokens, offsets([len(s) for s in sentences]), offsets([len(d) for d in part]))
        entries.append(write_shard(path, f"train-{i:06d}", shard))
    write_json(path / "index.json", {"format": 1, "shards": {"train": entries, "valid": []}})
    return Shards(path, "train")


def corpus(n=60, seed=0, longest=30):
    """Documents whose tokens tell where they stand: all distinct while ids last."""
    r = np.random.default_rng(seed)
    fresh = iter(np.tile(np.arange(5, 400), 100).tolist())
    return [
        [[next(fresh) for _ in range(r.integers(1, longest))] for _ in range(r.integers(1, 7))]
        for _ in range(n)
    ]


def texts(sequences, batch):
    """Each sequence's tokens with the masked ones put back."""
    ids = batch.input_ids.copy()
    ids[batch.positions] = batch.labels
    return [ids[a:b].tolist() for a, b in pairwise(batch.cu_seqlens)]


def test_runs_hold_every_token_once(tmp_path):
    documents = corpus()
    sequences = Sequences(folder(tmp_path / "d", documents), WORDS, length=32)
    window = sequences.window(0)
    batch = sequences.build(window, np.arange(len(window.first)))
    found = texts(sequences, batch)
    assert all(len(t) <= 32 and t[0] == 2 and t[-1] == 3 for t in found)
    flat = sorted(t for s in found for t in s[1:-1])
    assert flat == sorted(t for d in documents for s in d for t in s)
    joined = [[t for s in d for t in s] for d in documents]
    inside = lambda part, whole: any(whole[i : i + len(part)] == part for i in range(len(whole)))
    assert all(any(inside(t[1:-1], d) for d in joined) for t in found)
    assert batch.max_seqlen == max(map(len, found)) and batch.next_sentence is None
    assert (batch.token_type_ids == 0).all()
    starts = np.repeat(batch.cu_seqlens[:-1], np.diff(batch.cu_seqlens))
    assert (batch.position_ids == np.arange(len(batch.input_ids)) - starts).all()


def test_pairs(tmp_path):
    documents = corpus(400)
    sequences = Sequences(folder(tmp_path / "d", documents, 400), WORDS, length=48, pairs=True)
    window = sequences.window(0)
    n = len(window.first)
    batch = sequences.build(window, np.arange(n))
    shard = sequences.shards.load(0)
    bounds = shard.sentences[shard.documents]
    owner = lambda position: np.searchsorted(bounds, position, side="right") - 1
    a, b = window.first, window.second
    assert (np.diff(a) > 0).all() and (np.diff(b) > 0).all()
    assert (owner(a[:, 0]) == owner(a[:, 1] - 1)).all() and (
        owner(b[:, 0]) == owner(b[:, 1] - 1)
    ).all()
    random = window.random_next
    assert (owner(a[random, 0]) != owner(b[random, 0])).all()
    assert (owner(a[~random, 0]) == owner(b[~random, 0])).all()
    whole = ~random & (window.lengths() < 48)
    assert (a[whole, 1] == b[whole, 0]).all() and whole.sum() > 20  # B goes on where A ends
    assert (window.lengths() <= 48).all() and 0.4 < random.mean() < 0.75
    assert (batch.next_sentence == random).all()
    for i in (0, n // 2, n - 1):
        start, end = batch.cu_seqlens[i : i + 2]
        size = a[i, 1] - a[i, 0] + 2
        types = batch.token_type_ids[start:end]
        assert (types[:size] == 0).all() and (types[size:] == 1).all()
        text = texts(sequences, batch)[i]
        assert text == [2, *shard.tokens[slice(*a[i])], 3, *shard.tokens[slice(*b[i])], 3]


def test_cut_pairs_lose_tokens_of_both_ends():
    rng, starts = np.random.default_rng(0), []
    for _ in range(200):
        a, b = [10, 110], [200, 230]
        _cut_pair(a, b, 60, rng)
        assert (a[1] - a[0], b[1] - b[0]) == (30, 30)
        starts.append(a[0] - 10)
    assert abs(np.mean(starts) - 35) < 2 and min(starts) > 10 and max(starts) < 60
    a, b = [0, 50], [50, 101]
    _cut_pair(a, b, 41, rng)
    assert sorted((a[1] - a[0], b[1] - b[0])) == [20, 21]


def test_short_pairs(tmp_path):
    """A tenth are shorter than the limit, so that the model sees such texts, too."""
    r = np.random.default_rng(0)
    documents = [[r.integers(5, 400, 10).tolist() for _ in range(1500)] for _ in range(3)]
    sequences = Sequences(folder(tmp_path / "d", documents), WORDS, length=64, pairs=True)
    window = sequences.window(0)
    short = (window.lengths() < 50).mean()
    assert len(window.keys) > 400 and 0.04 < short < 0.13
    assert abs(window.random_next.mean() - 0.5) < 0.07  # where sentences don't run out
    assert len({*window.keys.tolist()}) == len(window.keys)  # masks of their own


def test_pairs_leave_nothing_out():
    """What a random B displaces starts the next pair."""
    n = 4000
    found = _pairs(np.arange(n + 1), np.array([0, n // 2, n]), 40, np.random.default_rng(0))
    first, second, random_next = found
    ranges = [*first.tolist(), *second[~random_next].tolist()]
    counts = np.bincount([t for a, b in ranges for t in range(a, b)], minlength=n)
    assert (counts == 1).all() and random_next.any()


def test_steps(tmp_path):
    """Within the budget, together every sequence but the last few, and cut without changing them."""
    sequences = Sequences(folder(tmp_path / "d", corpus(300)), WORDS, length=32)
    window = sequences.window(0)
    lengths = window.lengths()
    whole = sequences.steps(window, 256)
    assert all(224 < lengths[s].sum() <= 256 for s in whole)
    flat = np.concatenate(whole)
    assert (flat == np.arange(len(flat))).all() and lengths[len(flat) :].sum() < 256
    for parts in (2, 3, 5):
        cut = sequences.steps(window, 256, parts)
        assert len(cut) == parts * len(whole)
        for i, step in enumerate(whole):
            mine = cut[i * parts : (i + 1) * parts]
            assert (np.concatenate(mine) == step).all()
            assert max(lengths[m].sum() for m in mine) <= 256 / parts + 32
    refused(ValueError, "can't hold", sequences.steps, window, 31)


def test_windows(tmp_path):
    """A pass sees each shard once, in windows; the same again for the same seed alone."""
    documents = corpus(64)
    shards = folder(tmp_path / "d", documents)
    make = lambda seed: Sequences(
        shards, WORDS, length=32, window_tokens=shards.tokens // 3, seed=seed
    )
    sequences = make(0)
    assert sequences.windows >= 3

    def contents(s, numbers):
        return [texts(s, s.build(w, np.arange(len(w.first)))) for w in map(s.window, numbers)]

    first = contents(sequences, range(sequences.windows))
    again = contents(make(0), range(sequences.windows))
    assert first == again
    flat = lambda windows: sorted(t for w in windows for s in w for t in s[1:-1])
    assert flat(first) == sorted(t for d in documents for s in d for t in s)
    second = contents(sequences, range(sequences.windows, 2 * sequences.windows))
    assert flat(second) == flat(first)
    of = lambda windows: [sorted(t for s in w for t in s) for w in windows]
    assert of(second) != of(first)  # other shards side by side
    assert contents(make(1), [0]) != first[:1]
    w = sequences.window(1)
    other = make(0).window(1)
    a, b = (s.build(x, np.arange(5)) for s, x in ((sequences, w), (make(0), other)))
    assert (a.input_ids == b.input_ids).all() and (a.positions == b.positions).all()


def test_new_masks_in_every_pass(tmp_path):
    shards = folder(tmp_path / "d", [[[10, 11, 13, 14, 16, 17, 19, 20]]])
    sequences = Sequences(shards, WORDS, length=32)
    masks = {tuple(sequences.build(sequences.window(i), np.arange(1)).positions) for i in range(30)}
    assert len(masks) > 4


def test_refusals(tmp_path):
    shards = folder(tmp_path / "d", [[[10, 11]]])
    refused(ValueError, "length is 4", Sequences, shards, WORDS, length=4)
    with pytest.raises(ValueError, match="too little text for sentence pairs"):
        Sequences(shards, WORDS, pairs=True).window(0)


@pytest.mark.parametrize("text", ["[]", "3", '{"format": [1]}', "{", "[" * 10**5])
def test_index_of_another_kind(tmp_path, text):
    (tmp_path / "index.json").write_text(text)
    refused(DataError, "index.json (has format|can't be read)", read_index, tmp_path)
