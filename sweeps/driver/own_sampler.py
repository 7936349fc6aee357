"""The sampler that a user adds, `sampler` of a sweep: called for each proposal, and checked."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import optuna

from synq.common.error_text import one_line
from synq.config.plugins import SAMPLER, parsed
from synq.teacher.user_code import added_function, called

from ..space import Dimension


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplerInputs:
    """What a sampler of a user is made from, for one proposal of one group of a sweep.

    It is made anew for every proposal, so that a sweep that is resumed continues as one that was not stopped: what it
    has learned is in the trials of the study, which Optuna passes to it.
    """

    seed: int
    """Seed in [0, 2**31) of its random numbers; another one for every proposal."""
    num_startup: int
    """Number of trials, at least 2, after which SynQ's samplers use results."""
    dimensions: tuple[Dimension, ...]
    """The search space: name, type (float, int, choice) and range or values of each searched setting."""
    directions: tuple[str, ...]
    """minimize or maximize, for one objective or two."""


def own_sampler(sampler: str, inputs: SamplerInputs) -> optuna.samplers.BaseSampler:
    """Return the Optuna sampler that a function of the user makes for one proposal.

    Args:
        sampler: The function, as the sweep names it.
        inputs: Its inputs.

    Raises:
        ValueError: There is no such function, it fails, or it returns no sampler.
        FileNotFoundError: Its file does not exist.
    """
    rule, name = "`sampler` must return an optuna.samplers.BaseSampler", shown_name(sampler)
    made = called(added_function(SAMPLER, sampler), inputs, rule, name)
    if not isinstance(made, optuna.samplers.BaseSampler):
        found = f"the class {made.__name__}" if isinstance(made, type) else type(made).__name__
        raise ValueError(f"{rule}, but {name} returned {found}")
    return made


def check_proposal(sampler: str, dimensions: Sequence[Dimension], params: dict[str, Any]) -> None:
    """Check that the parameters of a proposal are inside the search space; Optuna does so for choices only.

    Raises:
        ValueError: A number is outside its range or not finite.
    """
    for dimension in dimensions:
        value = params.get(dimension.name)
        if dimension.type == "choice" or value is None:
            continue
        assert dimension.low is not None and dimension.high is not None
        if not (math.isfinite(value) and dimension.low <= value <= dimension.high):
            raise ValueError(
                f"`sampler` must propose {dimension.name} in [{dimension.low:g}, {dimension.high:g}], but "
                f"{shown_name(sampler)} proposed {value!r}"
            )


def proposal_error(sampler: str, error: Exception) -> ValueError:
    """Return the error for a sampler of the user that raised while it proposed settings."""
    return ValueError(f"`sampler` must propose settings, but {shown_name(sampler)} raised {one_line(error)}")


def shown_name(sampler: str) -> str:
    """Return the name of a sampler without its version."""
    return parsed(SAMPLER, sampler).name
