"""A trial with several workers: Ray Train distributes the processes, Accelerate trains one student on all of them.

Ray Tune starts `run_wide_trial` in a small separate process on the head node, which starts the workers, on any
machines, and forwards their reports. If one dies, all are restarted and resume after their last finished epoch.
"""

import os
from typing import Any

import ray.train
import ray.tune
from ray.train.torch import TorchTrainer
from ray.tune.integration.ray_train import TuneReportCallback

from synq.common.environment import environment

from ..state.plans import unfinished_record
from ..state.trial_task import TrialTask
from .deaths import death_status
from .trial import STORAGE, do_trial
from .workspace import Workspace, is_storage_error


class TrialStopped(BaseException):  # like SystemExit, so that `except Exception` does not record it as an error
    """The scheduler requested a stop of the trial."""


def run_wide_trial(task: TrialTask) -> None:
    """Run a trial in `task.workers` processes."""
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")  # the period of forwarding reports
    workspace = Workspace(task.folder, task.address)
    resources = {"CPU": task.cpus, **({"GPU": task.gpus} if task.gpus else {})}
    callbacks: list[Any] = [TuneReportCallback()]
    trainer = TorchTrainer(
        work,
        train_loop_config={"task": task},
        scaling_config=ray.train.ScalingConfig(
            num_workers=task.workers, use_gpu=task.gpus > 0, resources_per_worker=resources
        ),
        run_config=ray.train.RunConfig(
            name=task.trial,
            callbacks=callbacks,
            failure_config=ray.train.FailureConfig(max_failures=task.max_failures),
            **_train_storage(workspace),
        ),
    )
    try:
        trainer.fit()
    except ray.train.TrainingFailedError as error:  # after as many restarts as the spec allows
        ray.tune.report(_give_up(task, workspace, error))


def _give_up(task: TrialTask, workspace: Workspace, error: ray.train.TrainingFailedError) -> dict[str, Any]:
    """Return the report of a trial whose workers failed too often, and write its record if there is none."""
    causes = list(error.worker_failures.values()) if isinstance(error, ray.train.WorkerGroupError) else []
    stored = next((cause for cause in causes if is_storage_error(cause)), None)
    if stored is not None:
        return {"status": STORAGE, "reason": str(stored), "epochs": 0}
    record = workspace.record(task.trial, task.config_digest)
    if record is None:
        cause = causes[0] if causes else error
        lines = str(cause).strip().splitlines() or [type(cause).__name__]
        reason = f"its workers failed {task.max_failures + 1} times: {lines[-1]}"
        record = unfinished_record(
            task.config,
            task.trial,
            status=death_status(cause),
            reason=reason,
            teacher=task.teacher,
            values=environment(),
        )
        workspace.finish(record)
    return {"status": record.status, "reason": record.reason, "epochs": 0}


def work(config: dict[str, TrialTask]) -> None:
    """Run one worker of a trial; Ray Train calls it on each, with the process group already joined."""
    from accelerate.utils import broadcast_object_list

    task = config["task"]
    workspace, rank = Workspace(task.folder, task.address), ray.train.get_context().get_world_rank()

    def report(metrics: dict[str, Any]) -> None:
        ray.train.report(metrics)  # on every worker, because it is a barrier
        if (
            "status" not in metrics
            and broadcast_object_list([rank == 0 and workspace.is_stop_requested(task.trial)])[0]
        ):
            raise TrialStopped

    try:
        do_trial(task, report, rank=rank)
    except TrialStopped:
        return


def _train_storage(workspace: Workspace) -> dict[str, Any]:
    """Return the storage arguments of Ray Train, whose state every worker must see; SynQ stores nothing there."""
    if workspace.storage is None:
        return {"storage_path": str(workspace.root / "ray" / "train")}
    return {"storage_path": workspace.storage.path("ray/train"), "storage_filesystem": workspace.storage.files}
