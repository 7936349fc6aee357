"""A sweep's folder in an object store, by address: s3://bucket/path, gs://, abfs://, hdfs://, file:///mnt/x, or what fsspec knows.

The driver and the trials work on copies on their own machines and send what counts. A file under its final name is always whole: an object
store shows an object when it is closed, and elsewhere a file is written under another name and renamed. What is replaced and what is
listed must be seen at once by all machines, as S3, Google and Azure promise. Knows neither Ray nor torch.
"""

import errno
import io
import os
import re
import shutil
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from filelock import FileLock

from .addresses import cache_root, connect, is_address, local_copy, shown, split_address

__all__ = ["Storage", "cache_root", "is_address", "local_copy", "open_storage"]

T = TypeVar("T")
F = TypeVar("F", bound=BinaryIO)
CHUNK_BYTES = 16 * 2**20
"""Most of one file that is in memory at a time."""
THREADS = 16
"""Files that travel at a time."""
PAUSES = (0.5, 1.0, 2.0, 4.0)
"""Seconds before each further attempt after an error that may pass."""
OBJECT_STORES = ("s3", "gcs", "abfs")
"""File systems, as pyarrow names them, that show an object when it is closed."""
MAY_PASS = re.compile(
    r"time.?out|timed out|slow.?down|unavailable|throttl|too many requests|try again|internal.?(failure|error)|network"
    r"|connect|changed while|\b(429|500|502|503|504)\b",
    re.IGNORECASE,
)
DENIED = re.compile(r"ACCESS_DENIED|ACCESS_KEY|SIGNATURE|TOKEN|[Cc]redential|[Aa]uthenticat|[Ff]orbidden|\b40[13]\b")


def open_storage(address: str) -> "Storage":
    """Open the folder of an address; it need not exist yet.

    A server other than Amazon's is named by AWS_ENDPOINT_URL or in the address: s3://bucket/path?endpoint_override=http://host:9000.
    Credentials come from the environment, or from where else the store's own tools look for them.

    Raises:
        ValueError: The scheme is unknown, the bucket is absent, or the credentials are missing or rejected.
        OSError: The store cannot be reached.
    """
    parts = split_address(address)
    if parts.password is not None:  # it would travel in every plan and every message
        raise ValueError(f"`output_dir` must carry no password (set it in the environment), but got {shown(parts)}")
    try:
        files, root = connect(parts)
    except (ValueError, ImportError, NotImplementedError) as error:
        raise ValueError(f"`output_dir` must be an address to open, but got {shown(parts)}: {_line(error)}") from error
    except Exception as error:  # no connection; each back end has separate exception types
        raise _failure(error, shown(parts)) from error
    storage = Storage(address, files, root)
    if files.type_name in OBJECT_STORES:
        storage.check_bucket()
    return storage


class Storage:
    """One folder of an object store. Names are relative to it, with slashes. Threads may share it; it can be pickled.

    Errors that may pass are given some seconds; those that stay are an OSError of one line with the address and the cause.
    """

    def __init__(self, address: str, files: Any, root: str) -> None:
        self.address = address
        self.files = files
        """The store, as a file system of pyarrow."""
        self._root = root.rstrip("/")

    def __str__(self) -> str:
        """The address without options, to be shown."""
        return shown(split_address(self.address))

    def path(self, name: str) -> str:
        """Where a name lies in `files`."""
        if name.startswith("/") or ".." in name.split("/"):
            raise ValueError(f"`name` must stay below the folder, but got {name!r}")
        path = f"{self._root}/{name}".rstrip("/")
        if self.files.type_name.startswith("py::") and set(path) & set("*?["):  # fsspec moves by patterns
            raise ValueError(f"`name` must have none of *?[ in a store of this kind, but got {self._where(name)!r}")
        return path

    def check_bucket(self) -> None:
        """Reject a bucket that is absent or closed to us. A store lists an absent one as if it were empty."""
        from pyarrow.fs import FileType

        try:
            self.names("")
        except OSError as error:
            if not DENIED.search(str(error)):
                raise
            raise ValueError(f"`output_dir` must be open to the credentials in use, but got {_line(error)}") from error
        with suppress(OSError):  # the bucket itself may be closed where its folder is open
            if self._infos(self._root.split("/")[0]).type == FileType.NotFound:
                raise ValueError(f"`output_dir` must name an existing bucket, but got {self}")

    def check_writable(self) -> None:
        """Write, read and remove a small object.

        Raises:
            OSError: One of them failed.
        """
        probe = f".probe-{uuid.uuid4().hex}"
        try:
            self.put(b"probe", probe)
            if self.read(probe) != b"probe":
                raise OSError("what was written cannot be read back")
            self.delete(probe)
        except OSError as error:
            text = f"`output_dir` must be writable, but got {self}: {_line(error)}"
            raise OSError(error.errno or errno.EIO, text) from error

    def exists(self, name: str) -> bool:
        """Whether there is a file of that name."""
        path = self.path(name)
        return self._attempt(lambda: bool(self._infos(path).is_file), self._where(name))

    def names(self, folder: str) -> list[str]:
        """Names of the files directly below a folder, sorted; none where it is absent."""
        return self._list(folder, recursive=False)

    def put(self, content: Path | bytes, name: str) -> None:
        """Send a local file, or the content itself. A reader finds what was there before or all of the new."""
        path = self.path(name)

        def send() -> None:
            with io.BytesIO(content) if isinstance(content, bytes) else content.open("rb") as source:
                self._send(source, path)

        ends = (self._where(name),) if isinstance(content, bytes) else (str(content), self._where(name))
        call = partial(self._attempt, send, *ends)
        if threading.current_thread() is not threading.main_thread():
            call()
            return
        with ThreadPoolExecutor(1) as thread:  # Ctrl-C in the midst would close the object, and so publish half of it
            thread.submit(call).result()

    def get(self, name: str, local: Path) -> bool:
        """Fetch a file, under a temporary name until it is whole. Returns False where there is none."""
        return self._fetch(name, lambda: _whole(local), str(local)) is not None

    def read(self, name: str) -> bytes | None:
        """Return the content of a small file, or None where there is none."""
        memory = self._fetch(name, lambda: nullcontext(io.BytesIO()))
        return None if memory is None else memory.getvalue()

    def put_folder(self, local: Path, name: str, *, last: str = "") -> None:
        """Send every file of a local folder; the one called `last` after all others, so that its presence means that the folder is whole."""
        paths = [path for path in sorted(local.rglob("*")) if path.is_file() and not _is_temporary(path.name)]
        files = [path.relative_to(local).as_posix() for path in paths]
        if not files or (last and last not in files):
            raise ValueError(f"`last` must name a file of the folder to send, but got {last!r} for {local}")
        _each(lambda file: self.put(local / file, f"{name}/{file}"), [file for file in files if file != last])
        if last:
            self.put(local / last, f"{name}/{last}")

    def get_folder(self, name: str, local: Path) -> bool:
        """Fetch a folder whose content no longer changes, unless this machine has it. It appears as a whole, by rename.

        Of several processes of one machine that ask at the same time one downloads; the others wait for it.

        Returns:
            Whether this call downloaded it. If not, and `local` is still absent, then the store has no such folder.
        """
        if local.is_dir():
            return False
        local.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(local.with_name(f".{local.name}.lock")):
            files = [] if local.is_dir() else self._list(name, recursive=True)
            if not files:
                return False
            coming = local.with_name(f".{local.name}.coming")  # ours by the lock, a killed download's rest included
            shutil.rmtree(coming, ignore_errors=True)
            try:
                if not all(_each(lambda file: self.get(f"{name}/{file}", coming / file), files)):
                    raise OSError(f"{self._where(name)}: a file vanished while the folder was fetched")
                os.replace(coming, local)
            finally:
                shutil.rmtree(coming, ignore_errors=True)
        return True

    def get_all(self, folders: Sequence[str], local: Path) -> int:
        """Make the files directly below some folders here what they are in the store; those that the store lacks are removed here.

        Returns:
            How many were fetched.
        """
        found = {folder: self.names(folder) for folder in folders}
        for folder, names in found.items():
            (local / folder).mkdir(parents=True, exist_ok=True)
            for path in set((local / folder).iterdir()) - {local / folder / name for name in names}:
                if path.is_file():
                    path.unlink(missing_ok=True)
        wanted = [f"{folder}/{name}" for folder, names in found.items() for name in names]
        return sum(_each(lambda name: self.get(name, local / name), wanted))

    def delete(self, name: str) -> None:
        """Remove a file; a missing one is fine."""
        path = self.path(name)

        def remove() -> None:
            with suppress(FileNotFoundError):
                self.files.delete_file(path)

        self._attempt(remove, self._where(name))

    def _where(self, name: str) -> str:
        return f"{str(self).rstrip('/')}/{name}".rstrip("/")

    def _infos(self, what: Any) -> Any:
        """Ask for file infos. What fsspec remembers is dropped first: other machines write here, too."""
        if self.files.type_name.startswith("py::fsspec"):
            self.files.handler.fs.invalidate_cache()
        return self.files.get_file_info(what)

    def _list(self, folder: str, *, recursive: bool) -> list[str]:
        from pyarrow.fs import FileSelector

        base = self.path(folder)
        selector = FileSelector(base or "/", allow_not_found=True, recursive=recursive)
        infos = self._attempt(lambda: self._infos(selector), self._where(folder))
        paths = [info.path.strip("/") for info in infos if info.is_file and not _is_temporary(info.base_name)]
        return sorted(path.removeprefix(base.strip("/")).strip("/") for path in paths)

    def _send(self, source: BinaryIO, path: str) -> None:
        parent, _, last = path.rpartition("/")
        if self.files.type_name == "local":  # Python's own calls flush to the disk and report a full one by its errno
            with _whole(Path(path)) as file:
                shutil.copyfileobj(source, file, CHUNK_BYTES)
        elif self.files.type_name in OBJECT_STORES:
            self._write(source, path)
        else:
            temporary = f"{parent}/{_temporary(last)}"
            self.files.create_dir(parent, recursive=True)
            try:
                self._write(source, temporary)
                self.files.move(temporary, path)
            except Exception:
                with suppress(Exception):  # the first error counts
                    self.files.delete_file(temporary)
                raise

    def _write(self, source: BinaryIO, path: str) -> None:
        """Write a stream by pieces. Not by `pyarrow.fs.copy_files`, which drops the errors of closing: the upload's success."""
        chunk = source.read(CHUNK_BYTES)
        stream = self.files.open_output_stream(path, compression=None)
        while chunk:
            stream.write(chunk)
            stream.flush()  # pieces travel in the background: without this, the whole file would wait in memory
            try:
                chunk = source.read(CHUNK_BYTES)
            except OSError:  # of the local disk; what is begun can only be closed
                stream.close()
                self.files.delete_file(path)
                raise
        stream.close()

    def _fetch(self, name: str, make: Callable[[], AbstractContextManager[F]], *ends: str) -> F | None:
        """Copy a file into what `make` opens and return that; None where there is no such file."""
        path = self.path(name)

        def fetch() -> F | None:
            try:
                stream = self.files.open_input_file(path)
            except FileNotFoundError:
                return None
            with stream, make() as file:
                shutil.copyfileobj(stream, file, CHUNK_BYTES)
                if file.tell() != stream.size():
                    raise OSError("it changed while it was read")
                return file

        return self._attempt(fetch, self._where(name), *ends)

    def _attempt(self, function: Callable[[], T], *ends: str) -> T:
        """Call a function of the store, again after errors that may pass. The error that remains names both ends of the way."""
        for pause in (*PAUSES, 0.0):
            try:
                return function()
            except Exception as error:  # each back end has separate exception types
                if not pause or not _may_pass(error):
                    raise _failure(error, *ends) from error
            time.sleep(pause)
        raise AssertionError("unreachable")


@contextmanager
def _whole(path: Path) -> Iterator[BinaryIO]:
    """Open a file that takes the place of `path` when the block ends, and vanishes when it fails."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(_temporary(path.name))
    try:
        with temporary.open("xb") as file:  # not by mkstemp, whose mode hides a file from others on a shared disk
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _temporary(name: str) -> str:
    return f".{name}.{uuid.uuid4().hex}.tmp"


def _is_temporary(name: str) -> bool:
    return name.startswith(".") and name.endswith(".tmp")


def _each(function: Callable[[str], T], names: Iterable[str]) -> list[T]:
    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(function, names))


def _may_pass(error: Exception) -> bool:
    if isinstance(error, OSError) and error.errno:
        lost = (errno.ESTALE, errno.EHOSTUNREACH, errno.ENETUNREACH)
        return isinstance(error, ConnectionError | TimeoutError) or error.errno in lost
    text = f"{type(error).__name__} {error}"
    return MAY_PASS.search(text) is not None and not DENIED.search(text)


def _failure(error: Exception, *ends: str) -> OSError:
    number = error.errno if isinstance(error, OSError) and error.errno else errno.EIO
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return OSError(number, _line(text) or type(error).__name__, ends[0], None, *ends[1:])


def _line(text: object) -> str:
    return " ".join(str(text).split())[:400]
