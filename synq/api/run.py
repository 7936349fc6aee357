"""A finished run as a Python object: the student, its metrics, and what can be done with it."""

import functools
import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from synq.api.models import Model, is_network, open_model, working_copy
from synq.api.session import named_as_arguments, session
from synq.config.run import PATH_SETTINGS, RunConfig, config_from_dict, with_overrides
from synq.evaluation.labeled_memory import in_memory, is_in_memory, labeled_in_memory
from synq.runs import finished
from synq.runs.finished_folder import finished_folder
from synq.runs.record import RunRecord, read_record, summary_line
from synq.runs.recount import Recount, recount, recount_settings
from synq.runtime import make_accelerator
from synq.synthesis.dataset import SyntheticSet
from synq.teacher.sources import MEMORY
from synq.teacher.teacher import Teacher
from synq.teacher.trust import trusting

if TYPE_CHECKING:
    from synq.export.export import Container

METRICS = (
    *("top1", "top5", "teacher_top1", "rtn_top1", "drop", "drop_stderr", "num_eval", "objective_value"),
    *("size_bytes", "bitops", "kept_share", "codes_changed", "total_seconds"),
)
"""Fields of a record that are metrics of a run, in this order; those of its fidelity follow."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Export:
    """Files of an exported student."""

    folder: Path
    """Folder of the files, with the model card (README.md, card.json)."""
    files: tuple[Path, ...]
    """The files, the first for the run's engine."""
    metrics: dict[str, Any]
    """Sizes in bytes, latency in milliseconds, and the comparison with the student, as in the run's record."""

    def __str__(self) -> str:
        rows = [
            f"{entry['name']}: {entry['bytes'] / 1024:,.0f} KiB (float {self.metrics['float_bytes'] / 1024:,.0f} KiB)"
            + (f", {1 / ratio:.2f}x the speed of float" if (ratio := entry.get("latency_ratio")) else "")
            for entry in self.metrics["files"]
        ]
        return "\n".join([f"{self.folder}", *rows])

    def __repr__(self) -> str:
        return f"<synq.Export {self}>"


class Run:
    """A finished run, from `synq.quantize` or `synq.open_run`.

    Attributes:
        path: Folder of the run.
        record: Its result and settings; see `synq.RunRecord`.
        config: Its settings, with the current paths.
        teacher: Its teacher.
    """

    def __init__(self, path: Path, config: RunConfig, teacher: Teacher, dataset: Any = None) -> None:
        """Open the record of a finished run; use `synq.open_run`.

        Args:
            path: Folder of the run.
            config: Its settings, with the current paths.
            teacher: Its teacher, on the CPU.
            dataset: Its labeled images if they are in memory, as for `labeled_in_memory`.
        """
        self.path, self.config, self.teacher = path, config, teacher
        self.record = read_record(path / "record.json")
        self._dataset = dataset

    @functools.cached_property
    def student(self) -> nn.Module:
        """The fine-tuned student: (N, C, H, W) normalized images -> logits (N, K).

        Weights and activations are rounded to their grids in floating point (fake quantization); `deployed` computes
        what the engine does. An ordinary module in eval mode on the CPU: it can be moved, copied, saved by `torch.save`
        and trained further. Nothing else of this object reads it: `evaluate` and `export` use the run's files.
        """
        with session(progress=False):
            return self._opened().student.net

    @functools.cached_property
    def deployed(self) -> nn.Module:
        """What the student computes where it is deployed, (N, C, H, W) -> logits (N, K), on the CPU.

        The arithmetic of the engine, integer sums and roundings; under target research, the integer form.
        """
        from synq.engines.deployed import deployed_network

        with session(progress=False):
            found = self._opened()
            return deployed_network(found.student.net, self.config.quant, self.teacher.input_size)

    @property
    def metrics(self) -> dict[str, float]:
        """Metrics that were measured: accuracies in percent, sizes in bytes, and the fidelity to the teacher.

        kl (nats) and agreement (percent) are measured on held-out synthetic images.
        """
        record = self.record
        values = {name: getattr(record, name) for name in METRICS} | dict(record.fidelity)
        return {name: value for name, value in values.items() if value is not None}

    @functools.cached_property
    def images(self) -> SyntheticSet:
        """The images that the student was trained on, memory-mapped, and their labels.

        Raises:
            FileNotFoundError: They are no longer in the store.
        """
        with session(progress=False):
            return self._opened().synthetic_sets()[0]

    @named_as_arguments
    def evaluate(
        self,
        dataset: Any = None,
        *,
        data_dir: str | Path | None = None,
        num_images: int | None = None,
        batch_size: int | None = None,
        progress: bool = False,
    ) -> Recount:
        """Count the correct predictions of the student and of its teacher on labeled images; the run is not changed.

        Args:
            dataset: As for `synq.quantize`; None takes the run's own.
            data_dir: Folder with the files of named sets; None takes the run's.
            num_images: Number of images, chosen as in a run; None takes all of a given set.
            batch_size: Images per forward pass; None takes the run's.
            progress: Whether to show a progress bar and notices.

        Returns:
            top1, teacher_top1, top5, teacher_top5 in percent, drop in points with its standard error, num_eval, lost
            and gained; `line()` is the result as text.

        Raises:
            ValueError: There are no labeled images, or they do not fit the teacher.
            FileNotFoundError: Their files do not exist.
        """
        with session(progress=progress), labeled_in_memory(self._dataset if dataset is None else dataset) as spec:
            given = None if dataset is None else spec
            folder = None if data_dir is None else str(data_dir)
            settings = recount_settings(
                self.config, dataset=given, data_dir=folder, num_images=num_images, batch_size=batch_size
            )
            return recount(self._opened(), settings, make_accelerator(self.config.runtime), progress=progress)

    @named_as_arguments
    def export(
        self,
        folder: str | Path | None = None,
        *,
        formats: Sequence[str] = (),
        containers: "Sequence[Container]" = (),
        rounds: int = 30,
        threads: int = 1,
        progress: bool = False,
    ) -> Export:
        """Write the student as the file that its engine runs, verified against the student and timed in the engine.

        Args:
            folder: Folder of the files, an earlier export in it is replaced; None means `export` in the run's folder.
            formats: For target research: some of onnx, packed, torch; empty for all.
            containers: For target research: integer types of ONNX weights, some of int4, int8, matmul.
            rounds: Timed runs of each model; 0 measures no latency.
            threads: Threads of the engine in timed runs.
            progress: Whether to show a progress bar and notices.

        Raises:
            ExportRejectedError: A file differs from the student by more than the tolerance; none is written then.
            ValueError: An option does not fit the target, or a package is missing.
            OSError: A file cannot be written.
        """
        from synq.export.export import ExportOptions, export_run

        moved = {key: self._value(key) for key in PATH_SETTINGS}
        options = ExportOptions(
            formats=tuple(formats),
            containers=tuple(containers),
            rounds=rounds,
            threads=threads,
            path_overrides={key: value for key, value in moved.items() if value is not None},
            progress=progress,
            without_labels=self._dataset is None and is_in_memory(self.config.evaluation.dataset),
        )
        with session(progress=progress), labeled_in_memory(self._dataset):
            written, self.record = export_run(self.path, folder, options, teacher=working_copy(self.teacher))
        files = tuple(written / file["name"] for file in self.record.deployment["files"])
        return Export(folder=written, files=files, metrics=self.record.deployment)

    @named_as_arguments
    def report(self, output: str | Path | None = None, *, num_images: int | None = None) -> Path:
        """Write the HTML page of the run: result, training, images, predictions, activation maps, layers.

        Args:
            output: File or folder of the page; None means report.html in the run's folder.
            num_images: Images on which the networks are evaluated; None chooses it so that it takes seconds.

        Returns:
            The page.
        """
        from synq.sweeps.reports.make import make_report

        with session(progress=False), labeled_in_memory(self._dataset):
            teacher = working_copy(self.teacher)
            return make_report([self.path], output, num_images=num_images, teacher=teacher)[0]

    def __str__(self) -> str:
        return summary_line(self.record)

    def __repr__(self) -> str:
        return f"<synq.Run {self.path}: {self}>"

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><th style='text-align:left'>{name}</th><td>{value:,.4g}</td></tr>"
            for name, value in self.metrics.items()
        )
        notes = "".join(f"<li>{html.escape(text)}</li>" for text in self.record.warnings)
        return (
            f"<div><b>{html.escape(str(self))}</b><table>{rows}</table>"
            + (f"<ul>{notes}</ul>" if notes else "")
            + f"<code>{html.escape(str(self.path))}</code></div>"
        )

    def _value(self, key: str) -> Any:
        part, _, name = key.partition(".")
        return getattr(getattr(self.config, part), name)

    def _opened(self) -> finished.Run:
        """Return the run as its files have it, with a copy of the teacher that may be moved and changed."""
        moved = {key: self._value(key) for key in PATH_SETTINGS}
        return finished.open_run(self.path, moved, working_copy(self.teacher))


@named_as_arguments
def open_run(
    path: str | Path,
    *,
    model: Model = None,
    dataset: Any = None,
    moved: Mapping[str, Any] | None = None,
    trust: bool = False,
) -> Run:
    """Open a finished run: its record, its teacher and its student.

    Args:
        path: Folder of the run, the record in it, or a sweep's record of a trial (records/TRIAL.json).
        model: The network of a run whose teacher was in memory; its code and weights must be those of the run.
        dataset: Labeled images of a run whose were in memory, which `evaluate` and `export` use; without them a file is
            verified on synthetic images only.
        moved: New paths of files that were moved since the run, by dotted key, such as {"teacher.weights": FILE}.
        trust: Whether to run code that the record names and that is not known as that of a run of yours.

    Raises:
        FileNotFoundError: The folder has no finished run.
        ValueError: A file is damaged, the network is not the run's, or its code may not run.
    """
    with session(progress=True), trusting(trust):
        folder = finished_folder(path)
        record = read_record(folder / "record.json")
        config = config_from_dict(RunConfig, record.config, source=str(folder / "record.json"))
        config = with_overrides(config, dict(moved or {}))
        needs_model = config.teacher.spec.startswith(f"{MEMORY}:")
        if needs_model and not is_network(model):
            raise ValueError(
                f"`model` must be the network of the run, because {record.model} was an object in memory "
                f"({config.teacher.spec}), but got {'none' if model is None else type(model).__name__}"
            )
        if not needs_model and model is not None:
            raise ValueError(f"`model` must be left out, because the run names its teacher: {config.teacher.spec}")
        if not needs_model:
            finished.check_code(record, config, folder / "record.json", named=(moved or {}).get("teacher.spec"))
        config, teacher = open_model(model, config)
        if teacher.digest != record.teacher.get("digest"):
            raise ValueError(
                f"`model` must have the code and the weights of the run in {folder}, {record.model} with digest "
                f"{str(record.teacher.get('digest'))[:12]}, but has digest {teacher.digest[:12]}"
            )
        return Run(folder, config, finished.with_rule_of(record, teacher), in_memory(dataset))


def load_student(path: str | Path, *, model: Model = None, trust: bool = False) -> nn.Module:
    """Return the student of a finished run, as `Run.student`.

    Args:
        path: As for `synq.open_run`.
        model: As for `synq.open_run`.
        trust: As for `synq.open_run`.

    Raises:
        FileNotFoundError: As `synq.open_run`.
        ValueError: As `synq.open_run`.
    """
    return open_run(path, model=model, trust=trust).student


__all__ = ["Export", "Recount", "Run", "RunRecord", "load_student", "open_run"]
