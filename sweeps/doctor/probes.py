"""What the check of a cluster asks of every node: an actor of Ray that answers, and how it finds the answers out. Nothing here judges."""

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

LOOK_SECONDS = 0.05
LOCK_SECONDS = 5.0
"""How long a lock that was just given back may take to be free for another machine."""
ROUND_TRIP_BYTES = 8 * 2**20
GPU_FACTS = """
import json, torch
found = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
print(json.dumps([[one.name, one.total_memory] for one in found]))
"""


class NodeProbe:
    """Sits on one node as long as the check lasts and does there what it is asked."""

    def __init__(self, node: str) -> None:
        self.node = node
        self._lock: FileLock | None = None

    def facts(self) -> dict[str, Any]:
        """Import what a trial imports and return what must be the same everywhere, and what the node has."""
        import torch

        import synq.sweeps.workers.entry
        import synq.sweeps.workers.wide_trial  # noqa: F401

        known = environment()
        return {
            "host": known["host"],
            "machine": machine(),
            "code": code_digest(ROOT),
            "commit": known["commit"],
            "versions": known["versions"],
            "cuda": torch.version.cuda or "",
            "gpus": self._gpus(),
        }

    def _gpus(self) -> list[tuple[str, int]]:
        """Name and bytes of each GPU. Ray hides them from an actor that asked for none: another process looks."""
        words = dict(os.environ)
        if not words.get("CUDA_VISIBLE_DEVICES"):
            words.pop("CUDA_VISIBLE_DEVICES", None)
        if not (Path("/dev/nvidiactl").exists() or Path("/dev/kfd").exists() or shutil.which("nvidia-smi")):
            return []
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", GPU_FACTS], env=words, capture_output=True, text=True, check=False
        )
        if done.returncode != 0:
            raise OSError(f"torch cannot look at the GPUs: {(done.stderr.strip().splitlines() or ['no reason'])[-1]}")
        return [(str(name), int(size)) for name, size in json.loads(done.stdout)]

    def clock(self) -> float:
        """Return this machine's time."""
        return time.time()

    def free_bytes(self, folder: str) -> int:
        """Return what is free on the disk of a folder ("": of this machine's copies of addresses)."""
        path = Path(folder) if folder else cache_root()
        while not path.exists():
            path = path.parent
        return shutil.disk_usage(path).free

    def file_system(self, folder: str) -> tuple[str, str]:
        """Return type and source of the file system that a folder lies on; see `file_system`."""
        return file_system(folder)

    def sees(self, path: str, text: str, patience: float) -> float | None:
        """Return after how many seconds a file has a text, or None if it has not in time."""
        return wait_for_text(Path(path), text, patience)

    def write(self, folder: str, text: str) -> None:
        """Write this node's file, by rename."""
        write_text_atomic(Path(folder) / self.node, text)

    def lock(self, path: str, patience: float = 0.0) -> bool:
        """Take a lock and keep it; False when another one has it."""
        lock = FileLock(path)
        try:
            lock.acquire(timeout=patience)
        except Timeout:
            return False
        self._lock = lock
        return True

    def unlock(self) -> None:
        """Give the lock back."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def store(self, address: str) -> tuple[float, float]:
        """Send 8 MiB to an address and fetch them again, and leave there a text that was replaced once.

        Returns:
            MB/s of sending and of fetching.

        Raises:
            OSError: It cannot, or what came back is another thing.
        """
        storage = open_storage(address)
        storage.check_writable()
        content, name = os.urandom(ROUND_TRIP_BYTES), f"{self.node}.bin"
        started = time.perf_counter()
        storage.put(content, name)
        sent = time.perf_counter()
        back = storage.read(name)
        ended = time.perf_counter()
        if back != content:
            raise OSError(f"{storage}/{name} came back with other content than was sent")
        for text in (b"old", self.node.encode()):
            storage.put(text, self.node)
        return ROUND_TRIP_BYTES / (sent - started) / 1e6, ROUND_TRIP_BYTES / (ended - sent) / 1e6

    def kill(self, pid: int) -> None:
        """Kill a worker of Ray on this machine and wait until it is gone.

        Raises:
            ValueError: The process is none of Ray's.
        """
        title = Path(f"/proc/{pid}/cmdline")
        if title.exists() and not title.read_bytes().startswith(b"ray::"):
            raise ValueError(f"`pid` must be a worker of Ray, but got {pid}: {title.read_bytes()[:80]!r}")
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
            while _alive(pid):
                time.sleep(LOOK_SECONDS)

    def forget(self, address: str) -> None:
        """Remove this machine's copy of an address."""
        shutil.rmtree(local_copy(address), ignore_errors=True)


def machine() -> str:
    """Return what tells this machine from others: its start, which containers of one machine share; else its name."""
    with suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    return platform.node()


def code_digest(root: Path) -> str:
    """Return a digest of the package's own source files. A commit says too little: a worker knows only what it was told of it."""
    digest = hashlib.sha256()
    for path in sorted(path for part in ("synq", "sweeps") for path in (root / part).rglob("*.py")):
        digest.update(f"{path.relative_to(root).as_posix()} {hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()[:12]


def file_system(folder: str, mounts: str = "/proc/mounts") -> tuple[str, str]:
    """Return type and source of the file system that a folder lies on, for example ("nfs4", "server:/export"); "" where unknown."""
    path, found = os.path.realpath(folder), ("", "", "")
    try:
        lines = Path(mounts).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return "", ""
    for line in lines:
        source, point, kind = (word.replace("\\040", " ") for word in line.split(" ")[:3])
        if (path == point or path.startswith(point.rstrip("/") + "/")) and len(point) >= len(found[0]):
            found = (point, kind, source)  # of two mounts at one point the later one hides the earlier
    return found[1], found[2]


def wait_for_text(path: Path, text: str, patience: float) -> float | None:
    """Return after how many seconds a file has a text, or None if it has not in time."""
    started = time.monotonic()
    while True:
        with suppress(OSError):
            if path.read_text() == text:
                return time.monotonic() - started
        if time.monotonic() - started > patience:
            return None
        time.sleep(LOOK_SECONDS)


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False
