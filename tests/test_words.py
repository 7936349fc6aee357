"""The field's standard terms: other words, and British spellings, are rejected in identifiers and prose of the source.

docs/concepts.md has the glossary. Prose is every docstring, comment and text of a file, so messages and help are part
of it.
"""

import io
import re
import tokenize
from functools import cache
from pathlib import Path

import pytest

from support.source_tree import files, name_of
from support.terms import BRITISH, FIGURE, PROSE

# Part of an identifier (snake or camel case) -> what the field says.
IDENTIFIERS = {
    "words?": "args, argv",
    "(?<!bit_)widths": "bits (of tensors), or sizes",
    "ends_words": "first and last layer bits",
    "said|told|says?|hear|hears": "logged, warned, printed, reported",
    "refus\\w+": "reject, raise",
    "stands?|beside|behind|whoever": "is, next to, after, any process",
    "answers?|answered": "logits, outputs, reply",
    "guard": "keep_best",
    "alike": "tied",
    "doors?": "command",
    "(?<!cam_)sites?": "cluster, location",
    "merit": "sort_key",
    "halts?": "stop_reason",
    "workplace": "workspace",
    "rehears\\w+": "smoke_run",
    "remarks?": "note",
    "places": "paths",
    "idle": "inactive",
    "look|alone|made_of|of_its_day": "probe, only, source, (gone)",
}
FIGURES = "sweeps/reports/"
"""The one package where a figure is a drawing; elsewhere a number is a metric, a value or a result."""
SOURCES = files("synq", "sweeps", "launch")


@cache
def _terms_for(identifier: str) -> tuple[str, ...]:
    """Return what the field says instead of an identifier; the same ones occur a thousand times."""
    parts = f"_{re.sub(r'(?<=[a-z0-9])(?=[A-Z])', '_', identifier).lower()}_"  # `NodeProbe` is `_node_probe_`
    found = [f"identifier `{identifier}`: {term}" for p, term in IDENTIFIERS.items() if re.search(f"_(?:{p})_", parts)]
    return (*found, f"`{identifier}`: American spelling") if re.search(BRITISH, identifier, re.I) else tuple(found)


def faults(text: str, *, figures: bool = False) -> list[str]:
    """Return a line for each word that the field does not use: its line, the word, the standard term."""
    found = []
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        where = token.start[0]
        if token.type == tokenize.NAME:
            found += [f"{where}: {text}" for text in _terms_for(token.string)]
        elif token.type in (tokenize.STRING, tokenize.COMMENT, getattr(tokenize, "FSTRING_MIDDLE", -1)):
            prose = PROSE if figures else {**PROSE, **FIGURE}
            for pattern, term in [*prose.items(), (BRITISH, "American spelling")]:
                for match in re.finditer(pattern, token.string, re.I):
                    line = where + token.string[: match.start()].count("\n")
                    found.append(f"{line}: {match[0]!r}: {term}")
    return found


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_the_source_speaks_the_language_of_the_field(path: Path) -> None:
    found = faults(path.read_text(encoding="utf-8"), figures=name_of(path).startswith(FIGURES))
    assert not found, f"{name_of(path)}:\n" + "\n".join(found)


@pytest.mark.parametrize(
    "text",
    [
        "def read(words): pass",
        "class NodeSite: pass",
        "import_widths = 1",
        '"""Say what was told."""',
        "x = 1  # it stands beside the other",
        'raise ValueError(f"{x} is refused")',
        "colour = 1",
        '"""Optimise the pixels."""',
        '"""The figures of a run."""',
    ],
)
def test_a_word_of_the_list_is_found(text: str) -> None:
    assert faults(text + "\n")


def test_standard_terms_pass() -> None:
    text = '"""Return bit-widths, site-packages, decimal places; a stand-alone summary."""\n'
    text += "width, height, words_per_minute = 1, 2, 3\n"
    assert faults(text) == ["2: identifier `words_per_minute`: args, argv"]
