"""The sweep's folder as a worker uses it: a folder that all machines see, or this machine's copy of an address.

Uploaded to the address: each epoch's checkpoint, the run's files, its record. Downloaded once per machine: the
synthetic sets. Imports neither Ray nor torch.
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

from ..state.trial_log import log_name
from ..storage.addresses import local_copy
from ..storage.object_store import Storage, open_storage

P = ParamSpec("P")
T = TypeVar("T")
CHECKPOINT = "checkpoint.pt"
KEPT = ("config.json", "student.safetensors", "record.json")
"""Files of a run's folder that are uploaded when it is finished."""
STORAGE_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ESTALE, errno.EFBIG)
"""Errors of the disk or the mount, which the next trial would also get."""


class StorageError(OSError):
    """The disk or the object store failed, not the trial."""


def _with_storage_errors(function: Callable[P, T]) -> Callable[P, T]:
    """Convert an OSError of `function` to a StorageError."""

    @functools.wraps(function)
    def call(*arguments: P.args, **named: P.kwargs) -> T:
        try:
            return function(*arguments, **named)
        except StorageError:
            raise
        except OSError as error:
            raise StorageError(str(error)) from error

    return call


_opened = _with_storage_errors(open_storage)


class Workspace:
    """Read and write the files of a sweep from one worker."""

    def __init__(self, folder: str, address: str = "") -> None:
        """Open the folder.

        Args:
            folder: The sweep's folder, visible on all machines; not used with an address.
            address: The sweep's address in an object store, or "".
        """
        self.storage: Storage | None = None
        if address:
            self.storage = _opened(address)
        self.root = local_copy(address) if address else Path(folder)

    def localize(self, config: RunConfig) -> RunConfig:
        """Return a run with the folders of this machine."""
        if self.storage is None:
            return config
        runs, store = str(self.root / "runs"), str(self.root / "store")
        return replace(config, runtime=replace(config.runtime, output_dir=runs, store_dir=store))

    def check_present(self) -> None:
        """Check that the sweep's folder still exists: a new one must not be created on an unmounted path.

        Raises:
            StorageError: It does not.
        """
        if self.storage is None and not (self.root / "sweep.json").exists():
            raise StorageError(f"`output_dir` must stay in place during a sweep, but {self.root} has gone")

    @_with_storage_errors
    def record(self, trial: str, config_digest: str) -> RunRecord | None:
        """Return the record of a trial; None if there is none, or one of another run (an earlier sweep's address)."""
        path = self._record_path(trial)
        if self.storage is not None and not self.storage.get(f"records/{path.name}", path):
            path.unlink(missing_ok=True)
        record = read_record(path) if path.exists() else None
        return record if record is not None and record.config_digest == config_digest else None

    @_with_storage_errors
    def finish(self, record: RunRecord) -> None:
        """Write a trial's record."""
        self.check_present()
        path = self._record_path(record.name)
        write_record(path, record)
        if self.storage is not None:
            self.storage.put(path, f"records/{path.name}")

    @_with_storage_errors
    def fetch(self, folder: Path, sets: Sequence[str]) -> None:
        """Download the synthetic sets of a run, and its last checkpoint if another machine started it.

        Args:
            folder: The run's folder.
            sets: Names of the sets in the store.
        """
        if self.storage is None:
            return
        self.fetch_sets(sets)
        self.storage.get(f"runs/{folder.name}/{CHECKPOINT}", folder / CHECKPOINT)

    @_with_storage_errors
    def keep_checkpoint(self, path: Path) -> None:
        """Upload a checkpoint, from which another machine may resume."""
        if self.storage is not None:
            self.storage.put(path, f"runs/{path.parent.name}/{path.name}")

    @_with_storage_errors
    def keep_run(self, folder: Path) -> None:
        """Upload the files of a finished run, and delete its uploaded checkpoint."""
        if self.storage is None:
            return
        for name in KEPT:
            self.storage.put(folder / name, f"runs/{folder.name}/{name}")
        self.storage.delete(f"runs/{folder.name}/{CHECKPOINT}")

    @_with_storage_errors
    def fetch_sets(self, names: Sequence[str]) -> None:
        """Download the sets that the address has."""
        if self.storage is not None:
            for name in names:
                self.storage.get_folder(f"store/{name}", self.root / "store" / name)

    @_with_storage_errors
    def keep_sets(self, names: Sequence[str]) -> None:
        """Upload the sets that the address does not have."""
        if self.storage is None:
            return
        for name in names:
            if not self.storage.exists(f"store/{name}/{MANIFEST_FILE}"):
                self.storage.put_folder(self.root / "store" / name, f"store/{name}", last=MANIFEST_FILE)

    @_with_storage_errors
    def is_stop_requested(self, trial: str) -> bool:
        """Return whether the scheduler requested a stop of a trial."""
        name = f"plans/{trial}.stop"
        return self.storage.exists(name) if self.storage is not None else (self.root / name).exists()

    @_with_storage_errors
    def log(self, trial: str, rank: int = 0) -> Path:
        """Return the path of a trial's log, with what an earlier start on any machine wrote.

        Args:
            trial: Name of the trial.
            rank: Rank of this process among the trial's workers.
        """
        name = log_name(trial, rank)
        if self.storage is not None:
            self.storage.get(name, self.root / name)
        return self.root / name

    @_with_storage_errors
    def keep_log(self, trial: str, rank: int = 0) -> None:
        """Upload the log of a trial."""
        name = log_name(trial, rank)
        if self.storage is not None and (self.root / name).is_file():
            self.storage.put(self.root / name, name)

    def _record_path(self, trial: str) -> Path:
        return self.root / "records" / f"{trial}.json"


def is_storage_error(error: BaseException) -> bool:
    """Return whether an error is one of the disk or the object store, not of the trial."""
    return isinstance(error, StorageError) or (isinstance(error, OSError) and error.errno in STORAGE_ERRORS)
