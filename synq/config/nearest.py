"""Known names in messages about unknown ones. Standard library only."""

import difflib
from collections.abc import Iterable

SHORTEST_START = 3
"""Length of a text from which on a name that it begins is similar to it."""


def nearest(text: str, choices: Iterable[str]) -> str:
    """Return "; did you mean `x`?" for the choice most similar to `text`, or "" if none is similar.

    A dotted choice is also found by its last part: `nearest("lr", ["finetune.lr"])` names `finetune.lr`. In a known
    table only the last part is compared: that `finetune.xyz` and `finetune.lr` share their table is no similarity. A
    choice that `text` begins is similar, too.
    """
    found = _similar(text, list(choices))
    return "; did you mean " + " or ".join(f"`{choice}`" for choice in found[:3]) + "?" if found else ""


def _similar(text: str, choices: list[str]) -> list[str]:
    table, _, last = text.rpartition(".")
    same_last = [choice for choice in choices if choice.rpartition(".")[2] == last]
    longer = [choice for choice in choices if len(last) >= SHORTEST_START and choice.startswith(text)]
    found = difflib.get_close_matches(text, choices, n=1, cutoff=0.9) if not table else []
    found = found or same_last or longer
    if found:
        whole = [choice for choice in found if difflib.SequenceMatcher(None, text, choice).ratio() >= 0.9]
        return whole or found
    by_last = {choice.rpartition(".")[2]: choice for choice in choices if choice.rpartition(".")[0] == table}
    if not table or not by_last:
        found = difflib.get_close_matches(text, choices, n=1, cutoff=0.6)
    found = found or [by_last[part] for part in difflib.get_close_matches(last, by_last, n=1, cutoff=0.6)]
    if not found:
        by_last = {choice.rpartition(".")[2]: choice for choice in choices}
        found = [by_last[part] for part in difflib.get_close_matches(last, by_last, n=1, cutoff=0.7)]
    return found


def key_hint(text: str, choices: Iterable[str]) -> str:
    """Return `nearest`, or, if no known key is similar, the known keys of the same table: "; known are `a`, `b`".

    Args:
        text: The unknown key, possibly dotted.
        choices: The known keys. If none has the table of `text`, the tables and the keys without one are named.
    """
    choices = list(choices)
    if found := nearest(text, choices):
        return found
    table = text.rpartition(".")[0]
    inside = [choice for choice in choices if choice.rpartition(".")[0] == table] if table else []
    known = inside or dict.fromkeys(choice.partition(".")[0] for choice in choices)
    return f"; known are {', '.join(known)}" if known else ""


def unknown_key(name: str, text: str, choices: Iterable[str]) -> ValueError:
    """Return the error for an unknown key, which names the most similar known ones.

    Args:
        name: The key as in the message.
        text: The key as compared with `choices`.
        choices: The known keys.
    """
    return ValueError(f"`{name}` must be a known key, but got an unknown one{key_hint(text, choices)}")
