"""One trial on its worker: the run, a report for each epoch, the record. Does not import Ray.

Representations of a trial, from the search space to the tables, and their sources:

    parameters  by dotted name, as in Optuna (`GroupSearch.propose`)                 in the plan, to replay the search
    overrides   settings by dotted name (`synq.sweeps.space.sample`)                 None where an idea is disabled
    RunConfig   the group's run with the overrides (`synq.sweeps.spec.run_config`)   in the plan, plans/TRIAL.json
    TrialTask   the run, the sweep's folder, the resources (`Ledger.task`)           as plain values in Ray Tune
    RunRecord   the run and its metrics (`synq.pipeline.run`)                        records/TRIAL.json
    row         of trials.csv; of leaderboard.csv for all seeds of a setting         (`synq.sweeps.leaderboard.records`)
"""

import gc
import os
import platform
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import torch

from synq import pipeline
from synq.common.environment import environment
from synq.common.notices import forget_notices
from synq.config.run import RunConfig
from synq.finetune.loop import NonFiniteLossError
from synq.runs.record import FAILURES, RunRecord, Status, run_folder
from synq.synthesis.run_sets import set_names, set_store, set_warnings

from ..constraints import SEARCHED
from ..state.plans import unfinished_record
from ..state.trial_log import TrialLog, log_name, logged
from ..state.trial_task import TrialTask
from .workspace import Workspace, is_storage_error

Report = Callable[[dict[str, Any]], None]
STORAGE = "storage"
"""Status of a trial that an error of the disk or the object store stopped: it has no record, and the sweep stops."""


class TrialFailedError(RuntimeError):
    """One worker of a trial with several failed; the record has the reason."""


def do_trial(task: TrialTask, report: Report, *, rank: int = 0) -> None:
    """Run one trial in this process, or this process's part of it.

    Args:
        task: The trial.
        report: Called on every process with the metrics of each epoch and, last, of the trial.
        rank: Rank of this process among the trial's workers; rank 0 writes the record.

    Raises:
        TrialFailedError: This worker of several failed; the others, which may wait for it, must be stopped.
    """
    wide = task.workers > 1
    began = time.time()

    def report_times(metrics: dict[str, Any]) -> None:
        # With each report, because the trial may be stopped after it.
        report({**metrics, "began": began, "ended": time.time(), "host": platform.node()})

    _fresh_process(task.gpus)
    workspace = Workspace(task.folder, task.address)
    try:
        workspace.check_present()
        config = workspace.localize(task.config)
        record = workspace.record(task.trial, task.config_digest)
        if record is None:
            with logged(workspace.log(task.trial, rank)) as log:
                record = _run(config, task, workspace, report_times, log, rank)
                log.event(f"{record.status}: {record.reason}" if record.reason else record.status)
            workspace.keep_log(task.trial, rank)
            if rank == 0 or record.status in FAILURES:
                workspace.finish(record)
            if wide and record.status in FAILURES:
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
        **{name: getattr(record, name) for name in SEARCHED},
    }
    report_times(metrics)


def check_run(config: RunConfig) -> dict[str, Any]:
    """Load everything a run needs except its synthetic images.

    Returns:
        A dict with teacher (its name, digest and input_size), eval_digest and earlier_digest (of the labeled images, as
        this version and as earlier ones compute it), or with error, a message for the user.
    """
    _fresh_process()
    try:
        teacher, measure = pipeline.check(config)
    except (ValueError, OSError, ImportError) as error:
        return _as_reply(error)
    fields = {"name": teacher.name, "digest": teacher.digest, "input_size": list(teacher.input_size)}
    earlier = "" if measure.labeled is None else measure.labeled.earlier_fingerprint()
    return {"teacher": fields, "eval_digest": measure.labels_digest, "earlier_digest": earlier}


def make_sets(config: RunConfig, folder: str, address: str) -> dict[str, Any]:
    """Make the synthetic sets of a run that the store does not have.

    Args:
        config: The run.
        folder: The sweep's folder.
        address: The sweep's address in an object store, or "".

    Returns:
        A dict with sets (their names in the store), made (number of new ones) and warnings about those, or with error,
        a message for the user.
    """
    _fresh_process()
    warnings: list[str] = []
    try:
        workspace = Workspace(folder, address)
        config = workspace.localize(config)
        names = set_names(config)
        workspace.fetch_sets(names)
        missing = [name for name in names if not set_store(config).is_complete(name)]
        if missing:
            warnings = set_warnings(config.synthesis, *pipeline.prepare(config))
        workspace.keep_sets(names)
    except (ValueError, OSError, ImportError) as error:
        return _as_reply(error)
    return {"sets": names, "made": len(missing), "warnings": warnings}


def _as_reply(error: Exception) -> dict[str, Any]:
    return {"error": " ".join(str(error).split()) or type(error).__name__}


def _run(
    config: RunConfig, task: TrialTask, workspace: Workspace, report: Report, log: TrialLog, rank: int = 0
) -> RunRecord:
    name, teacher = task.trial, task.teacher
    started, clock = datetime.now(UTC), time.perf_counter()
    folder = run_folder(config)

    def on_epoch(epoch: dict[str, float]) -> None:
        workspace.check_present()  # a checkpoint must not create a new folder on an unmounted path
        value = epoch["objective_value"]
        log.write(f"epoch {int(epoch['epoch'])}/{int(epoch['epochs'])}: objective {value:.6g}\n")
        workspace.keep_log(task.trial, rank)
        report({"epoch": int(epoch["epoch"]), "epochs": int(epoch["epochs"]), "objective_value": value})

    try:
        workspace.fetch(folder, task.sets)
        record = pipeline.run(config, on_epoch=on_epoch, on_checkpoint=workspace.keep_checkpoint)
        if rank == 0:
            workspace.keep_run(folder)
    except Exception as error:  # any cause goes into the record; the scheduler stops by SystemExit, which passes
        if is_storage_error(error) or (task.workers > 1 and _may_be_of_other_worker(error)):
            raise
        values = {
            **environment(),
            "started": started.isoformat(timespec="seconds"),
            "total_seconds": time.perf_counter() - clock,
        }
        reason = f"{type(error).__name__}: {error}"
        status: Status = "diverged" if isinstance(error, NonFiniteLossError) else "failed"
        log.write(traceback.format_exc())
        return unfinished_record(config, name, status=status, reason=reason, teacher=teacher, values=values)
    # The spec may name the model.
    return replace(record, name=name, model=teacher.get("name", record.model), log=log_name(name))


def _may_be_of_other_worker(error: Exception) -> bool:
    """Return whether the death of another worker may have caused an error.

    The process group raises RuntimeErrors with many texts for it; Ray Train then restarts all workers. A run that
    diverged or exceeded the memory would only do so again.
    """
    deterministic = (NonFiniteLossError, torch.OutOfMemoryError)
    return isinstance(error, RuntimeError) and not isinstance(error, deterministic)


def _fresh_process(gpus: float = 0.0) -> None:
    """Free the memory of an earlier trial in this worker; `make_accelerator` resets the state of Accelerate.

    Args:
        gpus: Fraction of one GPU for this trial. Ray only counts it; here it limits the GPU memory.
    """
    # Gives a stopped trial time to finish its writes before the next one starts.
    os.environ["TUNE_FUNCTION_THREAD_TIMEOUT_S"] = "60"
    forget_notices()  # each trial has a log
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        if 0 < gpus < 1:
            torch.cuda.set_per_process_memory_fraction(gpus)
