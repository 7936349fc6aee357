"""The task of a trial as the driver sends it to a worker. Imports neither Ray nor torch."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from synq.config.parsing import config_from_dict, config_to_dict
from synq.config.run import RunConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class TrialTask:
    """One trial as its worker receives it: the config, the location of the sweep's files, and the resources.

    Ray Tune stores the config of a trial as plain values: `to_dict` returns them when a trial is suggested, and
    `from_dict` reads them when a worker starts.
    """

    trial: str
    """Name of the trial; the stem of its files."""
    group: str
    """Key of its group."""
    stage: Literal["search", "final"]
    """search, or final for a re-run on a further seed."""
    config: RunConfig
    """Config of the run."""
    config_digest: str
    """Digest of the config; a record with another digest belongs to another sweep."""
    teacher: dict[str, Any]
    """Known fields of the teacher (name, digest, input_size), for the record of a run that ends early."""
    sets: tuple[str, ...]
    """Names of the synthetic sets in the store."""
    folder: str
    """The sweep's folder, absolute."""
    address: str
    """The sweep's address in an object store; "" where all machines share `folder`."""
    workers: int
    """Number of processes that train the student together."""
    cpus: float
    """CPU cores of each process."""
    gpus: float
    """GPUs of each process; below 1, the fraction of one GPU's memory."""
    max_failures: int
    """Maximum number of restarts after the death of a worker."""

    def to_dict(self) -> dict[str, Any]:
        """Return the task as JSON values, with the config as nested dicts and tuples as lists."""
        return config_to_dict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "TrialTask":
        """Read a task from the values that `to_dict` returned.

        Raises:
            ValueError: A key is missing or unknown, or a value has another type.
        """
        missing = [name for name in cls.__dataclass_fields__ if name not in values]
        if missing:
            raise ValueError(f"a trial's task must have every key of TrialTask, but {', '.join(missing)} is missing")
        return config_from_dict(cls, values, source="a trial's task")


def trial_name(values: Mapping[str, Any]) -> str:
    """Return the name of a trial from the values that Ray Tune stores for its task (`TrialTask.to_dict`)."""
    return str(values["trial"])
