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
    write_text_atomic(path, json.dumps(_strict(value), indent=2, allow_nan=False) + "\n")


def _strict(value: object) -> object:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _strict(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(part) for part in value]
    return value


def read_json(path: str | Path) -> Any:
    """Read a JSON file.

    Raises:
        FileNotFoundError: The file is missing.
        ValueError: The file is damaged; the message names it.
    """
    try:
        return json.loads(Path(path).read_bytes())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        ours = Path(path).suffix == ".json"
        advice = f"is damaged ({error}); remove it to have it made again" if ours else "does not"
        raise ValueError(f"`{path}` must hold JSON, but it {advice}") from None


def check_paths(paths: Iterable[str | Path], name: str = "PATH") -> None:
    """Raise if a path is missing, before any import that takes seconds.

    Raises:
        FileNotFoundError: A path is missing.
    """
    for path in paths:
        if not Path(path).exists():
            raise FileNotFoundError(f"`{name}` must exist, but got {path}")
