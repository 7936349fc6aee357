"""A lease that gives one driver exclusive access to a folder in an object store, which has no locks.

The lease is one small object with the holder (owner, host, process), a counter that each renewal increments, and the
time. Since the clocks of two machines may differ, the time alone never ends a lease: one with a recent time is
respected; one with an old time (or a time in the future) is watched for `stale_after` seconds and taken over only if
its counter does not change. A holder that could not renew its lease for that long treats it as lost, by its monotonic
clock. If two drivers take a free lease at the same time, the last writer gets it: both wait a moment and read it
again, and later each renewal reads before it writes.

Imports neither Ray nor torch.
"""

import json
import os
import platform
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol


class SmallObjects(Protocol):
    """Interface to the folder that a lease protects: small objects by name. `str()` returns the folder's address."""

    def read(self, name: str) -> bytes | None:
        """Return the content of an object, or None if it does not exist."""

    def put(self, content: bytes, name: str) -> None:
        """Write an object atomically."""

    def delete(self, name: str) -> None:
        """Remove an object, if it exists."""


class Lease:
    """An exclusive right to write into a folder, which a thread renews until it is released."""

    def __init__(
        self,
        storage: SmallObjects,
        name: str = "sweep.lease.json",
        *,
        every: float = 20.0,
        stale_after: float = 90.0,
        settle: float = 2.0,
    ) -> None:
        """Create a lease object without taking the lease; `acquire` takes it.

        Args:
            storage: The folder.
            name: Name of the lease object in the folder.
            every: Seconds from one renewal to the next.
            stale_after: Seconds without a renewal after which the lease is lost to its holder and free to others; must
                be the same for all drivers.
            settle: Seconds to wait after writing a free lease, so that concurrent writers see each other.

        Raises:
            ValueError: `stale_after` is not more than twice `every`, so that one failed renewal would lose the lease.
        """
        if not 0 < 2 * every < stale_after:
            raise ValueError(f"`stale_after` must be more than twice `every`, but got {stale_after:g} and {every:g}")
        self._storage, self._name = storage, name
        self._every, self._stale_after, self._settle = every, stale_after, settle
        self._owner = uuid.uuid4().hex
        self._beat = 0
        self._lost = self._problem = ""
        self._renewed = 0.0
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def lost(self) -> str:
        """Reason why the lease was lost, "" while held. A lost lease stays lost; a renewal that hangs loses it."""
        silent = time.monotonic() - self._renewed
        if self._thread is not None and not self._lost and silent > self._stale_after:
            why = self._problem or "the store does not respond"
            self._lost = f"`output_dir` must stay writable, but {self._storage} was not for {silent:.0f} s: {why}"
        return self._lost

    def acquire(self, log: Callable[[str], None] | None = None) -> None:
        """Take the lease and start the thread that renews it.

        Args:
            log: Called once with a message if an old lease has to be watched for `stale_after` seconds.

        Raises:
            ValueError: Another driver holds the lease.
            OSError: The folder cannot be read or written.
        """
        content = self._storage.read(self._name)
        if content is not None and self._is_alive(content, log):
            raise self._in_use(content)
        try:
            self._renewed = time.monotonic()
            self._write()
            time.sleep(self._settle)
            content = self._storage.read(self._name)
            if content is None or _holder(content).get("owner") != self._owner:
                raise self._in_use(content or b"")
        except BaseException:
            self.release()
            raise
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)
        self._thread.start()

    def release(self) -> None:
        """Stop renewing the lease and remove it, if it is still held."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join(self._every)
            if self._thread.is_alive() or self.lost:  # a renewal that hangs may still write; the lease will expire
                return
            self._thread = None
        with suppress(OSError):  # if it cannot be removed, it expires
            content = self._storage.read(self._name)
            if content is not None and _holder(content).get("owner") == self._owner:
                self._storage.delete(self._name)

    def _renew(self) -> None:
        while not self._stop.wait(self._every):
            started = time.monotonic()
            try:
                content = self._storage.read(self._name)
                if content is not None and _holder(content).get("owner") != self._owner:
                    self._lost = str(self._in_use(content))
                    return
                self._write()
            except OSError as error:
                self._problem = str(error)
                continue
            if self.lost:  # by the monotonic clock: another driver may have started meanwhile
                return
            self._renewed = started

    def _write(self) -> None:
        self._beat += 1
        holder = {
            "owner": self._owner,
            "host": platform.node(),
            "pid": os.getpid(),
            "place": pid_namespace(),
            "birth": start_time(os.getpid()),
            "beat": self._beat,
            "time": time.time(),
        }
        self._storage.put((json.dumps(holder) + "\n").encode(), self._name)

    def _is_alive(self, content: bytes, log: Callable[[str], None] | None) -> bool:
        """Return whether the holder of a lease still runs, as far as this machine can determine."""
        holder = _holder(content)
        namespace = pid_namespace()
        same_namespace = bool(namespace) and holder.get("place") == namespace
        if same_namespace and start_time(holder["pid"]) not in ("unknown", holder.get("birth")):
            return False
        if abs(_age(holder)) <= self._stale_after:
            return True
        if log is not None:
            log(f"old lease in {self._storage} ({_who(holder)}): watching it for {self._stale_after:.0f} s")
        end = time.monotonic() + self._stale_after
        while time.monotonic() < end:
            time.sleep(min(self._every / 4, max(0.0, end - time.monotonic())))
            latest = self._storage.read(self._name)
            if latest != content:
                return latest is not None
        return False

    def _in_use(self, content: bytes) -> ValueError:
        who = _who(_holder(content))
        return ValueError(f"`output_dir` must not be in use, but another sweep runs in {self._storage} ({who})")


def _holder(text: bytes) -> dict[str, Any]:
    """Read the holder of a lease; a damaged lease has an unknown holder with time 0, so it counts as old."""
    try:
        holder = json.loads(text)
        return {**holder, "pid": int(holder["pid"]), "time": float(holder["time"])}
    except (ValueError, TypeError, KeyError):
        return {"pid": 0, "time": 0.0}


def _age(holder: dict[str, Any]) -> float:
    return time.time() - float(holder["time"])


def _who(holder: dict[str, Any]) -> str:
    age = max(0.0, _age(holder))
    return f"host {holder.get('host', 'unknown')}, pid {holder['pid']}, last renewal {age:.0f} s ago"


def pid_namespace() -> str:
    """Return host, boot id and pid namespace, within which a pid is unique; "" if unknown."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{platform.node()} {boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def start_time(pid: int) -> str:
    """Return the start time of a process of this pid namespace, in clock ticks since boot, since pids are reused.

    Returns "ended" if it has ended, and "unknown" if its status is not readable.
    """
    try:
        os.kill(pid, 0)
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except ProcessLookupError:
        return "ended"
    except OSError:
        return "unknown"
    return "ended" if fields[0] in "ZX" else fields[19]
