"""State that the checks of a cluster share: its nodes, the probe actor on each, and the actor that runs sweeps."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..storage.addresses import split_address
from .probes import NodeProbe
from .workers import Runner


class FailedError(Exception):
    """A check failed; the message has the reason and the cure."""


class SkippedError(Exception):
    """A check cannot run on this cluster; the message has the reason."""


@dataclass(frozen=True)
class Passed:
    """The result of a check that passed."""

    detail: str
    """What was measured, one line."""
    verified: Mapping[str, str] = field(default_factory=dict)
    """Verified claims (keys of `check.CLAIMS`), each with its evidence."""
    lacking: Mapping[str, str] = field(default_factory=dict)
    """Claims that the check could not verify here, each with the reason."""


@dataclass
class Cluster:
    """A joined Ray cluster, and the folder or address for the files of the checks."""

    folder: Path
    """Temporary folder of the checks; for an address, this machine's copy of it."""
    address: str
    """Temporary address of the checks; "" where `folder` is used directly."""
    workers: int
    """Number of processes in a process group."""
    deadline: float = 0.0
    """Deadline of the running check, in seconds of `time.monotonic`."""
    nodes: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Name and resources of every node, as Ray reports them, by node id."""
    probes: dict[str, Any] = field(default_factory=dict)
    """A `NodeProbe` actor on every node, by node id."""
    facts: dict[str, dict[str, Any]] = field(default_factory=dict)
    """`NodeProbe.facts` of each node that responded, by node id."""
    unreachable: bool = False
    """Whether the address was not writable, so that there is nothing to remove."""
    _runner: Any = None

    def output_dir(self, name: str) -> str:
        """Return the folder or address of a subfolder of the checks, as the `output_dir` of a spec."""
        return join_address(self.address, name) if self.address else str(self.folder / name)

    def seconds_left(self) -> float:
        """Return the seconds until the deadline of the running check, at least 0.1."""
        return max(0.1, self.deadline - time.monotonic())

    def start_probes(self) -> None:
        """Start a `NodeProbe` actor on every node."""
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        for node in ray.nodes():
            if node["Alive"]:
                name = node["NodeID"]
                self.nodes[name] = {"name": node["NodeManagerHostname"], "resources": node["Resources"]}
                on_node = NodeAffinitySchedulingStrategy(name, soft=False)
                self.probes[name] = ray.remote(num_cpus=0)(NodeProbe).options(scheduling_strategy=on_node).remote(name)

    def call(self, method: str, *args: Any, only: Sequence[str] | None = None) -> dict[str, Any]:
        """Call a method of `NodeProbe` on every node concurrently.

        Args:
            method: Name of the method.
            args: Its arguments.
            only: Ids of the nodes to call; None calls all.

        Returns:
            The result of each node by node id; an exception where the call failed or timed out.
        """
        import ray

        pending = {getattr(self.probes[node], method).remote(*args): node for node in only or self.probes}
        if not pending:
            return {}
        ready, _ = ray.wait(list(pending), num_returns=len(pending), timeout=self.seconds_left())
        replies: dict[str, Any] = {
            node: TimeoutError("no reply in time: the node is unreachable or overloaded") for node in pending.values()
        }
        for reference in ready:
            try:
                replies[pending[reference]] = ray.get(reference)
            except Exception as error:  # raised on the node; the check reports it
                replies[pending[reference]] = cause(error)
        return replies

    def call_or_fail(self, method: str, *args: Any, only: Sequence[str] | None = None) -> dict[str, Any]:
        """Call a method of `NodeProbe` as `call` does, and require a result from every node.

        Raises:
            FailedError: The call failed or timed out on a node.
        """
        replies = self.call(method, *args, only=only)
        for node, reply in replies.items():
            if isinstance(reply, Exception):
                raise FailedError(f"{self.node_name(node)}: {one_line(reply)}")
        return replies

    def start(self, method: str, *args: Any) -> Any:
        """Start a method of the `Runner` actor on the driver's node and return its object reference."""
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        if self._runner is None:
            here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
            self._runner = ray.remote(num_cpus=0)(Runner).options(scheduling_strategy=here).remote()
        return getattr(self._runner, method).remote(*args)

    def finish(self, reference: Any, timeout_message: str) -> Any:
        """Wait for a method started by `start` and return its result.

        Args:
            reference: What `start` returned.
            timeout_message: Message of the error if it does not end before the deadline.

        Raises:
            FailedError: It failed or timed out; the runner and the processes it started are killed after a timeout.
        """
        import ray

        try:
            return ray.get(reference, timeout=self.seconds_left())
        except ray.exceptions.GetTimeoutError:
            self.kill_runner()
            raise FailedError(timeout_message) from None
        except ray.exceptions.RayError as error:
            if isinstance(error, ray.exceptions.ActorDiedError):
                self.kill_runner()
            raise FailedError(one_line(cause(error))) from None

    def kill_runner(self) -> None:
        """Kill the `Runner` actor and the processes that it started."""
        import ray

        if self._runner is not None:
            ray.kill(self._runner)
            self._runner = None

    def node_name(self, node: str) -> str:
        """Return the host name of a node, followed by a part of its id where two nodes share the host."""
        name = str(self.nodes[node]["name"])
        ambiguous = [one["name"] for one in self.nodes.values()].count(name) > 1
        return f"{name} ({node[:6]})" if ambiguous else name

    def num_machines(self) -> int:
        """Return the number of distinct machines that responded; several nodes may share one."""
        return len({facts["machine"] for facts in self.facts.values()})

    def logical_gpus(self, node: str) -> int:
        """Return the number of GPUs that Ray registered for a node."""
        return int(self.nodes[node]["resources"].get("GPU", 0))

    def gpus(self) -> dict[str, int]:
        """Return the number of usable GPUs of each node with any: registered in Ray and visible to torch."""
        found = {node: min(self.logical_gpus(node), len(facts["gpus"])) for node, facts in self.facts.items()}
        return {node: count for node, count in found.items() if count}

    def no_gpus_reason(self) -> str:
        """Return the reason why there is no usable GPU."""
        if any(self.logical_gpus(node) for node in self.nodes):
            return "logical GPUs without devices: Ray registered GPUs that torch does not see"
        visible = sum(len(facts["gpus"]) for facts in self.facts.values())
        if visible:
            return f"{visible} GPUs exist, but Ray was started without them (ray start --num-gpus N)"
        return "no GPU"


def join_address(address: str, name: str) -> str:
    """Return the address of a subfolder; the options after ? stay at the end."""
    parts = split_address(address)
    return parts._replace(path=f"{parts.path.rstrip('/')}/{name}").geturl()


def cause(error: Exception) -> Exception:
    """Return the exception that one of Ray's exceptions wraps, else the exception itself."""
    inner = getattr(error, "cause", None)
    return inner if isinstance(inner, Exception) else error


def one_line(error: object) -> str:
    """Return the message of an error as one line, with its type for types other than ValueError.

    Of a long message (a traceback), the last 400 characters are returned.
    """
    text = " ".join(str(error).split())
    kind = "" if isinstance(error, ValueError | FailedError) else f"{type(error).__name__}: "
    return f"{kind}{text if len(text) <= 400 else '... ' + text[-400:]}" if text else type(error).__name__
