"""Files that are complete or absent. Standard library only.

Every file that counts as a result is written under a temporary name in the same folder, flushed to disk and renamed: a
reader, or a process killed at any instant, never sees half of it.
"""

import json
import math
import os
import tempfile
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any


class DamagedFileError(ValueError):
    """A file is not as it was written; what can be made without it is made again by a resumed run or sweep.

    Attributes:
        path: The file, or its folder.
    """

    def __init__(self, text: str, path: str | Path = "") -> None:
        super().__init__(text)
        self.path = Path(path)


def write_bytes_atomic(path: str | Path, content: bytes) -> None:
    """Write `content` to `path` atomically: the file is either the old one or the complete new one.

    Raises:
        OSError: The folder cannot be written, or the disk is full; the error names `path`, and no temporary file
            remains.
    """
    path = Path(path)
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(
            temporary, 0o666 & ~mask
        )  # mkstemp creates 0600, which would hide results from a team on a shared disk
        os.replace(temporary, path)
    except BaseException as error:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise OSError(error.errno, error.strerror or str(error), str(path)) from error
        raise


def nearest_existing(path: Path) -> Path:
    """Return a path, or its nearest parent folder that exists."""
    return next(part for part in (path, *path.absolute().parents) if part.exists())


def check_writable(folder: Path) -> None:
    """Raise before a run if its folder cannot be written.

    Raises:
        OSError: It cannot; the message names the parent folder and the reason.
    """
    probe, existed = folder / ".writable", folder.exists()
    try:
        write_bytes_atomic(probe, b"")
    except OSError as error:
        reason = error.strerror or str(error)
        raise OSError(f"runtime.output_dir must be writable, but got {folder.parent}: {reason}") from error
    probe.unlink(missing_ok=True)
    if not existed:
        with suppress(OSError):  # another process has begun to write there
            folder.rmdir()


def write_text_atomic(path: str | Path, text: str) -> None:
    """Write UTF-8 text as `write_bytes_atomic` does."""
    write_bytes_atomic(path, text.encode("utf-8"))


def write_json_atomic(path: str | Path, value: object) -> None:
    """Write strict JSON as `write_bytes_atomic` does: NaN and infinities become null, tuples become lists."""
    write_text_atomic(path, json.dumps(strict(value), indent=2, allow_nan=False) + "\n")


def strict(value: object) -> object:
    """Return JSON values that every reader accepts: NaN and infinities become None, tuples lists, keys text."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): strict(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [strict(part) for part in value]
    return value


def read_json(path: str | Path, cure: str = "") -> Any:
    """Read a JSON file.

    Args:
        path: The file.
        cure: What to do if it is damaged, for the message.

    Raises:
        FileNotFoundError: The file is missing.
        DamagedFileError: The file is no JSON; the message names it.
    """
    return parse_json(path, Path(path).read_bytes(), cure)


def parse_json(path: str | Path, content: bytes, cure: str = "") -> Any:
    """Return the value of a JSON file that was read.

    Args:
        path: The file, for the message.
        content: Its bytes.
        cure: As for `read_json`.

    Raises:
        DamagedFileError: It is no JSON.
    """
    advice = f"; {cure}" if cure else ""
    try:
        return json.loads(content)
    except RecursionError:
        raise DamagedFileError(f"`{path}` must hold JSON, but is nested too deeply{advice}", path) from None
    except ValueError as error:  # of the syntax, the encoding, or a number of more digits than Python reads
        found = f"it is damaged ({error}){advice}" if Path(path).suffix == ".json" else "it does not"
        raise DamagedFileError(f"`{path}` must hold JSON, but {found}", path) from None


def check_paths(paths: Iterable[str | Path], name: str = "PATH") -> None:
    """Raise if a path is missing, before any import that takes seconds.

    Raises:
        FileNotFoundError: A path is missing.
    """
    for path in paths:
        if not Path(path).exists():
            raise FileNotFoundError(f"`{name}` must exist, but got {path}")
