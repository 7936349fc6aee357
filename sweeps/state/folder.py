"""Where a sweep's files lie: a folder that all machines see, or an address of which this machine has a copy. Takes it for one driver."""

import time
from contextlib import suppress
from pathlib import Path

from filelock import FileLock, Timeout

from synq.common.files import write_json_atomic

from ..storage.lease import Lease
from ..storage.object_store import Storage, open_storage

PARTS = ("plans", "records")
LEFTOVER_SECONDS = 60.0
"""Age at which a temporary file belongs to nobody."""


class SweepFolder:
    """The folder of a sweep, for its driver."""

    def __init__(self, root: Path, address: str = "") -> None:
        """Name a folder.

        Args:
            root: The folder; for an address, this machine's copy.
            address: Where the sweep lies, if not in `root`.
        """
        self.root, self.address = root, address
        self.storage: Storage | None = None
        self._lease: Lease | None = None
        self._lock = FileLock(root / "sweep.lock")

    def take(self) -> None:
        """Lock the folder and, from an address, fetch plans and records.

        Raises:
            ValueError: Another sweep runs in it.
            OSError: It cannot be written.
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
            self._lock.acquire(timeout=0)
        except Timeout:
            raise ValueError(f"`output_dir` must not be in use, but another sweep runs in {self.root}") from None
        self._clear_leftovers()
        if self.storage is None:
            return
        try:
            self._lease = Lease(self.storage)
            self._lease.acquire(lambda text: print(text, flush=True))
            self.storage.get_all(PARTS, self.root)
            if not self.storage.get("sweep.json", self.root / "sweep.json"):
                (self.root / "sweep.json").unlink(missing_ok=True)
        except BaseException:
            self.give_back()
            raise

    def _clear_leftovers(self) -> None:
        """Remove what processes that were killed had begun to write; not what a worker of theirs may be writing still."""
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

    @property
    def lost(self) -> str:
        """Why the address is no longer this driver's; "" while it is."""
        return self._lease.lost if self._lease is not None else ""

    def write(self, name: str, value: object) -> None:
        """Write a JSON file, here and at the address.

        Raises:
            OSError: The folder, the disk or the store refuses.
        """
        self.check_present()
        write_json_atomic(self.root / name, value)
        self.send(name)

    def send(self, name: str) -> None:
        """Send a file of the folder to the address, if there is one."""
        if self.storage is not None:
            self.storage.put(self.root / name, name)

    def fetch(self, name: str) -> bool:
        """Whether a file is there; one that only the address has is fetched."""
        path = self.root / name
        return path.exists() or (self.storage is not None and self.storage.get(name, path))

    def remove(self, name: str) -> None:
        """Remove a file, here and at the address."""
        (self.root / name).unlink(missing_ok=True)
        if self.storage is not None:
            self.storage.delete(name)

    def check_present(self) -> None:
        """Refuse to write where the folder has gone, rather than begin a new one in its place (an unmounted disk).

        Raises:
            OSError: It has gone.
        """
        if not (self.root / "sweep.json").exists():
            raise OSError(f"`output_dir` must stay in place during a sweep, but {self.root} has gone")
