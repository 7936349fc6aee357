"""Known names in messages about unknown ones. Standard library only."""

import difflib
from collections.abc import Iterable


def nearest(text: str, choices: Iterable[str]) -> str:
    """Return "; did you mean `x`?" for the choice most similar to `text`, or "" if none is similar.

    A dotted choice is also found by its last part: `nearest("lr", ["finetune.lr"])` names `finetune.lr`.
    """
    choices = list(choices)
    last = text.rpartition(".")[2]
    same_last = [choice for choice in choices if choice.rpartition(".")[2] == last]
    found = (
        difflib.get_close_matches(text, choices, n=1, cutoff=0.9)
        or same_last
        or difflib.get_close_matches(text, choices, n=1, cutoff=0.6)
    )
    if not found:
        by_last = {choice.rpartition(".")[2]: choice for choice in choices}
        found = [by_last[part] for part in difflib.get_close_matches(last, by_last, n=1, cutoff=0.7)]
    return "; did you mean " + " or ".join(f"`{choice}`" for choice in found[:3]) + "?" if found else ""


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
