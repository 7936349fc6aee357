"""The configuration of a sweep: budget, search, resources. Imports neither Ray nor torch."""

import re
from dataclasses import dataclass
from typing import Literal

from synq.config.parsing import between, one_of, require
from synq.config.plugins import SAMPLER, check_known, is_added
from synq.config.run import MAX_NAME
from synq.runs.record import FAILURES

DEFAULT_TRIALS = 8
SAMPLERS = SAMPLER.built_in
LISTED = ("grid", "points")
"""Samplers whose trials are all known from the start."""
OBJECTIVES = ("synthetic", "selection")
STOPS = ("budget", "no_gain", "stagnation")
SECOND_OBJECTIVES = ("none", "size_bytes", "bitops")


@dataclass(frozen=True, kw_only=True, slots=True)
class SearchConfig:
    """Budget, search and resources of a sweep."""

    name: str = "sweep"
    """Name of the sweep."""
    output_dir: str = "none"
    """Folder of the sweep, or an address such as s3://bucket/path; none is runs/NAME."""
    num_trials: int | None = None
    """Number of trials of each group, including pruned and failed ones, without re-runs on `seeds`; none: 8, or the
    size of the grid or list."""
    stop_when: Literal["budget", "no_gain", "stagnation"] = "budget"
    """When the search of a group ends: budget (after num_trials), or earlier, by the evaluators of Optuna's terminator:
    no_gain (after 20 completed trials or more, once the best can improve by less than `min_gain`, as a bound on the
    regret of a Gaussian process has it) or stagnation (no better trial among the last `patience` completed ones)."""
    min_gain: float = 0.05
    """Improvement, as a share of the best objective so far, below which `no_gain` ends a search."""
    patience: int = 20
    """Number of completed trials without a better one after which `stagnation` ends a search."""
    more_trials: int = 0
    """Trials of each group in addition to those of the finished sweep in the folder (--num-trials +N on the command
    line)."""
    objective: Literal["synthetic", "selection"] = "synthetic"
    """Metric to optimize: synthetic (fidelity to the teacher, lower is better) or selection (top-1 on a part of the
    labeled set, higher is better)."""
    second_objective: Literal["none", "size_bytes", "bitops"] = "none"
    """Second metric to minimize, over the bit-widths of `bits`: the search of a model then looks for the Pareto
    front."""
    seeds: tuple[int, ...] = ()
    """Seeds (of fine-tuning and of the synthetic set) on which the best settings of each group are run after the
    search."""
    final_top_k: int = 1
    """Number of the best settings of each (model, bits) to run on `seeds`."""
    sampler: str = "tpe"
    """How settings are proposed: by Optuna (tpe, random, gp, nsga2; cmaes with the package cmaes; auto, AutoSampler of
    OptunaHub, with the package optunahub), every combination of the space (grid), only the listed [[points]] (points),
    or a function of yours: FILE.py:FUNCTION, MODULE:FUNCTION, or a name that synq.sampler or an entry point of
    synq.samplers registers; @VERSION is added. It is called with synq.SamplerInputs and returns an
    optuna.samplers.BaseSampler."""
    sampler_seed: int = 0
    """Seed of the proposals."""
    warm_start: tuple[str, ...] = ()
    """Folders (or leaderboard.csv files) of earlier sweeps whose best settings are tried first."""
    warm_start_top_k: int = 3
    """Number of settings that each group takes from `warm_start`."""
    scheduler: Literal["asha", "none"] = "asha"
    """Whether weak trials are stopped early: asha (asynchronous successive halving within each group) or none."""
    grace_epochs: int = 1
    """Epochs that every trial completes before it may be stopped."""
    reduction_factor: float = 3.0
    """Factor eta of successive halving: about one in eta trials passes each rung."""
    max_concurrent: int | None = None
    """Maximum number of concurrent trials; none is as many as fit the cluster."""
    max_failures: int = 3
    """Number of restarts, from its last epoch, of a trial whose worker died."""
    max_failed_trials: int = 10
    """Number of failed trials since the start of the sweep at which it stops: so many usually have one common cause."""
    retry: tuple[Literal["failed", "diverged", "pre-empted", "lost"], ...] = ()
    """Statuses of an earlier start whose trials are run again: failed, diverged, pre-empted, lost."""
    workers_per_trial: int = 1
    """Processes of one trial; several train its student together (DDP), on one machine or more."""
    cpus_per_worker: float = 1.0
    """CPU cores of each worker; also its number of threads."""
    gpus_per_worker: float = 0.0
    """GPUs of each worker: 1, a fraction such as 0.25 (several trials then share a device), or 0 for the CPU."""
    study_storage: str = "none"
    """Storage of the Optuna studies for optuna-dashboard: journal (optuna.journal in the sweep's folder; one driver), a
    database such as postgresql://USER@HOST/NAME or sqlite:////tmp/studies.db, through which several drivers may run the
    sweep together, or none."""
    report: bool = True
    """Whether the sweep ends by writing a page, report.html in its folder; `synq report` makes it at any time."""

    def __post_init__(self) -> None:
        slug = re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", self.name) is not None
        require("name", "be letters, digits, dots, dashes and underscores (it names a folder)", self.name, slug)
        require("name", f"have at most {MAX_NAME} characters", self.name, len(self.name) <= MAX_NAME)
        for name, low in (
            ("more_trials", 0),
            ("final_top_k", 1),
            ("grace_epochs", 1),
            ("max_failures", 0),
            ("max_failed_trials", 1),
            ("sampler_seed", 0),
            ("warm_start_top_k", 1),
            ("patience", 1),
            ("workers_per_trial", 1),
        ):
            between(name, getattr(self, name), low)
        for name in ("num_trials", "max_concurrent"):
            if getattr(self, name) is not None:
                between(name, getattr(self, name), 1)
        between("reduction_factor", self.reduction_factor, 1, open_low=True)
        between("min_gain", self.min_gain, 0, open_low=True)
        seeds = len(set(self.seeds)) == len(self.seeds) and all(seed >= 0 for seed in self.seeds)
        require("seeds", "be different numbers >= 0", self.seeds, seeds)
        for name, choices in (
            ("objective", OBJECTIVES),
            ("second_objective", SECOND_OBJECTIVES),
            ("scheduler", ("asha", "none")),
            ("stop_when", STOPS),
        ):
            one_of(name, getattr(self, name), choices)
        for status in self.retry:
            one_of("retry", status, FAILURES)
        check_known(SAMPLER, self.sampler)
        storage = self.study_storage in ("none", "journal") or "://" in self.study_storage
        require("study_storage", "be none, journal or the address of a database", self.study_storage, storage)
        self._check_resources()
        if self.two_objectives:
            rule = "be none with a `second_objective`: a Pareto front has no rank of early values"
            require("scheduler", rule, self.scheduler, self.scheduler == "none")
            require("sampler", "be another with a `second_objective`", self.sampler, self.sampler != "cmaes")
            rule = "be budget with a `second_objective`: the gain of a front is not bounded"
            require("stop_when", rule, self.stop_when, self.stop_when == "budget")
        if self.sampler in LISTED:
            rule = "be budget for sampler grid or points, whose trials are known"
            require("stop_when", rule, self.stop_when, self.stop_when == "budget")

    def _check_resources(self) -> None:
        cpus, gpus = self.cpus_per_worker, self.gpus_per_worker
        between("cpus_per_worker", cpus, 0, open_low=True)
        between("gpus_per_worker", gpus, 0)
        require("cpus_per_worker", "be < 1 or a whole number", cpus, cpus < 1 or cpus % 1 == 0)
        require("gpus_per_worker", "be a part of one GPU, or 1 (a process uses one)", gpus, gpus <= 1)
        if self.workers_per_trial > 1:  # NCCL rejects two processes of one group on one device
            rule = "be 0 or 1 if a trial has several workers"
            require("gpus_per_worker", rule, gpus, gpus in (0, 1))

    @property
    def is_shared(self) -> bool:
        """Whether the studies are in a database, which several drivers may share."""
        return "://" in self.study_storage

    @property
    def minimize(self) -> bool:
        """Whether a lower objective is better."""
        return self.objective == "synthetic"

    @property
    def has_own_sampler(self) -> bool:
        """Whether the sampler is a function of the user."""
        return is_added(SAMPLER, self.sampler)

    @property
    def two_objectives(self) -> bool:
        """Whether a second objective is minimized in addition to the first."""
        return self.second_objective != "none"

    @property
    def trials(self) -> int:
        """Return the resolved number of trials of each group.

        Raises:
            AssertionError: It is not resolved yet (`resolve_spec`).
        """
        assert self.num_trials is not None
        return self.num_trials
