"""Classes of tokens: by Python's own tokenizer, by the plain rule, and whatever the text."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fathom.lab.inspector.classes import BLANKS, BREAKS, PLAIN, PYTHON, byte_classes, is_python, token_classes


def classed(pieces: list[str], python: bool) -> list[str]:
    """The class of each piece, taken as a token."""
    classes = byte_classes("".join(pieces), python)
    return [classes.names[kind] for kind in token_classes(classes, [len(piece.encode()) for piece in pieces])]


def test_python_is_classed_by_its_own_tokenizer() -> None:
    pieces = {
        "class": "keywords", " Ä": "names", ":": "operators", "\n    ": BREAKS, "x": "names", " =": "operators",
        " 12": "numbers", ".5e": "numbers", "-3": "numbers", "  ": BLANKS, "# if": "comments", " 7": "comments",
        "\n": BREAKS, "    def": "keywords", " match": "names", "(self": "names", "):\n": "operators",
        '        """': "strings", "for": "strings", "\n ": "strings", ' 1"""': "strings",
        "\n        return": "keywords",
        " not": "keywords", " 'a": "strings", "b'": "strings", ".join": "names", "\n\n": BREAKS,
    }  # fmt: skip
    assert dict(zip(pieces, classed(list(pieces), python=True), strict=True)) == pieces


def test_python_that_breaks_off_keeps_the_plain_rule_from_there() -> None:
    assert classed(["if", " x", ":\n", "  y", " = ", "'''never", " closed", " 3"], python=True)[:4] == [
        "keywords", "names", "operators", "names",
    ]  # fmt: skip
    assert classed(["x", " = ", "'''", "never", " 3"], python=True)[3:] == ["names", "numbers"]


def test_plain_text() -> None:
    pieces = {
        "The": "capitalised words", " cat": "words", " cost": "words", " 12": "numbers", ",": "punctuation",
        "50": "numbers", " €": "punctuation", ".\n\n": "punctuation", " Ünd": "capitalised words", "\n\t": BREAKS,
        "数据": "words",
    }  # fmt: skip
    assert dict(zip(pieces, classed(list(pieces), python=False), strict=True)) == pieces
    assert classed(["a", "  ", "b"], python=False)[1] == BLANKS


def test_a_character_may_be_several_tokens() -> None:
    classes = byte_classes("a😀", python=False)
    assert [classes.names[kind] for kind in token_classes(classes, [1, 2, 2])] == ["words"] + ["punctuation"] * 2
    with pytest.raises(ValueError, match="4 bytes, the text 5"):
        token_classes(classes, [1, 2, 1])


@given(st.text(), st.booleans())
def test_every_byte_of_any_text_has_a_class(text: str, python: bool) -> None:
    classes = byte_classes(text, python)
    assert classes.names == (PYTHON if python else PLAIN)
    assert len(classes.of_bytes) == len(text.encode())
    assert all(kind < len(classes.names) for kind in classes.of_bytes)


@pytest.mark.parametrize(
    ("text", "python"),
    [
        ("def f(): pass", True),
        ("x = 1\n", True),
        ("hello", False),
        ("the cat sat", False),
        ("def f(", False),
        ("", False),
    ],
)
def test_what_counts_as_python(text: str, python: bool) -> None:
    assert is_python(text) == python
