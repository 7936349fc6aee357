"""What a worker gets of a trial. Knows neither Ray nor torch."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from synq.config.parsing import config_from_dict, config_to_dict
from synq.config.run import RunConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class TrialTask:
    """One trial as its worker gets it: what to run, where the sweep's files are, and on which resources.

    Ray Tune holds a trial's configuration as plain values: `to_dict` makes them where a trial is suggested, `from_dict` reads them where
    a worker starts.
    """

    trial: str
    """Name of the trial; the stem of its files."""
    group: str
    """Key of its group."""
    stage: Literal["search", "final"]
    """search, or final for a re-run on a further seed."""
    config: RunConfig
    """The run."""
    config_digest: str
    """Digest of the run; a record with another digest belongs to another sweep."""
    teacher: dict[str, Any]
    """What is known of the teacher (name, digest, input_size), for the record of a run that does not get far."""
    second_objective: Literal["none", "size_bytes", "bitops"]
    """Field of the record that is reported and minimized next to the objective."""
    sets: tuple[str, ...]
    """Names of the synthetic sets in the store."""
    folder: str
    """The sweep's folder, absolute."""
    address: str
    """The sweep's address in an object store; "" where all machines share `folder`."""
    workers: int
    """Processes that train the student together."""
    cpus: float
    """CPU cores of each of them."""
    gpus: float
    """GPUs of each of them; below 1, the share of one GPU's memory."""
    max_failures: int
    """How often workers that died are started again."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values: the run as nested tables, tuples as lists."""
        return config_to_dict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "TrialTask":
        """Read what `to_dict` returned.

        Raises:
            ValueError: A key is missing or unknown, or a value has another type.
        """
        missing = [name for name in cls.__dataclass_fields__ if name not in values]
        if missing:
            raise ValueError(f"a trial's task must have every key of TrialTask, but {', '.join(missing)} is missing")
        return config_from_dict(cls, values, source="a trial's task")


def trial_name(values: Mapping[str, Any]) -> str:
    """Return the name of a trial from the plain values that Ray Tune keeps of its task."""
    return str(values["trial"])
