"""A trial of several processes: Ray Train places the workers, Accelerate trains one student on all of them.

Ray Tune starts `run_wide_trial` in a small process of its own on the head, which starts the workers and passes their reports on. The
workers may stand on any machines. One that dies takes the others down; all are started again and go on after their last epoch.
"""

import os
from typing import Any

import ray.train
import ray.tune
from ray.train.torch import TorchTrainer
from ray.tune.integration.ray_train import TuneReportCallback

from synq.common.environment import environment
from synq.config.run import RunConfig, config_from_dict

from ..state.plans import unfinished_record
from .trial import STORAGE, do_trial
from .workspace import Workplace, is_storage_error


class TrialStopped(BaseException):  # like SystemExit: no error, and nothing that records errors may catch it
    """The sweep asked the trial to end."""


def run_wide_trial(task: dict[str, Any]) -> None:
    """Do a trial with `task["workers"]` processes; see `synq.sweeps.workers.trial.run_trial`."""
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")  # reports are passed on at this pace
    place = Workplace(task)
    resources = {"CPU": task["cpus"], **({"GPU": task["gpus"]} if task["gpus"] else {})}
    callbacks: list[Any] = [TuneReportCallback()]
    trainer = TorchTrainer(
        work,
        train_loop_config=task,
        scaling_config=ray.train.ScalingConfig(
            num_workers=task["workers"], use_gpu=task["gpus"] > 0, resources_per_worker=resources
        ),
        run_config=ray.train.RunConfig(
            name=task["trial"],
            callbacks=callbacks,
            failure_config=ray.train.FailureConfig(max_failures=task["max_failures"]),
            **_train_storage(place),
        ),
    )
    try:
        trainer.fit()
    except ray.train.TrainingFailedError as error:  # Ray Train has tried as often as the spec allows
        ray.tune.report(_give_up(task, place, error))


def _give_up(task: dict[str, Any], place: Workplace, error: ray.train.TrainingFailedError) -> dict[str, Any]:
    """Return what is reported of a trial whose workers failed too often, and see that there is a record."""
    causes = list(error.worker_failures.values()) if isinstance(error, ray.train.WorkerGroupError) else []
    stored = next((cause for cause in causes if is_storage_error(cause)), None)
    if stored is not None:
        return {"status": STORAGE, "reason": str(stored), "epochs": 0}
    record = place.record()
    if record is None:
        cause = causes[0] if causes else error
        lines = str(cause).strip().splitlines() or [type(cause).__name__]
        reason = f"its workers failed {task['max_failures'] + 1} times: {lines[-1]}"
        config = config_from_dict(RunConfig, task["config"])
        values, teacher = environment(), task["teacher"]
        record = unfinished_record(
            config, task["trial"], status="failed", reason=reason, teacher=teacher, values=values
        )
        place.finish(record)
    return {"status": record.status, "reason": record.reason, "epochs": 0}


def work(task: dict[str, Any]) -> None:
    """Do one worker's part of a trial; Ray Train calls it in each, with their process group already joined."""
    from accelerate.utils import broadcast_object_list

    place, rank = Workplace(task), ray.train.get_context().get_world_rank()

    def report(metrics: dict[str, Any]) -> None:
        ray.train.report(metrics)  # on every worker, or the others would wait
        if "status" not in metrics and broadcast_object_list([rank == 0 and place.asked_to_stop()])[0]:
            raise TrialStopped

    try:
        do_trial(task, report, rank=rank)
    except TrialStopped:
        return


def _train_storage(place: Workplace) -> dict[str, Any]:
    """Where Ray Train keeps its notes; every worker must see it, though nothing of ours is in them."""
    if place.storage is None:
        return {"storage_path": str(place.root / "ray" / "train")}
    return {"storage_path": place.storage.path("ray/train"), "storage_filesystem": place.storage.files}
