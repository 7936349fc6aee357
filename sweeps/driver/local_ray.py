"""Start of Ray on this machine alone: one more attempt, the death of its processes noticed, advice for the user."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from synq.common.error_text import first_line
from synq.common.exit_codes import RUN_FAILED
from synq.common.notices import print_notice

ATTEMPTS = 2
DAEMONS = ("gcs_server", "raylet")
"""Names of the processes without which Ray does not work."""
POLL_SECONDS = 0.5
"""Seconds between two checks of Ray's processes while it starts."""


STOP_SECONDS = 5.0
"""Seconds that Ray has to stop after one of its processes died."""
WATCH_SECONDS = 2.0
"""Seconds between two checks of Ray's processes while a sweep runs."""
REPEAT_SECONDS = 4.0
"""Seconds after which the main thread is interrupted again, if it goes on."""
STUCK_SECONDS = 12.0
"""Seconds after the death of a process of Ray when the main thread is given up: some of Ray's calls do not return."""


class _DaemonDiedError(KeyboardInterrupt):
    """A process of Ray died; not an Exception, which Ray's loops would catch and go on waiting.

    Of the exceptions of a signal handler, Ray's compiled calls pass on KeyboardInterrupt alone, as a new one. Any other
    is lost, and `ray.wait` waits until its limit.
    """


class LocalRayDiedError(RuntimeError):
    """A process of the Ray that this process started died: no machine can come back, and Ray would wait for one."""


@contextmanager
def local_ray(**options: Any) -> Iterator[None]:
    """Start Ray on this machine, and stop it after the ``with`` block.

    Args:
        options: Arguments of `ray.init`.

    Raises:
        OSError: Ray did not start.
        LocalRayDiedError: One of its processes died in the block; only in the main thread, see `_watching`.
    """
    import ray

    before = _children()
    start_local_ray(**options)
    died: list[str] = []
    cause: BaseException | None = None
    try:
        with _watching(before, WATCH_SECONDS, must_end=True) as died:
            yield
    except BaseException as error:
        if not died:
            ray.shutdown()
            raise
        cause = error
    if not died:  # Ray Tune may have swallowed the error
        ray.shutdown()
        return
    _end(before)
    stop = threading.Thread(target=ray.shutdown, daemon=True)  # it may wait for the dead process
    stop.start()
    stop.join(timeout=STOP_SECONDS)
    raise LocalRayDiedError(f"Ray ended on this machine: its process {died[0]} died") from cause


def start_local_ray(**options: Any) -> None:
    """Start Ray on this machine, with one more attempt if it fails.

    Args:
        options: Arguments of `ray.init`.

    Raises:
        OSError: Ray did not start; the message has the last reason and what to do.
    """
    import ray

    for attempt in range(ATTEMPTS):
        before, started = _children(), time.monotonic()
        died: list[str] = []
        try:
            with _watching(before) as died, own_sigterm():
                ray.init(address="local", **options)
            return
        except BaseException as error:  # Ray raises a bare Exception if its processes do not start
            _end(before)
            if not died and not isinstance(error, Exception):
                raise
            ray.shutdown()
            reason = f"{first_line(error).rstrip('. ')} (after {time.monotonic() - started:.0f} s)"
            if attempt + 1 < ATTEMPTS:
                print_notice(f"Ray did not start on this machine: {reason}; one more attempt")
    raise OSError(f"Ray must start on this machine, but it did not in {ATTEMPTS} attempts: {reason}; {_advice()}")


@contextmanager
def own_sigterm() -> Iterator[None]:
    """Keep the handler of SIGTERM of this process while Ray starts or is joined.

    Ray replaces it by one that raises SystemExit: its compiled calls lose that, and the driver has nothing to clean up.
    """
    from ray._private import utils

    name = "set_sigterm_handler"
    theirs = getattr(utils, name, None)
    if theirs is None:
        yield
        return
    setattr(utils, name, lambda handler: None)
    try:
        yield
    finally:
        setattr(utils, name, theirs)


def _advice() -> str:
    logs = Path(os.environ.get("RAY_TMPDIR", "/tmp"), "ray", "session_latest", "logs")
    return (
        "a machine that is busy, or short of memory or of room for /dev/shm, starts it too slowly: end other work, or "
        f"start Ray once by `ray start --head` and set RAY_ADDRESS=auto; its own messages are in {logs}"
    )


@contextmanager
def _watching(
    before: dict[int, tuple[str, str]], seconds: float = POLL_SECONDS, *, must_end: bool = False
) -> Iterator[list[str]]:
    """Raise `_DaemonDiedError` in the ``with`` block as soon as a new child of this process among `DAEMONS` is dead.

    Ray itself waits for its whole limit, whether or not the process that it waits for still exists. Nothing is watched
    outside the main thread, to which Python delivers signals, and on systems without /proc.

    Args:
        before: Children that existed before Ray was started.
        seconds: Seconds between two checks.
        must_end: End this process with exit code 1 if the block is not left in `STUCK_SECONDS`. Calls that ask Ray's
            head do not return once it is dead, run no signal handler, and end the process after a minute themselves.

    Yields:
        A list to which the name of the dead process is added.
    """
    if threading.current_thread() is not threading.main_thread() or not Path("/proc/self").exists():
        yield []
        return
    died: list[str] = []
    is_over = threading.Event()
    main = threading.get_ident()

    def poll() -> None:
        seen: dict[int, str] = {}
        while not is_over.wait(seconds):
            now = _children()
            seen |= {pid: name for pid, (name, _) in now.items() if pid not in before and name in DAEMONS}
            dead = [name for pid, name in seen.items() if pid not in now or now[pid][1] == "Z"]
            if dead:
                died.append(dead[0])
                interrupt()
                return

    def interrupt() -> None:
        noticed = time.monotonic()
        while True:
            signal.pthread_kill(main, signal.SIGUSR1)
            if is_over.wait(REPEAT_SECONDS):
                return
            if must_end and time.monotonic() - noticed > STUCK_SECONDS:
                _end(before)
                print_notice(f"Ray ended on this machine: its process {died[0]} died; the same command goes on")
                os._exit(RUN_FAILED)

    def stop(number: int, frame: Any) -> None:
        if not is_over.is_set():
            raise _DaemonDiedError(f"its process {died[0]} ended" if died else "it was stopped by a signal")

    handler = signal.signal(signal.SIGUSR1, stop)
    watcher = threading.Thread(target=poll, daemon=True)
    watcher.start()
    try:
        yield died
    finally:
        is_over.set()
        watcher.join()
        signal.signal(signal.SIGUSR1, handler)


def _children(of: int = 0) -> dict[int, tuple[str, str]]:
    """Return name and state of every child of a process by its id; Z is a dead one. Empty without /proc.

    Args:
        of: Id of the process; 0 for this one.
    """
    found: dict[int, tuple[str, str]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it may have ended in the meantime
            head, _, tail = path.read_text().rpartition(")")  # a name may hold spaces and brackets
            state, parent = tail.split()[:2]
            if int(parent) == (of or os.getpid()):
                found[int(path.parent.name)] = (head.partition("(")[2], state)
    return found


def _is_of_ray(pid: int, name: str) -> bool:
    """Return whether a child runs one of Ray's programs: a daemon, or Python with a file of the package."""
    import ray

    package = str(Path(ray.__file__).parent) + os.sep
    with suppress(OSError):
        args = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
        return name in DAEMONS or any(arg.startswith(package) for arg in args)
    return False


def _end(before: dict[int, tuple[str, str]]) -> None:
    """Kill Ray's processes that were started since `before`, which a failed or interrupted start does not end.

    The agents that the raylet starts would otherwise go on for a minute until they notice that it has gone.
    """
    children = {pid: name for pid, (name, state) in _children().items() if pid not in before and state != "Z"}
    ending = [pid for pid, name in children.items() if _is_of_ray(pid, name)]
    for pid in ending:  # grows by their children, children's children and so on
        ending += _children(pid)
    for pid in ending:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
