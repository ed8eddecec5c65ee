# ruff: noqa: RUF001
"""Sentence splitting by punctuation and case: no word lists, so the same for every language."""

import re

_CJK_MARKS = "。！？"
# End marks, closing quotes and brackets, space. One set first: the engine then skips to it fast.
_BREAK = re.compile(r"[.!?…؟۔।။።។。！？]+[\"'”’»)\]」』）]*(\s*)")
# A capital initial, a short title ("Dr.") or a word with inner dots ("e.g."): a dot that ends none.
_ABBREVIATION = re.compile(r"(?:^|[\s(\[\"'“‘«])(?:[^\W\d_]|[A-Z][^\W\d_]{1,2}|(?:\w+\.)+\w+)\.$")


def split_sentences(line: str) -> list[str]:
    """The sentences of one line, stripped, none empty.

    A break needs an end mark followed by space and no lower-case letter; the marks of Chinese and
    Japanese break by themselves.
    """
    out, start = [], 0
    for m in _BREAK.finditer(line):
        end = m.end()
        if end == len(line) or not (m[1] or set(_CJK_MARKS) & set(m[0])) or line[end].islower():
            continue
        head = line[start:end].rstrip()
        if head[-1] == "." and _ABBREVIATION.search(head[-12:]):
            continue
        out.append(head)
        start = end
    rest = line[start:].strip()
    if rest:
        out.append(rest)
    return out
