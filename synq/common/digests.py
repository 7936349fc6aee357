"""Digests of the files that are written and read again: written with the file, checked when it is read.

    JSON            the last key, `file_digest`: SHA-256 of the text without it; another layout is no damage
    states          the last 48 bytes of the file: a mark and the SHA-256 of what is before it
    other files     SHA-256 in a JSON file next to them: a student's in its run's record, an export's in its card

A file that differs is named by a `DamagedFileError`, and nothing is computed from it. A file without a digest is one of
an earlier version, and is read with a notice. Standard library only.
"""

import hashlib
import json
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from synq.common.files import DamagedFileError, parse_json, strict, write_bytes_atomic, write_text_atomic
from synq.common.notices import print_notice

KEY = "file_digest"
"""Last key of a JSON file: the digest of the others."""
END = "\n}"
_START = f',\n  "{KEY}": "'
MARK = b"\0synq sha256 end"
"""Start of the last bytes of a file of states; the digest follows."""
CHUNK = 2**22
"""Bytes that are hashed at a time."""


def write_sealed_json(path: str | Path, values: Mapping[str, Any]) -> None:
    """Write strict JSON with its digest, atomically: NaN and infinities become null, tuples become lists.

    Args:
        path: The file.
        values: At least one key and value.
    """
    write_text_atomic(path, sealed_text(values))


def sealed_text(values: Mapping[str, Any]) -> str:
    """Return the text of the file that `write_sealed_json` writes."""
    text = _as_text(strict(values))
    digest = hashlib.sha256(text.encode()).hexdigest()
    return f'{text.removesuffix(END)}{_START}{digest}"{END}\n'


def _as_text(content: object) -> str:
    return json.dumps(content, indent=2, allow_nan=False)


def read_sealed_json(path: str | Path, cure: str = "") -> tuple[Any, bool]:
    """Read a JSON file and compare it with its digest.

    Args:
        path: The file.
        cure: What to do if it is damaged, for the message.

    Returns:
        The value without its digest, and whether it had one. The caller calls `report_unsealed` for a file that has
        none, after its own checks.

    Raises:
        FileNotFoundError: The file is missing.
        DamagedFileError: It is not JSON, or differs from its digest.
    """
    raw = Path(path).read_bytes()
    content = parse_json(path, raw, cure)
    if not isinstance(content, dict) or KEY not in content:
        return content, False
    expected = content.pop(KEY)
    body, _, _ = raw.rpartition(_START.encode())
    if hashlib.sha256(body + END.encode()).hexdigest() == expected:
        return content, True
    try:  # the same values in another layout
        is_same = hashlib.sha256(_as_text(content).encode()).hexdigest() == expected
    except (ValueError, RecursionError):  # NaN, or nested too deeply, which are never written
        is_same = False
    if not is_same:
        raise damaged(path, cure)
    return content, True


def report_unsealed(path: str | Path) -> None:
    """Print, once per folder, that files of an earlier version cannot be checked."""
    print_notice(
        f"note: `{Path(path).parent}` has files that were written without a digest, by an earlier version of SynQ; "
        "they are read unchecked"
    )


def sealed(content: bytes) -> bytes:
    """Return the content of a file of states with its digest at the end."""
    return content + MARK + hashlib.sha256(content).digest()


def write_sealed(path: str | Path, content: bytes) -> None:
    """Write a file of states with its digest, atomically."""
    write_bytes_atomic(path, sealed(content))


def read_sealed(path: str | Path, cure: str = "") -> tuple[bytes, bool]:
    """Read a file of states and compare it with its digest.

    Args:
        path: The file.
        cure: As for `read_sealed_json`.

    Returns:
        Its content without the digest, and whether it had one; see `read_sealed_json`.

    Raises:
        FileNotFoundError: The file is missing.
        DamagedFileError: It differs from its digest.
    """
    content = Path(path).read_bytes()
    start = len(content) - len(MARK) - hashlib.sha256().digest_size
    if start < 0 or not content.startswith(MARK, start):
        return content, False
    body = memoryview(content)[:start]
    if hashlib.sha256(body).digest() != content[start + len(MARK) :]:
        raise damaged(path, cure)
    return bytes(body), True


def file_digest(path: str | Path) -> str:
    """Return the SHA-256 of a file, 64 hexadecimal digits; a file that has not changed is hashed once per process.

    Raises:
        OSError: The file cannot be read.
    """
    file = Path(path).resolve()
    status = file.stat()
    return _file_digest(str(file), (status.st_ino, status.st_mtime_ns, status.st_size))


@lru_cache(maxsize=256)
def _file_digest(file: str, identity: tuple[int, int, int]) -> str:
    digest = hashlib.sha256()
    with open(file, "rb") as content:
        while part := content.read(CHUNK):
            digest.update(part)
    return digest.hexdigest()


def check_file(path: str | Path, digests: Mapping[str, Any], cure: str = "") -> None:
    """Compare a file with its digest in another file; without one there, `report_unsealed`.

    Args:
        path: The file.
        digests: Digests by file name.
        cure: As for `read_sealed_json`.

    Raises:
        FileNotFoundError: The file is missing.
        DamagedFileError: It differs.
    """
    expected = digests.get(Path(path).name)
    if expected is None:
        report_unsealed(path)
    elif file_digest(path) != expected:
        raise damaged(path, cure)


def damaged(path: str | Path, cure: str = "") -> DamagedFileError:
    """Return the error for a file that is not as it was written."""
    advice = f": {cure}" if cure else ""
    return DamagedFileError(
        f"`{path}` must be as it was written, but differs from its digest: it is damaged, was changed, or is of "
        f"another run{advice}",
        path,
    )
