"""Random SIGKILLs over a sweep: `python -m fuzz.kills_run --count 100 --seed 0`, from the folder tests.

A sweep over listed points runs until it is finished; in between, at random moments, its driver, a worker, the raylet or
the head process is killed, and the same command starts again. Then a new sweep begins, until there were enough kills.
Moments are drawn in seconds of processor time of all processes of the sweep, so that other work does not move them.
Of each finished sweep the leaderboard must equal the undisturbed one, no record may have been written twice, and no
start may hang: neither for more than 60 s after its Ray was killed, nor beyond its limit. Prints a line for each kill
and fault and a summary; ends with 1 if there is a fault. With `--s3`, the sweep is at an address of moto's server.
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import ExitStack
from pathlib import Path

from support.ray_processes import DAEMONS, processes_of, processor_seconds
from support.sweep_tools import board, listed
from synq.sweeps.storage.addresses import is_address
from synq.sweeps.storage.object_store import open_storage

ROOT = Path(__file__).resolve().parents[2]
KINDS = ("driver", "worker", *DAEMONS)
HANG_SECONDS = 60.0
"""Longest time from the death of Ray to the end of the driver."""
ANEW = "one more attempt"
"""Where Ray dies while it starts, it is started once more, and the sweep does not end."""
TOO_BUSY = ("Ray must start on this machine, but it did not", "stopped: the memory is full")
"""Ends on a machine whose processors or memory are too busy for Ray; the next start goes on."""
LIMIT_SECONDS = 900.0
"""Longest time of one start."""
NEVER = float("inf")
MOST_STARTS = 20
"""Most starts of one sweep, the last of them undisturbed."""
LATEST = 1.0
"""Latest kill, in times of the processor time of an undisturbed sweep."""
POLL_SECONDS = 0.2


def start(words: list[str], log: Path) -> subprocess.Popen[bytes]:
    """Start the sweep in a process group of its own, as a user would."""
    with log.open("ab") as file:
        return subprocess.Popen(
            [sys.executable, str(ROOT / "launch" / "sweep.py"), *words],
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={**os.environ, "RAY_TMPDIR": str(log.parent)},
        )


def end_group(process: subprocess.Popen[bytes]) -> None:
    """End what a killed driver left, which on a machine its user would do, or the next start."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    finally:
        process.wait()


def is_too_busy(log: Path) -> bool:
    """Return whether a start ended for want of the machine's time or memory."""
    text = log.read_text()
    return any(end in text for end in TOO_BUSY)


def content(place: str) -> dict[str, bytes]:
    """Return the records of a sweep, which have the time of their run, and its leaderboard, in a folder or at an
    address.
    """
    if not is_address(place):
        paths = [*Path(place).glob("records/*.json"), *Path(place).glob("leaderboard.csv")]
        return {path.name: path.read_bytes() for path in paths}
    storage = open_storage(place)
    names = [f"records/{name}" for name in storage.names("records")] + ["leaderboard.csv"]
    return {name.rpartition("/")[2]: part for name in names if (part := storage.read(name)) is not None}


def board_of(place: str, scratch: Path) -> list[dict[str, str]]:
    """Return the leaderboard of a sweep, without times and places."""
    (scratch / "leaderboard.csv").write_bytes(content(place)["leaderboard.csv"])
    return board(scratch)


def one_start(words: list[str], log: Path, kind: str, after: float, rng: random.Random) -> tuple[float, bool, str]:
    """Start the sweep, kill one of its processes after some processor seconds, and wait for its end.

    Returns:
        Processor seconds until the kill or the end, whether the kill was done, and a fault, "" for none.
    """
    process = start(words, log)
    began = time.monotonic()
    killed = used = 0.0
    try:
        while process.poll() is None:
            now = time.monotonic()
            used = used if killed else max(used, processor_seconds(process.pid))
            if not killed and used >= after:
                found = [process.pid] if kind == "driver" else processes_of(process.pid, kind)
                if found:
                    os.kill(rng.choice(found), signal.SIGKILL)
                    killed = now
            if killed and kind in DAEMONS and now - killed > HANG_SECONDS and ANEW not in log.read_text():
                return used, True, f"hangs for more than {HANG_SECONDS:.0f} s after its {kind} was killed"
            if now - began > LIMIT_SECONDS:
                return used, bool(killed), f"is not finished after {LIMIT_SECONDS:.0f} s"
            time.sleep(POLL_SECONDS)
    finally:
        end_group(process)
    if process.returncode in (1, 2) and is_too_busy(log):
        return used, bool(killed), ""
    allowed = {"driver": (-signal.SIGKILL,), "worker": (0,)}.get(kind, (0, 1)) if killed else (0,)
    if process.returncode not in allowed:
        return (
            used,
            bool(killed),
            f"ended with {process.returncode} after its {kind} was killed: {log.read_text()[-600:]}",
        )
    return used, bool(killed), ""


def main(argv: list[str] | None = None) -> int:
    """Kill and compare; see the module."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=100, help="kills")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--s3", action="store_true", help="with the sweep at an address of moto's server")
    args = parser.parse_args(argv)
    rng, faults = random.Random(f"kills {args.seed}"), 0
    kills: Counter[str] = Counter()
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="k") as temporary, ExitStack() as stack:
        folder = Path(temporary)  # short: Ray puts sockets below it
        spec, address = str(listed(folder)), ""
        if args.s3:
            from moto.server import ThreadedMotoServer

            server = ThreadedMotoServer(port=0)
            server.start()
            stack.callback(server.stop)
            os.environ |= {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "AWS_DEFAULT_REGION": "us-east-1"}
            address = f"http://127.0.0.1:{server.get_host_and_port()[1]}"
            import boto3

            boto3.client("s3", endpoint_url=address).create_bucket(Bucket="kills")
        log, first = folder / "log", str(folder / "undisturbed")
        for _ in range(MOST_STARTS):  # on a busy machine Ray may not start
            usual, _, fault = one_start([spec, "--output-dir", first], log, "driver", NEVER, rng)
            if fault:
                parser.error(fault)
            if "leaderboard.csv" in content(first) and not is_too_busy(log):
                break
        wanted = board_of(first, folder)
        print(f"undisturbed: {len(wanted)} rows, {usual:.0f} processor seconds", flush=True)
        sweeps = busy = 0
        while kills.total() < args.count:
            place = f"s3://kills/sweep{sweeps}?endpoint_override={address}" if address else str(folder / f"s{sweeps}")
            words, kind = [spec, "--output-dir", place], ""
            sweeps += 1
            for number in range(MOST_STARTS):
                before = content(place)
                is_last = number == MOST_STARTS - 1 or kills.total() >= args.count
                kind, after = rng.choice(KINDS), NEVER if is_last else rng.uniform(1.0, LATEST * usual)
                log.unlink(missing_ok=True)
                used, done, fault = one_start(words, log, kind, after, rng)
                kills[kind] += done
                now = content(place)
                again = [name for name in before if name.endswith(".json") and before[name] != now.get(name)]
                fault = fault or (f"records written again: {again}" if again else "")
                faults += bool(fault)
                end = (log.read_text().rstrip().splitlines() or [""])[-1]
                what = f"{kind} killed after {used:.1f} processor seconds" if done else "undisturbed"
                print(f"{'FAULT ' if fault else ''}sweep {sweeps}, {what}: {fault or end}"[:400], flush=True)
                busy += is_too_busy(log)
                if not fault and not is_too_busy(log) and (not done or kind == "worker"):  # it is finished
                    break
            if board_of(place, folder) != wanted:
                faults += 1
                print(f"FAULT sweep {sweeps}: its leaderboard differs from the undisturbed one", flush=True)
    seconds = time.monotonic() - began
    print(
        f"{kills.total()} kills {dict(kills)}, seed {args.seed}, {sweeps} sweeps: {faults} faults, "
        f"{busy} starts ended on a busy machine, {seconds:.0f} s"
    )
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
