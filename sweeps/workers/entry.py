"""The function that Ray Tune calls for each trial."""

from typing import Any

from ray import tune

from ..state.trial_task import TrialTask
from .trial import do_trial


def run_trial(values: dict[str, Any]) -> None:
    """Run one trial of a sweep, in this process or in several.

    The record of a finished trial is reported unchanged. A failed run gets a record with status "failed" and its
    reason, and the sweep continues; a worker that dies is restarted by Ray and resumes after its last finished epoch.

    Args:
        values: The trial's task as plain values (`TrialTask.to_dict`).
    """
    task = TrialTask.from_dict(values)
    if task.workers > 1:
        from .wide_trial import run_wide_trial  # imports Ray Train, which a single process does not need

        run_wide_trial(task)
    else:
        do_trial(task, tune.report)
