"""Terms found and swapped: case, pronouns, everything else; and files that are wrong."""

import pytest
from helpers import refused

from bertfast.audit import lexicon
from bertfast.audit.lexicons import BUILT_IN
from bertfast.data import DataError
from bertfast.train import ConfigError

GENDER = lexicon.load(["gender", "names"])


def swapped(text, terms=GENDER, step=1):
    return terms.swap(text, terms.find(text), step)


@pytest.mark.parametrize(
    "text, expected",
    [
        ("She said HER dog saw him.", "He said HIS dog saw her."),
        ("I saw her.", "I saw him."),
        ("I told her that; I gave her, too, a map.", "I told him that; I gave him, too, a map."),
        ("her own  idea, his and hers", "his own  idea, hers and his"),
        ("He's here;\tit is his!", "She's here;\tit is hers!"),
        ("“Mrs. Hall” — he/she", "“Mr. Hall” — she/he"),
        ("Emma met JOSÉ, will, and Mark", "Liam met MARIA, will, and Mark"),
        ("MS Office, Ms Hall", "MS Office, Mr Hall"),
        ("emma is a word here", "emma is a word here"),  # a name in lower case
        ("this theatre, the shelter, hero-worship", "this theatre, the shelter, heroine-worship"),
        ("The Mother and her mum", "The Father and his dad"),
        ("no term at all", "no term at all"),
    ],
)
def test_swapped_text(text, expected):
    assert swapped(text) == expected


def test_lower_cased_texts():
    assert swapped("emma met josé", lexicon.load("names", ignore_case=True)) == "liam met maria"


@pytest.mark.parametrize("name", BUILT_IN)
def test_every_built_in_term_goes_round(name):
    """Each is found, and as many steps as there are groups lead back to it, in its case."""
    terms = lexicon.load(name)
    for row in terms.rows:
        for cell in row:
            term = cell[0].removesuffix("+")
            after = " book" if cell[0].endswith("+") else "."
            for given in (term, term.upper(), term[0].upper() + term[1:]):
                if len(term) < 3 and not term.islower() and given == term.upper():
                    continue  # MS, MR
                text = f"so, {given}{after}"
                found = text
                for _ in terms.groups:
                    assert len(terms.find(found)) == 1, found
                    found = swapped(found, terms)
                if given != "Her":  # "Him." comes back as "Her.", no possessive
                    assert found == text


def test_more_groups_and_longest_terms():
    places = lexicon.load("places")
    text = "a Mexican from Mexico  City, not from Mexico"
    assert swapped(text, places, 1) == "a Nigerian from Lagos, not from Nigeria"
    assert swapped(text, places, 2) == "a Indian from Mumbai, not from India"  # articles stay
    assert len({f.group for f in places.find("Paris and Lagos")}) == 2


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "has 0 lines, expected the groups' names"),
        ("# nothing\n", "has 0 lines"),
        ("female | male\n", "has 1 lines"),
        ("female\nshe\n", "line 1: the groups are female, expected two or more"),
        ("a | a\nshe | he\n", "line 1: the groups are a | a, expected two or more different"),
        ("f | m\n\nshe | he | it\n", "line 3 has 3 cells, expected one for each of f, m"),
        ("f | m\nshe |\n", "line 2: 'she |' lacks a term"),
        ("f | m\nshe | he\nShe | him\n", "line 3: 'She' stands in .*line 2, too; keep one"),
        ("f | m\nfriend | friend\n", "line 2: 'friend' stands in"),
    ],
)
def test_wrong_files(tmp_path, text, message):
    (tmp_path / "x.txt").write_text(text)
    refused(DataError, rf"x\.txt.*{message.replace('|', '[|]')}", lexicon.load, tmp_path / "x.txt")


def test_what_does_not_fit(tmp_path):
    refused(ConfigError, "no such file, and none of gender, names", lexicon.load, "gendre")
    refused(ConfigError, "give them one at a time", lexicon.load, ["gender", "places"])
    refused(ConfigError, "lexicon is empty", lexicon.load, [])
    (tmp_path / "x").write_bytes(b"f | m\n\xff | a\n")
    refused(DataError, "is no UTF-8", lexicon.load, tmp_path / "x")
    refused(OSError, "is a folder", lexicon.load, tmp_path)
