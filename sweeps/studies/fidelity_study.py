"""Study of label-free objectives: all fidelity measures and perturbations, for the trials of a sweep with labels.

A trial's student is rebuilt from its run folder and must reproduce the KL of its record. Its logits are cached in the
output folder, by the digest of the images, so that a study of a growing sweep only computes what is new.
"""

import hashlib
import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, fx

from synq.common.digests import write_sealed
from synq.common.seeding import make_generator
from synq.config.run import RunConfig, config_from_dict
from synq.evaluation import fidelity, harder_views
from synq.finetune.augment import flip_shift
from synq.network.tracing import with_features
from synq.quant.integer_form import integer_form
from synq.quant.student import build_student
from synq.runs.finished import check_code
from synq.runs.record import RunRecord
from synq.runs.reuse import STUDENT_FILE, check_student
from synq.synthesis.dataset import SyntheticSet, tensor_bytes
from synq.synthesis.generate import ensure_set
from synq.synthesis.run_sets import HELDOUT_SEED
from synq.synthesis.store import SetStore
from synq.teacher.teacher import Teacher, load_teacher

from ..leaderboard.records import load_records
from ..studies import perturbations
from .rank_table import Values, table
from .study_folder import stored_logits

MEASURES: dict[str, fidelity.Measure] = {
    "kl": fidelity.kl,
    "kl_t4": lambda t, s: fidelity.kl(t, s, 4.0),
    "reverse_kl": perturbations.reverse_kl,
    "jensen_shannon": fidelity.jensen_shannon,
    "total_variation": perturbations.total_variation,
    "disagreement": fidelity.disagreement,
    "logit_mse": fidelity.logit_mse,
    "logit_angle": perturbations.logit_angle,
    "margin_mse": perturbations.margin_mse,
    "hard_cross_entropy": perturbations.hard_cross_entropy,
    "doubtful_kl": perturbations.doubtful_kl,
}
FEATURES = "features"
"""Name of the one measure on features, available where the teacher has a CAM layer."""
BATCH = 256
SAME_KL = 1e-4
"""Largest relative difference between a rebuilt student's KL and its record's."""
View = Callable[[Tensor, Tensor, Callable[[Tensor], Tensor], torch.Generator], Tensor]


def _mixup(share: float | None) -> View:
    def view(x: Tensor, labels: Tensor, net: Callable[[Tensor], Tensor], generator: torch.Generator) -> Tensor:
        partner = harder_views.partners(labels, generator)
        return harder_views.mixed(x, partner, torch.rand(len(x), generator=generator) if share is None else share)

    return view


def _cutmix(area: float) -> View:
    return lambda x, labels, net, g: perturbations.cut_mixed(x, harder_views.partners(labels, g), area, g)


def _fixed(function: Callable[..., Tensor], *values: float) -> View:
    return lambda x, labels, net, g: function(x, *values)


def _drawn(function: Callable[..., Tensor], *values: float) -> View:
    return lambda x, labels, net, g: function(x, *values, g)


def _attack(epsilon: float) -> View:
    return lambda x, labels, net, g: perturbations.adversarial(x, net, epsilon)


def _after(first: View, second: View) -> View:
    return lambda x, labels, net, g: second(first(x, labels, net, g), labels, net, g)


VIEWS: dict[str, View] = {
    "plain": lambda x, labels, net, g: x,
    "flip_shift": _drawn(flip_shift),
    **{f"lowpass_{cutoff}": _fixed(perturbations.low_passed, cutoff) for cutoff in (0.5, 0.25)},
    **{f"noise_{sigma}": _drawn(perturbations.noisy, sigma) for sigma in (0.1, 0.25, 0.5, 1.0)},
    **{f"shade_{sigma}": _drawn(perturbations.shaded, sigma) for sigma in (0.5, 1.0)},
    "reweight": _fixed(perturbations.reweighted),
    "reweight_mixup": _after(_mixup(0.5), _fixed(perturbations.reweighted)),
    "mixup_0.5": _mixup(0.5),
    "mixup_0.7": _mixup(0.7),
    "mixup_uniform": _mixup(None),
    "mixup_0.5_again": _mixup(0.5),
    "mixup_0.5_noise_0.25": _after(_mixup(0.5), _drawn(perturbations.noisy, 0.25)),
    **{f"cutmix_{area}": _cutmix(area) for area in (0.25, 0.5)},
    "erase_0.25": _drawn(perturbations.erased, 0.25),
    **{f"fade_{contrast}": _fixed(perturbations.faded, contrast) for contrast in (0.5, 0.25)},
    "drown_0.5": _drawn(perturbations.drowned, 0.5),
    **{f"zoom_{size}": _drawn(perturbations.zoomed, size) for size in (0.5, 0.75)},
    **{f"adversarial_{epsilon}": _attack(epsilon) for epsilon in (0.02, 0.05, 0.1, 0.2)},
    "boundary": lambda x, labels, net, g: perturbations.on_boundary(x, harder_views.partners(labels, g), net),
}
"""Views by name: (images, their labels, the teacher, generator) -> images. Each has a separate generator."""
BN_VIEWS = ("plain", "noise_0.5", "mixup_0.5", "cutmix_0.5", "adversarial_0.05")
"""Views also applied to held-out images synthesized from batch-norm statistics alone (`bn_only`)."""
UNIONS: tuple[tuple[str, ...], ...] = (
    ("plain", "mixup_0.5"),
    ("plain", "noise_0.5"),
    ("noise_0.5", "mixup_0.5"),
    ("noise_0.5", "cutmix_0.5"),
    ("mixup_0.5", "mixup_0.5_again"),
    ("mixup_0.5", "cutmix_0.5"),
    ("mixup_0.5", "adversarial_0.05"),
    ("mixup_0.5", "noise_0.5", "adversarial_0.05"),
)
"""Groups of views whose measures are averaged."""


@dataclass(frozen=True, kw_only=True)
class Trial:
    """A completed run: its record, its configuration, and the folder of its student."""

    record: RunRecord
    config: RunConfig
    folder: Path

    @property
    def group(self) -> str:
        """Name of the group within which top-1 may be compared."""
        r = self.record
        return f"{r.model} W{r.weight_bits}A{r.act_bits} {r.protocol} {r.act_points}"


def find_trials(sweep: Path, bits: Sequence[str] = ()) -> list[Trial]:
    """Return the completed trials with labels of a sweep, sorted by group and name.

    Args:
        sweep: Folder of the sweep.
        bits: Bit-widths such as W4A4; none is all.

    Raises:
        ValueError: A trial's student is missing, or there are no such trials.
        FileNotFoundError: There are no records.
    """
    found = []
    for record in load_records([sweep]):
        if record.status != "completed" or record.top1 is None:
            continue
        config = config_from_dict(RunConfig, record.config, source=f"record {record.name}")
        if bits and config.quant.label not in bits:
            continue
        folder = sweep / "runs" / f"{config.name}-{record.config_digest}"
        if not (folder / "student.safetensors").is_file():
            raise ValueError(
                f"`SWEEP_DIR` must hold the student of every trial, but got no {folder}/student.safetensors"
            )
        found.append(Trial(record=record, config=config, folder=folder))
    if not found:
        raise ValueError(f"`SWEEP_DIR` must hold completed trials with labels, but got none in {sweep}")
    return sorted(found, key=lambda trial: (trial.group, trial.record.name))


class ViewSet:
    """The views of one teacher's held-out images, and the teacher's logits on them."""

    def __init__(self, trial: Trial, sweep: Path, output: Path, views: Sequence[str], bn_only: bool) -> None:
        check_code(trial.record, trial.config, trial.folder / "record.json")
        self.teacher: Teacher = load_teacher(trial.config.teacher)
        self.cache = output / "logits"
        synthesis = replace(trial.config.synthesis, num_images=trial.config.evaluation.heldout_images)
        heldout = self._heldout(synthesis, sweep / "store")
        if heldout.digest != trial.record.heldout_digest:
            raise ValueError(
                f"`SWEEP_DIR` must hold the held-out set of its records, but got {heldout.digest[:16]} where "
                f"{trial.record.name} has {trial.record.heldout_digest[:16]}"
            )
        self.images: dict[str, Tensor] = {name: self._view(name, heldout) for name in views}
        if bn_only:
            plain = self._heldout(replace(synthesis, inception_weight=0.0), output / "store")
            self.images |= {f"bn_only_{name}": self._view(name, plain) for name in BN_VIEWS}
        self.digests = {name: hashlib.sha256(tensor_bytes(x)).hexdigest() for name, x in self.images.items()}
        net = self._with_features(self.teacher.graph, self.teacher.cam.node)
        self.expected = {name: _outputs(net, x) for name, x in self.images.items()}

    def _heldout(self, synthesis: Any, store: Path) -> SyntheticSet:
        return ensure_set(self.teacher, synthesis, HELDOUT_SEED, SetStore(store), purpose="heldout", progress=False)

    def _view(self, name: str, heldout: SyntheticSet) -> Tensor:
        generator = make_generator("fidelity study", name)
        return VIEWS[name](heldout.images, heldout.labels, self.teacher.graph, generator).contiguous()

    def _with_features(self, net: fx.GraphModule, node: str) -> fx.GraphModule:
        return with_features(net, node) if self.teacher.cam.kind != "none" else net

    def measure(self, trial: Trial) -> Values:
        """Return every measure on every view of a trial's student.

        Raises:
            ValueError: The rebuilt student does not reproduce the KL of its record.
        """
        check_student(trial.folder, trial.record)
        weights = (trial.folder / STUDENT_FILE).read_bytes()
        cached = self.cache / f"{trial.record.name}-{hashlib.sha256(weights).hexdigest()[:16]}-integers.safetensors"
        known = _read_cache(cached)
        missing = [name for name, digest in self.digests.items() if f"{digest}.logits" not in known]
        if missing:
            student = build_student(self.teacher, trial.config.quant)
            student.net.load_state_dict(safetensors.torch.load(weights))
            net, form = self._with_features(student.net, student.cam_node), integer_form(student.net)
            for name in missing:
                _, features = _outputs(net, self.images[name])
                # As in the record: logits of the integer form, whose features are integer codes.
                known[f"{self.digests[name]}.logits"], _ = _outputs(form, self.images[name])
                expected = self.expected[name][1]
                if features is not None and expected is not None:
                    known[f"{self.digests[name]}.features"] = perturbations.feature_distance(expected, features)
            write_sealed(cached, safetensors.torch.save(known))
        values: Values = {}
        for name, digest in self.digests.items():
            teacher_logits, student_logits = self.expected[name][0], known[f"{digest}.logits"]
            for measure, function in MEASURES.items():
                values[name, measure] = float(function(teacher_logits, student_logits).mean())
            if f"{digest}.features" in known:
                values[name, FEATURES] = float(known[f"{digest}.features"].mean())
        self._check(trial, values["plain", "kl"])
        for union in UNIONS:
            if set(union) <= set(self.images):
                for measure in [measure for name, measure in values if name == union[0]]:
                    values["+".join(union), measure] = sum(values[name, measure] for name in union) / len(union)
        return values

    @staticmethod
    def _check(trial: Trial, found: float) -> None:
        recorded = trial.record.fidelity.get("kl")
        if recorded is None or not math.isclose(found, recorded, rel_tol=SAME_KL, abs_tol=1e-9):
            raise ValueError(
                f"`SWEEP_DIR` must hold the students of its records, but {trial.record.name} has KL "
                f"{found:.8g} instead of {recorded}: the weights or the arithmetic differ from the sweep's"
            )


@torch.no_grad()
def _outputs(net: fx.GraphModule, images: Tensor) -> tuple[Tensor, Tensor | None]:
    parts = [net(batch) for batch in images.split(BATCH)]
    if isinstance(parts[0], Tensor):
        return torch.cat(parts), None
    return torch.cat([logits for logits, _ in parts]), torch.cat([features for _, features in parts])


def _read_cache(path: Path) -> dict[str, Tensor]:
    content = stored_logits(path)
    return {} if content is None else safetensors.torch.load(content)


def study(
    sweep: Path,
    output: Path,
    *,
    bits: Sequence[str] = (),
    views: Sequence[str] = tuple(VIEWS),
    bn_only: bool = False,
    log: Callable[[str], None] = print,
) -> list[dict[str, Any]]:
    """Measure the completed trials of a sweep and return the rows of the table, best first within each group.

    Args:
        sweep: Folder of the sweep.
        output: Folder in which the students' logits are cached.
        bits: Bit-widths such as W4A4; none is all.
        views: Some of `VIEWS`; "plain" is always included.
        bn_only: Also synthesize a held-out set from batch-norm statistics alone and measure on it.
        log: Called with one line for each trial.

    Raises:
        ValueError: A view is unknown, or a student is not that of its record.
    """
    unknown = [name for name in views if name not in VIEWS]
    if unknown:
        raise ValueError(f"`views` must be some of {', '.join(VIEWS)}, but got {unknown[0]!r}")
    views = list(dict.fromkeys(["plain", *views]))
    view_sets: dict[tuple[str, str], ViewSet] = {}
    groups: dict[str, list[tuple[float, Values]]] = defaultdict(list)
    for trial in find_trials(sweep, bits):
        key = (str(trial.record.teacher.get("digest")), trial.record.heldout_digest)
        if key not in view_sets:
            view_sets[key] = ViewSet(trial, sweep, output, views, bn_only)
        assert trial.record.top1 is not None
        groups[trial.group].append((trial.record.top1, view_sets[key].measure(trial)))
        log(f"{trial.group} {trial.record.name}: top-1 {trial.record.top1:.2f}")
    return table(groups)
