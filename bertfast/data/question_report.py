"""What questions and their contexts look like, before anything is trained on them."""

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import numpy as np
import regex

from .batching import UNKNOWN, unknown_text
from .questions import Questions
from .spans import QuestionWindows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_QUANTILES = {"min": 0, "median": 0.5, "p90": 0.9, "p99": 0.99, "max": 1}
# Two letters or digits, of scripts that put spaces between words.
_LETTER = r"[[\p{L}\p{M}\p{N}]--[\p{Han}\p{Hiragana}\p{Katakana}\p{Line_Break=SA}]]"
_WITHIN = regex.compile(_LETTER * 2, regex.V1)
_SHOWN = 3  # places in a warning


@dataclass
class QuestionPart:
    """One part of a data set. `tokens`: quantiles of a window's, specials included; `windows`: of a
    context's."""

    questions: int
    answerable: int
    contexts: int  # of all questions, each as often as it is asked about
    windows: int
    tokens: dict[str, int]
    windows_a_context: dict[str, int]
    with_answer: int  # windows that hold their question's whole answer
    cut: list[str]  # where questions stand that were longer than max_query_length
    unreachable: list[str]  # answers of more tokens than max_answer_length, or in no window
    inside_words: list[str]  # answers that begin or end inside a word
    unknown: float  # share of tokens that the tokenizer doesn't know
    duplicates: int  # questions that stood before, over the same contexts
    disagreeing: list[str]  # those of them with other answers


@dataclass
class QuestionReport:
    """Figures of each part, and `leakage`: how many questions and contexts two parts share."""

    max_length: int
    max_answer_length: int
    parts: dict[str, QuestionPart]
    leakage: dict[str, int]

    def as_dict(self) -> dict:
        return asdict(self)

    def warnings(self) -> list[str]:
        """What a user should look at before training."""
        out = [f"{n} {pair} are the same" for pair, n in self.leakage.items() if n]
        long = f"answers have more than {self.max_answer_length} tokens, or are in no window"
        for name, part in self.parts.items():
            for places, text in (
                (part.cut, "questions are cut"),
                (part.unreachable, f"{long}: they can't be found"),
                (part.inside_words, "answers begin or end inside a word"),
                (part.disagreeing, "questions are asked again, with other answers"),
            ):
                if places:
                    more = ", ..." * (len(places) > _SHOWN)
                    out.append(f"{name}: {len(places)} {text}: {'; '.join(places[:_SHOWN])}{more}")
            if part.unknown > UNKNOWN:
                out.append(f"{name}: {unknown_text(part.unknown)}")
        return out

    def __str__(self) -> str:
        table = [["", *self.parts]]
        row = lambda title, value: table.append([title, *map(value, self.parts.values())])
        row("questions", lambda p: f"{p.questions:,}")
        row("without an answer", lambda p: f"{p.questions - p.answerable:,}")
        row("contexts", lambda p: f"{p.contexts:,}")
        for q in ("median", "max"):
            row(f"windows a context, {q}", lambda p, q=q: str(p.windows_a_context[q]))
        for q in _QUANTILES:
            row(f"tokens a window, {q}", lambda p, q=q: str(p.tokens[q]))
        row("windows", lambda p: f"{p.windows:,}")
        row("with the answer", lambda p: f"{p.with_answer:,}")
        row("questions that are cut", lambda p: f"{len(p.cut):,}")
        row("unknown tokens", lambda p: f"{p.unknown:.1%}")
        row("repeated questions", lambda p: f"{p.duplicates:,}")
        for pair, n in self.leakage.items():
            table.append([f"same {pair}", f"{n:,}", *[""] * (len(self.parts) - 1)])
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = [
            "  ".join([r[0].ljust(widths[0]), *map(str.rjust, r[1:], widths[1:])]).rstrip()
            for r in table
        ]
        return "\n".join(lines + [f"warning: {w}" for w in self.warnings()])


def question_report(
    parts: dict[str, Questions],
    windows: dict[str, QuestionWindows],
    tokenizer: "PreTrainedTokenizerBase",
    max_length: int,
    max_answer_length: int,
) -> QuestionReport:
    """Lengths, windows, what is cut or out of reach, repetitions, what two parts share, and answers
    to look at. Texts are the same when they are equal up to case, whitespace and Unicode form."""
    same = {name: part.same() for name, part in parts.items()}
    contexts = {name: {c for cs in p.context_keys() for c in cs} for name, p in parts.items()}
    names, leakage = list(parts), {}
    for i, a in enumerate(names):
        for b in names[i + 1 :]:
            leakage[f"questions of {a} and {b}"] = len({*same[a]} & {*same[b]})
            leakage[f"contexts of {a} and {b}"] = len(contexts[a] & contexts[b])
    found = {
        name: _part(part, windows[name], same[name], tokenizer, max_answer_length)
        for name, part in parts.items()
    }
    return QuestionReport(max_length, max_answer_length, found, leakage)


def _part(given: Questions, windows: QuestionWindows, same, tokenizer, longest) -> QuestionPart:
    lengths = np.array([len(row["input_ids"]) for row in windows.rows])
    pairs = np.stack([windows.question, windows.context], 1)
    counts = np.unique(pairs, axis=0, return_counts=True)[1]
    quantiles = lambda v: {
        n: int(np.quantile(v, q, method="higher")) for n, q in _QUANTILES.items()
    }
    unknown = total = 0
    for row in windows.rows:
        unknown += int((row["input_ids"] == tokenizer.unk_token_id).sum())
        total += len(row["input_ids"])
    reached = np.zeros(len(given), bool)
    spans = windows.targets[:, 1] - windows.targets[:, 0] + 1
    with_answer = windows.targets[:, 0] > 0
    reached[windows.question[with_answer & (spans <= longest)]] = True
    answerable = np.array([bool(a) for a in given.answers], bool)
    first, disagreeing = {}, []
    for i, key in enumerate(same):
        j = first.setdefault(key, i)
        if _said(given.answers[i]) != _said(given.answers[j]):
            disagreeing.append(given.place(i))
    return QuestionPart(
        questions=len(given),
        answerable=int(answerable.sum()),
        contexts=len(counts),
        windows=len(windows),
        tokens=quantiles(lengths),
        windows_a_context=quantiles(counts),
        with_answer=int(with_answer.sum()),
        cut=[given.place(i) for i in windows.cut],
        unreachable=[given.place(i) for i in np.flatnonzero(answerable & ~reached)],
        inside_words=[given.place(i) for i in range(len(given)) if _inside_a_word(given, i)],
        unknown=unknown / max(total, 1),
        duplicates=len(same) - len(first),
        disagreeing=disagreeing,
    )


def _said(answers) -> set[str]:
    return {" ".join(a.text.casefold().split()) for a in answers}


def _inside_a_word(given: Questions, i: int) -> bool:
    """Whether an answer's end has letters or digits on both sides."""
    for text, start, number in given.answers[i]:
        context = given.contexts[i][number]
        for at in (start, start + len(text)):
            if at and _WITHIN.match(context, at - 1):
                return True
    return False
