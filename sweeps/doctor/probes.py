"""The Ray actor that inspects a node for the checks of a cluster. It measures; node_checks.py evaluates the results."""

import hashlib
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from synq.common.environment import environment
from synq.common.files import write_text_atomic

from ..driver.cluster import ROOT
from ..storage.object_store import cache_root, local_copy, open_storage

POLL_SECONDS = 0.05
LOCK_SECONDS = 5.0
"""Time limit for a lock that was just released to become free for another machine."""
ROUND_TRIP_BYTES = 8 * 2**20
GPU_QUERY = """
import json, torch
found = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
print(json.dumps([[one.name, one.total_memory] for one in found]))
"""


class NodeProbe:
    """An actor on one node that runs the node's part of the checks."""

    def __init__(self, node: str) -> None:
        self.node = node
        self._lock: FileLock | None = None

    def facts(self) -> dict[str, Any]:
        """Import what a trial imports and return the versions and devices of the node.

        Returns:
            host, machine (`machine_id`), code (`code_digest`), commit, versions by package, cuda (version of torch's
            build, "" without), and gpus: name and bytes of each.
        """
        import torch

        import synq.sweeps.workers.entry
        import synq.sweeps.workers.wide_trial  # noqa: F401

        known = environment()
        return {
            "host": known["host"],
            "machine": machine_id(),
            "code": code_digest(ROOT),
            "commit": known["commit"],
            "versions": known["versions"],
            "cuda": torch.version.cuda or "",
            "gpus": self._gpus(),
        }

    def _gpus(self) -> list[tuple[str, int]]:
        """Return name and bytes of each GPU.

        They are queried in a subprocess, since Ray hides them from an actor that requested none.

        Raises:
            OSError: torch fails in the subprocess.
        """
        environ = dict(os.environ)
        if not environ.get("CUDA_VISIBLE_DEVICES"):
            environ.pop("CUDA_VISIBLE_DEVICES", None)
        if not (Path("/dev/nvidiactl").exists() or Path("/dev/kfd").exists() or shutil.which("nvidia-smi")):
            return []
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", GPU_QUERY], env=environ, capture_output=True, text=True, check=False
        )
        if done.returncode != 0:
            raise OSError(f"torch cannot query the GPUs: {(done.stderr.strip().splitlines() or ['no reason'])[-1]}")
        return [(str(name), int(size)) for name, size in json.loads(done.stdout)]

    def clock(self) -> float:
        """Return the node's time, in seconds since 1970."""
        return time.time()

    def free_bytes(self, folder: str) -> int:
        """Return the free bytes on the disk of a folder ("" for the folder of this machine's copies of addresses)."""
        path = Path(folder) if folder else cache_root()
        while not path.exists():
            path = path.parent
        return shutil.disk_usage(path).free

    def file_system(self, folder: str) -> tuple[str, str]:
        """Return type and source of the file system of a folder; see the function `file_system`."""
        return file_system(folder)

    def wait_for_text(self, path: str, text: str, timeout: float) -> float | None:
        """Wait until a file has the given text; see the function `wait_for_text`."""
        return wait_for_text(Path(path), text, timeout)

    def write(self, folder: str, text: str) -> None:
        """Write this node's file atomically, by rename."""
        write_text_atomic(Path(folder) / self.node, text)

    def lock(self, path: str, timeout: float = 0.0) -> bool:
        """Acquire a file lock and hold it; return False if another process still holds it after `timeout` seconds."""
        lock = FileLock(path)
        try:
            lock.acquire(timeout=timeout)
        except Timeout:
            return False
        self._lock = lock
        return True

    def unlock(self) -> None:
        """Release the lock that `lock` acquired."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def transfer(self, address: str) -> tuple[float, float]:
        """Send 8 MiB to an address, fetch them again, and leave a text there that was replaced once.

        Returns:
            The rates of sending and of fetching, in MB/s.

        Raises:
            OSError: The address is not writable, or the fetched content differs from the content that was sent.
        """
        storage = open_storage(address)
        storage.check_writable()
        content, name = os.urandom(ROUND_TRIP_BYTES), f"{self.node}.bin"
        started = time.perf_counter()
        storage.put(content, name)
        sent = time.perf_counter()
        fetched = storage.read(name)
        ended = time.perf_counter()
        if fetched != content:
            raise OSError(f"{storage}/{name} must return what was sent, but has other content")
        for text in (b"old", self.node.encode()):
            storage.put(text, self.node)
        return ROUND_TRIP_BYTES / (sent - started) / 1e6, ROUND_TRIP_BYTES / (ended - sent) / 1e6

    def kill(self, pid: int) -> None:
        """Kill a worker process of Ray on this machine and wait until it has ended.

        Raises:
            ValueError: The process is not a worker of Ray.
        """
        title = Path(f"/proc/{pid}/cmdline")
        if title.exists() and not title.read_bytes().startswith(b"ray::"):
            raise ValueError(f"`pid` must be a worker of Ray, but got {pid}: {title.read_bytes()[:80]!r}")
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
            while _alive(pid):
                time.sleep(POLL_SECONDS)

    def remove_copy(self, address: str) -> None:
        """Remove this machine's copy of an address."""
        shutil.rmtree(local_copy(address), ignore_errors=True)


def machine_id() -> str:
    """Return an identifier of this machine: its boot id, which containers on it share; else its host name."""
    with suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    return platform.node()


def code_digest(root: Path) -> str:
    """Return a digest of the package's source files below `root`, 12 hexadecimal digits.

    The commit is not enough: a worker only knows the one that the driver passed to it. In a checkout synq/sweeps is a
    link, in a wheel and in an uploaded working directory a folder: all three give the same digest.
    """
    digest = hashlib.sha256()
    folders = os.walk(root / "synq", followlinks=True)
    for path in sorted(Path(folder, name) for folder, _, names in folders for name in names if name.endswith(".py")):
        digest.update(f"{path.relative_to(root).as_posix()} {hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()[:12]


def file_system(folder: str, mounts: str = "/proc/mounts") -> tuple[str, str]:
    """Return type and source of the file system of a folder.

    Args:
        folder: The folder.
        mounts: Table of mounts, in the format of /proc/mounts.

    Returns:
        For example ("nfs4", "server:/export"); ("", "") if unknown.
    """
    path, found = os.path.realpath(folder), ("", "", "")
    try:
        lines = Path(mounts).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return "", ""
    for line in lines:
        source, point, kind = (part.replace("\\040", " ") for part in line.split(" ")[:3])
        if (path == point or path.startswith(point.rstrip("/") + "/")) and len(point) >= len(found[0]):
            found = (point, kind, source)  # a later mount at the same point hides the earlier one
    return found[1], found[2]


def wait_for_text(path: Path, text: str, timeout: float) -> float | None:
    """Wait until a file has the given text.

    Returns:
        The seconds waited, or None if the file does not have the text within `timeout` seconds.
    """
    started = time.monotonic()
    while True:
        with suppress(OSError):
            if path.read_text() == text:
                return time.monotonic() - started
        if time.monotonic() - started > timeout:
            return None
        time.sleep(POLL_SECONDS)


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False
