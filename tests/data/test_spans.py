"""Targets of windows beside the official example's walk over offsets; what answers may stand on."""

import numpy as np
import pytest
import tiny_qa

from bertfast.data.answer_cells import Answer
from bertfast.data.errors import ConfigError
from bertfast.data.questions import Questions
from bertfast.data.spans import NOWHERE, question_windows

SETTINGS = {"max_length": 16, "stride": 4}


def _questions(contexts, answers, question="who"):
    n = len(contexts)
    contexts = [c if isinstance(c, list) else [c] for c in contexts]
    return Questions([str(i) for i in range(n)], [question] * n, contexts, answers)


def _official(offsets, inside, answer):
    """First and last token of an answer, by the steps that transformers' run_qa describes: from
    the ends of the context inwards while the characters still hold the answer."""
    tokens = [t for t in range(len(offsets)) if inside[t]]
    begin, end = answer.start, answer.start + len(answer.text)
    if not tokens or offsets[tokens[0]][0] > begin or offsets[tokens[-1]][1] < end:
        return [0, 0]
    first, last = tokens[0], tokens[-1]
    while first <= tokens[-1] and offsets[first][0] <= begin:
        first += 1
    while last >= 0 and offsets[last][1] >= end:
        last -= 1
    return [first - 1, last + 1]


@pytest.mark.parametrize("kind", ["wordpiece", "unigram", "modern"])
def test_targets_are_the_official_ones(kind):
    """Over every run of words of every window; also of answers that begin or end inside a word."""
    tokenizer = tiny_qa.tokenizer(kind)
    context = tiny_qa.text(14, 3).replace("café", "cafe")
    starts = [0] + [i + 1 for i, c in enumerate(context) if c == " "]
    ends = [i for i, c in enumerate(context) if c == " "] + [len(context)]
    answers = [Answer(context[a:b], a) for a in starts for b in ends if a < b <= a + 22]
    answers += [
        Answer(context[a + 1 : a + 2], a + 1) for a in starts if context[a + 1 : a + 2].strip()
    ]
    found = question_windows(
        tokenizer, _questions([context] * len(answers), [[a] for a in answers]), **SETTINGS
    )
    options = {
        "truncation": "only_second",
        "return_overflowing_tokens": True,
        "return_offsets_mapping": True,
    }
    stock = tokenizer(["who"], [context], **SETTINGS, **options)
    count = len(stock["input_ids"])
    assert len(found) == count * len(answers) and count > 1
    real = 0
    for row, (i, target) in enumerate(zip(found.question, found.targets.tolist(), strict=True)):
        k = row % count
        assert found.rows[row]["input_ids"].tolist() == stock["input_ids"][k]
        inside = [s == 1 for s in stock.sequence_ids(k)]
        assert target == _official(stock["offset_mapping"][k], inside, answers[i]), answers[i]
        if target != [0, 0]:
            real += 1
            text = context[found.starts[row][target[0]] : found.ends[row][target[1]]]
            assert answers[i].text in text and text == text.strip()
    assert real >= len(answers)


def test_windows_without_the_whole_answer_have_none():
    context = "Ada lives in Paris by the river of blue stone"
    answers = [[Answer("Paris by", 13), Answer("Ada", 0)], [], [Answer("stone", 40)]]
    found = question_windows(tiny_qa.tokenizer("wordpiece"), _questions([context] * 3, answers), max_length=8, stride=1)  # fmt: skip
    # [CLS] who [SEP] of context's tokens 0-3, 3-6, 6-9 [SEP]
    assert found.question.tolist() == [0] * 3 + [1] * 3 + [2] * 3
    assert found.targets.tolist() == [[0, 0], [3, 4], [0, 0], *[[0, 0]] * 3, *[[0, 0]] * 2, [6, 6]]


def test_several_contexts():
    contexts = [["Ada sings", "Bob sings"], ["Eve"]]
    found = question_windows(tiny_qa.tokenizer("bytes"), _questions(contexts, [[Answer("Bob", 0, 1)], []]), max_length=40, stride=4)  # fmt: skip
    assert found.question.tolist() == [0, 0, 1] and found.context.tolist() == [0, 1, 0]
    assert found.targets.tolist() == [[0, 0], [6, 8], [0, 0]]  # <s> w h o </s> </s> B o b
    assert question_windows(tiny_qa.tokenizer("bytes"), _questions(contexts, None), max_length=40, stride=4).targets is None  # fmt: skip


@pytest.mark.parametrize("kind", tiny_qa.KINDS)
def test_answers_never_begin_or_end_with_white_space(kind):
    context = " Ada  lives\n\tin \u00a0 Paris🎉 "
    answers = [[Answer("Paris🎉", context.index("Paris"))], [Answer("  lives\n", 4)]]
    options = {"max_length": 64, "stride": 4}
    found = question_windows(tiny_qa.tokenizer(kind), _questions([context] * 2, answers), **options)
    for row, text in enumerate(("Paris🎉", "lives")):
        starts, ends, (first, last) = found.starts[row], found.ends[row], found.targets[row]
        assert context[starts[first] : ends[last]] == text
        solid = starts != NOWHERE
        assert (solid == (ends != NOWHERE)).all()
        for a, b in zip(starts[solid], ends[solid], strict=True):
            assert context[a:b] and context[a:b] == context[a:b].strip()


def test_long_questions_are_cut_and_told():
    tokenizer = tiny_qa.tokenizer("wordpiece")
    asked = ["who is Ada", "where is Paris in the blue river", "riverriver"]
    questions = Questions(["a", "b", "c"], asked, [["Bob"]] * 3)
    found = question_windows(tokenizer, questions, max_length=16, stride=2, max_query_length=4)
    assert found.cut == [1, 2] and questions.questions[1] == asked[1]
    texts = [tokenizer.convert_ids_to_tokens(row["input_ids"].tolist()) for row in found.rows]
    assert texts[1][1:6] == ["where", "is", "Paris", "in", "[SEP]"]
    assert texts[2][1] == "river" and texts[2][5] == "[SEP]" and len(texts[0]) == 7
    whole = question_windows(tokenizer, questions, max_length=32, stride=2)
    assert whole.cut == [] and len(whole.rows[1]["input_ids"]) == 7 + 1 + 3


def test_of_bytes_of_one_character():
    """A letter of several tokens is cut before it, never inside it."""
    tokenizer = tiny_qa.tokenizer("bytes")
    questions = Questions(["a"], ["ab🎉"], [["Bob"]])
    found = question_windows(tokenizer, questions, max_length=16, stride=2, max_query_length=4)
    assert found.cut == [0] and tokenizer.decode(found.rows[0]["input_ids"][1:3]) == "ab"
    assert found.rows[0]["input_ids"][3] == 2


def test_bad_settings():
    questions = _questions(["Bob sings"], None, question="who is the blue red")
    tokenizer = tiny_qa.tokenizer("wordpiece")
    with pytest.raises(ConfigError, match="max_query_length is 0"):
        question_windows(tokenizer, questions, **SETTINGS, max_query_length=0)
    with pytest.raises(ConfigError, match=r"longest first text.*smaller stride"):
        question_windows(tokenizer, questions, max_length=8, stride=1)
    from tokenizers import processors

    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A [SEP]", pair="$A [SEP] $B [SEP]", special_tokens=[("[SEP]", 3)]
    )
    with pytest.raises(ConfigError, match="begins a text without a special token"):
        question_windows(tokenizer, questions, max_length=16, stride=1)


def test_arrays_are_small():
    found = question_windows(
        tiny_qa.tokenizer("wordpiece"), _questions(["Bob sings"], [[]]), **SETTINGS
    )
    assert {k: v.dtype for k, v in found.rows[0].items()} == {"input_ids": np.int32, "token_type_ids": np.uint8}  # fmt: skip
    assert found.starts[0].dtype == np.int32
