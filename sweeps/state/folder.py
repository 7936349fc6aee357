"""The folder of a sweep, shared by all machines or copied from an address, and its locks for one driver."""

import fcntl
import os
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from synq.common.digests import write_sealed_json
from synq.common.notices import print_notice

from ..storage.lease import Lease
from ..storage.object_store import Storage, open_storage
from .trial_log import TrialLog, log_name

PARTS = ("plans", "records")
LEFTOVER_SECONDS = 60.0
"""Age at which a temporary file counts as abandoned."""


class SweepFolder:
    """The folder of a sweep, as its driver uses it."""

    def __init__(self, root: Path, address: str = "") -> None:
        """Create the object without touching the disk; `take` locks the folder.

        Args:
            root: The folder; for an address, this machine's copy.
            address: Address of the sweep in an object store; "" if `root` is the only folder.
        """
        self.root, self.address = root, address
        self.storage: Storage | None = None
        self._lease: Lease | None = None
        self._shared: int | None = None
        self._lock = FileLock(root / "sweep.lock")

    def take(self, *, shared: bool = False) -> None:
        """Lock the folder and, for an address, download plans and records.

        Args:
            shared: Whether other drivers may use the folder, too, if they also share it.

        Raises:
            ValueError: Another sweep runs in the folder.
            OSError: The folder or the address is not writable.
        """
        if self.address:
            self.storage = open_storage(self.address)
            self.storage.check_writable()
        try:
            for folder in PARTS:
                (self.root / folder).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OSError(f"`output_dir` must be writable, but got {self.root}: {error.strerror}") from error
        try:
            if shared:
                self._share()
            else:
                self._lock.acquire(timeout=0)
        except (Timeout, BlockingIOError):
            raise ValueError(f"`output_dir` must not be in use, but another sweep runs in {self.root}") from None
        self._clear_leftovers()
        if self.storage is None:
            return
        try:
            if not shared:
                self._lease = Lease(self.storage)
                self._lease.acquire(lambda text: print(text, flush=True))
            self.storage.get_all(PARTS, self.root)
            if not self.storage.get("sweep.json", self.root / "sweep.json"):
                (self.root / "sweep.json").unlink(missing_ok=True)
        except BaseException:
            self.give_back()
            raise

    def _clear_leftovers(self) -> None:
        """Remove the temporary files of killed processes, except recent ones, which a live worker may still write."""
        for folder in (self.root, *(self.root / part for part in PARTS)):
            for path in folder.glob(".*.tmp"):
                with suppress(FileNotFoundError):
                    if time.time() - path.stat().st_mtime > LEFTOVER_SECONDS:
                        path.unlink()

    def give_back(self) -> None:
        """Release the locks."""
        if self._lease is not None:
            self._lease.release()
        self._lock.release()
        if self._shared is not None:
            os.close(self._shared)
            self._shared = None

    def _share(self) -> None:
        """Lock the folder against a driver that does not share it.

        Raises:
            BlockingIOError: There is one.
        """
        self._shared = os.open(self.root / "sweep.lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(self._shared, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            os.close(self._shared)
            self._shared = None
            raise

    @property
    def lost(self) -> str:
        """Reason why the lease on the address was lost; "" while it is held, or without an address."""
        return self._lease.lost if self._lease is not None else ""

    def write(self, name: str, values: Mapping[str, Any]) -> None:
        """Write a JSON file with its digest to the folder and to the address.

        Args:
            name: Name of the file in the folder.
            values: JSON values, at least one.

        Raises:
            OSError: The folder has gone, the disk is full, or the store is not writable.
        """
        self.check_present()
        write_sealed_json(self.root / name, values)
        self.send(name)

    def send(self, name: str) -> None:
        """Upload a file of the folder to the address, if there is one."""
        if self.storage is not None:
            self.storage.put(self.root / name, name)

    def fetch(self, name: str) -> bool:
        """Return whether a file exists, after downloading it if only the address has it."""
        path = self.root / name
        return path.exists() or (self.storage is not None and self.storage.get(name, path))

    def remove(self, name: str) -> None:
        """Remove a file from the folder and from the address."""
        (self.root / name).unlink(missing_ok=True)
        if self.storage is not None:
            self.storage.delete(name)

    def log_end(self, trial: str, text: str) -> None:
        """Append the end of a trial that wrote no record to its log."""
        name = log_name(trial)
        if self.storage is not None:
            self.storage.get(name, self.root / name)
        with TrialLog(self.root / name) as log:
            log.event(f"the driver: {text}")
        if (self.root / name).is_file():
            self.send(name)

    def set_aside(self, name: str, reason: str) -> None:
        """Rename a damaged file, so that no reader takes it for one of the sweep; a notice names it.

        Args:
            name: Name of the file in the folder.
            reason: What is wrong and what is done instead, for the notice.
        """
        path = self.root / name
        aside = path.with_name(f"{path.name}.damaged")
        path.replace(aside)
        if self.storage is not None:
            self.storage.delete(name)
        print_notice(f"warning: {reason}; the file is kept as {aside.name}")

    def check_present(self) -> None:
        """Raise if the folder has gone (an unmounted disk), rather than create a new one at its path.

        Raises:
            OSError: The folder has no sweep.json.
        """
        if not (self.root / "sweep.json").exists():
            raise OSError(f"`output_dir` must stay in place during a sweep, but {self.root} has gone")
