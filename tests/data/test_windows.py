"""Windows beside the whole text's tokens, cut by hand; of every kind of tokenizer."""

import numpy as np
import pytest
import tiny_qa

from bertfast.data.errors import ConfigError
from bertfast.data.windows import windows

TEXTS = [tiny_qa.text(n, n) for n in (1, 5, 23)] + ["Ada  🎉\tlives\n in  Paris. ", ""]


def _cut(whole, room, stride):
    """Ranges of tokens: each `stride` tokens before the end of the one before, to the last token."""
    start, found = 0, []
    while True:
        found.append(range(start, min(start + room, whole)))
        if start + room >= whole:
            return found
        start += room - stride


@pytest.mark.parametrize("kind", tiny_qa.KINDS)
@pytest.mark.parametrize("max_length, stride", [(9, 0), (9, 3), (12, 6), (64, 10)])
@pytest.mark.parametrize("pair", [False, True])
def test_are_slices_of_the_whole(kind, max_length, stride, pair):
    tokenizer = tiny_qa.tokenizer(kind)
    head = "is" if pair else None
    before = tokenizer(head, add_special_tokens=False)["input_ids"] if pair else []
    room = max_length - tokenizer.num_special_tokens_to_add(pair=pair) - len(before)
    if room <= stride:
        pytest.skip("no room")
    options = {"max_length": max_length, "stride": stride}
    if pair:
        found = windows(tokenizer, [head] * len(TEXTS), TEXTS, **options)
    else:
        found = windows(tokenizer, TEXTS, **options)
    assert [w.example for w in found] == sorted(w.example for w in found)
    for i, text in enumerate(TEXTS):
        whole = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        own = [w for w in found if w.example == i]
        ranges = _cut(len(whole["input_ids"]), room, stride)
        assert len(own) == len(ranges)
        for window, tokens in zip(own, ranges, strict=True):
            inside = window.inside
            ids = [whole["input_ids"][t] for t in tokens]
            assert np.array(window.input_ids)[inside].tolist() == ids
            assert window.offsets[inside].tolist() == [
                list(whole["offset_mapping"][t]) for t in tokens
            ]
            assert len(window.input_ids) == len(ids) + len(before) + (
                tokenizer.num_special_tokens_to_add(pair=pair)
            )
            assert (window.words[~inside] == -1).all() and (window.words[inside] >= 0).all()
            stock = tokenizer([head], [text]) if pair else tokenizer([text])
            if len(ranges) == 1:
                assert [window.input_ids] == stock["input_ids"]
                assert [window.token_type_ids] == stock.get("token_type_ids", [None])
    assert tokenizer.truncation_side == "right"


@pytest.mark.parametrize("kind", tiny_qa.KINDS)
def test_of_words(kind):
    """As the same words with spaces between, also of a tokenizer that tells words by the space."""
    tokenizer = tiny_qa.tokenizer(kind)
    words = [["Ada", "lives", "xq", "Paris", "café"], ["by"], []]
    found = windows(tokenizer, words, max_length=64, stride=8, split=True)
    assert [w.example for w in found] == [0, 1, 2]
    for window, own in zip(found, words, strict=True):
        assert window.input_ids == tokenizer(" ".join(own))["input_ids"]
        for place, word in enumerate(own):
            of = window.words == place
            assert of.any() and not of[~window.inside].any()
            begin, end = window.offsets[of].T
            assert begin.min() == 0 and end.max() == len(word)
        texts = [
            own[w][a:b] for w, (a, b) in zip(window.words, window.offsets, strict=True) if w >= 0
        ]
        assert all(
            set(text) <= set(own[w])
            for text, w in zip(texts, window.words[window.inside], strict=True)
        )


def test_of_words_in_several_windows():
    tokenizer = tiny_qa.tokenizer("bytes")
    words = [["Ada", "lives", "in", "Paris"]]
    found = windows(tokenizer, words, max_length=8, stride=2, split=True)
    whole = tokenizer("Ada lives in Paris", add_special_tokens=False)["input_ids"]
    cut = _cut(len(whole), 6, 2)
    assert [w.input_ids[1:-1] for w in found] == [[whole[t] for t in r] for r in cut]
    # a word's tokens keep their places in it in a window that begins with it, or inside it
    for window in found:
        for w, (a, b) in zip(window.words[1:-1], window.offsets[1:-1], strict=True):
            assert b - a <= 1 and b <= len(words[0][w])


def test_a_tokenizer_that_cuts_on_the_left_and_pads():
    tokenizer = tiny_qa.tokenizer("wordpiece")
    text = tiny_qa.text(20, 0)
    right = windows(tokenizer, [text], max_length=9, stride=2)
    tokenizer.truncation_side = "left"
    tokenizer.backend_tokenizer.enable_padding(length=40)  # as a saved tokenizer.json may say
    left = windows(tokenizer, [text], max_length=9, stride=2)
    assert [w.input_ids for w in left] == [w.input_ids for w in right]
    assert left[0].offsets[1, 0] == 0 and tokenizer.truncation_side == "left"


def test_the_first_text_stands_whole_in_every_window():
    tokenizer = tiny_qa.tokenizer("bytes")
    heads, texts = ["who", "where is Ada"], [tiny_qa.text(12, 1), tiny_qa.text(9, 2)]
    for window in windows(tokenizer, heads, texts, max_length=24, stride=4):
        head = tokenizer(heads[window.example], add_special_tokens=False)["input_ids"]
        assert window.input_ids[: len(head) + 3] == [0, *head, 2, 2]
        assert not window.inside[: len(head) + 3].any() and window.token_type_ids is None


def test_nothing():
    assert windows(tiny_qa.tokenizer("wordpiece"), [], max_length=9, stride=2) == []
    assert windows(tiny_qa.tokenizer("wordpiece"), [], [], max_length=9, stride=2) == []


@pytest.mark.parametrize(
    "change, parts",
    [
        ({"stride": -1}, ["stride is -1", "0 to max_length - 1, 8"]),
        ({"stride": 9}, ["stride is 9", "0 to max_length - 1, 8"]),
        ({"stride": 7}, ["2 tokens of it are special", "smaller stride"]),
        ({"max_length": 2, "stride": 0}, ["max_length is 2", "larger max_length"]),
        ({"pairs": ["red"], "stride": 5}, ["4 tokens of it", "longest first text"]),
    ],
)
def test_settings_that_leave_no_room(change, parts):
    with pytest.raises(ConfigError) as e:
        windows(tiny_qa.tokenizer("wordpiece"), ["blue"], **{"max_length": 9, "stride": 2} | change)
    assert all(part in str(e.value) for part in parts)


def test_the_least_room_that_is_allowed():
    """One new token a window."""
    tokenizer = tiny_qa.tokenizer("wordpiece")
    found = windows(tokenizer, ["Ada lives in Paris by"], max_length=5, stride=2)
    assert len(found) == 3 and all(len(w.input_ids) == 5 for w in found)


def test_a_slow_tokenizer_is_refused():
    class Slow:
        is_fast = False

    with pytest.raises(ConfigError, match=r"Slow can't say .*tokenizer\.json"):
        windows(Slow(), ["a"], max_length=9, stride=2)
