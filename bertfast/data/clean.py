"""Text cleaning."""

import re
import unicodedata

import regex

# C0 and C1 controls that are not whitespace, the BOM, lone surrogates (no UTF-8 form).
DROP = re.compile("[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\ufeff\ud800-\udfff]")

# A letter of a script that puts no spaces between words: Unicode's line-break class SA (Thai, Lao,
# Khmer, Burmese, ...) and kana. Chinese characters are words already, see `corpus`.
UNSPACED = regex.compile(r"[[\p{Line_Break=SA}\p{Hiragana}\p{Katakana}]&&\p{L}]", regex.V1)


def clean_text(s: str) -> str:
    """Unicode NFC, no control characters, every run of whitespace one space, ends stripped.

    Format characters that carry meaning (zero-width joiners of emoji, Persian, Indic) stay.
    """
    return " ".join(unicodedata.normalize("NFC", DROP.sub("", s)).split())
