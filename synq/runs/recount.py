"""A finished student on other labeled images: top-1 and top-5 of teacher and student, nothing trained."""

from dataclasses import dataclass

from accelerate import Accelerator

from synq.common.statistics import drop_stderr, drop_text
from synq.config.identity import absolute_path, resolved
from synq.config.plugins import DATASET_SOURCE
from synq.config.run import EvaluationConfig, RunConfig, with_overrides
from synq.evaluation.measure import Measure, evaluate, lost_and_gained
from synq.runs.finished import Run
from synq.runtime import place


@dataclass(frozen=True, kw_only=True, slots=True)
class Recount:
    """Accuracy of the student of a finished run on labeled images, in percent."""

    run: str
    """Folder of the run."""
    dataset: str
    """The labeled images, as given."""
    labels_digest: str
    """Their digest."""
    num_eval: int
    """Number of images."""
    teacher_top1: float
    """Top-1 of the teacher."""
    top1: float
    """Top-1 of the student in its integer form (of a run in float64, as it is)."""
    teacher_top5: float
    """Top-5 of the teacher."""
    top5: float
    """Top-5 of the student."""
    drop: float
    """teacher_top1 - top1, in percentage points."""
    drop_stderr: float
    """Its standard error, paired by image."""
    lost: int
    """Images that only the teacher classifies correctly."""
    gained: int
    """Images that only the student classifies correctly."""

    def line(self) -> str:
        """Return the result in one line."""
        return (
            f"{self.dataset} | {self.num_eval} images | teacher {self.teacher_top1:.2f} | student {self.top1:.2f} | "
            f"{drop_text(self.drop, self.drop_stderr)}"
        )


def recount_settings(
    config: RunConfig,
    *,
    dataset: str | None = None,
    data_dir: str | None = None,
    num_images: int | None = None,
    batch_size: int | None = None,
) -> EvaluationConfig:
    """Return the settings of a recount: those of a run, with what was given.

    Args:
        config: The run.
        dataset: Labeled images, as in `EvaluationConfig`; None are the run's.
        data_dir: Folder of named sets; None is the run's.
        num_images: Number of images; None means all of a given set, else as many as in the run.
        batch_size: Images per forward pass; None is the run's.

    Raises:
        ValueError: A value is invalid.
    """
    given = {
        "evaluation.dataset": resolved(DATASET_SOURCE, dataset) if dataset is not None else None,
        "evaluation.data_dir": None if data_dir is None else absolute_path(data_dir),
        "evaluation.batch_size": batch_size,
        "evaluation.num_images": num_images,
    }
    plain: dict[str, object] = (
        {"evaluation.num_images": None, "evaluation.objective": "synthetic"} if dataset is not None else {}
    )
    if dataset is not None and not dataset.startswith("imagefolder:"):  # arrays are not resized by a rule for files
        plain |= {"evaluation.resize_size": None, "evaluation.interpolation": None}
    changes = {**plain, **{key: value for key, value in given.items() if value is not None}}
    return with_overrides(config, changes).evaluation


def recount(run: Run, settings: EvaluationConfig, accelerator: Accelerator, *, progress: bool = False) -> Recount:
    """Count the correct predictions of a finished student and of its teacher on labeled images.

    Args:
        run: The finished run.
        settings: Its `dataset`, `data_dir`, `num_images` and `batch_size` are used.
        accelerator: Process group, whose device computes.
        progress: Whether to show a progress bar.

    Raises:
        ValueError: There are no labeled images, or they do not fit the teacher.
        FileNotFoundError: Their files do not exist.
    """
    measure = Measure.prepare(settings, run.teacher, accelerator, quant=run.config.quant)
    if measure.labeled is None:
        raise ValueError(
            "`dataset` must name labeled images, such as cifar10, imagefolder:PATH or npz:FILE, but got "
            f"{settings.dataset!r}"
        )
    for net in (run.teacher.graph, run.student.net):  # as in the run, whose numbers they must be
        place(net, run.config.runtime, accelerator.device, run.teacher.input_size)
    nets = (run.teacher.graph, measure.deployed_form(run.student.net))
    before, after = (
        evaluate(
            net,
            measure.labeled.batch,
            measure.reported,
            batch_size=settings.batch_size,
            accelerator=accelerator,
            progress=progress,
        )
        for net in nets
    )
    lost, gained = lost_and_gained(before, after, accelerator=accelerator)
    number = after.num_images
    return Recount(
        run=str(run.folder),
        dataset=str(settings.dataset or run.teacher.default_dataset),
        labels_digest=measure.labels_digest,
        num_eval=number,
        teacher_top1=before.top1,
        top1=after.top1,
        teacher_top5=before.top5,
        top5=after.top5,
        drop=100 * (lost - gained) / number,
        drop_stderr=drop_stderr(lost, gained, number),
        lost=lost,
        gained=gained,
    )
