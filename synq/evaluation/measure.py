"""Measure a network: exact top-1 and top-5 on labelled images, fidelity to the teacher on synthetic ones.

Counts are summed over processes and divided once, so any number of processes and any batch size give the same figure.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from accelerate import Accelerator
from torch import Tensor, fx, nn

from synq.common.progress import passing_bar
from synq.config.run import EvaluationConfig
from synq.evaluation import fidelity as measures
from synq.evaluation.labelled import LabelledSet, load_labelled
from synq.quant.integer_form import integer_form
from synq.teacher.teacher import Teacher

Fetch = Callable[[Tensor], tuple[Tensor, Tensor]]
_TEACHERS: dict[tuple[object, ...], "Accuracy"] = {}
"""Accuracy of each teacher, by all that decides it: a process that does many runs of one counts its correct answers once."""


@dataclass(frozen=True, kw_only=True)
class Accuracy:
    """Accuracy on labelled images, in percent.

    Attributes:
        top1: Share of images whose label is the largest logit.
        top5: Share of images whose label is among the five largest (all, with fewer classes).
        num_images: Images counted.
        hits: (n,) bool on the CPU, whether the largest logit of each image of *this process* is its label, in the order of its row numbers.
    """

    top1: float
    top5: float
    num_images: int
    hits: Tensor = field(repr=False, compare=False)


def forget_teachers() -> None:
    """Let every teacher be counted anew, as in a fresh process."""
    _TEACHERS.clear()


@torch.no_grad()
def evaluate(
    net: nn.Module, fetch: Fetch, indices: Tensor, *, batch_size: int, accelerator: Accelerator, progress: bool = False
) -> Accuracy:
    """Count correct answers over ``indices``, each image once, whatever the number of processes.

    Args:
        net: (N, C, H, W) -> logits (N, K), in evaluation mode, on the device of ``accelerator``.
        fetch: Gives (images (n, C, H, W), labels (n,)) of row numbers.
        indices: Row numbers to count.
        batch_size: Images per forward pass over all processes.
        accelerator: Process group.
        progress: Whether a terminal shows a progress bar (of the main process).

    Raises:
        ValueError: If there is nothing to count.
    """
    if len(indices) == 0:
        raise ValueError("evaluation must see at least one labelled image, but got 0")
    dtype = _dtype(net)
    counts = torch.zeros(3, dtype=torch.int64, device=accelerator.device)
    hits = [torch.zeros(0, dtype=torch.bool, device=accelerator.device)]  # a process may have no image at all
    parts = _share(indices, batch_size, accelerator)
    is_shown = progress and accelerator.is_main_process
    with passing_bar(sum(map(len, parts)), "labelled images", "image", is_shown=is_shown) as bar:
        for rows in parts:
            images, labels = fetch(rows)
            logits = net(images.to(accelerator.device, dtype))
            labels = labels.to(accelerator.device)
            best = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
            hits.append(best[:, 0])
            seen = torch.tensor(len(rows), device=best.device)
            counts += torch.stack([best[:, 0].sum(), best.any(dim=1).sum(), seen])
            bar.update(len(rows))
    first, five, number = accelerator.reduce(counts, reduction="sum").tolist()
    return Accuracy(top1=100 * first / number, top5=100 * five / number, num_images=number, hits=torch.cat(hits).cpu())


def lost_and_gained(before: Accuracy, after: Accuracy, *, accelerator: Accelerator) -> tuple[int, int]:
    """Compare two networks image by image, over all processes.

    The difference of their top-1 is 100 (lost - gained) / num_images; how sure it is depends on lost + gained.

    Args:
        before, after: From `evaluate` with the same row numbers and process group.
        accelerator: Process group.

    Returns:
        Images that only ``before`` has right (lost), and images that only ``after`` has right (gained).
    """
    counts = torch.stack([(before.hits & ~after.hits).sum(), (after.hits & ~before.hits).sum()])
    lost, gained = accelerator.reduce(counts.to(accelerator.device), reduction="sum").tolist()
    return lost, gained


@dataclass(frozen=True, kw_only=True)
class Reference:
    """A teacher's answers to fixed images, computed once for all students: this process's share, in batches.

    Attributes:
        images: (N, C, H, W), all of them.
        rows: Row numbers of each batch, (n,).
        logits: The teacher's logits of each batch, (n, K), on the device.
    """

    images: Tensor
    rows: Sequence[Tensor]
    logits: Sequence[Tensor]

    @classmethod
    @torch.no_grad()
    def of(cls, teacher: nn.Module, images: Tensor, *, batch_size: int, accelerator: Accelerator) -> "Reference":
        """Let the teacher answer.

        Args:
            teacher: (N, C, H, W) -> logits (N, K), in evaluation mode, on the device of ``accelerator``.
            images: (N, C, H, W).
            batch_size: Images per forward pass over all processes.
            accelerator: Process group.
        """
        rows = _share(torch.arange(len(images)), batch_size, accelerator)
        logits = [teacher(_batch(images, part, teacher, accelerator)) for part in rows]
        return cls(images=images, rows=rows, logits=logits)


@torch.no_grad()
def fidelity(
    reference: Reference, student: nn.Module, functions: Mapping[str, measures.Measure], *, accelerator: Accelerator
) -> dict[str, float]:
    """Measure how closely the student follows the teacher on images without labels: means over all images.

    Args:
        reference: Images and the teacher's answers.
        student: (N, C, H, W) -> logits (N, K), in evaluation mode, on the device of ``accelerator``.
        functions: Measures by name.
        accelerator: Process group.

    Returns:
        The mean of each measure over the images of all processes, by name.
    """
    sums = torch.zeros(len(functions) + 1, dtype=torch.float64, device=accelerator.device)
    for rows, wanted in zip(reference.rows, reference.logits, strict=True):
        got = student(_batch(reference.images, rows, student, accelerator))
        values = [function(wanted, got).double().sum() for function in functions.values()]
        sums += torch.stack([*values, torch.full_like(values[0], len(rows))])
    *totals, seen = accelerator.reduce(sums, reduction="sum").tolist()
    return {name: total / seen for name, total in zip(functions, totals, strict=True)}


def _batch(images: Tensor, rows: Tensor, net: nn.Module, accelerator: Accelerator) -> Tensor:
    return images[rows.to(images.device)].to(accelerator.device, _dtype(net))


def _share(indices: Tensor, batch_size: int, accelerator: Accelerator) -> list[Tensor]:
    """Row numbers of this process, in batches; none is repeated to fill up."""
    mine = indices[accelerator.process_index :: accelerator.num_processes]
    return list(mine.split(max(1, batch_size // accelerator.num_processes))) if len(mine) else []


def _kind(net: nn.Module) -> tuple[object, ...]:
    """Return what of a network's placement may change a result by rounding: device, format and layout."""
    return tuple((p.device.type, p.dtype, p.is_contiguous()) for p in net.parameters())


def _dtype(net: nn.Module) -> torch.dtype:
    return next((p.dtype for p in net.parameters()), torch.float32)


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """What was measured of one network.

    Attributes:
        objective: Value of the configured objective.
        fidelity: From `fidelity`, on the held-out synthetic images.
        top1, top5, num_eval: On the labelled images that are reported on; None without labels.
        lost, gained: Those of them that only the teacher, or only the network has right; None without labels.
    """

    objective: float | None
    fidelity: dict[str, float | None]
    top1: float | None
    top5: float | None
    num_eval: int | None
    lost: int | None = None
    gained: int | None = None


@dataclass(kw_only=True)
class Measure:
    """Measures any network of a run: fidelity on the held-out set, accuracy on labelled images where there are some.

    Attributes:
        settings: What is measured.
        teacher: The network that fidelity is measured against.
        accelerator: Process group.
        labelled: Labelled images, or None.
        chosen: Row numbers on which the objective "selection" is measured.
        reported: The other row numbers, on which accuracy is reported.
        labels_digest: Fingerprint of the labelled images, "" without.
        progress: Whether a terminal shows a progress bar over labelled images.
        heldout: (N, C, H, W) held-out synthetic images.
    """

    settings: EvaluationConfig
    teacher: Teacher
    accelerator: Accelerator
    labelled: LabelledSet | None
    chosen: Tensor
    reported: Tensor
    labels_digest: str = ""
    progress: bool = False
    heldout: Tensor = field(default_factory=lambda: torch.empty(0))
    _reference: Reference | None = field(default=None, init=False, repr=False)
    """Made when the first network is measured: by then the teacher stands on its device."""
    _teacher: Accuracy | None = field(default=None, init=False, repr=False)
    """The teacher on the reported images, counted at the same time."""

    @classmethod
    def prepare(
        cls, settings: EvaluationConfig, teacher: Teacher, accelerator: Accelerator, *, progress: bool = False
    ) -> "Measure":
        """Open the labelled images and divide them as the objective asks.

        Raises:
            ValueError, FileNotFoundError: If the set cannot be read, or does not suit the objective.
        """
        spec = settings.dataset or teacher.default_dataset
        labelled = None
        if spec is not None and spec != "none":
            labelled = load_labelled(
                spec,
                teacher.input_size,
                teacher.mean,
                teacher.std,
                num_classes=teacher.num_classes,
                data_dir=settings.data_dir,
                limit=settings.num_images,
            )
        rows = torch.arange(len(labelled) if labelled is not None else 0)
        mask = torch.zeros(len(rows), dtype=torch.bool)
        if settings.objective == "selection":
            if labelled is None:
                raise ValueError("evaluation.objective must be synthetic without labelled images, but got selection")
            mask = labelled.selection_mask(settings.selection_fraction)
            if not mask.any() or mask.all():
                raise ValueError(
                    f"evaluation.selection_fraction must leave images on both sides, but got {settings.selection_fraction} "
                    f"of {len(rows)}"
                )
        return cls(
            settings=settings,
            teacher=teacher,
            accelerator=accelerator,
            labelled=labelled,
            chosen=rows[mask],
            reported=rows[~mask],
            labels_digest="" if labelled is None else labelled.fingerprint(),
            progress=progress,
        )

    def hold_out(self, images: Tensor) -> None:
        """Take the held-out images (N, C, H, W)."""
        self.heldout, self._reference = images, None

    def objective(self, net: fx.GraphModule) -> float:
        """Return the objective's value: the fidelity measure (lower is better), or top-1 in percent on the chosen part."""
        return self._objective(self._measured(net))

    def _measured(self, net: fx.GraphModule) -> fx.GraphModule:
        """Return what is measured: the teacher itself; of a student its integer form, so that a figure is that of what an engine runs.

        A student in float64 was asked for by its user, and one that is no longer finite has no codes: both are measured as they are.
        """
        if net is self.teacher.graph or _dtype(net) is torch.float64:
            return net
        statistics = (tensor for name, tensor in net.named_buffers() if "running_" in name)
        finite = all(bool(tensor.isfinite().all()) for tensor in (*net.parameters(), *statistics))
        return integer_form(net).to(self.accelerator.device) if finite else net

    def _objective(self, net: fx.GraphModule) -> float:
        if self.settings.objective == "selection":
            return self._accuracy(net, self.chosen).top1
        name = self.settings.fidelity_measure
        return self._means(net, {name: measures.OBJECTIVES[name]})[name]

    def _accuracy(self, net: fx.GraphModule, rows: Tensor) -> Accuracy:
        assert self.labelled is not None
        size, teacher = self.settings.batch_size, self.teacher
        source = (self.settings.dataset, self.settings.data_dir, self.labels_digest, tuple(rows.tolist()))
        key = (teacher.digest, teacher.mean, teacher.std, *source, _kind(net), size)
        # Counting is a collective call: with several processes all of them count, whatever one of them remembers.
        remembers = net is teacher.graph and self.accelerator.num_processes == 1
        if remembers and (known := _TEACHERS.get(key)) is not None:
            return known
        found = evaluate(
            net, self.labelled.batch, rows, batch_size=size, accelerator=self.accelerator, progress=self.progress
        )
        if remembers:
            _TEACHERS[key] = found
        return found

    def _fidelity(self, net: fx.GraphModule) -> dict[str, float]:
        """Return kl, agreement, logit_mse and the chosen measure under its name."""
        functions: dict[str, measures.Measure] = {"kl": measures.kl, "agreement": measures.disagreement}
        functions["logit_mse"] = measures.logit_mse
        name = self.settings.fidelity_measure
        values = self._means(net, {**functions, name: measures.OBJECTIVES[name]})
        return {**values, "agreement": 100 - values["agreement"]}

    def _means(self, net: fx.GraphModule, functions: Mapping[str, measures.Measure]) -> dict[str, float]:
        if self._reference is None:
            size = self.settings.batch_size
            self._reference = Reference.of(
                self.teacher.graph, self.heldout, batch_size=size, accelerator=self.accelerator
            )
        return fidelity(self._reference, net, functions, accelerator=self.accelerator)

    def __call__(self, net: fx.GraphModule) -> Measurement:
        """Measure the teacher, or a student in its integer form, in full; a collective call when there are several processes."""
        net = self._measured(net)
        values = self._fidelity(net)
        chosen = values[self.settings.fidelity_measure]
        objective = chosen if self.settings.objective == "synthetic" else self._objective(net)
        if self.labelled is None:
            return Measurement(objective=objective, fidelity={**values}, top1=None, top5=None, num_eval=None)
        if self._teacher is None:
            self._teacher = self._accuracy(self.teacher.graph, self.reported)
        accuracy = self._teacher if net is self.teacher.graph else self._accuracy(net, self.reported)
        lost, gained = lost_and_gained(self._teacher, accuracy, accelerator=self.accelerator)
        return Measurement(
            objective=objective,
            fidelity={**values},
            top1=accuracy.top1,
            top5=accuracy.top5,
            num_eval=accuracy.num_images,
            lost=lost,
            gained=gained,
        )
