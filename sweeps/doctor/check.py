"""Verification of a cluster before long runs: a sequence of checks, each with a time limit, and a table of the results.

node_checks.py and workload_checks.py have the checks, cluster_state.py what they share, probes.py and workers.py the
code that runs on the nodes.
"""

import os
import shutil
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal, TypeVar

from synq.common.environment import environment
from synq.common.files import write_json_atomic
from synq.common.text_tables import to_markdown
from synq.config.parsing import between, one_of

from ..driver.cluster import cluster as join_cluster
from ..driver.cluster import output_root
from ..search_config import SearchConfig
from ..storage.addresses import shown, split_address
from ..storage.object_store import is_address, local_copy, open_storage
from .cluster_state import Cluster, FailedError, Passed, SkippedError, cause, join_address, one_line
from .node_checks import check_capacity, check_clock, check_disk, check_nodes, check_output
from .workload_checks import (
    check_faults,
    check_gloo,
    check_gpus,
    check_nccl,
    check_packing,
    check_sweep,
    check_wide,
)

T = TypeVar("T")
CHECKS: dict[str, Callable[[Cluster], Passed]] = {
    "nodes": check_nodes,
    "clock": check_clock,
    "disk": check_disk,
    "output": check_output,
    "gpus": check_gpus,
    "packing": check_packing,
    "capacity": check_capacity,
    "gloo": check_gloo,
    "nccl": check_nccl,
    "sweep": check_sweep,
    "wide": check_wide,
    "faults": check_faults,
}
NEEDS = {"wide": ("output", "gloo", "nccl"), "sweep": ("output",), "faults": ("output",)}
"""Prerequisites of a check: if one of them failed, the check is skipped, since it would fail for the same reason."""
CLAIMS = {
    "machines": ("nodes", "several machines with the same software"),
    "folder": ("output", "folder for results: renames and locks between processes"),
    "shared folder": ("output", "folder for results, seen by several machines"),
    "network folder": ("output", "folder for results on a network file system"),
    "s3": ("output", "results at s3://"),
    "address": ("output", "results at another address"),
    "gpus": ("gpus", "GPUs compute as the CPU does (fp32, bf16)"),
    "packing": ("packing", "four trials share one GPU"),
    "capacity": ("capacity", "requests that can never fit are rejected"),
    "gloo": ("gloo", "process group on CPUs (gloo)"),
    "gloo machines": ("gloo", "process group on CPUs across machines"),
    "nccl": ("nccl", "process group on GPUs (NCCL)"),
    "nccl machines": ("nccl", "process group on GPUs across machines"),
    "sweep": ("sweep", "sweep on CPUs"),
    "sweep gpus": ("sweep", "sweep on GPUs"),
    "wide": ("wide", "trial of several processes on CPUs"),
    "wide gpus": ("wide", "trial of several processes on GPUs"),
    "faults": ("faults", "a trial survives the death of its process"),
}
"""Everything that can be verified, by name: the check that verifies it, and its text in the table."""
COLUMNS = ("what", "verified here", "how, or why not")
GRACE_SECONDS = 10.0
"""Time beyond its limit after which a check counts as stuck in a call that never returns."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """The outcome of a check."""

    name: str
    """Name of the check."""
    status: Literal["PASS", "FAIL", "SKIP"]
    """PASS, FAIL, or SKIP: the check cannot run on this cluster."""
    detail: str
    """What was measured, or the reason of a failure or skip; one line."""
    seconds: float = 0.0
    """Duration of the check."""
    verified: dict[str, str] = field(default_factory=dict)
    """Verified claims, each with its evidence."""
    lacking: dict[str, str] = field(default_factory=dict)
    """Claims that the check could not verify here, each with the reason."""

    def line(self) -> str:
        """Return the outcome as one line."""
        return f"{self.status}  {self.name:<8} {self.detail} ({self.seconds:.1f} s)"


def check_cluster(
    *,
    output_dir: str | None = None,
    workers: int = 2,
    timeout: float = 60.0,
    skip: Sequence[str] = (),
    json_file: str | None = None,
) -> int:
    """Check the cluster that RAY_ADDRESS names, or a local Ray on this machine, and print the results.

    Args:
        output_dir: Folder or address of results, in which a temporary folder is created and removed; None is ./runs.
        workers: Number of processes in a process group, >= 2.
        timeout: Time limit of each check, in seconds.
        skip: Names of checks to leave out.
        json_file: File to which all results are written as well.

    Returns:
        0 when nothing failed, else 1.

    Raises:
        ValueError, OSError: An argument is invalid, or the cluster cannot be joined.
    """
    between("workers", workers, 2)
    between("timeout", timeout, 0, open_low=True)
    for name in skip:
        one_of("skip", name, [check for check in CHECKS if check != "nodes"])
    if json_file is not None and not Path(json_file).absolute().parent.is_dir():
        raise ValueError(f"`json` must name a file in an existing folder, but got {json_file!r}")
    cluster = make_cluster(output_dir, workers)
    parent = cluster.folder.parent
    existed = run_with_timeout(lambda: _exists(parent), GRACE_SECONDS)
    if existed is None:
        raise OSError(
            f"`output_dir` must respond, but {parent} does not within {GRACE_SECONDS:g} s: is its file server down?"
        )
    with join_cluster(SearchConfig()):
        try:
            cluster.start_probes()
            results = run_checks(cluster, timeout, skip)
        finally:
            problems = run_with_timeout(lambda: clean_up(cluster, remove_parent=not existed), 3 * GRACE_SECONDS)
            for problem in [cluster.output_dir("")] if problems is None else problems:
                print(f"could not be removed: {problem}", flush=True)
    rows, failed = table(results), [result for result in results if result.status == "FAIL"]
    summary = f"{headline()} Failed: {', '.join(result.name for result in failed) or 'nothing'}."
    print(f"\n{summary}\n\n{to_markdown(rows, COLUMNS)}", end="", flush=True)
    if json_file is not None:
        nodes = [{**cluster.nodes[node], **cluster.facts.get(node, {})} for node in cluster.nodes]
        write_json_atomic(
            json_file, {"of": summary, "checks": [asdict(one) for one in results], "table": rows, "nodes": nodes}
        )
    return int(bool(failed))


def make_cluster(output_dir: str | None, workers: int) -> Cluster:
    """Return the state of a check with a new folder name below `output_dir`; the folder is not created yet.

    Raises:
        ValueError: An address contains a password.
    """
    name = f"check-{uuid.uuid4().hex[:8]}"
    if output_dir is not None and is_address(output_dir):
        parts = split_address(output_dir)
        if parts.password is not None:  # it would appear in every message
            raise ValueError(f"`output_dir` must carry no password (set it in the environment), but got {shown(parts)}")
        address = join_address(output_dir, name)
        return Cluster(local_copy(address), address, workers)
    return Cluster(output_root() / Path(output_dir or "runs").expanduser() / name, "", workers)


def _exists(folder: Path) -> bool:
    """Return whether a folder exists; any other problem with it is reported by the check `output`."""
    return os.path.lexists(folder)


def run_checks(cluster: Cluster, timeout: float, skip: Sequence[str]) -> list[Result]:
    """Run all checks, print each result as it arrives, and return the results.

    A failed check only skips the checks that need it (`NEEDS`); without a responding node, everything is skipped.
    """
    results: dict[str, Result] = {}
    for name, check in CHECKS.items():
        failed = [need for need in NEEDS.get(name, ()) if need in results and results[need].status == "FAIL"]
        if name in skip:
            results[name] = Result(name=name, status="SKIP", detail="left out (--skip)")
        elif name != "nodes" and not cluster.facts:
            results[name] = Result(name=name, status="SKIP", detail="no node responds")
        elif failed:
            results[name] = Result(name=name, status="SKIP", detail=f"needs {failed[0]}, which failed")
        else:
            results[name] = run_check(name, check, cluster, timeout)
        print(results[name].line(), flush=True)
    return list(results.values())


def run_check(name: str, check: Callable[[Cluster], Passed], cluster: Cluster, timeout: float) -> Result:
    """Run one check in a thread, which is abandoned if it does not end in time."""
    started = time.monotonic()
    cluster.deadline = started + timeout

    def work() -> Result:
        try:
            passed = check(cluster)
        except SkippedError as reason:
            return Result(name=name, status="SKIP", detail=str(reason))
        except FailedError as error:
            return Result(name=name, status="FAIL", detail=str(error))
        except Exception as error:  # any exception is a result of the check
            return Result(name=name, status="FAIL", detail=one_line(cause(error)))
        verified, lacking = dict(passed.verified), dict(passed.lacking)
        return Result(name=name, status="PASS", detail=passed.detail, verified=verified, lacking=lacking)

    result = run_with_timeout(work, timeout + GRACE_SECONDS)
    if result is None:
        hangs = f"no end in {timeout:g} s: a file system (a dead NFS server) or the network (a firewall) hangs"
        result = Result(name=name, status="FAIL", detail=hangs)
    return replace(result, seconds=time.monotonic() - started)


def run_with_timeout(function: Callable[[], T], seconds: float) -> T | None:
    """Return the result of a function, or None if it does not end in time; its daemon thread is then abandoned."""
    results: list[T] = []
    thread = threading.Thread(target=lambda: results.append(function()), daemon=True)
    thread.start()
    thread.join(seconds)
    return results[0] if results else None


def table(results: Sequence[Result]) -> list[dict[str, str]]:
    """Return a row for every claim (columns `COLUMNS`): whether it was verified, and the evidence or the reason."""
    by_name = {result.name: result for result in results}
    rows = []
    for claim, (name, text) in CLAIMS.items():
        result = by_name.get(name)
        if result is None:
            verdict, why = "no", "not checked"
        elif claim in result.verified:
            verdict, why = "yes", result.verified[claim]
        elif result.status == "FAIL":
            verdict, why = "no", f"the check {name} failed"
        else:
            verdict, why = "no", result.lacking.get(claim, result.detail)
        rows.append(dict(zip(COLUMNS, (text, verdict, why), strict=True)))
    return rows


def headline() -> str:
    """Return the date, host, commit and versions of the check as one sentence."""
    known = environment()
    versions = ", ".join(f"{name} {known['versions'].get(name, 'absent')}" for name in ("python", "ray", "torch"))
    return f"Checked on {datetime.now(UTC):%Y-%m-%d} from {known['host']}, commit {known['commit']}, {versions}."


def clean_up(cluster: Cluster, *, remove_parent: bool) -> list[str]:
    """Kill the processes of the checks, remove their files, and return what could not be removed, with the reason."""
    problems = []
    cluster.deadline = time.monotonic() + GRACE_SECONDS
    with suppress(Exception):  # disconnecting from the cluster also ends the actors
        cluster.kill_runner()
    if cluster.address:
        for name in ("", "sweep", "wide", "faults"):
            cluster.call("remove_copy", join_address(cluster.address, name) if name else cluster.address)
    if cluster.address and not cluster.unreachable:
        try:
            storage = open_storage(cluster.address)
            storage.files.delete_dir(storage.path(""))  # S3: pyarrow leaves an empty object as marker of the parent
        except FileNotFoundError:
            pass
        except Exception as error:  # each back end has separate exception types
            problems.append(f"{cluster.address}: {one_line(error)}")
    shutil.rmtree(cluster.folder, ignore_errors=True)
    if not cluster.address and os.path.lexists(cluster.folder):
        problems.append(str(cluster.folder))
    if not cluster.address and remove_parent:
        with suppress(OSError):  # another process may have started to use it
            cluster.folder.parent.rmdir()
    return problems
