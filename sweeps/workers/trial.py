"""One trial, as a worker of Ray does it: the whole run, its record written by rename, each epoch reported."""

import gc
import os
import platform
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import torch
from ray import tune

from synq import pipeline
from synq.config.run import RunConfig, config_from_dict
from synq.finetune.loop import NonFiniteLossError
from synq.runs.record import RunRecord, environment, run_folder
from synq.synthesis.run_sets import set_names, set_store

from ..state.plans import unfinished_record
from .workspace import Workplace, is_storage_error

Report = Callable[[dict[str, Any]], None]
STORAGE = "storage"
"""Status of a trial that the disk or the store kept from its work: it has no record, and the sweep stops."""


def run_trial(task: dict[str, Any]) -> None:
    """Do one trial of a sweep; the function that Ray Tune calls.

    A finished record is reported as it stands. A run that fails becomes a record with status "failed" and its reason, and the sweep
    goes on; a worker that dies is started again by Ray and continues after its last finished epoch.

    Args:
        task: What the sweep says of the trial (`Ledger.task`).
    """
    if task["workers"] > 1:
        from .wide_trial import run_wide_trial

        run_wide_trial(task)
    else:
        do_trial(task, tune.report)


class TrialFailedError(RuntimeError):
    """A worker's part of a trial failed; its record says why."""


def do_trial(task: dict[str, Any], report: Report, *, rank: int = 0) -> None:
    """Do one trial in this process, or this process's part of it.

    Args:
        task: What the sweep says of the trial.
        report: Takes the metrics of an epoch and, last, of the trial; on every process.
        rank: Number of this process among the trial's workers; the first one writes the record.

    Raises:
        TrialFailedError: This worker of several failed. The others may wait for it, so that all must be ended.
    """
    wide = task["workers"] > 1
    began = time.time()

    def say(metrics: dict[str, Any]) -> None:
        report(
            {**metrics, "began": began, "ended": time.time(), "host": platform.node()}
        )  # should it be stopped here, this was its work

    _fresh_process(task["gpus"])
    place = Workplace(task)
    try:
        place.check_present()
        config = place.config(task["config"])
        record = place.record()
        if record is None:
            record = _run(config, task, place, say, rank)
            if rank == 0 or record.status == "failed":
                place.finish(record)
            if wide and record.status == "failed":
                raise TrialFailedError(record.reason)
    except OSError as error:
        if wide or not is_storage_error(error):
            raise
        report({"status": STORAGE, "reason": str(error), "epochs": 0})
        return
    metrics = {
        "status": record.status,
        "reason": record.reason,
        "objective_value": record.objective_value,
        "epoch": config.finetune.epochs,
        "epochs": config.finetune.epochs,
        "gpu_bytes": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0,
    }
    if task["second_objective"] != "none":
        metrics[task["second_objective"]] = getattr(record, task["second_objective"])
    say(metrics)


def check_run(config: dict[str, Any]) -> dict[str, Any]:
    """Open everything a run needs besides its images; a task of Ray.

    Returns:
        teacher (its name, digest and input_size) and eval_digest, or error: what the user should mend.
    """
    _fresh_process()
    try:
        teacher, measure = pipeline.check(config_from_dict(RunConfig, config))
    except (ValueError, OSError, ImportError) as error:
        return _refusal(error)
    facts = {"name": teacher.name, "digest": teacher.digest, "input_size": list(teacher.input_size)}
    return {"teacher": facts, "eval_digest": measure.labels_digest}


def make_sets(task: dict[str, Any]) -> dict[str, Any]:
    """Make the synthetic sets of a run where the store lacks them; a task of Ray.

    Returns:
        sets (their names in the store) and made (how many were new), or error: what the user should mend.
    """
    _fresh_process()
    try:
        place = Workplace(task)
        config = place.config(task["config"])
        names = set_names(config)
        place.fetch_sets(names)
        missing = [name for name in names if not set_store(config).is_complete(name)]
        if missing:
            pipeline.prepare(config)
        place.keep_sets(names)
    except (ValueError, OSError, ImportError) as error:
        return _refusal(error)
    return {"sets": names, "made": len(missing)}


def _refusal(error: Exception) -> dict[str, Any]:
    return {"error": " ".join(str(error).split()) or type(error).__name__}


def _run(config: RunConfig, task: dict[str, Any], place: Workplace, report: Report, rank: int = 0) -> RunRecord:
    name, teacher = task["trial"], task["teacher"]
    started, clock = datetime.now(UTC), time.perf_counter()
    folder = run_folder(config)

    def on_epoch(epoch: dict[str, float]) -> None:
        place.check_present()  # before a checkpoint begins a new folder where an unmounted one was
        value = epoch["objective_value"]
        report({"epoch": int(epoch["epoch"]), "epochs": int(epoch["epochs"]), "objective_value": value})

    try:
        place.fetch(folder, task["sets"])
        record = pipeline.run(config, on_epoch=on_epoch, on_checkpoint=place.keep_checkpoint)
        if rank == 0:
            place.keep_run(folder)
    except (
        Exception
    ) as error:  # whatever it was stands in the record; a stop by the scheduler is a SystemExit and passes
        if is_storage_error(error) or (task["workers"] > 1 and _may_be_anothers(error)):
            raise
        values = {
            **environment(),
            "started": started.isoformat(timespec="seconds"),
            "total_seconds": time.perf_counter() - clock,
        }
        reason = f"{type(error).__name__}: {error}"
        return unfinished_record(config, name, status="failed", reason=reason, teacher=teacher, values=values)
    return replace(record, name=name, model=teacher.get("name", record.model))  # the spec may name the model


def _may_be_anothers(error: Exception) -> bool:
    """Whether another worker's death may be behind an error: the process group tells of it by a RuntimeError of many words.

    Ray Train then starts all of them again; a run that diverged or asked for too much memory would only do so again.
    """
    own = (NonFiniteLossError, torch.OutOfMemoryError)
    return isinstance(error, RuntimeError) and not isinstance(error, own)


def _fresh_process(gpus: float = 0.0) -> None:
    """Forget what an earlier trial left in this worker; `make_accelerator` renews Accelerate's own state.

    Args:
        gpus: Share of one GPU that is this trial's. Ray only counts it; the memory is divided here.
    """
    os.environ["TUNE_FUNCTION_THREAD_TIMEOUT_S"] = (
        "60"  # a stopped trial may finish what it writes before the next one starts
    )
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        if 0 < gpus < 1:
            torch.cuda.set_per_process_memory_fraction(gpus)
