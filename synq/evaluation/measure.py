"""Evaluation of a network: top-1 and top-5 accuracy on labeled images, fidelity to the teacher on synthetic images.

Counts are summed over processes and divided once: results depend neither on the number of processes nor on batch size.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from accelerate import Accelerator
from torch import Tensor, fx, nn

from synq.common.progress import passing_bar
from synq.config.quant import RESEARCH
from synq.config.run import EvaluationConfig, QuantConfig
from synq.engines.deployed import deployed_network
from synq.evaluation import fidelity as measures
from synq.evaluation.accuracy import top_hits
from synq.evaluation.harder_views import HarderViews
from synq.evaluation.labeled import DIGEST_PREFIX, LabeledSet, open_labeled
from synq.evaluation.teacher_logits import TeacherLogits, dtype_of_net, fidelity, local_batches
from synq.teacher.teacher import Teacher

Fetch = Callable[[Tensor], tuple[Tensor, Tensor]]
_TEACHER_ACCURACY: dict[tuple[object, ...], "Accuracy"] = {}
"""Cached accuracies of teachers, by everything that determines them: a process of many runs evaluates each once."""


@dataclass(frozen=True, kw_only=True)
class Accuracy:
    """Accuracy on labeled images.

    Attributes:
        top1: Top-1 accuracy in percent, see `top_hits`.
        top5: Top-5 accuracy in percent (100 with at most five classes).
        num_images: Number of images.
        hits: (n,) bool on the CPU: whether the top-1 prediction is correct, for the images of *this process* in the
            order of their indices.
    """

    top1: float
    top5: float
    num_images: int
    hits: Tensor = field(repr=False, compare=False)


def forget_teachers() -> None:
    """Clear the cache of the teachers' accuracies."""
    _TEACHER_ACCURACY.clear()


@torch.no_grad()
def evaluate(
    net: nn.Module, fetch: Fetch, indices: Tensor, *, batch_size: int, accelerator: Accelerator, progress: bool = False
) -> Accuracy:
    """Return the accuracy of a network; each image is counted exactly once for any number of processes.

    Args:
        net: (N, C, H, W) -> logits (N, K), in eval mode, on the device of ``accelerator``.
        fetch: Returns (images (n, C, H, W), labels (n,)) for indices (n,).
        indices: (N,) int64, the images to evaluate.
        batch_size: Images per forward pass over all processes.
        accelerator: Process group.
        progress: Whether the main process shows a progress bar.

    Raises:
        ValueError: If ``indices`` is empty.
    """
    if len(indices) == 0:
        raise ValueError("evaluation must have at least one labeled image, but got 0")
    dtype = dtype_of_net(net)
    counts = torch.zeros(3, dtype=torch.int64, device=accelerator.device)
    hits = [torch.zeros(0, dtype=torch.bool, device=accelerator.device)]  # a process may have no image at all
    batches = local_batches(indices, batch_size, accelerator)
    is_shown = progress and accelerator.is_main_process
    with passing_bar(sum(map(len, batches)), "labeled images", "image", is_shown=is_shown) as bar:
        for rows in batches:
            images, labels = fetch(rows)
            logits = net(images.to(accelerator.device, dtype))
            first, five = top_hits(logits, labels.to(accelerator.device))
            hits.append(first)
            counts += torch.stack([first.sum(), five.sum(), first.new_tensor(len(rows), dtype=torch.int64)])
            bar.update(len(rows))
    first, five, number = accelerator.reduce(counts, reduction="sum").tolist()
    return Accuracy(top1=100 * first / number, top5=100 * five / number, num_images=number, hits=torch.cat(hits).cpu())


def lost_and_gained(before: Accuracy, after: Accuracy, *, accelerator: Accelerator) -> tuple[int, int]:
    """Count the images on which exactly one of two networks is correct, over all processes.

    The difference in top-1 is 100 (lost - gained) / num_images; its uncertainty depends on lost + gained.

    Args:
        before, after: Results of `evaluate` with the same indices and process group.
        accelerator: Process group.

    Returns:
        Number of images that only ``before`` classifies correctly (lost), and that only ``after`` does (gained).
    """
    counts = torch.stack([(before.hits & ~after.hits).sum(), (after.hits & ~before.hits).sum()])
    lost, gained = accelerator.reduce(counts.to(accelerator.device), reduction="sum").tolist()
    return lost, gained


def _placement(net: nn.Module) -> tuple[object, ...]:
    """Return device, dtype and contiguity of each parameter, which may change results by rounding."""
    return tuple((p.device.type, p.dtype, p.is_contiguous()) for p in net.parameters())


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """Results of one network.

    Attributes:
        objective: Value of the configured objective.
        fidelity: Fidelity measures on the held-out synthetic images.
        top1, top5: Accuracy in percent on the reported labeled images; None without labels.
        num_eval: Number of reported labeled images; None without labels.
        lost, gained: How many of them only the teacher, or only the network classifies correctly; None without labels.
        harder: Agreement in percent and KL on the views of `harder_views`; empty for the teacher, or without held-out
            labels.
    """

    objective: float | None
    fidelity: dict[str, float | None]
    top1: float | None
    top5: float | None
    num_eval: int | None
    lost: int | None = None
    gained: int | None = None
    harder: dict[str, float | None] = field(default_factory=dict)


@dataclass(kw_only=True)
class Measure:
    """Evaluator of the networks of a run: fidelity on the held-out set, and accuracy if there are labeled images.

    Attributes:
        settings: Settings of the evaluation.
        teacher: The reference of the fidelity.
        accelerator: Process group.
        labeled: Labeled images, or None.
        chosen: Indices of the images for the objective "selection".
        reported: Indices of the other images, on which accuracy is reported.
        labels_digest: Fingerprint of the labeled images, "" if there are none.
        progress: Whether to show a progress bar over the labeled images.
        quant: Quantization of the students, whose target decides what is measured in their place.
        heldout: (N, C, H, W), held-out synthetic images.
    """

    settings: EvaluationConfig
    teacher: Teacher
    accelerator: Accelerator
    labeled: LabeledSet | None
    chosen: Tensor
    reported: Tensor
    labels_digest: str = ""
    progress: bool = False
    quant: QuantConfig = field(default_factory=QuantConfig)
    heldout: Tensor = field(default_factory=lambda: torch.empty(0))
    _reference: TeacherLogits | None = field(default=None, init=False, repr=False)
    """Computed with the first network, when the teacher is on its final device."""
    _teacher: Accuracy | None = field(default=None, init=False, repr=False)
    """Accuracy of the teacher on the reported images, computed at the same time."""
    _harder: HarderViews | None = field(default=None, init=False, repr=False)

    @classmethod
    def prepare(
        cls,
        settings: EvaluationConfig,
        teacher: Teacher,
        accelerator: Accelerator,
        *,
        quant: QuantConfig,
        progress: bool = False,
    ) -> "Measure":
        """Load the labeled images and split them as the objective requires.

        Raises:
            ValueError, FileNotFoundError: If the set cannot be read or does not support the objective.
        """
        labeled = open_labeled(settings, teacher)
        rows = torch.arange(len(labeled) if labeled is not None else 0)
        mask = torch.zeros(len(rows), dtype=torch.bool)
        if settings.objective == "selection":
            if labeled is None:
                raise ValueError("evaluation.objective must be synthetic without labeled images, but got selection")
            mask = labeled.selection_mask(settings.selection_fraction)
            if not mask.any() or mask.all():
                raise ValueError(
                    "evaluation.selection_fraction must leave images on both sides, "
                    f"but got {settings.selection_fraction} of {len(rows)}"
                )
        return cls(
            settings=settings,
            teacher=teacher,
            accelerator=accelerator,
            labeled=labeled,
            chosen=rows[mask],
            reported=rows[~mask],
            labels_digest="" if labeled is None else labeled.fingerprint(),
            progress=progress,
            quant=quant,
        )

    def has_labels_of(self, digest: str) -> bool:
        """Return whether a recorded digest, also one of an earlier version, is that of the labeled images."""
        if self.labeled is None or not digest or digest.startswith(DIGEST_PREFIX):
            return digest == self.labels_digest
        return digest == self.labeled.earlier_fingerprint()

    def hold_out(self, images: Tensor, labels: Tensor | None = None) -> None:
        """Set the held-out images (N, C, H, W), and their assigned classes (N,) if `Measurement.harder` is wanted."""
        self.heldout, self._reference = images, None
        self._harder = None if labels is None else HarderViews(images, labels)

    def objective(self, net: fx.GraphModule) -> float:
        """Return the objective: the fidelity measure (lower is better), or top-1 in percent on the selection part."""
        return self._objective(self.deployed_form(net))

    def deployed_form(self, net: fx.GraphModule) -> nn.Module:
        """Return the network to evaluate: the teacher unchanged, a student as its engine runs it.

        A student in float64 of target research (a choice of the user; engines have no such form) or with non-finite
        values (it has no integer codes) is unchanged.
        """
        if net is self.teacher.graph or (dtype_of_net(net) is torch.float64 and self.quant.target == RESEARCH):
            return net
        statistics = (tensor for name, tensor in net.named_buffers() if "running_" in name)
        finite = all(bool(tensor.isfinite().all()) for tensor in (*net.parameters(), *statistics))
        return deployed_network(net, self.quant, self.teacher.input_size).to(self.accelerator.device) if finite else net

    def _objective(self, net: nn.Module) -> float:
        if self.settings.objective == "selection":
            return self._accuracy(net, self.chosen).top1
        name = self.settings.fidelity_measure
        return self._means(net, {name: measures.OBJECTIVES[name]})[name]

    def _accuracy(self, net: nn.Module, rows: Tensor) -> Accuracy:
        assert self.labeled is not None
        size, teacher = self.settings.batch_size, self.teacher
        source = (self.settings.dataset, self.settings.data_dir, self.labels_digest, tuple(rows.tolist()))
        key = (teacher.digest, teacher.mean, teacher.std, *source, _placement(net), size)
        # Evaluation is a collective call, so with several processes no process may skip it for a cached result.
        is_cached = net is teacher.graph and self.accelerator.num_processes == 1
        if is_cached and (cached := _TEACHER_ACCURACY.get(key)) is not None:
            return cached
        accuracy = evaluate(
            net, self.labeled.batch, rows, batch_size=size, accelerator=self.accelerator, progress=self.progress
        )
        if is_cached:
            _TEACHER_ACCURACY[key] = accuracy
        return accuracy

    def _fidelity(self, net: nn.Module) -> dict[str, float]:
        """Return kl, agreement, logit_mse and the configured fidelity measure by name."""
        functions: dict[str, measures.Measure] = {"kl": measures.kl, "agreement": measures.disagreement}
        functions["logit_mse"] = measures.logit_mse
        name = self.settings.fidelity_measure
        values = self._means(net, {**functions, name: measures.OBJECTIVES[name]})
        return {**values, "agreement": 100 - values["agreement"]}

    def _on_harder_views(self, net: nn.Module) -> dict[str, float | None]:
        if self._harder is None:
            return {}
        size, teacher = self.settings.batch_size, self.teacher.graph
        return {**self._harder.fidelity(teacher, net, batch_size=size, accelerator=self.accelerator)}

    def _means(self, net: nn.Module, functions: Mapping[str, measures.Measure]) -> dict[str, float]:
        if self._reference is None:
            size = self.settings.batch_size
            self._reference = TeacherLogits.compute(
                self.teacher.graph, self.heldout, batch_size=size, accelerator=self.accelerator
            )
        return fidelity(self._reference, net, functions, accelerator=self.accelerator)

    def __call__(self, net: fx.GraphModule) -> Measurement:
        """Evaluate the teacher, or a student as its engine runs it, completely; a collective call of all processes."""
        is_teacher, form = net is self.teacher.graph, self.deployed_form(net)
        values, harder = self._fidelity(form), {} if is_teacher else self._on_harder_views(form)
        chosen = values[self.settings.fidelity_measure]
        objective = chosen if self.settings.objective == "synthetic" else self._objective(form)
        if self.labeled is None:
            return Measurement(
                objective=objective, fidelity={**values}, top1=None, top5=None, num_eval=None, harder=harder
            )
        if self._teacher is None:
            self._teacher = self._accuracy(self.teacher.graph, self.reported)
        accuracy = self._teacher if is_teacher else self._accuracy(form, self.reported)
        lost, gained = lost_and_gained(self._teacher, accuracy, accelerator=self.accelerator)
        return Measurement(
            objective=objective,
            fidelity={**values},
            top1=accuracy.top1,
            top5=accuracy.top5,
            num_eval=accuracy.num_images,
            lost=lost,
            gained=gained,
            harder=harder,
        )
