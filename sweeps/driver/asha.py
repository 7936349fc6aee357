"""Early stopping of a sweep: successive halving (ASHA) with separate rungs for every group."""

import math
from types import SimpleNamespace
from typing import Any

from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler, TrialScheduler

from ..spec import SweepSpec
from ..state.ledger import Ledger
from ..state.plans import Plan
from ..state.trial_task import trial_name
from .group_search import EPOCH, OBJECTIVE, STATUS, is_finite
from .halt import StopReason


class SweepScheduler(FIFOScheduler):
    """Stops trials that are weak in their own group; re-runs and last epochs are never stopped.

    A trial of several workers is not stopped by Ray Tune, which can only kill its outermost process and may leave the workers and
    their resources running: it is asked to stop, by a sign in the sweep's folder that its workers look for after each epoch.
    """

    def __init__(self, spec: SweepSpec, ledger: Ledger, stop_reason: StopReason | None = None) -> None:
        super().__init__()
        self.ledger, self.stop_reason = ledger, StopReason() if stop_reason is None else stop_reason
        self.wide = spec.search.workers_per_trial > 1
        self.asked: set[str] = set()
        """Trials that were asked to stop."""
        self.inner: dict[str, AsyncHyperBandScheduler] = {}
        for group in spec.groups:
            epochs = group.base.finetune.epochs
            if spec.search.scheduler == "asha" and epochs > 1:
                self.inner[group.key] = AsyncHyperBandScheduler(
                    time_attr=EPOCH,
                    metric=OBJECTIVE,
                    mode="min" if spec.search.minimize else "max",
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
        plan = self._plan(trial)
        inner = self._rungs(plan)
        if inner is not None:
            inner.on_trial_add(tune_controller, trial)
            for epoch, value in plan.history:
                inner.on_trial_result(tune_controller, trial, {EPOCH: epoch, OBJECTIVE: value})

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Stop a trial that is weak in its own group."""
        plan = self._plan(trial)
        inner = self._rungs(plan)
        last = STATUS in result or EPOCH not in result or result[EPOCH] >= result.get("epochs", math.inf)
        if inner is None or last or not is_finite(result.get(OBJECTIVE)) or plan.trial in self.asked:
            return TrialScheduler.CONTINUE
        decision = inner.on_trial_result(tune_controller, trial, result)
        if decision != TrialScheduler.STOP or not self.wide:
            return decision
        self.asked.add(plan.trial)
        self.stop_reason.try_write(lambda: self.ledger.ask_to_stop(plan.trial))
        return TrialScheduler.CONTINUE

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        """Nothing: every epoch was counted when it was reported."""

    def on_trial_remove(self, tune_controller: Any, trial: Any) -> None:
        """Nothing to take back."""

    def _plan(self, trial: Any) -> Plan:
        return self.ledger.plans[trial_name(trial.config)]

    def _rungs(self, plan: Plan) -> AsyncHyperBandScheduler | None:
        return self.inner.get(plan.group) if plan.stage == "search" else None
