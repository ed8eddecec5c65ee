"""What a cell of a table says: a text, the name of a class, several names, a number."""

import json
import math
import re
import reprlib
from ast import literal_eval
from decimal import Decimal
from typing import Any

import numpy as np

from .clean import clean_text

ON, OFF = {"1", "True"}, {"0", "False"}  # a class's place in a vector of flags
_LARGEST = float(np.finfo(np.float32).max)
_TRUTH = {"true": "True", "false": "False"}
_WHOLE = re.compile(r"-?(0)\.0+|(-?[1-9][0-9]*)\.0+")
_FLAGS = re.compile(r"[01](?:[\s,;]+[01])+")
_ITEM = re.compile(  # of a list as Python or NumPy writes it
    r"""\s*('(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*"|[-+]?[0-9]+\.?[0-9]*|True|False)\s*(?:,|\s|$)""",
    re.DOTALL,
)


class Flags(list):
    """Names that were written as a bare vector of flags, "0 1 0"."""


def text(value: Any, clean: bool = True, needed: bool = True) -> str:
    """Where it isn't `needed`, a missing text is an empty one."""
    if value is None and not needed:
        return ""
    if not isinstance(value, str):
        raise ValueError(f"is {reprlib.repr(value)}, a {type(value).__name__}; expected a string")
    found = clean_text(value) if clean else value
    if needed and not found.strip():
        raise ValueError("is an empty text; fill it or drop the row")
    try:
        found.encode()
    except UnicodeEncodeError:
        raise ValueError("holds a lone surrogate, which has no UTF-8 form; clean it") from None
    return found


def normal(name: str) -> str:
    """The one form of a class's name: "1.0" is "1", "true" and "TRUE" are "True"."""
    name = clean_text(name)
    whole = _WHOLE.fullmatch(name)
    return (whole[1] or whole[2]) if whole else _TRUTH.get(name.lower(), name)


def name(value: Any) -> str:
    """A class's name, the same of 1, 1.0, "1" and "1.0", and of true, "true" and "TRUE"."""
    if isinstance(value, float | Decimal):
        if math.isnan(value):
            raise ValueError("is missing (NaN); fill it or drop the row")
        if value % 1:
            raise ValueError(
                f"is {reprlib.repr(value)}, no class name; for numbers use task 'regression'"
            )
        value = int(value)
    written = isinstance(value, str) and _items(value.strip()) is not None
    if written or not isinstance(value, str | int):
        raise ValueError(
            f"is {reprlib.repr(value)}; expected one name (lists belong to task 'multi_label')"
        )
    found = normal(str(value))
    if not found:
        raise ValueError("is an empty label; fill it or drop the row")
    return found


def names(value: Any) -> list[str]:
    """The names in a cell, repeats too: of a list, also as JSON, Python or NumPy write it; of a
    string with "|" between; of a vector of flags with spaces or commas between (as `Flags`)."""
    if not isinstance(value, str | list):
        value = [value]
    if isinstance(value, list):
        return [name(v) for v in value]
    value = value.strip()
    if _FLAGS.fullmatch(value):
        return Flags(re.findall("[01]", value))
    items = _items(value)
    if items is None and value[:1] + value[-1:] == "[]" and re.search("""[,'"]""", value):
        raise ValueError(f"is {reprlib.repr(value)}, no list that can be read; quote its names")
    if items is None:
        items = value.split("|") if value else []
    return [name(v) for v in items]


def _items(written: str) -> list | None:
    """The values of a list (or tuple, or set) as JSON, Python or NumPy write it, or None."""
    ends, inner = written[:1] + written[-1:], written[1:-1].strip()
    if ends not in ("[]", "()", "{}") or (ends != "[]" and inner[:1] not in "'\""):
        return None
    try:
        found = json.loads(written)
        if isinstance(found, list):
            return found
    except (ValueError, RecursionError):
        pass
    out, at = [], 0
    while at < len(inner):
        item = _ITEM.match(inner, at)
        try:
            out.append(literal_eval(item[1]) if item else None)
        except (SyntaxError, ValueError):
            return None
        if item is None:
            return None
        at = item.end()
    return out


def number(value: Any) -> float:
    """A number that float32 holds."""
    try:
        if isinstance(value, bool):
            raise TypeError
        found = float(value)
    except OverflowError:
        found = math.inf
    except (TypeError, ValueError):
        point = " with a decimal point" if isinstance(value, str) and "," in value else ""
        raise ValueError(f"is {reprlib.repr(value)}; expected a number{point}") from None
    if not abs(found) <= _LARGEST:
        raise ValueError(f"is {reprlib.repr(value)}; expected a finite number that float32 holds")
    return found
