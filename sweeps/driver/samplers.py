"""The samplers of Optuna by name, and those of packages that need not be installed."""

import copy
import functools
import importlib.util
import logging
import warnings
from collections.abc import Sequence
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler, CmaEsSampler
from optuna.trial import TrialState

from synq.common.error_text import one_line

from ..search_config import SAMPLERS
from ..space import Dimension

_Groups: Any = getattr(optuna.search_space, "group_decomposed", None)
_Groups = getattr(_Groups, "_GroupDecomposedSearchSpace", object)
"""Private to Optuna; where it is missing, only the proposals after thousands of trials take longer."""
REMEMBERING = ("nsga2", "cmaes", "auto")
"""Samplers that mark each trial as they propose it, also one whose settings are given, such as that of a replay."""
LEAST_RANGES = 2
"""Fewest ranges that CMA-ES can search."""


class CmaEs(CmaEsSampler):
    """CMA-ES over the ranges that exist in every trial; choices, and ranges that may be off, are drawn by TPE.

    Its parent searches the ranges that all trials so far have in common, and falls back to random proposals for good
    once a trial lacks one of them.
    """

    def __init__(self, names: Sequence[str], *, seed: int, num_startup: int) -> None:
        others = optuna.samplers.TPESampler(seed=seed, n_startup_trials=num_startup)
        super().__init__(
            seed=seed, n_startup_trials=num_startup, independent_sampler=others, warn_independent_sampling=False
        )
        self.names = frozenset(names)

    def infer_relative_search_space(
        self, study: optuna.Study, trial: optuna.trial.FrozenTrial
    ) -> dict[str, BaseDistribution]:
        """Return the ranges of the study that exist in every trial."""
        found = super().infer_relative_search_space(study, trial)
        return {name: distribution for name, distribution in found.items() if name in self.names}


def make_sampler(name: str, dimensions: Sequence[Dimension], *, seed: int, num_startup: int) -> BaseSampler:
    """Return the sampler of one proposal.

    Args:
        name: One of `SAMPLERS` that draws: tpe, gp, cmaes, nsga2 or auto.
        dimensions: The search space.
        seed: Seed of its random numbers.
        num_startup: Number of random trials before results are used; also the population size of nsga2.

    Raises:
        ValueError: The name is another one, or the sampler's package is not installed.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        if name == "gp":
            return optuna.samplers.GPSampler(seed=seed, n_startup_trials=num_startup)
        if name == "nsga2":
            return optuna.samplers.NSGAIISampler(seed=seed, population_size=max(2, num_startup))
        if name == "cmaes":
            return CmaEs(always_ranges(dimensions), seed=seed, num_startup=num_startup)
        if name == "auto":
            sampler: BaseSampler = auto_sampler()(seed=seed)
            return sampler
        if name != "tpe":
            raise ValueError(f"`sampler` must be one of {', '.join(SAMPLERS)}, but got {name}")
        # group: conditional settings are modeled separately; constant_liar: running trials count as weak.
        tpe = optuna.samplers.TPESampler(
            seed=seed, multivariate=True, group=True, constant_liar=True, n_startup_trials=num_startup
        )
        if isinstance(getattr(tpe, "_group_decomposed_search_space", None), _Groups) and _Groups is not object:
            tpe._group_decomposed_search_space = KnownGroups(include_pruned=True)
        return tpe


class KnownGroups(_Groups):  # type: ignore[misc]
    """The groups of settings that exist together, as its parent finds them, but each set of settings is added once.

    A trial with the settings of an earlier one changes no group; adding all, for each proposal, takes most of the time
    of a proposal after thousands of trials.
    """

    def calculate(self, study: optuna.Study, *args: Any, **options: Any) -> Any:
        """Return the groups of the completed and the pruned trials of a study."""
        seen: set[frozenset[str]] = set()
        for trial in study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED)):
            names = frozenset(trial.distributions)
            if names not in seen:
                seen.add(names)
                self._search_space.add_distributions(trial.distributions)
        return copy.deepcopy(self._search_space)


def always_ranges(dimensions: Sequence[Dimension]) -> list[str]:
    """Return the names of the ranges that exist in every trial, with more than one value."""
    return [
        one.name for one in dimensions if one.type != "choice" and not (one.optional or one.when or one.low == one.high)
    ]


def check_installed(name: str, dimensions: Sequence[Dimension]) -> None:
    """Check that the package of a sampler is installed, and that the sampler can search a space.

    Raises:
        ValueError: It is not, or it cannot.
    """
    if name == "auto":
        auto_sampler()
    if name != "cmaes":
        return
    if importlib.util.find_spec("cmaes") is None:
        raise ValueError("`sampler` must be one that is installed, but got cmaes: pip install cmaes")
    found = always_ranges(dimensions)
    if len(found) < LEAST_RANGES:
        raise ValueError(
            f"`sampler` must be another than cmaes unless {LEAST_RANGES} ranges (float or int, neither optional nor "
            f"with `when`) are searched, but got {len(found)}"
        )


@functools.cache
def auto_sampler() -> Any:
    """Return the class AutoSampler of OptunaHub, which chooses a sampler by the space and the number of trials.

    OptunaHub downloads its code from GitHub when it is used for the first time on a machine.

    Raises:
        ValueError: The package optunahub, or one that AutoSampler needs, is not installed, or the download failed.
    """
    try:
        import optunahub

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            logging.getLogger("optunahub").setLevel(logging.WARNING)
            return optunahub.load_module("samplers/auto_sampler").AutoSampler
    except ImportError as error:
        missing = "pip install optunahub cmaes"
        raise ValueError(
            f"`sampler` must be one that is installed, but got auto: {missing} ({one_line(error)})"
        ) from None
    except Exception as error:  # of git, of GitHub's API, or of the network
        raise ValueError(
            "`sampler` must be one that can be loaded, but got auto, whose code OptunaHub did not get: "
            f"{one_line(error)}"
        ) from None
