"""Processes of a sweep that a test started: its driver's workers, raylet and head, found below the driver only."""

import os
from collections.abc import Iterator
from pathlib import Path

WORKER = "ray::ImplicitFunc"
"""Start of the command line of a trial's process."""
DAEMONS = ("raylet", "gcs_server")


def below(pid: int) -> Iterator[int]:
    """Yield the processes below a process."""
    parents: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            _, _, tail = path.read_text().rpartition(")")
        except OSError:  # it has ended in the meantime
            continue
        parents.setdefault(int(tail.split()[1]), []).append(int(path.parent.name))
    waiting = [pid]
    while waiting:
        found = parents.get(waiting.pop(), [])
        yield from found
        waiting += found


def processes_of(driver: int, kind: str) -> list[int]:
    """Return the processes of one kind below a driver, the lowest first.

    Args:
        driver: The driver's process.
        kind: "worker", "raylet" or "gcs_server", the head's.
    """
    found = []
    for pid in below(driver):
        try:
            name = (Path("/proc") / str(pid) / "comm").read_text().strip()
            line = (Path("/proc") / str(pid) / "cmdline").read_bytes().decode(errors="replace")
        except OSError:
            continue
        if name == kind or (kind == "worker" and line.startswith(WORKER)):
            found.append(pid)
    return sorted(found)


def processor_seconds(driver: int) -> float:
    """Return the processor time of a driver and of all processes below it that still run, in seconds."""
    ticks = 0
    for pid in (driver, *below(driver)):
        try:
            _, _, tail = (Path("/proc") / str(pid) / "stat").read_text().rpartition(")")
        except OSError:
            continue
        ticks += sum(int(part) for part in tail.split()[11:13])
    return ticks / os.sysconf("SC_CLK_TCK")
