"""Checks of what a cluster's machines are: the same software, near clocks, free disks, and one place for results that all of them see."""

import os
import time
from collections import Counter
from collections.abc import Mapping
from typing import Any
from urllib.parse import parse_qsl

from filelock import FileLock, Timeout

from synq.common.files import write_text_atomic

from ..driver.cluster import capacity
from ..search_config import SearchConfig
from ..storage.addresses import shown, split_address
from ..storage.object_store import open_storage
from .probes import LOCK_SECONDS, file_system, wait_for_text
from .site import FailedError, Passed, Site, one_line

SAME = ("python", "synq", "torch", "ray", "accelerate")
"""Versions that must be the same on all machines; of torch's, builds for other devices are."""
SKEW_SECONDS = 5.0
"""Difference of clocks at which the user is warned."""
CLOCK_ROUNDS = 5
FREE_BYTES = 2**30
"""Least space on the disk of the results."""
PATIENCE = 10.0
"""Seconds in which a machine must see what another one wrote; NFS keeps what it has read for some."""
NETWORK = ("nfs", "lustre", "ceph", "gpfs", "beegfs", "cifs", "smb", "gluster", "afs", "orangefs", "pvfs", "wekafs", "9p", "virtiofs", "panfs")  # fmt: skip
"""File systems of several machines, by the begin of their type; behind fuse., too."""


def check_nodes(site: Site) -> Passed:
    """Every node runs the same software and can import this package."""
    answers = site.ask("facts")
    site.facts = {node: answer for node, answer in answers.items() if not isinstance(answer, Exception)}
    problems = [
        f"{site.name(node)}: {one_line(answer)} (install the project there, or submit it with --working-dir)"
        for node, answer in answers.items()
        if isinstance(answer, Exception)
    ]
    site.probes = {node: site.probes[node] for node in site.facts}  # the other checks are of those that answer
    problems += differences({site.name(node): facts for node, facts in site.facts.items()})
    if problems:
        raise FailedError("; ".join(problems))
    resources = [node["resources"] for node in site.nodes.values()]
    total = {name: sum(part.get(name, 0.0) for part in resources) for name in ("CPU", "GPU")}
    gpus = Counter((name, size) for facts in site.facts.values() for name, size in facts["gpus"])
    listed = ", ".join(f"{count} x {name} ({size / 2**30:.0f} GiB)" for (name, size), count in gpus.items())
    first = next(iter(site.facts.values()))
    versions = ", ".join(f"{name} {first['versions'].get(name, 'absent')}" for name in SAME)
    where = f"{_plural(len(site.nodes), 'node')} on {_plural(site.machines(), 'machine')}"
    detail = f"{where}, {total['CPU']:g} CPUs, {total['GPU']:g} GPUs ({listed or 'no device'}); {versions}, code {first['code']}"
    if site.machines() > 1:
        return Passed(detail, {"machines": where})
    return Passed(detail, lacking={"machines": where})


def differences(facts: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return in what machines differ that must be the same, one line each.

    Args:
        facts: `NodeProbe.facts` by the machine's name.
    """
    found = []
    for name in (*SAME, "code"):
        holders: dict[str, list[str]] = {}
        for host, known in facts.items():
            value = str(known["code"] if name == "code" else known["versions"].get(name, "absent"))
            holders.setdefault(value.partition("+")[0] if name == "torch" else value, []).append(host)
        if len(holders) > 1:
            shown_values = ", ".join(f"{value} on {' '.join(hosts)}" for value, hosts in sorted(holders.items()))
            what = "the source files of this package" if name == "code" else f"`{name}`"
            found.append(f"{what} must be the same everywhere, but got {shown_values}")
    return found


def check_clock(site: Site) -> Passed:
    """Every clock is near the driver's."""
    skews: dict[str, float] = {}
    for node in site.probes:
        rounds = []
        for _ in range(CLOCK_ROUNDS):
            before = time.time()
            there = site.ask_all("clock", only=[node])[node]
            after = time.time()
            rounds.append((after - before, there - (before + after) / 2))
        skews[node] = min(rounds)[1]  # the quickest answer says it best
    worst = max(skews, key=lambda node: abs(skews[node]))
    skew = skews[worst]
    where = f"{abs(skew):.3f} s {'ahead of' if skew > 0 else 'behind'} the driver at most ({site.name(worst)})"
    if abs(skew) > SKEW_SECONDS:
        return Passed(f"WARNING: {where}; set NTP up, or dates in records and ages of locks mislead")
    return Passed(where)


def check_disk(site: Site) -> Passed:
    """There is space for results, and on every machine for its copies of an address."""
    what = "this machine's copies of the address (SYNQ_CACHE_DIR)" if site.address else "`output_dir`"
    free = site.ask_all("free_bytes", "" if site.address else str(site.folder))
    least = min(free, key=lambda node: free[node])
    return Passed(enough_space(free[least], f"{site.name(least)}, {what}"))


def enough_space(free: int, where: str) -> str:
    """Return how much is free, in words.

    Raises:
        FailedError: It is under 1 GiB.
    """
    words = f"{free / 2**30:.1f} GiB free ({where})"
    if free < FREE_BYTES:
        raise FailedError(f"the disk must have 1 GiB free, but got {words}; make room or choose another --output-dir")
    return words


def check_output(site: Site) -> Passed:
    """Every machine sees at once what another one writes, and keeps out of what another one has locked."""
    return _check_address(site) if site.address else _check_folder(site)


def _check_folder(site: Site) -> Passed:
    folder = site.folder / "output"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_text_atomic(folder / "driver", "driver")
    except OSError as error:
        raise FailedError(
            f"`output_dir` must be writable, but got {site.folder.parent}: {error.strerror or error}"
        ) from None
    shared = "choose one on a file system that all machines share"
    lag = 0.0
    for node, seen in site.ask_all("sees", str(folder / "driver"), "driver", PATIENCE).items():
        if seen is None:
            raise FailedError(
                f"`output_dir` must be seen by all machines, but {site.name(node)} does not see {folder}: {shared}"
            )
        lag = max(lag, seen)
    for text in ("first", "second"):  # the second one takes the place of the first, which a machine may still remember
        site.ask_all("write", str(folder), text)
        for node in site.probes:
            seen = wait_for_text(folder / node, text, PATIENCE)
            if seen is None:
                raise FailedError(
                    f"the driver must see what {site.name(node)} writes in {folder}, but it does not: {shared}"
                )
            lag = max(lag, seen)
    _check_locks(site, str(folder / "lock"))
    kinds = site.ask_all("file_system", str(folder))
    mounted = Counter([file_system(str(folder)), *kinds.values()])
    network = [f"{kind} of {source}" for kind, source in mounted if is_network(kind)]
    named = ", ".join(sorted({kind or "unknown type" for kind, _ in mounted}))
    many = site.machines() > 1
    where = f"{named}, {_plural(len(site.facts), 'node')} on {_plural(site.machines(), 'machine')}"
    detail = f"{site.folder.parent} on {where}; files, renames and locks of each are seen by the others, after {lag:.1f} s at most"
    verified = {"folder": where}
    if many:
        verified["shared folder"] = where
    if network:
        verified["network folder"] = f"{', '.join(network)}, {_plural(site.machines(), 'machine')}"
    lacking = {"shared folder": "one machine", "network folder": f"the folder lies on {named}"}
    return Passed(detail, verified, {**lacking, "s3": "a folder was checked", "address": "a folder was checked"})


def _check_locks(site: Site, path: str) -> None:
    """See that a lock which one process holds is refused to all others."""
    cure = "mount it with locks over the network (Lustre: -o flock, NFS 3: lockd and no -o nolock)"

    def refused(answers: Mapping[str, bool], holder: str) -> None:
        for node, taken in answers.items():
            if taken:
                raise FailedError(
                    f"a lock that {holder} holds must be refused to others, but {site.name(node)} got it: {cure}"
                )

    try:
        with FileLock(path, timeout=LOCK_SECONDS):
            refused(site.ask_all("lock", path), "the driver")
        for node in site.probes:
            if not site.ask_all("lock", path, LOCK_SECONDS, only=[node])[node]:
                raise FailedError(
                    f"a lock that was given back must be free, but {site.name(node)} does not get it: {cure}"
                )
            others = [other for other in site.probes if other != node]
            refused(site.ask_all("lock", path, only=others) if others else {}, site.name(node))
            try:
                with FileLock(path, timeout=0):
                    raise FailedError(
                        f"a lock that {site.name(node)} holds must be refused to the driver, but it is not: {cure}"
                    )
            except Timeout:
                site.ask_all("unlock", only=[node])
    except (OSError, NotImplementedError) as error:
        raise FailedError(f"files must be lockable, but got {one_line(error)}: {cure}") from None


def _check_address(site: Site) -> Passed:
    parts = split_address(site.address)
    site.unreachable = True
    try:
        storage = open_storage(site.address)
        storage.check_writable()
        site.unreachable = False
    except (OSError, ValueError) as error:
        raise FailedError(f"{error}; look at the address, the credentials and the firewall") from None
    speeds = site.ask_all("store", site.address)
    for node in site.probes:
        seen = storage.read(node)
        if seen != node.encode():
            raise FailedError(f"the driver must see at once what {site.name(node)} put at {storage}, but got {seen!r}")
    sent, fetched = (sorted(pair[way] for pair in speeds.values()) for way in (0, 1))
    rate = f"8 MiB sent at {sent[0]:.0f}..{sent[-1]:.0f} MB/s and fetched at {fetched[0]:.0f}..{fetched[-1]:.0f} MB/s"
    where = f"{shown(parts).rpartition('/')[0]}{server(parts.scheme, storage)}, {_plural(site.machines(), 'machine')}"
    lacking = {name: "an address was checked" for name in ("folder", "shared folder", "network folder")}
    lacking |= dict.fromkeys(("s3", "address"), f"the address is {parts.scheme}://")
    claim = "s3" if parts.scheme == "s3" else "address"
    return Passed(f"{where}: {rate}", {claim: where}, lacking)


def server(scheme: str, storage: Any) -> str:
    """Return which server answers for s3, in words: one that speaks S3 is not Amazon's."""
    own = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or ""
    own = dict(parse_qsl(split_address(storage.address).query)).get("endpoint_override", own)
    return f" (server {own}, not Amazon)" if scheme == "s3" and own else ""


def is_network(kind: str) -> bool:
    """Whether a type of file system is one of several machines."""
    return kind.removeprefix("fuse.").startswith(NETWORK)


def check_rejection(site: Site) -> Passed:
    """What can never fit is refused at once, not waited for."""
    started = time.monotonic()
    largest = max(node["resources"].get("CPU", 0.0) for node in site.nodes.values())
    total = sum(node["resources"].get("CPU", 0.0) for node in site.nodes.values())
    said = []
    for search in (
        SearchConfig(cpus_per_worker=int(largest) + 1),
        SearchConfig(workers_per_trial=int(total) + 1),
    ):
        try:
            capacity(search)
        except ValueError as error:
            said.append(str(error))
        else:
            raise FailedError(
                f"a trial of {search.workers_per_trial} x {search.cpus_per_worker:g} CPUs must be refused, but is not"
            )
    return Passed(f"refused: {said[0]}", {"refusal": f"2 requests in {time.monotonic() - started:.2f} s"})


def _plural(number: int, word: str) -> str:
    return f"{number} {word}{'s' if number != 1 else ''}"
