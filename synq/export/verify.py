"""Does an exported file compute what the student computes? Run both on the same images and compare."""

import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from synq.config.parsing import between

if TYPE_CHECKING:
    import onnxruntime

IMAGES = "images"
"""Name of an exported model's input (N, C, H, W)."""
INTEGER_CONVOLUTIONS = ("QLinearConv", "ConvInteger", "QLinearMatMul", "MatMulInteger", "QGemm")
FLOAT_CONVOLUTIONS = ("Conv", "FusedConv", "MatMul", "Gemm", "FusedMatMul", "FusedGemm", "NhwcFusedConv")
Engine = Callable[[Tensor], Tensor]
"""(N, C, H, W) float32 -> logits (N, K) float32, on the CPU."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """An exported file beside its student, on one set of images.

    Attributes:
        source: Which images: synthetic or labelled.
        images: Their number.
        margin: Difference of the student's two largest logits above which an image counts as decided.
        decided: Number of those.
        agreement: Percent of the decided images on which both choose the same class.
        agreement_all: The same of all images.
        mean_difference: Mean absolute difference of the logits, as a share of their standard deviation in the student.
        max_difference: Largest absolute difference of the logits.
        student_top1, file_top1: Percent of labelled images; None without labels.
    """

    source: str
    images: int
    margin: float
    decided: int
    agreement: float
    agreement_all: float
    mean_difference: float
    max_difference: float
    student_top1: float | None = None
    file_top1: float | None = None

    @property
    def differing(self) -> int:
        """Decided images on which the classes differ."""
        return round(self.decided * (100 - self.agreement) / 100)


@dataclass(frozen=True, kw_only=True)
class Tolerance:
    """What an exported file may differ by before it is refused.

    Attributes:
        agreement: Least percent of decided images with the same class; of fewer than 1,000 one image may differ all the same.
        margin: Difference of the two largest logits from which an image counts as decided.
        mean_difference: Largest mean difference, see `Comparison`.
    """

    agreement: float = 99.9
    margin: float = 0.0
    mean_difference: float = 0.05

    def __post_init__(self) -> None:
        between("agreement", self.agreement, 0, 100)
        between("margin", self.margin, 0)
        between("mean_difference", self.mean_difference, 0)

    def complaint(self, found: Comparison, own: Comparison | None = None) -> str:
        """Return what is wrong with a comparison, "" where it is good enough.

        An integer form gives the same codes on every engine where nothing but sums of integers, multiplications and additions stands
        between two quantizers. Where an exponential does, say, engines differ in its last digit, that moves an activation across the edge of
        its step now and then, and a deep low-bit network carries it on. How much it does so shows in the student of the fine-tuning, whose sums
        are those of floats: a file may differ twice as often and as far.

        Args:
            found: The file beside the student's integer form.
            own: The student of the fine-tuning beside its integer form, on the same images.
        """
        allowed = max(1, int(found.decided * (100 - self.agreement) / 100 + 1e-9))
        mean = self.mean_difference
        if own is not None:
            if found.differing > allowed and own.differing * 10 > own.decided:
                return (
                    f"it cannot be checked: with sums in float the student chooses another class on {own.differing} of {own.decided} "
                    f"{own.source} images"
                )
            allowed, mean = max(allowed, 2 * own.differing), max(mean, 2 * own.mean_difference)
        if not found.decided:
            return (
                f"it cannot be checked: on none of {found.images} {found.source} images do the student's two largest logits differ by "
                f"more than {found.margin:g}"
            )
        if found.differing > allowed:
            itself = f"; with sums in float the student on {own.differing}" if own is not None and own.differing else ""
            return (
                f"it chooses another class than the student on {found.differing} of {found.decided} {found.source} images "
                f"({found.agreement:.2f} % agree, {self.agreement} % are asked for{itself})"
            )
        if not found.mean_difference <= mean:  # also a NaN
            return (
                f"its logits differ from the student's by {found.mean_difference:.3g} of their standard deviation on "
                f"{found.images} {found.source} images (at most {mean:.3g} is asked for)"
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
    """Run a file on batches that its student has answered.

    Args:
        engine: What runs the file.
        batches: The student's logits (N, K), images (N, C, H, W), and labels (N,) where there are some.
        source: What the images are, for the record.
        margin: See `Tolerance`.

    Raises:
        ValueError: If there are no images.
    """
    columns: list[list[Tensor]] = [[] for _ in range(6)]
    labelled = True
    for wanted, images, labels in batches:
        found = engine(images)
        top = wanted.topk(2, dim=1).values
        same = wanted.argmax(1) == found.argmax(1)
        right = [torch.zeros_like(same) if labels is None else logits.argmax(1) == labels for logits in (wanted, found)]
        labelled = labelled and labels is not None
        row = (wanted, (wanted - found).abs(), top[:, 0] - top[:, 1] > margin, same, *right)
        for column, values in zip(columns, row, strict=True):
            column.append(values)
    if not columns[0]:
        raise ValueError(f"an exported file must be compared on at least one image, but there are no {source} images")
    wanted, difference, decided, same, student_right, file_right = (torch.cat(column) for column in columns)
    return Comparison(
        source=source,
        images=len(same),
        margin=margin,
        decided=int(decided.sum()),
        agreement=100 * float(same[decided].float().mean()) if bool(decided.any()) else 100.0,
        agreement_all=100 * float(same.float().mean()),
        mean_difference=float(difference.mean() / wanted.std().clamp(min=1e-12)),
        max_difference=float(difference.max()),
        student_top1=100 * float(student_right.float().mean()) if labelled else None,
        file_top1=100 * float(file_right.float().mean()) if labelled else None,
    )


def open_session(model: bytes, threads: int = 0, optimized: Path | None = None) -> "onnxruntime.InferenceSession":
    """Return an ONNX Runtime session on the CPU with the default optimisations.

    Args:
        model: An ONNX model.
        threads: Threads within an operation; 0 leaves ONNX Runtime its default.
        optimized: Where ONNX Runtime writes the graph that it really runs.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # one warning per model about a file that holds for this machine alone
    if threads:
        options.intra_op_num_threads = threads
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def engine_of(session: "onnxruntime.InferenceSession") -> Engine:
    """Return an engine that runs a session."""

    def run(images: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {IMAGES: images.float().numpy()})[0])

    return run


def count_kernels(model: bytes) -> tuple[int, int]:
    """Return how many convolutions and matrix products ONNX Runtime runs in integers, and how many in float, on this machine."""
    import onnx

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "optimized.onnx"
        open_session(model, optimized=path)
        nodes = onnx.load(path).graph.node
    kinds = [node.op_type for node in nodes]
    return sum(kind in INTEGER_CONVOLUTIONS for kind in kinds), sum(kind in FLOAT_CONVOLUTIONS for kind in kinds)


def latencies(models: dict[str, bytes], images: Tensor, *, threads: int = 0, rounds: int = 30) -> dict[str, float]:
    """Return the median milliseconds of one run of each model on ``images`` (N, C, H, W).

    Sessions take turns in one process, so that whatever else the machine does falls on all of them alike.
    """
    sessions = {name: open_session(model, threads) for name, model in models.items()}
    feed = {IMAGES: images.float().numpy()}
    times: dict[str, list[float]] = {name: [] for name in models}
    for turn in range(rounds + 3):
        for name, session in sessions.items():
            started = time.perf_counter()
            session.run(None, feed)
            if turn >= 3:  # the first runs allocate
                times[name].append(1000 * (time.perf_counter() - started))
    return {name: statistics.median(values) for name, values in times.items()}
