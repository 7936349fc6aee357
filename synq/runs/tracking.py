"""Logging of a run to TensorBoard, Weights & Biases or MLflow, through the trackers of Accelerate."""

import json
import os
import warnings
from collections.abc import Callable
from functools import reduce
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from synq.common.digests import read_sealed_json, write_sealed_json
from synq.common.files import DamagedFileError
from synq.common.notices import print_notice
from synq.config.parsing import dotted_keys
from synq.config.run import RunConfig
from synq.finetune.schedule import lr_at, num_steps
from synq.runs.record import RunRecord

PROJECT = "synq"
"""Default project (wandb) or experiment (mlflow); environment variables of the tracker override it."""
NOTE_FILE = "tracker.json"
"""File in the run's folder with the run's id in the tracker, for resuming."""
METRICS = (
    *("objective_value", "teacher_top1", "rtn_top1", "top1", "top5", "drop", "num_eval", "lost", "gained"),
    *("kept_share", "codes_changed", "size_bytes", "bitops", "total_seconds"),
)
"""Fields of a record that are logged at the end of a run."""


class RunLog:
    """Log one run to its tracker, on the main process; with `runtime.tracker` none, every method does nothing.

    A context manager that closes the tracker at the end, because a process may do several runs.
    """

    def __init__(self, config: RunConfig, folder: Path, accelerator: Accelerator) -> None:
        """Check the tracker; nothing is written yet.

        Args:
            config: The run.
            folder: Its folder.
            accelerator: Process group, made for the same tracker (`make_accelerator`).

        Raises:
            ValueError: `accelerator` was made for another tracker.
        """
        self.config, self.folder, self.accelerator = config, folder, accelerator
        self.tracker, self.is_on = config.runtime.tracker, False
        self._set_mlflow = False
        if self.tracker != "none" and self.tracker not in map(str, accelerator.log_with):
            made = ", ".join(map(str, accelerator.log_with)) or "none"
            raise ValueError(
                f"`accelerator` must be made with log_with={self.tracker!r}, as in runtime.tracker, but got {made}"
            )

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, *_: object) -> None:
        # Not `end_training`, which would also destroy the process group of the caller.
        if self.tracker != "none":
            for tracker in self.accelerator.trackers if self.is_on else ():
                self._try(tracker.finish)
            self.accelerator.trackers.clear()
        if self._set_mlflow:
            import mlflow

            mlflow.set_tracking_uri(None)

    def start(self) -> None:
        """Open the tracker and log the configuration; a resumed run continues under the id in `NOTE_FILE`.

        Raises:
            ValueError: The tracker cannot be opened, for example without a login or a server.
        """
        if self.tracker == "none":
            return
        note = self.folder / NOTE_FILE
        saved = _saved(note) if note.exists() else {}
        is_resumed = saved.get("tracker") == self.tracker
        try:
            self._choose_mlflow_store()
            options = self._options(saved["id"] if is_resumed else "")
            self.accelerator.init_trackers(self._project(), init_kwargs={self.tracker: options})
            self.is_on = True
            if not is_resumed:
                for tracker in self.accelerator.trackers:
                    tracker.store_init_configuration(_flat(self.config))
        except Exception as error:  # each package raises its own types
            lines = str(error).strip().splitlines() or [repr(error)]
            raise ValueError(
                f"`runtime.tracker` must be one that can be opened here, but got {self.tracker}: {lines[0]}"
            ) from error
        if self.accelerator.is_main_process and not is_resumed:
            write_sealed_json(note, {"tracker": self.tracker, "id": self._id()})

    def epoch(self, epoch: dict[str, float]) -> None:
        """Log the mean loss terms of an epoch, its objective if measured, and the learning rate of its last step."""
        if not self.is_on:
            return
        number, finetune = int(epoch["epoch"]), self.config.finetune
        steps = num_steps(self.config.synthesis.num_images, finetune.batch_size)
        values = {**epoch, "lr": lr_at(number * steps - 1, steps, finetune)}
        del values["epoch"]
        self._log("train", values, number)

    def end(self, record: RunRecord) -> None:
        """Log the metrics of the finished run, at its last epoch."""
        if not self.is_on:
            return
        values = {name: getattr(record, name) for name in METRICS}
        values |= {f"fidelity_{name}": value for name, value in record.fidelity.items()}
        values |= {f"rtn_fidelity_{name}": value for name, value in record.rtn_fidelity.items()}
        self._log("result", values, self.config.finetune.epochs)

    def _log(self, group: str, values: dict[str, Any], step: int) -> None:
        measured = {name.replace(" ", "_"): value for name, value in values.items() if value is not None}
        metrics = {f"{group}/{name}": value for name, value in measured.items()}
        self._try(lambda: self.accelerator.log(metrics, step=step))

    def _try(self, work: Callable[[], None]) -> None:
        """Call the tracker; if it fails, warn and stop logging, so that the run continues."""
        try:
            work()
        except Exception as error:  # each package raises its own types, for example for a lost server
            self.is_on = False
            lines = str(error).strip().splitlines() or [repr(error)]
            warnings.warn(f"{self.tracker} failed, the run continues without it: {lines[0]}", stacklevel=3)

    def _project(self) -> str:
        if self.tracker == "tensorboard":  # the folder of its files; an absolute path overrides `project_dir`
            return str(self.folder / "tensorboard")
        return os.environ.get("WANDB_PROJECT", PROJECT) if self.tracker == "wandb" else PROJECT

    def _options(self, run_id: str) -> dict[str, Any]:
        """Return the tracker's init arguments: the name of the run, and its id in the tracker if it is resumed."""
        if self.tracker == "tensorboard":
            return {}
        options: dict[str, Any] = {"name" if self.tracker == "wandb" else "run_name": self.folder.name}
        if run_id:
            options |= {"id": run_id, "resume": "allow"} if self.tracker == "wandb" else {"run_id": run_id}
        return options

    def _id(self) -> str:
        """Return the id of the run in the tracker, "" if it has none."""
        run = self.accelerator.get_tracker(self.tracker, unwrap=True)
        return {"wandb": lambda: run.id, "mlflow": lambda: run.info.run_id}.get(self.tracker, str)()

    def _choose_mlflow_store(self) -> None:
        """Set MLflow's store to the run's folder, unless the environment sets another one."""
        if self.tracker == "mlflow" and "MLFLOW_TRACKING_URI" not in os.environ and self.accelerator.is_main_process:
            import mlflow

            # A database, because MLflow 3 no longer accepts a folder of files.
            mlflow.set_tracking_uri(f"sqlite:///{self.folder / 'mlflow.db'}")
            self._set_mlflow = True


def _flat(config: RunConfig) -> dict[str, Any]:
    """Return the configuration by dotted key, with lists and tables as JSON."""
    values = {key: reduce(getattr, key.split("."), config) for key in dotted_keys(RunConfig)}
    plain = (str, int, float, type(None))
    return {key: value if isinstance(value, plain) else json.dumps(value) for key, value in values.items()}


def _saved(note: Path) -> dict[str, Any]:
    """Return tracker and id of an interrupted run; {} without them, and, with a notice, if the file is damaged."""
    try:
        content, _ = read_sealed_json(note)
    except DamagedFileError as error:
        print_notice(f"warning: {error}; the tracker gets a new run")
        return {}
    return content if isinstance(content, dict) and isinstance(content.get("id"), str) else {}
