"""A trial's view of its sweep's folder, on any machine: a folder that all machines see, or this machine's copy of an address.

Sent to the address: each epoch's checkpoint, the run's files, its record. Fetched once by each machine: the synthetic sets. Knows
neither Ray nor torch.
"""

import errno
import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import ParamSpec, TypeVar

from synq.config.run import RunConfig
from synq.runs.record import RunRecord, read_record, write_record
from synq.synthesis.dataset import MANIFEST_FILE

from ..storage.addresses import local_copy
from ..storage.object_store import Storage, open_storage

P = ParamSpec("P")
T = TypeVar("T")
CHECKPOINT = "checkpoint.pt"
KEPT = ("config.json", "student.safetensors", "record.json")
"""Files of a run's folder that go to the address at its end."""
STORAGE_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ESTALE, errno.EFBIG)
"""Errors of the disk or the mount, which the next trial would meet as well."""


class StorageError(OSError):
    """The disk or the store failed, and not the trial."""


def _marked(function: Callable[P, T]) -> Callable[P, T]:
    """Let an error of the system in `function` be known as one of the storage."""

    @functools.wraps(function)
    def call(*arguments: P.args, **named: P.kwargs) -> T:
        try:
            return function(*arguments, **named)
        except StorageError:
            raise
        except OSError as error:
            raise StorageError(str(error)) from error

    return call


_opened = _marked(open_storage)


class Workspace:
    """The files of a sweep as one worker reads and writes them."""

    def __init__(self, folder: str, address: str = "") -> None:
        """Open the folder.

        Args:
            folder: The sweep's folder, where all machines see it.
            address: The sweep's address in an object store, "" without one; `folder` is then not used.
        """
        self.storage: Storage | None = None
        if address:
            self.storage = _opened(address)
        self.root = local_copy(address) if address else Path(folder)

    def localize(self, config: RunConfig) -> RunConfig:
        """Return a run with its folders on this machine."""
        if self.storage is None:
            return config
        runs, store = str(self.root / "runs"), str(self.root / "store")
        return replace(config, runtime=replace(config.runtime, output_dir=runs, store_dir=store))

    def check_present(self) -> None:
        """Reject a sweep's folder that has gone, rather than begin a new one (an unmounted disk).

        Raises:
            OSError: It has gone.
        """
        if self.storage is None and not (self.root / "sweep.json").exists():
            raise StorageError(f"`output_dir` must stay in place during a sweep, but {self.root} has gone")

    @_marked
    def record(self, trial: str, config_digest: str) -> RunRecord | None:
        """Return the record of a trial, None where there is none or it is another run's (an earlier sweep's at the same address)."""
        path = self._record_path(trial)
        if self.storage is not None and not self.storage.get(f"records/{path.name}", path):
            path.unlink(missing_ok=True)
        record = read_record(path) if path.exists() else None
        return record if record is not None and record.config_digest == config_digest else None

    @_marked
    def finish(self, record: RunRecord) -> None:
        """Write a trial's record."""
        self.check_present()
        path = self._record_path(record.name)
        write_record(path, record)
        if self.storage is not None:
            self.storage.put(path, f"records/{path.name}")

    @_marked
    def fetch(self, folder: Path, sets: Sequence[str]) -> None:
        """Bring what a run needs here: the synthetic sets, and the last checkpoint where another machine had begun it.

        Args:
            folder: The run's folder.
            sets: Names of the sets in the store.
        """
        if self.storage is None:
            return
        self.fetch_sets(sets)
        self.storage.get(f"runs/{folder.name}/{CHECKPOINT}", folder / CHECKPOINT)

    @_marked
    def keep_checkpoint(self, path: Path) -> None:
        """Send a checkpoint to where another machine would look for it."""
        if self.storage is not None:
            self.storage.put(path, f"runs/{path.parent.name}/{path.name}")

    @_marked
    def keep_run(self, folder: Path) -> None:
        """Send the files of a finished run; its checkpoint is no longer needed there."""
        if self.storage is None:
            return
        for name in KEPT:
            self.storage.put(folder / name, f"runs/{folder.name}/{name}")
        self.storage.delete(f"runs/{folder.name}/{CHECKPOINT}")

    @_marked
    def fetch_sets(self, names: Sequence[str]) -> None:
        """Bring sets here that the address has already."""
        if self.storage is not None:
            for name in names:
                self.storage.get_folder(f"store/{name}", self.root / "store" / name)

    @_marked
    def keep_sets(self, names: Sequence[str]) -> None:
        """Send sets that were made here to the address."""
        if self.storage is None:
            return
        for name in names:
            if not self.storage.exists(f"store/{name}/{MANIFEST_FILE}"):
                self.storage.put_folder(self.root / "store" / name, f"store/{name}", last=MANIFEST_FILE)

    @_marked
    def asked_to_stop(self, trial: str) -> bool:
        """Whether the sweep wants a trial to end after this epoch."""
        name = f"plans/{trial}.stop"
        return self.storage.exists(name) if self.storage is not None else (self.root / name).exists()

    def _record_path(self, trial: str) -> Path:
        return self.root / "records" / f"{trial}.json"


def is_storage_error(error: BaseException) -> bool:
    """Whether the disk or the store failed, and not the trial."""
    return isinstance(error, StorageError) or (isinstance(error, OSError) and error.errno in STORAGE_ERRORS)
