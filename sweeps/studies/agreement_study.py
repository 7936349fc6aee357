"""Logits of many students, good and bad, on views of their held-out synthetic images and on labeled images.

The expected agreement (`synq/runs/expected_agreement.py`) is calibrated on them. No label and no labeled image changes
a student; they enter only what the prediction is compared with. Logits are cached by student, so that a study that was
stopped goes on, and another predictor needs no further run.
"""

from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, fx, nn

from synq.common.digests import write_sealed
from synq.common.seeding import make_generator
from synq.config.run import EvaluationConfig, RunConfig
from synq.engines.deployed import deployed_network
from synq.evaluation.measure import Measure
from synq.pipeline import run
from synq.quant.student import build_student
from synq.runs.record import read_record, run_folder
from synq.runs.reuse import STUDENT_FILE, check_student
from synq.runtime import make_accelerator
from synq.synthesis.run_sets import ensure_sets
from synq.teacher.teacher import Teacher, load_teacher
from synq.teacher.weight_files import read_weights

from .fidelity_study import BATCH, VIEWS
from .study_folder import stored_logits

STUDY_VIEWS = ("plain", "noise_0.25", "noise_0.5", "mixup_0.5", "mixup_uniform", "cutmix_0.5", "fade_0.5", "boundary")
"""Views that were compared; those of the prediction are among them."""


@dataclass(frozen=True, kw_only=True)
class Student:
    """A student of the study."""

    network: str
    """Name of the teacher, the unit of cross-validation."""
    variant: str
    """How it was made: rounded, tuned, ..."""
    config: RunConfig
    """Its run, without labeled images."""
    labeled: EvaluationConfig
    """Where its labeled images are."""

    @property
    def name(self) -> str:
        """Return the name of its file, NETWORK-BITS-POINTS-VARIANT."""
        quant = self.config.quant
        return f"{self.network}-{quant.label}-{quant.points.replace(' ', '_')}-{self.variant}"


@torch.no_grad()
def _logits(net: nn.Module, images: Tensor) -> Tensor:
    return torch.cat([net(part) for part in images.split(BATCH)])


class Network:
    """A teacher with its labeled images, and the views of its held-out sets, computed once."""

    def __init__(self, first: Student) -> None:
        self.teacher: Teacher = load_teacher(first.config.teacher)
        self.accelerator = make_accelerator(first.config.runtime)
        measure = Measure.prepare(first.labeled, self.teacher, self.accelerator, quant=first.config.quant)
        if measure.labeled is None:
            raise ValueError(f"`{first.network}` must have labeled images, but got {first.labeled.dataset!r}")
        self.labeled = measure.labeled
        self._views: dict[str, dict[str, Tensor]] = {}
        self.on_labeled = self.labeled_logits(self.teacher.graph)

    @torch.no_grad()
    def labeled_logits(self, net: nn.Module) -> Tensor:
        """Return the logits (N, K) of a network on the labeled images."""
        rows = torch.arange(len(self.labeled)).split(BATCH)
        return torch.cat([net(self.labeled.batch(part)[0]) for part in rows])

    def views(self, config: RunConfig) -> dict[str, Tensor]:
        """Return the views of a run's held-out images, and the teacher's logits on them: NAME and t.NAME."""
        _, heldout = ensure_sets(config, self.teacher, self.accelerator)
        if heldout.digest not in self._views:
            net, pixels = self.teacher.graph, self.teacher.pixel_range()
            found: dict[str, Tensor] = {}
            for name in STUDY_VIEWS:
                generator = make_generator("fidelity study", name)
                images = pixels.clamp(VIEWS[name](heldout.images, heldout.labels, net, generator)).contiguous()
                found |= {name: images, f"t.{name}": _logits(net, images)}
            self._views[heldout.digest] = found
        return self._views[heldout.digest]


def deployed_student(config: RunConfig, teacher: Teacher) -> nn.Module:
    """Return the student of a finished run in the form that is measured and exported."""
    student = build_student(teacher, config.quant)
    folder = run_folder(config)
    check_student(folder, read_record(folder / "record.json"))
    student.net.load_state_dict(read_weights(folder / STUDENT_FILE))
    net: fx.GraphModule = student.net
    return deployed_network(net, config.quant, teacher.input_size)


def measured(student: Student, network: Network, cache: Path) -> dict[str, Tensor]:
    """Run a student if need be, and return its and its teacher's logits.

    Args:
        student: The student.
        network: Its teacher.
        cache: Folder of the logits, one file per student.

    Returns:
        `t.NAME` and `s.NAME` (N, K) of teacher and student, for each view and "labeled"; `labels` (N,).

    Raises:
        NonFiniteLossError: Fine-tuning diverged.
    """
    path = cache / f"{student.name}.safetensors"
    if (content := stored_logits(path)) is not None:
        return safetensors.torch.load(content)
    run(student.config)
    form, views = deployed_student(student.config, network.teacher), network.views(student.config)
    found = {name: logits for name, logits in views.items() if name.startswith("t.")}
    found |= {f"s.{name}": _logits(form, views[name]) for name in STUDY_VIEWS}
    found |= {"t.labeled": network.on_labeled, "s.labeled": network.labeled_logits(form)}
    found["labels"] = network.labeled.labels
    cache.mkdir(parents=True, exist_ok=True)
    write_sealed(path, safetensors.torch.save({name: x.contiguous() for name, x in found.items()}))
    return found
