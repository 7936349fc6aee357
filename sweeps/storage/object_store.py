"""A sweep's folder in an object store, by address: s3://bucket/path, gs://, abfs://, hdfs://, file://, or fsspec's.

The driver and the trials work on local copies and upload the results. A file is never visible in part: an object store
publishes an object when it is closed; on other file systems a file is written under a temporary name and renamed.
Overwrites and listings must be strongly consistent, as S3, Google Cloud Storage and Azure guarantee.

Imports neither Ray nor torch.
"""

import errno
import io
import os
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
from .errors import DENIED, as_os_error, is_transient, one_line

__all__ = ["Storage", "cache_root", "is_address", "local_copy", "open_storage"]

T = TypeVar("T")
F = TypeVar("F", bound=BinaryIO)
CHUNK_BYTES = 16 * 2**20
"""Maximum part of a file that is in memory at a time."""
THREADS = 16
"""Maximum number of concurrent transfers."""
PAUSES = (0.5, 1.0, 2.0, 4.0)
"""Seconds before each retry after a transient error."""
OBJECT_STORES = ("s3", "gcs", "abfs")
"""File systems, by pyarrow's type name, that publish an object when it is closed."""


def open_storage(address: str) -> "Storage":
    """Open the folder of an address; it need not exist yet.

    A server other than Amazon's is named by AWS_ENDPOINT_URL or in the address:
    s3://bucket/path?endpoint_override=http://host:9000.
    Credentials come from the environment or the other sources that the store's client library reads.

    Raises:
        ValueError: The scheme is unknown, the bucket is absent, or the credentials are missing or rejected.
        OSError: The store cannot be reached.
    """
    parts = split_address(address)
    if parts.password is not None:  # it would appear in every plan and every message
        raise ValueError(f"`output_dir` must carry no password (set it in the environment), but got {shown(parts)}")
    try:
        files, root = connect(parts)
    except (ValueError, ImportError, NotImplementedError) as error:
        why = f"{shown(parts)}: {one_line(error)}"
        raise ValueError(f"`output_dir` must be an address to open, but got {why}") from error
    except Exception as error:  # no connection; each back end has separate exception types
        raise as_os_error(error, shown(parts)) from error
    storage = Storage(address, files, root)
    if files.type_name in OBJECT_STORES:
        storage.check_bucket()
    return storage


class Storage:
    """One folder of an object store. Names are relative to it, with slashes. Thread-safe and picklable.

    Transient errors are retried for some seconds; others raise a one-line OSError with the address and the cause.
    """

    def __init__(self, address: str, files: Any, root: str) -> None:
        self.address = address
        self.files = files
        """The store, as a `pyarrow.fs.FileSystem`."""
        self._root = root.rstrip("/")

    def __str__(self) -> str:
        """Return the address without options, for messages."""
        return shown(split_address(self.address))

    def path(self, name: str) -> str:
        """Return the path of a name in `files`.

        Raises:
            ValueError: The name leads out of the folder, or has wildcards that fsspec would expand.
        """
        if name.startswith("/") or ".." in name.split("/"):
            raise ValueError(f"`name` must stay below the folder, but got {name!r}")
        path = f"{self._root}/{name}".rstrip("/")
        if self.files.type_name.startswith("py::") and set(path) & set("*?["):  # fsspec expands wildcards when it moves
            raise ValueError(f"`name` must have none of *?[ in a store of this kind, but got {self._where(name)!r}")
        return path

    def check_bucket(self) -> None:
        """Raise ValueError for a bucket that is absent or denies access; a store lists an absent one as empty."""
        from pyarrow.fs import FileType

        try:
            self.names("")
        except OSError as error:
            if not DENIED.search(str(error)):
                raise
            why = one_line(error)
            raise ValueError(f"`output_dir` must be accessible with the credentials in use, but got {why}") from error
        with suppress(OSError):  # the credentials may cover the folder only
            if self._infos(self._root.split("/")[0]).type == FileType.NotFound:
                raise ValueError(f"`output_dir` must name an existing bucket, but got {self}")

    def check_writable(self) -> None:
        """Write, read, list and remove a small object.

        Raises:
            OSError: One of the four failed.
        """
        probe = f".probe-{uuid.uuid4().hex}"
        try:
            self.put(b"probe", probe)
            if self.read(probe) != b"probe" or probe not in self.names(""):
                raise OSError("an object must be listed and read back as written, but is not")
            self.delete(probe)
        except OSError as error:
            text = f"`output_dir` must be writable, but got {self}: {one_line(error)}"
            raise OSError(error.errno or errno.EIO, text) from error

    def exists(self, name: str) -> bool:
        """Return whether a file of that name exists."""
        path = self.path(name)
        return self._attempt(lambda: bool(self._infos(path).is_file), self._where(name))

    def names(self, folder: str) -> list[str]:
        """Return the sorted names of the files directly below a folder; empty if the folder is absent."""
        return self._list(folder, recursive=False)

    def put(self, content: Path | bytes, name: str) -> None:
        """Upload a local file, or bytes, atomically: a reader gets either the old or the new content."""
        path = self.path(name)

        def send() -> None:
            with io.BytesIO(content) if isinstance(content, bytes) else content.open("rb") as source:
                self._send(source, path)

        ends = (self._where(name),) if isinstance(content, bytes) else (str(content), self._where(name))
        call = partial(self._attempt, send, *ends)
        if threading.current_thread() is not threading.main_thread():
            call()
            return
        # In the main thread, Ctrl-C during the upload would close the object, and so publish a part of it.
        with ThreadPoolExecutor(1) as thread:
            thread.submit(call).result()

    def get(self, name: str, local: Path) -> bool:
        """Download a file to `local` atomically, and return whether it exists."""
        return self._fetch(name, lambda: _whole(local), str(local)) is not None

    def read(self, name: str) -> bytes | None:
        """Return the content of a small file, or None if it does not exist."""
        memory = self._fetch(name, lambda: nullcontext(io.BytesIO()))
        return None if memory is None else memory.getvalue()

    def put_folder(self, local: Path, name: str, *, last: str = "") -> None:
        """Upload every file of a local folder, the one named `last` after all others.

        The presence of `last` then implies that the folder is complete.

        Raises:
            ValueError: The folder is empty or has no file `last`.
        """
        paths = [path for path in sorted(local.rglob("*")) if path.is_file() and not _is_temporary(path.name)]
        files = [path.relative_to(local).as_posix() for path in paths]
        if not files or (last and last not in files):
            raise ValueError(f"`last` must name a file of the folder to send, but got {last!r} for {local}")
        _each(lambda file: self.put(local / file, f"{name}/{file}"), [file for file in files if file != last])
        if last:
            self.put(local / last, f"{name}/{last}")

    def get_folder(self, name: str, local: Path) -> bool:
        """Download an immutable folder atomically, by rename, unless `local` exists.

        Of several concurrent processes of one machine, one downloads; the others wait for it.

        Returns:
            Whether this call downloaded the folder. If not, and `local` is still absent, the store has no such folder.

        Raises:
            OSError: A download failed, or a file vanished during it.
        """
        if local.is_dir():
            return False
        local.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(local.with_name(f".{local.name}.lock")):
            files = [] if local.is_dir() else self._list(name, recursive=True)
            if not files:
                return False
            # The lock makes this folder ours, including what a killed download left in it.
            partial_folder = local.with_name(f".{local.name}.coming")
            shutil.rmtree(partial_folder, ignore_errors=True)
            try:
                if not all(_each(lambda file: self.get(f"{name}/{file}", partial_folder / file), files)):
                    raise OSError(f"{self._where(name)}: a file vanished while the folder was downloaded")
                os.replace(partial_folder, local)
            finally:
                shutil.rmtree(partial_folder, ignore_errors=True)
        return True

    def get_all(self, folders: Sequence[str], local: Path) -> int:
        """Mirror the files directly below some folders from the store; local files that the store lacks are removed.

        Args:
            folders: Names of the folders in the store.
            local: Folder that has them on this machine.

        Returns:
            The number of files downloaded.
        """
        found = {folder: self.names(folder) for folder in folders}
        for folder, names in found.items():
            (local / folder).mkdir(parents=True, exist_ok=True)
            for path in set((local / folder).iterdir()) - {local / folder / name for name in names}:
                if path.is_file():
                    path.unlink(missing_ok=True)
        paths = [f"{folder}/{name}" for folder, names in found.items() for name in names]
        return sum(_each(lambda name: self.get(name, local / name), paths))

    def delete(self, name: str) -> None:
        """Remove a file, if it exists."""
        path = self.path(name)

        def remove() -> None:
            with suppress(FileNotFoundError):
                self.files.delete_file(path)

        self._attempt(remove, self._where(name))

    def _where(self, name: str) -> str:
        return f"{str(self).rstrip('/')}/{name}".rstrip("/")

    def _infos(self, what: Any) -> Any:
        """Return file infos, after invalidating fsspec's cache, since other machines write to the store as well."""
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
        if self.files.type_name == "local":  # Python's I/O flushes to the disk and reports a full one by its errno
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
                with suppress(Exception):  # report the first error
                    self.files.delete_file(temporary)
                raise

    def _write(self, source: BinaryIO, path: str) -> None:
        """Write a stream in chunks; `pyarrow.fs.copy_files` would ignore an error when the upload completes."""
        chunk = source.read(CHUNK_BYTES)
        stream = self.files.open_output_stream(path, compression=None)
        while chunk:
            stream.write(chunk)
            stream.flush()  # chunks upload in the background: without this, the whole file could queue in memory
            try:
                chunk = source.read(CHUNK_BYTES)
            except OSError:  # of the local disk; an upload that has started can only be closed
                stream.close()
                self.files.delete_file(path)
                raise
        stream.close()

    def _fetch(self, name: str, make: Callable[[], AbstractContextManager[F]], *ends: str) -> F | None:
        """Copy a file into the file object that `make` opens and return it; None if the file does not exist."""
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
        """Call a function of the store, retrying after transient errors.

        Raises:
            OSError: The last error; it names `ends`, the source and target of the transfer.
        """
        for pause in (*PAUSES, 0.0):
            try:
                return function()
            except Exception as error:  # each back end has separate exception types
                if not pause or not is_transient(error):
                    raise as_os_error(error, *ends) from error
            time.sleep(pause)
        raise AssertionError("unreachable")


@contextmanager
def _whole(path: Path) -> Iterator[BinaryIO]:
    """Open a temporary file that replaces `path` when the block ends, and is removed when the block fails."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(_temporary(path.name))
    try:
        with temporary.open("xb") as file:  # not mkstemp: its mode 0600 locks other users out
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
