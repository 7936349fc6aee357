"""Names of the values of a file that is written."""


def unique_name(name: str, used: set[str]) -> str:
    """Return ``name``, or ``name.1`` and so on if it is used, and add it to ``used``."""
    found, number = name, 0
    while found in used:
        number += 1
        found = f"{name}.{number}"
    used.add(found)
    return found
