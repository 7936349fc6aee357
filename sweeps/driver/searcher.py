"""The searcher of a sweep: one Optuna search per group, in turn, as the single searcher that Ray Tune accepts.

It has no persistent state: proposals are in the ledger's plans, results in its records, and every search is rebuilt
from them when a driver starts again.
"""

from collections.abc import Iterator
from dataclasses import replace
from itertools import chain
from typing import Any, Literal

from optuna.storages import BaseStorage
from ray.tune.search import Searcher

from synq.config.run import RunConfig, config_digest, config_to_dict

from ..constraints import SEARCHED
from ..points import Point, grid, point_params, read_earlier, warm_points
from ..search_config import LISTED
from ..space import base_values, existing, value_of
from ..spec import Group, SweepSpec, run_config
from ..state.ledger import Ledger
from ..state.plans import REMOVE, Plan
from .group_search import EPOCH, OBJECTIVE, STATUS, GroupSearch, num_startup
from .stopping import why_stop

MAX_PROPOSALS = 32
"""Consecutive proposals that repeat a known run or are invalid, after which the space counts as exhausted."""


class SweepSearcher(Searcher):
    """Choose the next trial: interrupted ones, then new ones of each group in turn, then the best on more seeds."""

    def __init__(self, spec: SweepSpec, ledger: Ledger, storage: BaseStorage | None = None) -> None:
        super().__init__()
        self.spec, self.ledger = spec, ledger
        self.searches = {
            group.key: GroupSearch(
                spec.dimensions,
                minimize=spec.search.minimize,
                second_objective=spec.search.second_objective,
                sampler=spec.search.sampler,
                seed=f"{spec.search.sampler_seed}/{group.key}",
                num_startup=num_startup(spec),
                study_name=study_name(spec, group),
                storage=storage,
                constraints=spec.constraints,
            )
            for group in spec.groups
        }
        self.groups = {group.key: group for group in spec.groups}
        self.turn = 0
        self.exhausted: set[str] = set()
        self.checked: dict[str, int] = {}
        """By group, the number of completed trials at the last check of `stop_when`."""
        self.invalid: dict[str, str] = {}
        """By group, the error of the last invalid proposal."""
        self.limit = spec.search.max_concurrent
        """Maximum number of concurrent trials; None leaves it to Ray Tune's resources."""
        self.live: dict[str, str] = {}
        """Names of the running trials by Ray Tune's id."""
        plans = {key: ledger.group_plans(key) for key in self.groups}
        self.known = {key: {plan.config_digest for plan in plans[key]} for key in self.groups}
        self.listed = {key: self._list(group, plans[key]) for key, group in self.groups.items()}
        self.interrupted = [
            self._current(plan)
            for plan in ledger.plans.values()
            if plan.trial not in ledger.records and plan.group in self.groups
        ]
        for key in self.groups:
            self._replay(key)

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def save(self, checkpoint_path: str) -> None:
        """Do nothing: the ledger is the state."""

    def restore(self, checkpoint_path: str) -> None:
        """Do nothing: the ledger is the state."""

    def suggest(self, trial_id: str) -> Any:
        """Return the task of the next trial as plain values; None if it must wait, FINISHED after the last."""
        if self.limit is not None and len(self.live) >= self.limit:
            return None
        plan = self._next(trial_id)
        if plan is None:
            return None if self._waiting() else Searcher.FINISHED
        self.live[trial_id] = plan.trial
        return self.ledger.task(plan).to_dict()

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Pass a result to the search of its group."""
        plan = self.ledger.plans[self.live[trial_id]]
        if plan.stage == "search":
            self.searches[plan.group].on_trial_result(trial_id, result)

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Pass the end of a trial to the search of its group."""
        name = self.live.pop(trial_id, None)
        plan = self.ledger.plans[name] if name is not None else None
        if plan is not None and plan.stage == "search":
            self.searches[plan.group].on_trial_complete(trial_id, result, error)

    def num_total(self) -> int:
        """Return the maximum number of trials of the sweep, including those that exist already."""
        search = self.spec.search
        finals = search.final_top_k * self.spec.num_bit_choices
        return sum(search.trials + finals * len(self._further_seeds(key)) for key in self.groups)

    def num_left(self) -> int:
        """Return the number of known trials without a record; 0 when the sweep is finished."""
        left = len(self.interrupted) + len(self.live)
        for key in self.groups:
            if not self._has_ended(key):
                left += max(0, self.spec.search.trials - self.ledger.num_plans(key))
        return left + sum(1 for key in self.groups for _ in self._finals(key))

    def _next(self, trial_id: str) -> Plan | None:
        if self.interrupted:
            plan = self.interrupted.pop(0)
            self.ledger.add_plan(plan)
            if plan.stage == "search":
                search = self.searches[plan.group]
                search.attach(trial_id, plan.params, plan.trial)
                for epoch, value in plan.history:
                    search.on_trial_result(trial_id, {EPOCH: epoch, OBJECTIVE: value})
            return plan
        keys = list(self.groups)
        for step in range(len(keys)):
            key = keys[(self.turn + step) % len(keys)]
            new = self._new(trial_id, self.groups[key])
            if new is not None:
                self.turn = (self.turn + step + 1) % len(keys)
                self.known[key].add(new.config_digest)
                self.ledger.add_plan(new)
                return new
        final = next((plan for key in keys for plan in self._finals(key)), None)
        if final is not None:
            self.ledger.add_plan(final)
        return final

    def _has_ended(self, key: str) -> bool:
        """Return whether a group gets no more trials although its budget is not spent."""
        if key in self.exhausted or key in self.ledger.stopped:
            return True
        number = self.searches[key].num_completed
        if self.checked.get(key) != number:
            self.checked[key] = number
            if reason := why_stop(self.searches[key].study, self.spec.search):
                self.ledger.stop_group(key, reason)
        return key in self.ledger.stopped

    def _new(self, trial_id: str, group: Group) -> Plan | None:
        """Return a new run of a group; None if its budget is spent or the space is exhausted."""
        if self.ledger.num_plans(group.key) >= self.spec.search.trials or self._has_ended(group.key):
            return None
        index = self.ledger.next_index(group.key)
        search, name = self.searches[group.key], f"{group.key}-t{index:03d}"
        for point in self.listed[group.key]:
            config = self._allowed(group, point)
            if config is not None:
                params = point_params(self.spec.dimensions, point) or {}
                search.attach(trial_id, params, name)
                return _plan(name, group.key, "search", index, params, config)
        for attempt in range(MAX_PROPOSALS if self.spec.search.sampler not in LISTED else 0):
            proposal = f"{trial_id}-{attempt}"
            number = index * MAX_PROPOSALS + attempt
            overrides, params = search.propose(proposal, number, blind=attempt >= MAX_PROPOSALS // 4)
            config = self._allowed(group, overrides)
            if config is not None:
                search.accept(proposal, trial_id, name)
                return _plan(name, group.key, "search", index, params, config)
            search.on_trial_complete(proposal, error=True)
        self.exhausted.add(group.key)
        return None

    def _allowed(self, group: Group, point: Point) -> RunConfig | None:
        """Return the run of a point; None if it is already known or its settings are invalid together."""
        try:
            config = run_config(self.spec, group, point)
        except ValueError as error:  # each setting is valid alone, but not all together
            self.invalid[group.key] = str(error)
            return None
        return None if config_digest(config) in self.known[group.key] else config

    def _list(self, group: Group, plans: list[Plan]) -> Iterator[Point]:
        """Return the points before any proposal: listed ones, the base, the best of earlier sweeps; or the grid."""
        dimensions, search = self.spec.dimensions, self.spec.search
        base = base_values(dimensions, group.base)
        listed = ({**base, **point} for point in self.spec.points)
        if search.sampler in LISTED:
            points = chain(listed, grid(dimensions)) if search.sampler == "grid" else listed
        else:
            earlier = self.ledger.earlier
            if search.warm_start and earlier is None:
                try:
                    earlier = self.ledger.earlier = read_earlier(search.warm_start)
                except FileNotFoundError:
                    if not plans:  # a resumed sweep has used them already, and does not need them again
                        raise
            warm = warm_points(earlier or [], dimensions, config_to_dict(group.base), search.warm_start_top_k)
            # Every search starts with the settings of the spec, as a baseline.
            points = chain(listed, [base], warm) if point_params(dimensions, base) is not None else chain(listed, warm)
        done = {_frozen(plan.params) for plan in plans}  # skipped without building their runs, which takes longer
        known = (point for point in points if _frozen(point_params(dimensions, point) or {}) not in done)
        return (existing(dimensions, point) for point in known)

    def _finals(self, key: str) -> Iterator[Plan]:
        """Yield the re-runs of a group's best settings that have not started; none before its search has ended."""
        search = self.spec.search
        has_ended = self.ledger.num_open(key) == 0
        if not has_ended or not (self.ledger.num_plans(key) >= search.trials or self._has_ended(key)):
            return
        for best in self.ledger.best(key, search.final_top_k):
            overrides = self._overrides(best)
            for seed in self._further_seeds(key):
                name = f"{key}-t{best.index:03d}-s{seed}"
                if name not in self.ledger.plans:
                    config = run_config(self.spec, self.groups[key], overrides, seeds=(seed, seed))
                    yield _plan(name, key, "final", best.index, best.params, config)

    def _overrides(self, plan: Plan) -> Point:
        return {dimension.name: value_of(plan.config, dimension.name) for dimension in self.spec.dimensions}

    def _current(self, plan: Plan) -> Plan:
        """Return an interrupted plan with the current paths: the sweep, its weights or its data may have moved."""
        seeds = (plan.config.seed, plan.config.data_seed)
        config = run_config(self.spec, self.groups[plan.group], self._overrides(plan), seeds=seeds)
        if config_digest(config) != plan.config_digest:
            raise ValueError(
                f"`{self.ledger.root / 'plans' / plan.trial}.json` must be a plan of this sweep, but it is of another "
                f"run: {REMOVE}"
            )
        return replace(plan, config=config)

    def _further_seeds(self, key: str) -> list[int]:
        """Return the seeds of a group's re-runs: all but that of the search."""
        base = self.groups[key].base
        return [seed for seed in self.spec.search.seeds if (seed, seed) != (base.seed, base.data_seed)]

    def _waiting(self) -> bool:
        """Return whether a running search trial may still lead to another trial."""
        plans = [self.ledger.plans[name] for name in self.live.values()]
        return any(plan.stage == "search" and self._further_seeds(plan.group) for plan in plans)

    def _replay(self, key: str) -> None:
        """Replay the ledger's plans and records of a group into its search."""
        for plan in self.ledger.group_plans(key):
            record = self.ledger.records.get(plan.trial)
            if record is None or point_params(self.spec.dimensions, self._overrides(plan)) is None:
                continue  # not ended, or from an earlier, longer list of points
            search = self.searches[key]
            search.attach(plan.trial, plan.params, plan.trial)
            for epoch, value in plan.history:
                search.on_trial_result(plan.trial, {EPOCH: epoch, OBJECTIVE: value})
            result = {metric: getattr(record, metric) for metric in {*search.metrics, *SEARCHED}}
            search.on_trial_complete(
                plan.trial, result if record.status == "pruned" else {**result, STATUS: record.status}
            )


def study_name(spec: SweepSpec, group: Group) -> str:
    """Return the name of a group's Optuna study."""
    return f"{spec.search.name}-{group.key}"


def _plan(
    trial: str, group: str, stage: Literal["search", "final"], index: int, params: Point, config: RunConfig
) -> Plan:
    digest = config_digest(config)
    return Plan(
        trial=trial,
        group=group,
        stage=stage,
        index=index,
        params=params,
        config=config,
        config_digest=digest,
    )


def _frozen(params: Point) -> tuple[tuple[str, str], ...]:
    """Return parameters as a hashable value, the same for 20 and 20.0."""
    return tuple(sorted((name, repr(float(v) if isinstance(v, int) else v)) for name, v in params.items()))
