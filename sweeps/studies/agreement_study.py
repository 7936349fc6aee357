"""Logits of many students, good and bad, on views of their held-out synthetic images and on labeled images.

The expected agreement (`synq/evaluation/expected_agreement.py`) is calibrated on them. No label and no labeled image
changes a student; they enter only what the prediction is compared with. Logits are cached by student, so that a study
that was stopped goes on, and another predictor needs no further run.
"""

from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn

from synq.common.files import write_bytes_atomic
from synq.common.seeding import make_generator
from synq.config.run import EvaluationConfig, RunConfig
from synq.engines.deployed import deployed_network
from synq.evaluation.labeled import LabeledSet, open_labeled
from synq.pipeline import run
from synq.quant.student import build_student
from synq.runs.record import run_folder
from synq.runtime import make_accelerator
from synq.synthesis.run_sets import ensure_sets
from synq.teacher.teacher import Teacher, load_teacher
from synq.teacher.weight_files import read_weights

from .fidelity_study import VIEWS

BATCH = 256
STUDY_VIEWS = ("plain", "noise_0.25", "noise_0.5", "mixup_0.5", "mixup_uniform", "cutmix_0.5", "fade_0.5", "boundary")


@dataclass(frozen=True, kw_only=True)
class Student:
    """A student of the study.

    Attributes:
        network: Name of the teacher, the unit of cross-validation.
        variant: How it was made: "rounded", "tuned", ...
        config: Its run, without labeled images.
        labeled: Where its labeled images are.
    """

    network: str
    variant: str
    config: RunConfig
    labeled: EvaluationConfig

    @property
    def name(self) -> str:
        """Return a file name."""
        quant = self.config.quant
        return f"{self.network}-{quant.label}-{quant.points.replace(' ', '_')}-{self.variant}"


@torch.no_grad()
def _logits(net: nn.Module, images: Tensor) -> Tensor:
    return torch.cat([net(part) for part in images.split(BATCH)])


def _labeled_logits(net: nn.Module, labeled: LabeledSet) -> Tensor:
    rows = torch.arange(len(labeled)).split(BATCH)
    with torch.no_grad():
        return torch.cat([net(labeled.batch(part)[0]) for part in rows])


class Network:
    """A teacher with its labeled images, and the views of its held-out sets, computed once."""

    def __init__(self, first: Student) -> None:
        self.teacher: Teacher = load_teacher(first.config.teacher)
        labeled = open_labeled(first.labeled, self.teacher)
        assert labeled is not None
        self.labeled = labeled
        self.known: dict[str, dict[str, Tensor]] = {}
        self.on_labeled = _labeled_logits(self.teacher.graph, labeled)

    def views(self, student: Student) -> dict[str, Tensor]:
        """Return the views of a student's held-out images and the teacher's logits on them, `NAME` and `t.NAME`."""
        _, heldout = ensure_sets(student.config, self.teacher, make_accelerator(student.config.runtime))
        if heldout.digest not in self.known:
            net, pixels, found = self.teacher.graph, self.teacher.pixel_range(), {}
            for name in STUDY_VIEWS:
                generator = make_generator("fidelity study", name)
                images = pixels.clamp(VIEWS[name](heldout.images, heldout.labels, net, generator)).contiguous()
                found |= {name: images, f"t.{name}": _logits(net, images)}
            self.known[heldout.digest] = found
        return self.known[heldout.digest]


def measured(student: Student, network: Network, cache: Path) -> dict[str, Tensor]:
    """Return the logits of a student and its teacher: `t.VIEW`, `s.VIEW`, `t.labeled`, `s.labeled`, and `labels`."""
    path = cache / f"{student.name}.safetensors"
    if path.exists():
        return safetensors.torch.load(path.read_bytes())
    run(student.config)
    config, teacher = student.config, network.teacher
    built = build_student(teacher, config.quant)
    built.net.load_state_dict(read_weights(run_folder(config) / "student.safetensors"))
    form = deployed_network(built.net, config.quant, teacher.input_size)
    views = network.views(student)
    found = {name: logits for name, logits in views.items() if name.startswith("t.")}
    found |= {f"s.{name}": _logits(form, views[name]) for name in STUDY_VIEWS}
    found |= {"t.labeled": network.on_labeled, "s.labeled": _labeled_logits(form, network.labeled)}
    found["labels"] = network.labeled.labels
    cache.mkdir(parents=True, exist_ok=True)
    write_bytes_atomic(path, safetensors.torch.save({name: x.contiguous() for name, x in found.items()}))
    return found
