"""Errors and names as parts of one line."""

import pytest

from synq.common.error_text import first_line, innermost, one_line, some_of


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("one\ntwo", "one"),
        ("\n  one  \ntwo", "one"),
        ("\x1b[31mred\x1b[0m line\nmore", "red line"),
        ("", "ValueError"),
        (" \n ", "ValueError"),
    ],
)
def test_the_first_line_of_an_error(text: str, expected: str) -> None:
    assert first_line(ValueError(text)) == expected


def test_an_error_on_one_line() -> None:
    assert one_line(KeyError("two\nlines")) == "KeyError: 'two\\nlines'"
    assert one_line(ValueError("a\n  b")) == "ValueError: a b" and one_line(OSError()) == "OSError"


def test_the_error_that_others_were_raised_from() -> None:
    first = ValueError("first")
    try:
        try:
            raise RuntimeError("second") from first
        except RuntimeError as second:
            raise OSError("third") from second
    except OSError as third:
        assert innermost(third) is first and innermost(first) is first


def test_the_first_names_of_many() -> None:
    assert [some_of(range(n)) for n in (0, 1, 3, 4)] == ["", "0", "0, 1, 2", "0, 1, 2, ..."]
