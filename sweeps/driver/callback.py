"""Ray Tune callbacks of the driver: record ended trials in the ledger, show progress, stop a failing sweep."""

import time
from typing import Any

import ray
from ray import tune
from ray.tune.experiment import Trial

from synq.common.text_tables import plural
from synq.runs.record import FAILURES, Status

from ..state.ledger import Ledger
from ..state.trial_task import trial_name
from ..workers.deaths import death_status, last_error
from ..workers.trial import STORAGE
from .cluster import capacity
from .group_search import EPOCH, OBJECTIVE, STATUS, is_finite
from .outcome import stopped_line
from .progress import Progress
from .stop_reason import StopReason

UNSEEN = "its record is not visible here: output_dir must be on a file system that all machines share"
WARN_SECONDS = 300.0
"""Seconds after which a cluster that is still too small is reported again."""
CHECK_SECONDS = 5.0
"""Seconds between two checks of the cluster's free resources and of the lease on the sweep's address."""


class SweepStopper(tune.Stopper):
    """Stop Ray Tune once there is a stop reason."""

    def __init__(self, stop_reason: StopReason) -> None:
        self.stop_reason = stop_reason

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        """Return False: single trials are stopped by the scheduler."""
        return False

    def stop_all(self) -> bool:
        """Return whether to stop the sweep now."""
        return bool(self.stop_reason)


class SweepCallback(tune.Callback):
    """Record each ended trial in the ledger and show it."""

    def __init__(self, ledger: Ledger, progress: Progress, stop_reason: StopReason) -> None:
        self.ledger, self.progress, self.stop_reason = ledger, progress, stop_reason
        self.history: dict[str, dict[int, float]] = {}
        self.started: dict[str, float] = {}
        self.failed = 0
        self._checked = 0.0
        self._stopped = set(ledger.stopped)
        """Groups whose end was printed."""
        self._shortage = ""
        self._warned = 0.0

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def on_step_end(self, iteration: int, trials: list[Trial], **info: Any) -> None:
        """Print ended searches; every `CHECK_SECONDS`, check the used resources and the lease of this driver."""
        for key in self.ledger.stopped.keys() - self._stopped:
            self._stopped.add(key)
            self.progress.log(stopped_line(key, self.ledger.stopped[key]))
        now = time.monotonic()
        if now - self._checked < CHECK_SECONDS:
            return
        self._checked = now
        self.stop_reason.storage = self.stop_reason.storage or self.ledger.lost
        self.progress.usage = usage()
        try:
            capacity(self.ledger.spec.search)
            self._shortage = ""
        except ValueError as error:  # machines have left; Ray waits for others without a message
            if not self._shortage or now - self._warned >= WARN_SECONDS:
                self._warned = now
                self.progress.log(f"no trial can be started: the cluster has shrunk ({error}); waiting for machines")
            self._shortage = str(error)

    def on_trial_start(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """Record the start of a trial; a resumed one keeps the epochs that it has reported."""
        name = trial_name(trial.config)
        self.started.setdefault(name, time.monotonic())
        self.history.setdefault(name, dict(self.ledger.plans[name].history))
        self.progress.running.setdefault(name, "starting")

    def on_trial_result(
        self, iteration: int, trials: list[Trial], trial: Trial, result: dict[str, Any], **info: Any
    ) -> None:
        """Record an epoch."""
        name, value = trial_name(trial.config), result.get(OBJECTIVE)
        if STATUS not in result and EPOCH in result:
            if value is not None and is_finite(value):
                history = self.history.setdefault(name, {})
                history[result[EPOCH]] = float(value)
                self.stop_reason.try_write(lambda: self.ledger.note(name, history))
            self.progress.epoch(name, result[EPOCH], result["epochs"], value)

    def on_trial_complete(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """Record a trial that ended by itself or was stopped."""
        last = trial.last_result or {}
        self.progress.worked(last.get("began"), last.get("ended"), last.get("gpu_bytes", 0))
        if last.get(STATUS) == STORAGE:
            self.stop_reason.storage = self.stop_reason.storage or last["reason"]
        elif STATUS in last:  # it ended by itself and wrote its record; "lost" only if that is not visible here
            self._settle(trial, "lost", UNSEEN)
        elif not self.stop_reason:  # else the sweep was stopped: the trial resumes when the sweep does
            epoch = last.get(EPOCH, 0)
            self._settle(trial, "pruned", f"stopped after epoch {epoch}: weak among the trials of its group")

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """Record a trial whose worker died too often."""
        error = last_error(trial)
        lines = str(error).strip().splitlines() or [type(error).__name__]
        reason = f"the worker died {plural(trial.num_failures, 'time')}: {' '.join(lines)}"
        self._settle(trial, death_status(error, str((trial.last_result or {}).get("node_ip", ""))), reason)

    def _settle(self, trial: Trial, status: Status, reason: str) -> None:
        name = trial_name(trial.config)
        history = sorted(self.history.pop(name, {}).items())
        seconds = time.monotonic() - self.started.pop(name, time.monotonic())
        last = trial.last_result or {}
        origin = {"began": last.get("began"), "host": last.get("host", "")}

        def settle() -> None:
            record = self.ledger.settle(name, status=status, reason=reason, history=history, seconds=seconds, **origin)
            self.progress.ended(name, record)
            if record.status in FAILURES:
                self.failed += 1
                if self.failed >= self.ledger.spec.search.max_failed_trials:
                    self.stop_reason.failed = f"{self.failed} trials failed, the last one, {name}, by: {record.reason}"

        self.stop_reason.try_write(settle)


def usage() -> str:
    """Return the used and total CPUs and GPUs of the cluster as text: "1/2 GPUs, 8/16 CPUs busy"."""
    total, free = ray.cluster_resources(), ray.available_resources()
    parts = [
        f"{total[name] - free.get(name, 0.0):g}/{total[name]:g} {name}s"
        for name in ("GPU", "CPU")
        if total.get(name, 0.0) > 0
    ]
    return ", ".join(parts) + " busy" if parts else ""
