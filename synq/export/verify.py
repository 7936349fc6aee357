"""Verify an exported file: run it and the student on the same images, and compare their logits."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from synq.common.processor import VNNI_FLAGS, processor_flags
from synq.config.parsing import between

if TYPE_CHECKING:
    import onnxruntime

IMAGES = "images"
"""Name of an exported model's input (N, C, H, W)."""
Engine = Callable[[Tensor], Tensor]
"""(N, C, H, W) float32 -> logits (N, K) float32, on the CPU."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Differences between an exported file and its student on one set of images.

    Attributes:
        source: Name of the set: synthetic, own (unlabeled images of the user) or labeled.
        images: Number of images.
        margin: An image is decided if the student's two largest logits differ by more than this.
        decided: Number of decided images.
        agreement: Percentage of decided images for which both predict the same class.
        agreement_all: The same for all images.
        mean_difference: Mean absolute difference of the logits, relative to the standard deviation of the student's.
        max_difference: Largest absolute difference of the logits.
        identical: Number of images whose logits are bit-identical.
        student_top1, file_top1: Top-1 accuracy in percent; None without labels.
    """

    source: str
    images: int
    margin: float
    decided: int
    agreement: float
    agreement_all: float
    mean_difference: float
    max_difference: float
    identical: int
    student_top1: float | None = None
    file_top1: float | None = None

    @property
    def differing(self) -> int:
        """Return the number of decided images for which the predicted classes differ."""
        return round(self.decided * (100 - self.agreement) / 100)


@dataclass(frozen=True, kw_only=True)
class Tolerance:
    """Largest accepted difference between an exported file and its student.

    Attributes:
        agreement: Smallest percentage of decided images with the same class; one image may always differ.
        margin: See `Comparison`.
        mean_difference: Largest mean difference, see `Comparison`.
    """

    agreement: float = 99.9
    margin: float = 0.0
    mean_difference: float = 0.05

    def __post_init__(self) -> None:
        between("agreement", self.agreement, 0, 100)
        between("margin", self.margin, 0)
        between("mean_difference", self.mean_difference, 0)

    def violation(self, found: Comparison, simulation: Comparison | None = None, *, exact: bool = False) -> str:
        """Return how a comparison exceeds the tolerance, "" if it does not.

        An integer form gives the same codes on every engine if there are only integer sums, multiplications and
        additions between two quantizers: then every logit must be bit-identical, whatever the tolerance. Engines differ
        in the last digit of other operations, such as an exponential; sometimes this changes the code of an activation,
        and the error propagates through a deep low-bit network. The size of this effect is measured by the fine-tuned
        student, whose sums are float: a file may differ from the integer form twice as often and as much.

        Args:
            found: Comparison of the file with the student's integer form.
            simulation: Comparison of the fine-tuned student with its integer form, on the same images.
            exact: Whether the integer form has only steps that every engine computes in the same way, see
                `exactness.py`.

        Returns:
            One line that continues "FILE was not written: ", or "".
        """
        allowed = max(1, int(found.decided * (100 - self.agreement) / 100 + 1e-9))
        mean = self.mean_difference
        if simulation is not None:
            if found.differing > allowed and simulation.differing * 10 > simulation.decided:
                return (
                    "it cannot be verified: with float sums the student predicts another class for "
                    f"{simulation.differing} of {simulation.decided} {simulation.source} images"
                )
            allowed, mean = max(allowed, 2 * simulation.differing), max(mean, 2 * simulation.mean_difference)
        if not found.decided and found.identical < found.images:
            return (
                f"it cannot be verified: for none of {found.images} {found.source} images do the student's two largest "
                f"logits differ by more than {found.margin:g}"
            )
        if found.differing > allowed:
            differing = 0 if simulation is None else simulation.differing
            simulated = f"; with float sums the student differs for {differing}" if differing else ""
            return (
                f"it predicts another class than the student for {found.differing} of {found.decided} {found.source} "
                f"images ({found.agreement:.2f} % agree, but at least {self.agreement} % must{simulated})"
            )
        if not found.mean_difference <= mean:  # also a NaN
            return (
                f"its logits differ from the student's by {found.mean_difference:.3g} of their standard deviation on "
                f"{found.images} {found.source} images, but by at most {mean:.3g} is allowed"
            )
        if exact and found.identical < found.images:
            return (
                f"its logits differ from the student's for {found.images - found.identical} of {found.images} "
                f"{found.source} images, by up to {found.max_difference:.3g}, but they must be bit-identical: every "
                "step of this student is exact in integers"
            )
        return ""


@torch.no_grad()
def compare(
    engine: Engine,
    batches: Iterable[tuple[Tensor, Tensor, Tensor | None]],
    *,
    source: str,
    margin: float = 0.0,
) -> Comparison:
    """Compare the logits of an exported file with those of its student.

    Args:
        engine: Runs the file.
        batches: The student's logits (N, K), the images (N, C, H, W), and their labels (N,) or None.
        source: Name of the set of images, for the record.
        margin: See `Comparison`.

    Raises:
        ValueError: If there are no images.
    """
    columns: list[list[Tensor]] = [[] for _ in range(7)]
    has_labels = True
    for reference, images, labels in batches:
        found = engine(images)
        top = reference.topk(2, dim=1).values
        same = reference.argmax(1) == found.argmax(1)
        right = [
            torch.zeros_like(same) if labels is None else logits.argmax(1) == labels for logits in (reference, found)
        ]
        has_labels = has_labels and labels is not None
        identical = (reference == found).all(1)
        row = (reference, (reference - found).abs(), top[:, 0] - top[:, 1] > margin, same, identical, *right)
        for column, values in zip(columns, row, strict=True):
            column.append(values)
    if not columns[0]:
        raise ValueError(f"an exported file must be compared on at least one image, but there are no {source} images")
    reference, difference, decided, same, identical, student_right, file_right = map(torch.cat, columns)
    return Comparison(
        source=source,
        images=len(same),
        margin=margin,
        decided=int(decided.sum()),
        agreement=100 * float(same[decided].float().mean()) if bool(decided.any()) else 100.0,
        agreement_all=100 * float(same.float().mean()),
        mean_difference=float(difference.mean() / reference.std().clamp(min=1e-12)),
        max_difference=float(difference.max()),
        identical=int(identical.sum()),
        student_top1=100 * float(student_right.float().mean()) if has_labels else None,
        file_top1=100 * float(file_right.float().mean()) if has_labels else None,
    )


def sums_saturate() -> bool:
    """Return whether engines add products of 8 bits in 16 bits on this processor: an x86 without VNNI."""
    flags = processor_flags()
    return bool(flags) and not flags & VNNI_FLAGS


def open_session(
    model: bytes,
    threads: int = 0,
    optimized: Path | None = None,
    *,
    optimizes: bool = True,
    entries: Mapping[str, str] = MappingProxyType({}),
) -> "onnxruntime.InferenceSession":
    """Return an ONNX Runtime session on the CPU.

    Args:
        model: An ONNX model.
        threads: Threads within an operation; 0: the default of ONNX Runtime.
        optimized: File to which ONNX Runtime writes the optimized graph; None: none.
        optimizes: Whether to apply the default graph optimizations; else each node runs as it is.
        entries: Configuration entries of the session.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    if not optimizes:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3  # each optimized file gets a warning that it is specific to this machine
    for name, value in entries.items():
        options.add_session_config_entry(name, value)
    if threads:
        options.intra_op_num_threads = threads
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def engine_of(session: "onnxruntime.InferenceSession") -> Engine:
    """Return an engine that runs an ONNX Runtime session."""

    def run(images: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {IMAGES: images.float().numpy()})[0])

    return run
