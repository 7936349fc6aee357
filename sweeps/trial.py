"""One trial, as a worker of Ray does it: the whole run in this process, its record written by rename, each epoch reported."""

import gc
import os
import time
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from ray import tune

from sweeps.ledger import unfinished_record
from synq import pipeline
from synq.configs import RunConfig, config_from_dict
from synq.results import RunRecord, environment, read_record, write_record


def run_trial(trial: dict[str, Any]) -> None:
    """Do one trial of a sweep; the function that Ray Tune calls.

    A finished record is reported as it stands. A run that fails becomes a record with status "failed" and its reason, and the sweep
    goes on; a worker that dies is started again by Ray and continues after its last finished epoch.

    Args:
        trial: trial (name), group, stage, config (a run as plain values), teacher (its facts) and record_path.
    """
    path = Path(trial["record_path"])
    config = config_from_dict(RunConfig, trial["config"])
    if path.exists():
        record = read_record(path)
    else:
        record = _run(config, trial["trial"], trial["teacher"])
        write_record(path, record)
    tune.report(
        {
            "status": record.status,
            "reason": record.reason,
            "objective_value": record.objective_value,
            "epoch": config.finetune.epochs,
            "epochs": config.finetune.epochs,
        }
    )


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


def make_sets(config: dict[str, Any]) -> dict[str, Any]:
    """Make the synthetic sets of a run where the store lacks them; a task of Ray.

    Returns:
        Nothing, or error: what the user should mend.
    """
    _fresh_process()
    try:
        pipeline.prepare(config_from_dict(RunConfig, config))
    except (ValueError, OSError, ImportError) as error:
        return _refusal(error)
    return {}


def _refusal(error: Exception) -> dict[str, Any]:
    return {"error": " ".join(str(error).split()) or type(error).__name__}


def _run(config: RunConfig, name: str, teacher: dict[str, Any]) -> RunRecord:
    _fresh_process()
    started, clock = datetime.now(UTC), time.perf_counter()
    try:
        record = pipeline.run(config, on_epoch=_report)
    except (
        Exception
    ) as error:  # whatever it was stands in the record; a stop by the scheduler is a SystemExit and passes
        values = {
            **environment(),
            "started": started.isoformat(timespec="seconds"),
            "total_seconds": time.perf_counter() - clock,
        }
        reason = f"{type(error).__name__}: {error}"
        return unfinished_record(config, name, status="failed", reason=reason, teacher=teacher, values=values)
    return replace(record, name=name, model=teacher.get("name", record.model))  # the spec may name the model


def _report(epoch: dict[str, float]) -> None:
    tune.report(
        {"epoch": int(epoch["epoch"]), "epochs": int(epoch["epochs"]), "objective_value": epoch["objective_value"]}
    )


def _fresh_process() -> None:
    """Forget what an earlier trial left in this worker; `pipeline.make_accelerator` renews Accelerate's own state."""
    os.environ["TUNE_FUNCTION_THREAD_TIMEOUT_S"] = (
        "60"  # a stopped trial may finish what it writes before the next one starts
    )
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
