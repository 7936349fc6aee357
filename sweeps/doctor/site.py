"""What the checks of a cluster share: how one ends, the nodes it asks, and the process that drives sweeps for it."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..storage.addresses import split_address
from .probes import NodeProbe
from .workers import Runner


class FailedError(Exception):
    """A check failed; the text says why and what to do."""


class SkippedError(Exception):
    """A check cannot be done here; the text says why."""


@dataclass(frozen=True)
class Passed:
    """A check found what it looked for."""

    detail: str
    """What it saw, one line."""
    verified: Mapping[str, str] = field(default_factory=dict)
    """Claims that hold here (keys of `check.CLAIMS`), each with its evidence."""
    lacking: Mapping[str, str] = field(default_factory=dict)
    """Claims on which the check says nothing here, each with the reason."""


@dataclass
class Site:
    """A joined cluster and a place for files."""

    folder: Path
    """The check's own folder; for an address, this machine's copy of it."""
    address: str
    """The check's own place where that is an address; else ""."""
    workers: int
    """Processes that must work together."""
    deadline: float = 0.0
    """When the running check must have ended, by the monotonic clock."""
    nodes: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Every node by its id: what Ray says of it (name, resources)."""
    probes: dict[str, Any] = field(default_factory=dict)
    """An actor on every node."""
    facts: dict[str, dict[str, Any]] = field(default_factory=dict)
    """What each node that answered has said of itself (`NodeProbe.facts`)."""
    unreachable: bool = False
    """Whether the address could not be written to, so that there is nothing to remove."""
    _runner: Any = None

    def place(self, name: str) -> str:
        """Where something of the check lies, as an output_dir."""
        return below(self.address, name) if self.address else str(self.folder / name)

    def left(self) -> float:
        """Seconds that the running check may still take."""
        return max(0.1, self.deadline - time.monotonic())

    def open(self) -> None:
        """Set an actor on every node."""
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        for node in ray.nodes():
            if node["Alive"]:
                name = node["NodeID"]
                self.nodes[name] = {"name": node["NodeManagerHostname"], "resources": node["Resources"]}
                place = NodeAffinitySchedulingStrategy(name, soft=False)
                self.probes[name] = ray.remote(num_cpus=0)(NodeProbe).options(scheduling_strategy=place).remote(name)

    def ask(self, method: str, *words: Any, only: Sequence[str] | None = None) -> dict[str, Any]:
        """Ask every node (or only some) at the same time.

        Returns:
            Each node's answer; an exception where it has none.
        """
        import ray

        waiting = {getattr(self.probes[node], method).remote(*words): node for node in only or self.probes}
        if not waiting:
            return {}
        ready, _ = ray.wait(list(waiting), num_returns=len(waiting), timeout=self.left())
        answers: dict[str, Any] = {
            node: TimeoutError("no answer in time: the node is unreachable or overloaded") for node in waiting.values()
        }
        for one in ready:
            try:
                answers[waiting[one]] = ray.get(one)
            except Exception as error:  # the node's own, which the check reports
                answers[waiting[one]] = cause(error)
        return answers

    def ask_all(self, method: str, *words: Any, only: Sequence[str] | None = None) -> dict[str, Any]:
        """Ask as `ask` does.

        Raises:
            FailedError: A node has no answer.
        """
        answers = self.ask(method, *words, only=only)
        for node, answer in answers.items():
            if isinstance(answer, Exception):
                raise FailedError(f"{self.name(node)}: {one_line(answer)}")
        return answers

    def start(self, method: str, *words: Any) -> Any:
        """Begin something in the process that drives sweeps and groups; returns what `finish` waits for."""
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        if self._runner is None:
            here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
            self._runner = ray.remote(num_cpus=0)(Runner).options(scheduling_strategy=here).remote()
        return getattr(self._runner, method).remote(*words)

    def finish(self, task: Any, late: str) -> Any:
        """Return the result of what `start` began.

        Args:
            task: What `start` returned.
            late: What is wrong if it does not end in time.

        Raises:
            FailedError: It failed or did not end; everything it had started is ended then.
        """
        import ray

        try:
            return ray.get(task, timeout=self.left())
        except ray.exceptions.GetTimeoutError:
            self.end_runner()
            raise FailedError(late) from None
        except ray.exceptions.RayError as error:
            if isinstance(error, ray.exceptions.ActorDiedError):
                self.end_runner()
            raise FailedError(one_line(cause(error))) from None

    def end_runner(self) -> None:
        """End the process that drives sweeps, and with it what it has started."""
        import ray

        if self._runner is not None:
            ray.kill(self._runner)
            self._runner = None

    def name(self, node: str) -> str:
        """A node's name for the user: its host; with a part of its id where two nodes are on one host."""
        name = str(self.nodes[node]["name"])
        double = [one["name"] for one in self.nodes.values()].count(name) > 1
        return f"{name} ({node[:6]})" if double else name

    def machines(self) -> int:
        """Number of different machines that have answered; several nodes may be on one."""
        return len({facts["machine"] for facts in self.facts.values()})

    def logical_gpus(self, node: str) -> int:
        """GPUs that Ray was told a node has."""
        return int(self.nodes[node]["resources"].get("GPU", 0))

    def gpus(self) -> dict[str, int]:
        """Usable GPUs of each node that has any: those that Ray was told of and torch sees."""
        found = {node: min(self.logical_gpus(node), len(facts["gpus"])) for node, facts in self.facts.items()}
        return {node: count for node, count in found.items() if count}

    def no_gpus(self) -> str:
        """Why there is no usable GPU."""
        if any(self.logical_gpus(node) for node in self.nodes):
            return "logical GPUs without devices: Ray was told of GPUs that torch does not see"
        there = sum(len(facts["gpus"]) for facts in self.facts.values())
        return (
            f"{there} GPUs are there, but Ray was started without them (ray start --num-gpus N)" if there else "no GPU"
        )


def below(address: str, name: str) -> str:
    """Return the address of a folder in an address; its options stay at the end."""
    parts = split_address(address)
    return parts._replace(path=f"{parts.path.rstrip('/')}/{name}").geturl()


def cause(error: Exception) -> Exception:
    """Return the error inside one of Ray's."""
    inner = getattr(error, "cause", None)
    return inner if isinstance(inner, Exception) else error


def one_line(error: object) -> str:
    """Return an error in one line, with its type where the text alone says little. Of a long one (a traceback) the end counts."""
    text = " ".join(str(error).split())
    kind = "" if isinstance(error, ValueError | FailedError) else f"{type(error).__name__}: "
    return f"{kind}{text if len(text) <= 400 else '... ' + text[-400:]}" if text else type(error).__name__
