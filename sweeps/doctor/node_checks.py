"""Checks of a cluster's nodes: the same software, synchronized clocks, free disks, and shared storage."""

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
from .cluster_state import Cluster, FailedError, Passed, one_line
from .probes import LOCK_SECONDS, file_system, wait_for_text

SAME = ("python", "synq", "torch", "ray", "accelerate")
"""Packages whose versions must be the same on all nodes; builds of torch for different devices count as the same."""
SKEW_SECONDS = 5.0
"""Clock skew above which the user is warned."""
CLOCK_ROUNDS = 5
FREE_BYTES = 2**30
"""Minimum free space on the disk of the results."""
VISIBILITY_SECONDS = 10.0
"""Time limit for a node to see a file that another node wrote; NFS caches what it has read for some seconds."""
NETWORK = (
    *("nfs", "lustre", "ceph", "gpfs", "beegfs", "cifs", "smb", "gluster"),
    *("afs", "orangefs", "pvfs", "wekafs", "9p", "virtiofs", "panfs"),
)
"""Prefixes of the types of network file systems; a leading "fuse." is ignored."""


def check_nodes(cluster: Cluster) -> Passed:
    """Check that every node can import this package and has the same versions.

    Raises:
        FailedError: A node does not respond, cannot import the package, or has another version.
    """
    replies = cluster.call("facts")
    cluster.facts = {node: reply for node, reply in replies.items() if not isinstance(reply, Exception)}
    problems = [
        f"{cluster.node_name(node)}: {one_line(reply)} (install the project there, or submit it with --working-dir)"
        for node, reply in replies.items()
        if isinstance(reply, Exception)
    ]
    cluster.probes = {node: cluster.probes[node] for node in cluster.facts}  # later checks use responding nodes only
    problems += differences({cluster.node_name(node): facts for node, facts in cluster.facts.items()})
    if problems:
        raise FailedError("; ".join(problems))
    resources = [node["resources"] for node in cluster.nodes.values()]
    total = {name: sum(part.get(name, 0.0) for part in resources) for name in ("CPU", "GPU")}
    gpus = Counter((name, size) for facts in cluster.facts.values() for name, size in facts["gpus"])
    listed = ", ".join(f"{count} x {name} ({size / 2**30:.0f} GiB)" for (name, size), count in gpus.items())
    first = next(iter(cluster.facts.values()))
    versions = ", ".join(f"{name} {first['versions'].get(name, 'absent')}" for name in SAME)
    where = f"{_plural(len(cluster.nodes), 'node')} on {_plural(cluster.num_machines(), 'machine')}"
    devices = f"{total['CPU']:g} CPUs, {total['GPU']:g} GPUs ({listed or 'no device'})"
    detail = f"{where}, {devices}; {versions}, code {first['code']}"
    if cluster.num_machines() > 1:
        return Passed(detail, {"machines": where})
    return Passed(detail, lacking={"machines": where})


def differences(facts: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return a line for each version, and for the source code, that differs between nodes.

    Args:
        facts: `NodeProbe.facts` by the name of the node.
    """
    found = []
    for name in (*SAME, "code"):
        hosts_by_value: dict[str, list[str]] = {}
        for host, known in facts.items():
            value = str(known["code"] if name == "code" else known["versions"].get(name, "absent"))
            hosts_by_value.setdefault(value.partition("+")[0] if name == "torch" else value, []).append(host)
        if len(hosts_by_value) > 1:
            listed = ", ".join(f"{value} on {' '.join(hosts)}" for value, hosts in sorted(hosts_by_value.items()))
            what = "the source files of this package" if name == "code" else f"`{name}`"
            found.append(f"{what} must be the same everywhere, but got {listed}")
    return found


def check_clock(cluster: Cluster) -> Passed:
    """Measure the skew of every node's clock to the driver's, and warn if it exceeds 5 s."""
    skews: dict[str, float] = {}
    for node in cluster.probes:
        rounds = []
        for _ in range(CLOCK_ROUNDS):
            before = time.time()
            remote = cluster.call_or_fail("clock", only=[node])[node]
            after = time.time()
            rounds.append((after - before, remote - (before + after) / 2))
        skews[node] = min(rounds)[1]  # the shortest round trip bounds the error best
    worst = max(skews, key=lambda node: abs(skews[node]))
    skew = skews[worst]
    where = f"clock skew to the driver {skew:+.3f} s at most ({cluster.node_name(worst)})"
    if abs(skew) > SKEW_SECONDS:
        return Passed(f"WARNING: {where}; set NTP up, or dates in records and ages of locks mislead")
    return Passed(where)


def check_disk(cluster: Cluster) -> Passed:
    """Check that the disk of the results, or of every node's copies of an address, has free space."""
    what = "this machine's copies of the address (SYNQ_CACHE_DIR)" if cluster.address else "`output_dir`"
    free = cluster.call_or_fail("free_bytes", "" if cluster.address else str(cluster.folder))
    least = min(free, key=lambda node: free[node])
    return Passed(require_space(free[least], f"{cluster.node_name(least)}, {what}"))


def require_space(free: int, where: str) -> str:
    """Return the free space as text.

    Args:
        free: Free bytes.
        where: The node and the folder, for the text.

    Raises:
        FailedError: Less than 1 GiB is free.
    """
    text = f"{free / 2**30:.1f} GiB free ({where})"
    if free < FREE_BYTES:
        raise FailedError(f"the disk must have 1 GiB free, but got {text}; make room or choose another --output-dir")
    return text


def check_output(cluster: Cluster) -> Passed:
    """Check that every node sees at once what another node writes, and respects another node's lock.

    Raises:
        FailedError: The folder or address is not writable, not shared, or has no working locks.
    """
    return _check_address(cluster) if cluster.address else _check_folder(cluster)


def _check_folder(cluster: Cluster) -> Passed:
    folder = cluster.folder / "output"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_text_atomic(folder / "driver", "driver")
    except OSError as error:
        raise FailedError(
            f"`output_dir` must be writable, but got {cluster.folder.parent}: {error.strerror or error}"
        ) from None
    shared = "choose one on a file system that all machines share"
    max_lag = 0.0
    replies = cluster.call_or_fail("wait_for_text", str(folder / "driver"), "driver", VISIBILITY_SECONDS)
    for node, lag in replies.items():
        if lag is None:
            raise FailedError(
                f"`output_dir` must be seen by all machines, but {cluster.node_name(node)} does not see {folder}: "
                f"{shared}"
            )
        max_lag = max(max_lag, lag)
    for text in ("first", "second"):  # the second one replaces the first, which a node may have cached
        cluster.call_or_fail("write", str(folder), text)
        for node in cluster.probes:
            lag = wait_for_text(folder / node, text, VISIBILITY_SECONDS)
            if lag is None:
                raise FailedError(
                    f"the driver must see what {cluster.node_name(node)} writes in {folder}, but it does not: {shared}"
                )
            max_lag = max(max_lag, lag)
    _check_locks(cluster, str(folder / "lock"))
    kinds = cluster.call_or_fail("file_system", str(folder))
    mounted = Counter([file_system(str(folder)), *kinds.values()])
    network = [f"{kind} of {source}" for kind, source in mounted if is_network(kind)]
    named = ", ".join(sorted({kind or "unknown type" for kind, _ in mounted}))
    machines = _plural(cluster.num_machines(), "machine")
    where = f"{named}, {_plural(len(cluster.facts), 'node')} on {machines}"
    detail = (
        f"{cluster.folder.parent} on {where}; files, renames and locks of each are seen by the others, "
        f"after {max_lag:.1f} s at most"
    )
    verified = {"folder": where}
    if cluster.num_machines() > 1:
        verified["shared folder"] = where
    if network:
        verified["network folder"] = f"{', '.join(network)}, {machines}"
    lacking = {"shared folder": "one machine", "network folder": f"the folder lies on {named}"}
    return Passed(detail, verified, {**lacking, "s3": "a folder was checked", "address": "a folder was checked"})


def _check_locks(cluster: Cluster, path: str) -> None:
    """Check that a file lock that one process holds cannot be acquired by any other.

    Raises:
        FailedError: Two processes acquired the lock, a released one stays locked, or the file system has no locks.
    """
    cure = "mount it with locks over the network (Lustre: -o flock, NFS 3: lockd and no -o nolock)"

    def require_exclusion(replies: Mapping[str, bool], holder: str) -> None:
        for node, acquired in replies.items():
            if acquired:
                raise FailedError(
                    f"a lock that {holder} holds must exclude others, but {cluster.node_name(node)} acquired it: {cure}"
                )

    try:
        with FileLock(path, timeout=LOCK_SECONDS):
            require_exclusion(cluster.call_or_fail("lock", path), "the driver")
        for node in cluster.probes:
            name = cluster.node_name(node)
            if not cluster.call_or_fail("lock", path, LOCK_SECONDS, only=[node])[node]:
                raise FailedError(f"a released lock must be free, but {name} cannot acquire it: {cure}")
            others = [other for other in cluster.probes if other != node]
            require_exclusion(cluster.call_or_fail("lock", path, only=others) if others else {}, name)
            try:
                with FileLock(path, timeout=0):
                    raise FailedError(f"a lock that {name} holds must exclude the driver, but it does not: {cure}")
            except Timeout:
                cluster.call_or_fail("unlock", only=[node])
    except (OSError, NotImplementedError) as error:
        raise FailedError(f"files must be lockable, but got {one_line(error)}: {cure}") from None


def _check_address(cluster: Cluster) -> Passed:
    parts = split_address(cluster.address)
    cluster.unreachable = True
    try:
        storage = open_storage(cluster.address)
        storage.check_writable()
        cluster.unreachable = False
    except (OSError, ValueError) as error:
        raise FailedError(f"{error}; look at the address, the credentials and the firewall") from None
    speeds = cluster.call_or_fail("transfer", cluster.address)
    for node in cluster.probes:
        content = storage.read(node)
        if content != node.encode():
            raise FailedError(
                f"the driver must see at once what {cluster.node_name(node)} put at {storage}, but got {content!r}"
            )
    sent, fetched = (sorted(pair[way] for pair in speeds.values()) for way in (0, 1))
    rate = f"8 MiB sent at {sent[0]:.0f}..{sent[-1]:.0f} MB/s and fetched at {fetched[0]:.0f}..{fetched[-1]:.0f} MB/s"
    machines = _plural(cluster.num_machines(), "machine")
    where = f"{shown(parts).rpartition('/')[0]}{server(parts.scheme, storage)}, {machines}"
    lacking = dict.fromkeys(("folder", "shared folder", "network folder"), "an address was checked")
    lacking |= dict.fromkeys(("s3", "address"), f"the address is {parts.scheme}://")
    claim = "s3" if parts.scheme == "s3" else "address"
    return Passed(f"{where}: {rate}", {claim: where}, lacking)


def server(scheme: str, storage: Any) -> str:
    """Return the S3-compatible server that an endpoint override names, as text; "" for Amazon S3 and other schemes."""
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or ""
    endpoint = dict(parse_qsl(split_address(storage.address).query)).get("endpoint_override", endpoint)
    return f" (server {endpoint}, not Amazon)" if scheme == "s3" and endpoint else ""


def is_network(kind: str) -> bool:
    """Return whether a type of file system is a network file system."""
    return kind.removeprefix("fuse.").startswith(NETWORK)


def check_capacity(cluster: Cluster) -> Passed:
    """Check that a resource request that can never fit is rejected at once instead of waiting forever."""
    started = time.monotonic()
    largest = max(node["resources"].get("CPU", 0.0) for node in cluster.nodes.values())
    total = sum(node["resources"].get("CPU", 0.0) for node in cluster.nodes.values())
    messages = []
    for search in (
        SearchConfig(cpus_per_worker=int(largest) + 1),
        SearchConfig(workers_per_trial=int(total) + 1),
    ):
        try:
            capacity(search)
        except ValueError as error:
            messages.append(str(error))
        else:
            raise FailedError(
                f"a trial of {search.workers_per_trial} x {search.cpus_per_worker:g} CPUs must be rejected, but is not"
            )
    return Passed(f"rejected: {messages[0]}", {"capacity": f"2 requests in {time.monotonic() - started:.2f} s"})


def _plural(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' if number != 1 else ''}"
