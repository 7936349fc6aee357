"""One trial in its worker: the run, a report for each epoch, the record. Knows nothing of Ray.

The shapes of a trial, from the search space to the table, and where each is made:

    parameters  by dotted name, as Optuna has them (`GroupSearch.propose`)            kept in the plan, to replay the search
    overrides   settings by dotted name (`synq.sweeps.space.sample`)                  None where an idea is off
    RunConfig   the group's run with the overrides (`synq.sweeps.spec.run_config`)    kept in the plan, plans/TRIAL.json
    TrialTask   the run, the sweep's folder, the resources (`Ledger.task`)            plain values only while Ray Tune holds it
    RunRecord   the run and its metrics (`synq.pipeline.run`)                         records/TRIAL.json
    row         of trials.csv; of leaderboard.csv for all seeds of a setting          (`synq.sweeps.leaderboard.records`)
"""

import gc
import os
import platform
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import torch

from synq import pipeline
from synq.common.environment import environment
from synq.config.run import RunConfig
from synq.finetune.loop import NonFiniteLossError
from synq.runs.record import RunRecord, run_folder
from synq.synthesis.run_sets import set_names, set_store

from ..state.plans import unfinished_record
from ..state.trial_task import TrialTask
from .workspace import Workspace, is_storage_error

Report = Callable[[dict[str, Any]], None]
STORAGE = "storage"
"""Status of a trial that the disk or the object store kept from running: it has no record, and the sweep stops."""


class TrialFailedError(RuntimeError):
    """A worker's part of a trial failed; its record has the reason."""


def do_trial(task: TrialTask, report: Report, *, rank: int = 0) -> None:
    """Run one trial in this process, or this process's part of it.

    Args:
        task: The trial.
        report: Takes the metrics of an epoch and, last, of the trial; on every process.
        rank: Number of this process among the trial's workers; the first one writes the record.

    Raises:
        TrialFailedError: This worker of several failed. The others may wait for it, so that all must be ended.
    """
    wide = task.workers > 1
    began = time.time()

    def report_times(metrics: dict[str, Any]) -> None:
        # With each report: should the trial be stopped here, this was its work.
        report({**metrics, "began": began, "ended": time.time(), "host": platform.node()})

    _fresh_process(task.gpus)
    workspace = Workspace(task.folder, task.address)
    try:
        workspace.check_present()
        config = workspace.localize(task.config)
        record = workspace.record(task.trial, task.config_digest)
        if record is None:
            record = _run(config, task, workspace, report_times, rank)
            if rank == 0 or record.status == "failed":
                workspace.finish(record)
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
    if task.second_objective != "none":
        metrics[task.second_objective] = getattr(record, task.second_objective)
    report_times(metrics)


def check_run(config: RunConfig) -> dict[str, Any]:
    """Open everything a run needs besides its images.

    Returns:
        teacher (its name, digest and input_size) and eval_digest, or error: what the user should mend.
    """
    _fresh_process()
    try:
        teacher, measure = pipeline.check(config)
    except (ValueError, OSError, ImportError) as error:
        return _as_reply(error)
    facts = {"name": teacher.name, "digest": teacher.digest, "input_size": list(teacher.input_size)}
    return {"teacher": facts, "eval_digest": measure.labels_digest}


def make_sets(config: RunConfig, folder: str, address: str) -> dict[str, Any]:
    """Make the synthetic sets of a run where the store lacks them.

    Args:
        config: The run.
        folder: The sweep's folder.
        address: The sweep's address in an object store, or "".

    Returns:
        sets (their names in the store) and made (how many were new), or error: what the user should mend.
    """
    _fresh_process()
    try:
        workspace = Workspace(folder, address)
        config = workspace.localize(config)
        names = set_names(config)
        workspace.fetch_sets(names)
        missing = [name for name in names if not set_store(config).is_complete(name)]
        if missing:
            pipeline.prepare(config)
        workspace.keep_sets(names)
    except (ValueError, OSError, ImportError) as error:
        return _as_reply(error)
    return {"sets": names, "made": len(missing)}


def _as_reply(error: Exception) -> dict[str, Any]:
    return {"error": " ".join(str(error).split()) or type(error).__name__}


def _run(config: RunConfig, task: TrialTask, workspace: Workspace, report: Report, rank: int = 0) -> RunRecord:
    name, teacher = task.trial, task.teacher
    started, clock = datetime.now(UTC), time.perf_counter()
    folder = run_folder(config)

    def on_epoch(epoch: dict[str, float]) -> None:
        workspace.check_present()  # before a checkpoint begins a new folder where an unmounted one was
        value = epoch["objective_value"]
        report({"epoch": int(epoch["epoch"]), "epochs": int(epoch["epochs"]), "objective_value": value})

    try:
        workspace.fetch(folder, task.sets)
        record = pipeline.run(config, on_epoch=on_epoch, on_checkpoint=workspace.keep_checkpoint)
        if rank == 0:
            workspace.keep_run(folder)
    except Exception as error:  # any cause goes into the record; a stop by the scheduler is a SystemExit and passes
        if is_storage_error(error) or (task.workers > 1 and _may_be_anothers(error)):
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
    """Whether another worker's death may have caused an error: the process group raises a RuntimeError with many texts for it.

    Ray Train then starts all of them again; a run that diverged or asked for too much memory would only do so again.
    """
    own = (NonFiniteLossError, torch.OutOfMemoryError)
    return isinstance(error, RuntimeError) and not isinstance(error, own)


def _fresh_process(gpus: float = 0.0) -> None:
    """Forget what an earlier trial left in this worker; `make_accelerator` renews Accelerate's own state.

    Args:
        gpus: Share of one GPU that is this trial's. Ray only counts it; the memory is divided here.
    """
    # A stopped trial may finish what it writes before the next one starts.
    os.environ["TUNE_FUNCTION_THREAD_TIMEOUT_S"] = "60"
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        if 0 < gpus < 1:
            torch.cuda.set_per_process_memory_fraction(gpus)
