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
from .stop_reason import StopReason


class SweepScheduler(FIFOScheduler):
    """Scheduler that stops weak trials by ASHA within each group; re-runs and last epochs are never stopped.

    A trial with several workers is not stopped by Ray Tune, which can only kill its outermost process and may leave the
    workers and their resources running. Instead, a file in the sweep's folder, which its workers check after each
    epoch, requests the stop.
    """

    def __init__(self, spec: SweepSpec, ledger: Ledger, stop_reason: StopReason | None = None) -> None:
        super().__init__()
        self.ledger, self.stop_reason = ledger, StopReason() if stop_reason is None else stop_reason
        self.is_wide = spec.search.workers_per_trial > 1
        self.stop_requested: set[str] = set()
        """Trials with a requested stop."""
        self.inner: dict[str, AsyncHyperBandScheduler] = {}
        """ASHA scheduler of each group."""
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
        self.fed: dict[str, set[int]] = {}
        """Reported epochs of the trials that this driver does not run, by name."""
        for plan in ledger.plans.values():
            if plan.trial in ledger.records or ledger.elsewhere(plan.trial):
                self.absorb(plan)

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def set_search_properties(self, metric: str | None, mode: str | None, **spec: Any) -> bool:
        """Return True: metric and mode are known from the spec."""
        return True

    def absorb(self, plan: Plan) -> None:
        """Add the reports of a trial that another driver runs to the rungs of its group, those that are not there."""
        inner = self._scheduler(plan)
        if inner is None:
            return
        no_controller: Any = None  # ASHA does not use it
        trial: Any = SimpleNamespace(trial_id=plan.trial)
        if plan.trial not in self.fed:
            self.fed[plan.trial] = set()
            inner.on_trial_add(no_controller, trial)
        for epoch, value in plan.history:
            if epoch not in self.fed[plan.trial]:
                self.fed[plan.trial].add(epoch)
                inner.on_trial_result(no_controller, trial, {EPOCH: epoch, OBJECTIVE: value})

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        """Add a trial to the rungs of its group; for a resumed one, replay its reports and ignore the decisions."""
        plan = self._plan(trial)
        inner = self._scheduler(plan)
        if inner is not None:
            if self.fed.pop(plan.trial, None) is not None:  # another driver ran it, and has gone
                for bracket in inner._brackets:
                    for _, recorded in bracket._rungs:
                        recorded.pop(plan.trial, None)
            inner.on_trial_add(tune_controller, trial)
            for epoch, value in plan.history:
                inner.on_trial_result(tune_controller, trial, {EPOCH: epoch, OBJECTIVE: value})

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Return whether a trial continues, by its rank in the rungs of its group."""
        plan = self._plan(trial)
        inner = self._scheduler(plan)
        last = STATUS in result or EPOCH not in result or result[EPOCH] >= result.get("epochs", math.inf)
        if inner is None or last or not is_finite(result.get(OBJECTIVE)) or plan.trial in self.stop_requested:
            return TrialScheduler.CONTINUE
        decision = inner.on_trial_result(tune_controller, trial, result)
        if decision != TrialScheduler.STOP or not self.is_wide:
            return decision
        self.stop_requested.add(plan.trial)
        self.stop_reason.try_write(lambda: self.ledger.ask_to_stop(plan.trial))
        return TrialScheduler.CONTINUE

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        """Do nothing: every epoch was counted when it was reported."""

    def on_trial_remove(self, tune_controller: Any, trial: Any) -> None:
        """Do nothing: a removed trial stays in the rungs."""

    def _plan(self, trial: Any) -> Plan:
        return self.ledger.plans[trial_name(trial.config)]

    def _scheduler(self, plan: Plan) -> AsyncHyperBandScheduler | None:
        return self.inner.get(plan.group) if plan.stage == "search" else None
