"""The search and the early stopping of a sweep: one of each per group, served in turn, behind the single face Ray Tune wants.

Nothing here has a state of its own that counts: what was proposed stands in the ledger's plans, what came of it in its records, and
both searches and rungs are rebuilt from them when a driver starts again.
"""

import math
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

from optuna.storages import BaseStorage
from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from sweeps.group_search import EPOCH, OBJECTIVE, STATUS, GroupSearch, is_finite
from sweeps.ledger import Ledger, Plan
from sweeps.space import base_point
from sweeps.spec import Group, SweepSpec, run_config
from synq.configs import RunConfig, config_digest, config_to_dict

MAX_PROPOSALS = 32
"""Proposals in a row that repeat a known run or are not allowed, before the space counts as exhausted."""


class SweepSearcher(Searcher):
    """What runs next: interrupted trials first, then new ones group after group in turn, then the best ones on further seeds."""

    def __init__(self, spec: SweepSpec, ledger: Ledger, storage: BaseStorage | None = None) -> None:
        super().__init__()
        self.spec, self.ledger = spec, ledger
        self.searches = {
            group.key: GroupSearch(
                spec.dimensions,
                minimise=spec.search.minimise,
                sampler=spec.search.sampler,
                seed=f"{spec.search.sampler_seed}/{group.key}",
                num_startup=min(10, max(2, spec.search.num_trials // 3)),
                study_name=f"{spec.search.name}-{group.key}",
                storage=storage,
            )
            for group in spec.groups
        }
        self.groups = {group.key: group for group in spec.groups}
        self.turn = 0
        self.exhausted: set[str] = set()
        self.invalid: dict[str, str] = {}
        """By group: why the last proposal that was not allowed was not."""
        self.live: dict[str, str] = {}
        """Name of each running trial by Ray Tune's id."""
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
        """Nothing to save: the ledger is the state."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing to restore."""

    def suggest(self, trial_id: str) -> Any:
        """Return the configuration of the next trial, None where one must be awaited, FINISHED after the last."""
        limit = self.spec.search.max_concurrent
        if limit is not None and len(self.live) >= limit:
            return None
        plan = self._next(trial_id)
        if plan is None:
            return None if self._waiting() else Searcher.FINISHED
        self.live[trial_id] = plan.trial
        return {
            "trial": plan.trial,
            "group": plan.group,
            "stage": plan.stage,
            "config": plan.config,
            "teacher": self.ledger.teachers.get(plan.group, {}),
            "record_path": str(self.ledger.record_path(plan.trial)),
        }

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
        """Most trials that the sweep comes to, those already there included."""
        search = self.spec.search
        return sum(search.num_trials + search.final_top_k * len(self._further_seeds(key)) for key in self.groups)

    def num_left(self) -> int:
        """Trials without a record, as far as is known now; 0 when the sweep is done."""
        left = len(self.interrupted) + len(self.live)
        for key in self.groups:
            if key not in self.exhausted:
                left += max(0, self.spec.search.num_trials - len(self.ledger.group_plans(key)))
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
                self.ledger.add_plan(new)
                return new
        final = next((plan for key in keys for plan in self._finals(key)), None)
        if final is not None:
            self.ledger.add_plan(final)
        return final

    def _new(self, trial_id: str, group: Group) -> Plan | None:
        """Propose a run of a group that was not proposed before, or None: the budget is spent or the space exhausted."""
        plans = self.ledger.group_plans(group.key)
        index = plans[-1].index + 1 if plans else 0
        if len(plans) >= self.spec.search.num_trials or group.key in self.exhausted:
            return None
        search = self.searches[group.key]
        known = {plan.config_digest for plan in plans}
        first = base_point(self.spec.dimensions, group.base) if not plans else None
        if first is not None:
            search.study.enqueue_trial(first)  # the spec's own settings open every search: what is found must beat them
        for attempt in range(MAX_PROPOSALS):
            proposal = f"{trial_id}-{attempt}"
            number = index * MAX_PROPOSALS + attempt
            overrides, params = search.propose(proposal, number, blind=attempt >= MAX_PROPOSALS // 4)
            try:
                config = run_config(self.spec, group, overrides)
            except ValueError as error:  # each setting is allowed alone, not all together
                self.invalid[group.key] = str(error)
                search.on_trial_complete(proposal, error=True)
                continue
            if config_digest(config) not in known:
                name = f"{group.key}-t{index:03d}"
                search.accept(proposal, trial_id, name)
                return _plan(name, group.key, "search", index, params, config)
            search.on_trial_complete(proposal, error=True)
        self.exhausted.add(group.key)
        return None

    def _finals(self, key: str) -> Iterator[Plan]:
        """Re-runs of a group's best settings that are still to be started; none before its search has ended."""
        search = self.spec.search
        plans = self.ledger.group_plans(key)
        ended = all(plan.trial in self.ledger.records for plan in plans)
        if not ended or not (len(plans) >= search.num_trials or key in self.exhausted):
            return
        for best in self.ledger.best(key)[: search.final_top_k]:
            overrides = self._overrides(best)
            for seed in self._further_seeds(key):
                name = f"{key}-t{best.index:03d}-s{seed}"
                if name not in self.ledger.plans:
                    config = run_config(self.spec, self.groups[key], overrides, seeds=(seed, seed))
                    yield _plan(name, key, "final", best.index, best.params, config)

    def _overrides(self, plan: Plan) -> dict[str, Any]:
        return {dimension.name: _at(plan.config, dimension.name) for dimension in self.spec.dimensions}

    def _current(self, plan: Plan) -> Plan:
        """Return an interrupted plan with the files and folders of today: the sweep, its weights or its data may have moved."""
        seeds = (plan.config["seed"], plan.config["data_seed"])
        config = run_config(self.spec, self.groups[plan.group], self._overrides(plan), seeds=seeds)
        if config_digest(config) != plan.config_digest:
            raise ValueError(
                f"`{self.ledger.root / 'plans' / plan.trial}.json` must be a plan of this sweep, but it asks for another run; "
                "remove it to have the trial proposed again"
            )
        return replace(plan, config=config_to_dict(config))

    def _further_seeds(self, key: str) -> list[int]:
        """Seeds of a group's re-runs; the one that the search itself ran on is there already."""
        base = self.groups[key].base
        return [seed for seed in self.spec.search.seeds if (seed, seed) != (base.seed, base.data_seed)]

    def _waiting(self) -> bool:
        """Whether a running search trial may still lead to another trial."""
        plans = [self.ledger.plans[name] for name in self.live.values()]
        return any(plan.stage == "search" and self._further_seeds(plan.group) for plan in plans)

    def _replay(self, key: str) -> None:
        """Tell a group's search everything that stands in the ledger."""
        for plan in self.ledger.group_plans(key):
            record = self.ledger.records.get(plan.trial)
            if record is None:
                continue
            search = self.searches[key]
            search.attach(plan.trial, plan.params, plan.trial)
            for epoch, value in plan.history:
                search.on_trial_result(plan.trial, {EPOCH: epoch, OBJECTIVE: value})
            result = {OBJECTIVE: record.objective_value}
            search.on_trial_complete(
                plan.trial, result if record.status == "pruned" else {**result, STATUS: record.status}
            )


class SweepScheduler(FIFOScheduler):
    """Successive halving (ASHA) with rungs of its own for every group; re-runs and last epochs are never stopped."""

    def __init__(self, spec: SweepSpec, ledger: Ledger) -> None:
        super().__init__()
        self.ledger = ledger
        self.inner: dict[str, AsyncHyperBandScheduler] = {}
        for group in spec.groups:
            epochs = group.base.finetune.epochs
            if spec.search.scheduler == "asha" and epochs > 1:
                self.inner[group.key] = AsyncHyperBandScheduler(
                    time_attr=EPOCH,
                    metric=OBJECTIVE,
                    mode="min" if spec.search.minimise else "max",
                    max_t=epochs,
                    grace_period=min(spec.search.grace_epochs, epochs),
                    reduction_factor=spec.search.reduction_factor,
                    stop_last_trials=False,
                )
        nobody: Any = None  # a controller, which these rungs never ask
        for plan in ledger.plans.values():
            if plan.stage == "search" and plan.trial in ledger.records and plan.group in self.inner:
                trial: Any = SimpleNamespace(trial_id=plan.trial)
                self.inner[plan.group].on_trial_add(nobody, trial)
                for epoch, value in plan.history:
                    self.inner[plan.group].on_trial_result(nobody, trial, {EPOCH: epoch, OBJECTIVE: value})

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def set_search_properties(self, metric: str | None, mode: str | None, **spec: Any) -> bool:
        """Metric and mode are known already."""
        return True

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        """Enter a trial into its group's rungs, an interrupted one with what it had reported; that it went on then is settled."""
        inner = self._of(trial)
        if inner is not None:
            inner.on_trial_add(tune_controller, trial)
            plan = self.ledger.plans.get(trial.config["trial"])
            for epoch, value in plan.history if plan is not None else ():
                inner.on_trial_result(tune_controller, trial, {EPOCH: epoch, OBJECTIVE: value})

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Stop a trial that is weak in its own group."""
        inner = self._of(trial)
        last = STATUS in result or EPOCH not in result or result[EPOCH] >= result.get("epochs", math.inf)
        if inner is None or last or not is_finite(result.get(OBJECTIVE)):
            return TrialScheduler.CONTINUE
        return inner.on_trial_result(tune_controller, trial, result)

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        """Nothing: every epoch was counted when it was reported."""

    def on_trial_remove(self, tune_controller: Any, trial: Any) -> None:
        """Nothing to take back."""

    def _of(self, trial: Any) -> AsyncHyperBandScheduler | None:
        return self.inner.get(trial.config["group"]) if trial.config["stage"] == "search" else None


def _plan(trial: str, group: str, stage: str, index: int, params: dict[str, Any], config: RunConfig) -> Plan:
    digest = config_digest(config)
    return Plan(
        trial=trial,
        group=group,
        stage=stage,
        index=index,
        params=params,
        config=config_to_dict(config),
        config_digest=digest,
    )


def _at(config: dict[str, Any], name: str) -> Any:
    part, _, key = name.partition(".")
    return config[part][key]
