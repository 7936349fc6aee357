"""The lease that keeps a second driver out of a folder in an object store, which has no locks. Knows neither Ray nor torch.

It is one small object: who holds it (owner, host, process), a counter that the holder moves on, and the time. Clocks of two machines
may differ, so a time alone takes nothing away from anybody: a lease whose time looks recent is respected, and one that looks old (or
lies in the future) is watched for `stale_after` seconds and taken over only if it does not move. A holder that could not renew it for
as long counts it as lost by itself, by a separate clock. Of two that take a free lease together the last writer has it: both
wait a moment and read it again, and later each renewal reads before it writes.
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
    """What a lease needs of the folder that it protects: small objects by name. `str()` is the folder's address."""

    def read(self, name: str) -> bytes | None:
        """Return the content of an object, None where it does not exist."""

    def put(self, content: bytes, name: str) -> None:
        """Write an object as a whole."""

    def delete(self, name: str) -> None:
        """Remove an object; a missing one is no error."""


class Lease:
    """The right to write into a folder."""

    def __init__(
        self,
        storage: SmallObjects,
        name: str = "sweep.lease.json",
        *,
        every: float = 20.0,
        stale_after: float = 90.0,
        settle: float = 2.0,
    ) -> None:
        """Name a lease; `acquire` takes it.

        Args:
            storage: The folder.
            name: Name of the lease in it.
            every: Seconds from one renewal to the next.
            stale_after: Seconds without a renewal after which a lease is lost to its holder and free to others; the same for all.
            settle: Seconds in which two that take it together must both have written.

        Raises:
            ValueError: A single renewal that fails would already lose it.
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
        """Why the folder is no longer ours; "" while it is. Once lost, always lost; also while a renewal hangs."""
        silent = time.monotonic() - self._renewed
        if self._thread is not None and not self._lost and silent > self._stale_after:
            why = self._problem or "the store does not respond"
            self._lost = f"`output_dir` must stay writable, but {self._storage} was not for {silent:.0f} s: {why}"
        return self._lost

    def acquire(self, log: Callable[[str], None] | None = None) -> None:
        """Take the folder.

        Args:
            log: Called once if an old lease has to be watched for a while.

        Raises:
            ValueError: Another sweep runs in the folder.
            OSError: The folder cannot be read or written.
        """
        there = self._storage.read(self._name)
        if there is not None and self._is_alive(there, log):
            raise self._in_use(there)
        try:
            self._renewed = time.monotonic()
            self._write()
            time.sleep(self._settle)
            there = self._storage.read(self._name)
            if there is None or _content(there).get("owner") != self._owner:
                raise self._in_use(there or b"")
        except BaseException:
            self.release()
            raise
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)
        self._thread.start()

    def release(self) -> None:
        """Give the folder back, if it is ours."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join(self._every)
            if (
                self._thread.is_alive() or self.lost
            ):  # a renewal that hangs may write after us; the lease grows old by itself
                return
            self._thread = None
        with suppress(OSError):  # as above
            there = self._storage.read(self._name)
            if there is not None and _content(there).get("owner") == self._owner:
                self._storage.delete(self._name)

    def _renew(self) -> None:
        while not self._stop.wait(self._every):
            started = time.monotonic()
            try:
                there = self._storage.read(self._name)
                if there is not None and _content(there).get("owner") != self._owner:
                    self._lost = str(self._in_use(there))
                    return
                self._write()
            except OSError as error:
                self._problem = str(error)
                continue
            if self.lost:  # by a clock of ours: another one may have started meanwhile
                return
            self._renewed = started

    def _write(self) -> None:
        self._beat += 1
        holder = {
            "owner": self._owner,
            "host": platform.node(),
            "pid": os.getpid(),
            "place": _place(),
            "birth": _birth(os.getpid()),
            "beat": self._beat,
            "time": time.time(),
        }
        self._storage.put((json.dumps(holder) + "\n").encode(), self._name)

    def _is_alive(self, there: bytes, log: Callable[[str], None] | None) -> bool:
        """Whether the holder of a lease still runs, as far as can be seen from here."""
        holder = _content(there)
        place = _place()
        if place and holder.get("place") == place and _birth(holder["pid"]) not in ("unknown", holder.get("birth")):
            return False
        if abs(_age(holder)) <= self._stale_after:
            return True
        if log is not None:
            log(f"an old lease lies in {self._storage} ({_who(holder)}): watching it for {self._stale_after:.0f} s")
        end = time.monotonic() + self._stale_after
        while time.monotonic() < end:
            time.sleep(min(self._every / 4, max(0.0, end - time.monotonic())))
            now = self._storage.read(self._name)
            if now != there:
                return now is not None
        return False

    def _in_use(self, there: bytes) -> ValueError:
        who = _who(_content(there))
        return ValueError(f"`output_dir` must not be in use, but another sweep runs in {self._storage} ({who})")


def _content(text: bytes) -> dict[str, Any]:
    """The holder of a lease; of a damaged one, somebody without a name whose time is long past."""
    try:
        holder = json.loads(text)
        return {**holder, "pid": int(holder["pid"]), "time": float(holder["time"])}
    except (ValueError, TypeError, KeyError):
        return {"pid": 0, "time": 0.0}


def _age(holder: dict[str, Any]) -> float:
    return time.time() - float(holder["time"])


def _who(holder: dict[str, Any]) -> str:
    return f"host {holder.get('host', 'unknown')}, pid {holder['pid']}, last sign of life {max(0.0, _age(holder)):.0f} s ago"


def _place() -> str:
    """What a process number is valid in: this start of this machine, this container. "" where that is unknown."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{platform.node()} {boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _birth(pid: int) -> str:
    """When a process of this place started, in ticks: numbers are used again. "ended" if it did, "unknown" if it is hidden from us."""
    try:
        os.kill(pid, 0)
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except ProcessLookupError:
        return "ended"
    except OSError:
        return "unknown"
    return "ended" if fields[0] in "ZX" else fields[19]
