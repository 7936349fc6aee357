"""The searcher of a sweep: one Optuna search per group, in turn, as the single searcher that Ray Tune accepts.

It has no persistent state: proposals are in the ledger's plans, results in its records, and every search is rebuilt
from them when a driver starts again.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import chain
from typing import Any

from optuna.storages import BaseStorage
from ray.tune.search import Searcher

from synq.config.run import RunConfig, config_digest, config_to_dict

from ..constraints import SEARCHED
from ..points import Point, grid, point_params, read_earlier, warm_points
from ..search_config import LISTED
from ..space import base_values, existing, value_of
from ..spec import Group, SweepSpec, run_config
from ..state.ledger import Ledger
from ..state.plans import REMOVE, Plan, new_plan
from .dashboard import StudyCopy
from .group_search import EPOCH, OBJECTIVE, STATUS, group_searches
from .stop_reason import StopReason
from .stopping import is_stopped

SYNC_SECONDS = 1.0
"""Minimum seconds between two looks at what the other drivers of a shared sweep have done."""
MAX_PROPOSALS = 32
"""Consecutive proposals that repeat a known run or are invalid, after which the space counts as exhausted."""


class SweepSearcher(Searcher):
    """Choose the next trial: interrupted ones, then new ones of each group in turn, then the best on more seeds."""

    def __init__(
        self,
        spec: SweepSpec,
        ledger: Ledger,
        storage: BaseStorage | None = None,
        *,
        copy: StudyCopy | None = None,
        stop_reason: StopReason | None = None,
    ) -> None:
        """Rebuild the searches from the ledger.

        Args:
            spec: The sweep.
            ledger: Its ledger, opened.
            storage: Storage of its studies; None keeps them in memory.
            copy: A copy of the studies in the database that the drivers of the sweep share.
            stop_reason: Gets the errors of the folder and of the database, instead of Ray Tune.
        """
        super().__init__()
        self.copy, self.stop_reason = copy, StopReason() if stop_reason is None else stop_reason
        self.listeners: list[Callable[[Plan], None]] = []
        """Called with each plan that another driver has changed."""
        self._synced = 0.0
        self.spec, self.ledger = spec, ledger
        self.searches = group_searches(spec, storage)
        self.groups = {group.key: group for group in spec.groups}
        self.turn = 0
        self.exhausted: set[str] = set()
        self.checked: dict[str, int] = {}  # completed trials of each group at the last check of `stop_when`
        self.invalid: dict[str, str] = {}  # error of the last invalid proposal of each group
        self.limit = spec.search.max_concurrent
        """Maximum number of concurrent trials; None leaves it to Ray Tune's resources."""
        self.live: dict[str, str] = {}  # names of the running trials by Ray Tune's id
        plans = {key: ledger.group_plans(key) for key in self.groups}
        self.known = {key: {plan.config_digest for plan in plans[key]} for key in self.groups}
        self.listed = {key: self._list(group, plans[key]) for key, group in self.groups.items()}
        self.interrupted = [
            self._current(plan)
            for plan in ledger.plans.values()
            if plan.trial not in ledger.records and plan.group in self.groups and not ledger.elsewhere(plan.trial)
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
        plans: list[Plan] = []
        self.stop_reason.try_write(lambda: plans.extend(self._claimed(trial_id)))
        if not plans:
            return None if self._waiting() and not self.stop_reason else Searcher.FINISHED
        (plan,) = plans
        self.live[trial_id] = plan.trial
        return self.ledger.task(plan).to_dict()

    def _claimed(self, trial_id: str) -> list[Plan]:
        """Return the plan of the next trial, which is this driver's; [] if there is none now."""
        self.stop_reason.storage = self.stop_reason.storage or self.ledger.lost
        if self.stop_reason:
            return []
        if time.monotonic() - self._synced > SYNC_SECONDS:
            self.sync()
        plan = self._next(trial_id)
        if plan is not None and plan.stage == "search":
            self._send(plan, trial_id)
        return [] if plan is None else [plan]

    def sync(self) -> None:
        """Take over what other drivers have proposed and found, and the trials of those that have gone."""
        for plan in self.ledger.sync():
            if plan.group in self.groups:
                self.known[plan.group].add(plan.config_digest)
                self._absorb(plan)
                for listener in self.listeners:
                    listener(plan)
        known = {plan.trial for plan in self.interrupted} | set(self.live.values())
        self.interrupted += [
            self._current(plan) for plan in self.ledger.freed() if plan.group in self.groups and plan.trial not in known
        ]
        self._synced = time.monotonic()

    def complete_copy(self) -> None:
        """Write the ended trials that the copy of the studies lacks, for example because a driver was killed."""
        if self.copy is not None:
            with self.ledger.exclusive("studies"):
                self.copy.read()
                for key, search in self.searches.items():
                    self.copy.complete(key, search.study.get_trials(deepcopy=False))

    def _send(self, plan: Plan, trial_id: str) -> None:
        """Write a trial to the copy of its study."""
        if self.copy is not None:
            self.copy.send(plan.group, plan.trial, self.searches[plan.group].frozen(trial_id))

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Pass a result to the search of its group."""
        plan = self.ledger.plans[self.live[trial_id]]
        if plan.stage == "search":
            self.searches[plan.group].on_trial_result(trial_id, result)
            self.stop_reason.try_write(lambda: self._send(plan, trial_id))

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Pass the end of a trial to the search of its group."""
        name = self.live.pop(trial_id, None)
        plan = self.ledger.plans[name] if name is not None else None
        if plan is not None and plan.stage == "search" and not (self.stop_reason and STATUS not in (result or {})):
            self.searches[plan.group].on_trial_complete(trial_id, result, error)
            self.stop_reason.try_write(lambda: self._send(plan, trial_id))

    def num_total(self) -> int:
        """Return the maximum number of trials of the sweep, including those that exist already."""
        search = self.spec.search
        finals = search.final_top_k * self.spec.num_bit_choices
        return sum(search.trials + finals * len(self._further_seeds(key)) for key in self.groups)

    def num_left(self) -> int:
        """Return the number of known trials without a record; 0 when the sweep is finished."""
        plans = self.ledger.plans.values()
        left = sum(plan.trial not in self.ledger.records and plan.group in self.groups for plan in plans)
        for key in self.groups:
            if not self._has_ended(key):
                left += max(0, self.spec.search.trials - self.ledger.num_plans(key))
        return left + sum(1 for key in self.groups for _ in self._finals(key))

    def _next(self, trial_id: str) -> Plan | None:
        while self.interrupted:
            plan = self.ledger.take_over(self.interrupted.pop(0))
            if plan is None:
                continue
            if plan.stage == "search":
                search = self.searches[plan.group]
                if self.copy is not None:
                    self.copy.read()
                if search.has(plan.trial) and not search.is_ended(plan.trial):
                    search.hand_over(plan.trial, trial_id)
                else:
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
                return new
        for final in [plan for key in keys for plan in self._finals(key)]:
            if self.ledger.claim(final):
                return final
        return None

    def _has_ended(self, key: str) -> bool:
        """Return whether the search of a group has ended before its budget was spent."""
        search = self.searches[key]
        return key in self.exhausted or is_stopped(key, self.ledger, search.study, search.num_completed, self.checked)

    def _new(self, trial_id: str, group: Group) -> Plan | None:
        """Return a new run of a group; None if its budget is spent or the space is exhausted."""
        if self._is_spent(group.key) or self._has_ended(group.key):
            return None
        index = self.ledger.next_index(group.key)
        search = self.searches[group.key]
        for point in self.listed[group.key]:
            config = self._allowed(group, point)
            if config is not None:
                params = point_params(self.spec.dimensions, point) or {}
                plan = self._claim(group, params, config)
                if plan is not None:
                    search.attach(trial_id, params, plan.trial)
                    return plan
                if self._is_spent(group.key):
                    return None
        for attempt in range(MAX_PROPOSALS if self.spec.search.sampler not in LISTED else 0):
            proposal = f"{trial_id}-{attempt}"
            number = index * MAX_PROPOSALS + attempt
            overrides, params = search.propose(proposal, number, blind=attempt >= MAX_PROPOSALS // 4)
            config = self._allowed(group, overrides)
            plan = None if config is None else self._claim(group, params, config)
            if plan is not None:
                search.accept(proposal, trial_id, plan.trial)
                return plan
            search.on_trial_complete(proposal, error=True)
            if self._is_spent(group.key):
                return None
        self.exhausted.add(group.key)
        return None

    def _is_spent(self, key: str) -> bool:
        return self.ledger.num_plans(key) >= self.spec.search.trials or key in self.exhausted

    def _claim(self, group: Group, params: Point, config: RunConfig) -> Plan | None:
        """Return the plan of a new run, which is this driver's; None if another driver has it, or the budget is spent.

        A driver that is faster with another run takes the index only: this run then gets the next one.
        """
        while not self._is_spent(group.key):
            index = self.ledger.next_index(group.key)
            plan = new_plan(f"{group.key}-t{index:03d}", group.key, "search", index, params, config)
            if self.ledger.claim(plan):
                self.known[group.key].add(plan.config_digest)
                return plan
            self.sync()
            if plan.config_digest in self.known[group.key]:
                return None
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
                    yield new_plan(name, key, "final", best.index, best.params, config)

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
        if any(self.ledger.elsewhere(trial) for trial in self.ledger.plans) or self.interrupted:
            return True
        plans = [self.ledger.plans[name] for name in self.live.values()]
        return any(plan.stage == "search" and self._further_seeds(plan.group) for plan in plans)

    def _replay(self, key: str) -> None:
        """Replay the ledger's plans and records of a group into its search."""
        for plan in self.ledger.group_plans(key):
            if plan.trial in self.ledger.records or self.ledger.elsewhere(plan.trial):
                self._absorb(plan)

    def _absorb(self, plan: Plan) -> None:
        """Replay the plan of a trial that this driver does not run, and its record, if any, into the search."""
        if plan.stage != "search" or point_params(self.spec.dimensions, self._overrides(plan)) is None:
            return  # the latter from an earlier, longer list of points
        search, record = self.searches[plan.group], self.ledger.records.get(plan.trial)
        if not search.has(plan.trial):
            search.attach(plan.trial, plan.params, plan.trial)
        for epoch, value in plan.history:
            search.on_trial_result(plan.trial, {EPOCH: epoch, OBJECTIVE: value})
        if record is None:
            return
        result = {metric: getattr(record, metric) for metric in {*search.metrics, *SEARCHED}}
        search.on_trial_complete(plan.trial, result if record.status == "pruned" else {**result, STATUS: record.status})


def _frozen(params: Point) -> tuple[tuple[str, str], ...]:
    """Return parameters as a hashable value, the same for 20 and 20.0."""
    return tuple(sorted((name, repr(float(v) if isinstance(v, int) else v)) for name, v in params.items()))
