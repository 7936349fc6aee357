"""Verify a cluster before hours are spent on it: every check in a row, each with a time limit, and a table of what holds here.

facts.py and work.py hold the checks, site.py what they share, probes.py and workers.py
what runs on the machines.
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

from ..driver.cluster import cluster, output_root
from ..search_config import SearchConfig
from ..storage.addresses import shown, split_address
from ..storage.object_store import is_address, local_copy, open_storage
from .facts import check_clock, check_disk, check_nodes, check_output, check_rejection
from .site import FailedError, Passed, Site, SkippedError, below, cause, one_line
from .work import (
    check_faults,
    check_gloo,
    check_gpus,
    check_nccl,
    check_packing,
    check_sweep,
    check_wide,
)

T = TypeVar("T")
CHECKS: dict[str, Callable[[Site], Passed]] = {
    "nodes": check_nodes,
    "clock": check_clock,
    "disk": check_disk,
    "output": check_output,
    "gpus": check_gpus,
    "packing": check_packing,
    "refusal": check_rejection,
    "gloo": check_gloo,
    "nccl": check_nccl,
    "sweep": check_sweep,
    "wide": check_wide,
    "faults": check_faults,
}
NEEDS = {"wide": ("output", "gloo", "nccl"), "sweep": ("output",), "faults": ("output",)}
"""Checks that must not have failed before another one: its failure would only say the same again, later."""
CLAIMS = {
    "machines": ("nodes", "several machines with the same software"),
    "folder": ("output", "folder for results: renames and locks between processes"),
    "shared folder": ("output", "folder for results, seen by several machines"),
    "network folder": ("output", "folder for results on a network file system"),
    "s3": ("output", "results at s3://"),
    "address": ("output", "results at another address"),
    "gpus": ("gpus", "GPUs compute as the CPU does (fp32, bf16)"),
    "packing": ("packing", "four trials share one GPU"),
    "refusal": ("refusal", "requests that can never fit are refused"),
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
"""What can be verified, by name: the check that does it, and the words for the table."""
COLUMNS = ("what", "verified here", "how, or why not")
GRACE_SECONDS = 10.0
"""What a check may take beyond its limit before it counts as hanging in a call that nothing ends."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """How a check ended."""

    name: str
    """Name of the check."""
    status: Literal["PASS", "FAIL", "SKIP"]
    """Whether it found what it looked for; SKIP: that cannot be checked here."""
    detail: str
    """What it saw, or why not; one line."""
    seconds: float = 0.0
    """How long it took."""
    verified: dict[str, str] = field(default_factory=dict)
    """Claims that hold, with their evidence."""
    lacking: dict[str, str] = field(default_factory=dict)
    """Claims on which it says nothing here, with the reason."""

    def line(self) -> str:
        """The check in one line."""
        return f"{self.status}  {self.name:<8} {self.detail} ({self.seconds:.1f} s)"


def check_cluster(
    *,
    output_dir: str | None = None,
    workers: int = 2,
    timeout: float = 60.0,
    skip: Sequence[str] = (),
    json_file: str | None = None,
) -> int:
    """Check the cluster that RAY_ADDRESS names, or a Ray of its own on this machine, and print what was found.

    Args:
        output_dir: Folder or address of results, in which a folder of the check is made and removed; None is ./runs.
        workers: Processes that must work together.
        timeout: Seconds that each check may take.
        skip: Names of checks to leave out.
        json_file: Where everything found is written, too.

    Returns:
        0 when nothing failed, else 1.

    Raises:
        ValueError, OSError: The words are wrong, or there is no cluster.
    """
    between("workers", workers, 2)
    between("timeout", timeout, 0, open_low=True)
    for name in skip:
        one_of("skip", name, [check for check in CHECKS if check != "nodes"])
    if json_file is not None and not Path(json_file).absolute().parent.is_dir():
        raise ValueError(f"`json` must name a file in an existing folder, but got {json_file!r}")
    site = make_site(output_dir, workers)
    there = bounded(lambda: _is_there(site.folder.parent), GRACE_SECONDS)
    if there is None:
        raise OSError(
            f"`output_dir` must answer, but {site.folder.parent} does not in {GRACE_SECONDS:g} s: is its server dead?"
        )
    with cluster(SearchConfig()):
        try:
            site.open()
            results = run_checks(site, timeout, skip)
        finally:
            problems = bounded(lambda: clean(site, remove_parent=not there), 3 * GRACE_SECONDS)
            for problem in [site.place("")] if problems is None else problems:
                print(f"could not be removed: {problem}", flush=True)
    rows, failed = table(results), [result for result in results if result.status == "FAIL"]
    of = f"{headline()} Failed: {', '.join(result.name for result in failed) or 'nothing'}."
    print(f"\n{of}\n\n{to_markdown(rows, COLUMNS)}", end="", flush=True)
    if json_file is not None:
        nodes = [{**site.nodes[node], **site.facts.get(node, {})} for node in site.nodes]
        write_json_atomic(
            json_file, {"of": of, "checks": [asdict(one) for one in results], "table": rows, "nodes": nodes}
        )
    return int(bool(failed))


def make_site(output_dir: str | None, workers: int) -> Site:
    """Return a place for the check's files, which is not made yet.

    Raises:
        ValueError: An address carries a password.
    """
    name = f"check-{uuid.uuid4().hex[:8]}"
    if output_dir is not None and is_address(output_dir):
        parts = split_address(output_dir)
        if parts.password is not None:  # it would stand in every message
            raise ValueError(f"`output_dir` must carry no password (set it in the environment), but got {shown(parts)}")
        address = below(output_dir, name)
        return Site(local_copy(address), address, workers)
    return Site(output_root() / Path(output_dir or "runs").expanduser() / name, "", workers)


def _is_there(folder: Path) -> bool:
    """Whether a folder exists already; whatever else is wrong with it, the check `output` says."""
    return os.path.lexists(folder)


def run_checks(site: Site, timeout: float, skip: Sequence[str]) -> list[Result]:
    """Do all checks, print each as it ends, and return how they ended. One that fails does not keep the others from being done."""
    results: dict[str, Result] = {}
    for name, check in CHECKS.items():
        failed = [need for need in NEEDS.get(name, ()) if need in results and results[need].status == "FAIL"]
        if name in skip:
            results[name] = Result(name=name, status="SKIP", detail="left out (--skip)")
        elif name != "nodes" and not site.facts:
            results[name] = Result(name=name, status="SKIP", detail="no node answers")
        elif failed:
            results[name] = Result(name=name, status="SKIP", detail=f"needs {failed[0]}, which failed")
        else:
            results[name] = run_check(name, check, site, timeout)
        print(results[name].line(), flush=True)
    return list(results.values())


def run_check(name: str, check: Callable[[Site], Passed], site: Site, timeout: float) -> Result:
    """Do one check in a thread, which is left behind should it hang."""
    started = time.monotonic()
    site.deadline = started + timeout

    def work() -> Result:
        try:
            passed = check(site)
        except SkippedError as reason:
            return Result(name=name, status="SKIP", detail=str(reason))
        except FailedError as error:
            return Result(name=name, status="FAIL", detail=str(error))
        except Exception as error:  # whatever it is, it is what the check found
            return Result(name=name, status="FAIL", detail=one_line(cause(error)))
        verified, lacking = dict(passed.verified), dict(passed.lacking)
        return Result(name=name, status="PASS", detail=passed.detail, verified=verified, lacking=lacking)

    result = bounded(work, timeout + GRACE_SECONDS)
    if result is None:
        hangs = f"no end in {timeout:g} s: a file system (a dead NFS server) or the network (a firewall) hangs"
        result = Result(name=name, status="FAIL", detail=hangs)
    return replace(result, seconds=time.monotonic() - started)


def bounded(function: Callable[[], T], seconds: float) -> T | None:
    """Return what a function returns, or None if it does not end in time; its thread is then left behind."""
    ended: list[T] = []
    thread = threading.Thread(target=lambda: ended.append(function()), daemon=True)
    thread.start()
    thread.join(seconds)
    return ended[0] if ended else None


def table(results: Sequence[Result]) -> list[dict[str, str]]:
    """Return a row for every claim: whether it holds here, and the evidence or the reason why that is not known."""
    by_name = {result.name: result for result in results}
    rows = []
    for claim, (name, words) in CLAIMS.items():
        result = by_name.get(name)
        if result is None:
            verdict, why = "no", "not checked"
        elif claim in result.verified:
            verdict, why = "yes", result.verified[claim]
        elif result.status == "FAIL":
            verdict, why = "no", f"the check {name} failed"
        else:
            verdict, why = "no", result.lacking.get(claim, result.detail)
        rows.append(dict(zip(COLUMNS, (words, verdict, why), strict=True)))
    return rows


def headline() -> str:
    """Return when and with what the table was made."""
    known = environment()
    versions = ", ".join(f"{name} {known['versions'].get(name, 'absent')}" for name in ("python", "ray", "torch"))
    return f"Checked on {datetime.now(UTC):%Y-%m-%d} from {known['host']}, commit {known['commit']}, {versions}."


def clean(site: Site, *, remove_parent: bool) -> list[str]:
    """End what the check started and remove what it wrote; returns what could not be removed, and why."""
    problems = []
    site.deadline = time.monotonic() + GRACE_SECONDS
    with suppress(Exception):  # the actors end with the connection, too
        site.end_runner()
    if site.address:
        for name in ("", "sweep", "wide", "faults"):
            site.ask("forget", below(site.address, name) if name else site.address)
    if site.address and not site.unreachable:
        try:
            storage = open_storage(site.address)
            storage.files.delete_dir(storage.path(""))  # S3: pyarrow leaves an empty object that stands for the parent
        except FileNotFoundError:
            pass
        except Exception as error:  # each back end has types of its own
            problems.append(f"{site.address}: {one_line(error)}")
    shutil.rmtree(site.folder, ignore_errors=True)
    if not site.address and os.path.lexists(site.folder):
        problems.append(str(site.folder))
    if not site.address and remove_parent:
        with suppress(OSError):  # others may have begun to use it
            site.folder.parent.rmdir()
    return problems
