"""Measurements on a finished run for its report: images, spectra, predictions, activation maps, errors of layers.

    open_run -> images and their spectra -> predictions of teacher and student -> maps, layers, ranges

All files of the run are only read. A measurement that fails is replaced by the reason; the others are still made.
"""

import functools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from synq.diagnostics.attention_maps import attention_of, place_of, shown_attention, token_similarities
from synq.diagnostics.layer_errors import layer_errors, range_counts
from synq.diagnostics.probe_parts import (
    Attention,
    ImageGrid,
    LayerError,
    Maps,
    Predictions,
    Probe,
    RangeCount,
    Spectra,
)
from synq.evaluation.measure import Measure
from synq.finetune.responses import TappedNetwork, teacher_response
from synq.network.logits import logits_of
from synq.network.tracing import with_features
from synq.quant.prepare import prepare_student
from synq.quant.student import Student, build_student
from synq.runs.finished import Run, open_run
from synq.synthesis.lowpass import cutoff_in_bins
from synq.synthesis.run_sets import low_pass
from synq.teacher.teacher import Teacher

NUM_IMAGES, LEAST_IMAGES = 1024, 64
"""Bounds on the number of images that teacher and student are evaluated on: many small images, few large ones."""
NUM_PIXELS = 2**23
"""Approximate number of values in these images, so that a page takes seconds, not minutes."""
GRID_CLASSES, GRID_IMAGES = 10, 8
"""Classes in the grid of images, and images per class."""
NUM_MAPS = 6
"""Images for which class activation maps are computed."""
LAYER_IMAGES = 64
"""Largest number of images for the errors and ranges of single layers."""
BATCH, LAYER_BATCH = 64, 4
T = TypeVar("T")


def probe_run(
    folder: str | Path,
    path_overrides: Mapping[str, Any] | None = None,
    num_images: int | None = None,
    teacher: Teacher | None = None,
) -> Probe:
    """Measure a finished run for its report, on the CPU.

    Args:
        folder: As for ``open_run``.
        path_overrides: As for ``open_run``.
        num_images: Largest number of images that the networks are evaluated on; None chooses it by image size.
        teacher: As for ``open_run``.

    Raises:
        FileNotFoundError, ValueError: As ``open_run``, if teacher or student cannot be loaded.
    """
    run = open_run(folder, path_overrides, teacher)
    bounded = max(LEAST_IMAGES, min(NUM_IMAGES, NUM_PIXELS // math.prod(run.teacher.input_size)))
    data = ReportData(run, num_images or bounded)
    return Probe(
        record=run.record,
        images=_or_reason(data.grid),
        spectra=_or_reason(data.spectra),
        predictions=_or_reason(data.predictions),
        maps=_or_reason(data.maps),
        attention=_or_reason(data.attention),
        layers=_or_reason(data.layers),
        ranges=_or_reason(data.ranges),
    )


def _or_reason(measure: Callable[[], T]) -> T | str:
    """Return the result of a measurement, or the reason why it failed."""
    try:
        return measure()
    except Exception as error:  # a measurement that fails must not prevent the others
        return " ".join(str(error).split()) or type(error).__name__


class ReportData:
    """Make the measurements of a report on a finished run; images are loaded once and shared.

    Args:
        run: The finished run.
        num_images: Largest number of images that the networks are evaluated on.
    """

    def __init__(self, run: Run, num_images: int) -> None:
        self.run, self.record, self.config = run, run.record, run.config
        self.teacher, self.student = run.teacher, run.student
        self.num_images = num_images
        self.no_labels_note = ""

    @functools.cached_property
    def _sets(self) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Return images and labels of the held-out and of the training set."""
        train, heldout = self.run.synthetic_sets()
        return (heldout.images, heldout.labels), (train.images, train.labels)

    @functools.cached_property
    def _labeled(self) -> tuple[Tensor, Tensor] | None:
        """Return evenly spaced labeled images of the reported part, or None if the run has none that can be read."""
        try:
            measure = Measure.prepare(
                self.config.evaluation, self.teacher, Accelerator(cpu=True), quant=self.config.quant
            )
        except (ValueError, OSError) as error:
            self.no_labels_note = f" (the labeled ones cannot be read: {' '.join(str(error).split())})"
            return None
        if measure.labeled is None:
            return None
        if not measure.has_labels_of(self.record.eval_digest):
            self.no_labels_note = " (the labeled ones differ from those that the run was evaluated on)"
            return None
        rows = _spread(measure.reported, self.num_images)
        return measure.labeled.batch(rows)

    @functools.cached_property
    def _evaluation_images(self) -> tuple[str, bool, Tensor, Tensor]:
        """Return source, whether labeled, images and labels for the evaluation of both networks.

        Labeled images if there are any, else held-out synthetic ones.
        """
        labeled = self._labeled
        if labeled is not None:
            return "labeled images", True, *labeled
        images, labels = self._sets[0]
        rows = _spread(torch.arange(len(labels)), self.num_images)
        return f"held-out synthetic images{self.no_labels_note}", False, images[rows], labels[rows]

    def grid(self) -> ImageGrid:
        """Return synthetic training images by class, before and after the low-pass filter."""
        images, labels = self._sets[1]
        classes = [int(label) for label in labels.unique()]
        classes = [classes[i] for i in _spread(torch.arange(len(classes)), GRID_CLASSES).tolist()]
        fewest = min(int((labels == label).sum()) for label in classes)
        rows = torch.stack([(labels == label).nonzero()[: min(GRID_IMAGES, fewest), 0] for label in classes])
        chosen = images[rows.flatten()]
        shape = (*rows.shape, *chosen.shape[2:])
        before, after = (
            self._to_pixels(chosen),
            self._to_pixels(low_pass(chosen, self.config, pixel_range=self.teacher.pixel_range())),
        )
        return ImageGrid(
            before=before.clip(0, 1).reshape(*shape, -1),
            after=after.clip(0, 1).reshape(*shape, -1),
            classes=tuple(classes),
            num_images=len(images),
            channels=images.shape[1],
            clipped=float(((before < 0) | (before > 1)).mean()),
        )

    def _kinds(self) -> dict[str, Tensor]:
        """Return synthetic, filtered and, if there are any, labeled images by name."""
        images, _ = self._sets[1]
        images = images[_spread(torch.arange(len(images)), self.num_images)]
        kinds = {"synthetic": images, "filtered": low_pass(images, self.config, pixel_range=self.teacher.pixel_range())}
        if self.config.finetune.lowpass_cutoff is None:
            del kinds["filtered"]
        labeled = self._labeled
        if labeled is not None:
            kinds["labeled (used only in this plot)"] = labeled[0]
        return kinds

    def spectra(self) -> Spectra:
        """Return amplitude spectra of synthetic, filtered and, if there are any, labeled images."""
        kinds = self._kinds()
        amplitudes = {name: _amplitude(part) for name, part in kinds.items()}
        settings, (height, width) = self.config.finetune, kinds["synthetic"].shape[2:]
        cutoff = settings.lowpass_cutoff
        return Spectra(
            amplitudes=amplitudes,
            profiles={name: _profile(part) for name, part in amplitudes.items()},
            cutoff=None if cutoff is None else cutoff_in_bins(cutoff, settings.lowpass_unit, height, width),
            counts={name: len(part) for name, part in kinds.items()},
        )

    def predictions(self) -> Predictions:
        """Return the classes that teacher and student predict, and the difficulty of each image."""
        source, labeled, images, labels = self._evaluation_images
        teacher_logits = logits_of(self.teacher.graph, images)
        student_logits = logits_of(self.student.net, images)
        confidence = teacher_logits.double().softmax(1).gather(1, labels[:, None])[:, 0]
        return Predictions(
            source=source,
            labeled=labeled,
            labels=labels.numpy(),
            teacher=teacher_logits.argmax(1).numpy(),
            student=student_logits.argmax(1).numpy(),
            difficulty=(1 - confidence).numpy(),
        )

    @functools.cached_property
    def _map_images(self) -> tuple[str, Tensor, Tensor]:
        """Return source, images and labels of the maps: the first image of some classes."""
        source, _, images, labels = self._evaluation_images
        first_rows = [int((labels == label).nonzero()[0, 0]) for label in labels.unique()]
        rows = torch.tensor(first_rows)[_spread(torch.arange(len(first_rows)), NUM_MAPS)]
        return source, images[rows], labels[rows]

    def maps(self) -> Maps:
        """Return class activation maps of the teacher, the student before fine-tuning, and the student."""
        cam_site = self.teacher.cam
        if cam_site.kind == "none":
            raise ValueError(f"this network has no class activation map: {cam_site.reason}")
        source, images, labels = self._map_images
        networks = {
            "teacher": (self.teacher.graph, cam_site.node),
            "rounded to nearest": (self._rounded.net, self._rounded.cam_node),
            "student": (self.student.net, self.student.cam_node),
        }
        maps = {}
        for name, (net, node) in networks.items():
            found = teacher_response(TappedNetwork(net=with_features(net, node), cam_site=cam_site), images, labels).cam
            assert found is not None
            maps[name] = found.numpy()
        return Maps(source=source, images=self._to_pixels(images).clip(0, 1), labels=labels.numpy(), maps=maps)

    def attention(self) -> Attention | None:
        """Return maps of attention and similarities of tokens, None for a network without attention."""
        graph = self.teacher.graph
        maps: Maps | str
        place = ""
        try:
            shown = shown_attention(graph)
        except ValueError as error:
            maps = str(error)
        else:
            if shown is None:
                return None
            source, images, labels = self._map_images
            name = shown.nodes.probabilities
            students = {"rounded to nearest": self._rounded, "student": self.student}
            networks = {
                "teacher": (graph, name),
                **{key: (one.net, one.taps.get(name, name)) for key, one in students.items()},
            }
            found = attention_of(networks, shown, images)
            pixels = self._to_pixels(images).clip(0, 1)
            maps = Maps(source=source, images=pixels, labels=labels.numpy(), maps=found)
            place = place_of(shown)
        few = {name: part[_spread(torch.arange(len(part)), LAYER_IMAGES)] for name, part in self._kinds().items()}
        noise = torch.randn(next(iter(few.values())).shape, generator=torch.Generator().manual_seed(0))
        few["Gaussian noise"] = self.teacher.pixel_range().clamp_(noise)
        return Attention(
            maps=maps,
            place=place,
            similarities={name: token_similarities(graph, part) for name, part in few.items()},
            counts={name: len(part) for name, part in few.items()},
        )

    @functools.cached_property
    def _rounded(self) -> Student:
        """Return the student before fine-tuning: rounded to nearest, same bits, ranges from the same observers."""
        plain = replace(
            self.config.quant, rounding="nearest", learned_steps="none", equalization=False, bn_correction=False
        )
        config = replace(self.config, quant=plain)
        student = build_student(self.teacher, plain)
        pixels = self.teacher.pixel_range()
        images = low_pass(self._sets[1][0][: plain.calib_images], config, pixel_range=pixels)
        prepare_student(student.net, self.teacher.graph, images, config, torch.device("cpu"), image_range=pixels)
        return student

    def _layer_images(self) -> Iterator[Tensor]:
        """Yield images for the measurements on layers, in small batches: all activations of a batch are in memory."""
        _, _, images, _ = self._evaluation_images
        number = max(LAYER_BATCH, min(LAYER_IMAGES, NUM_PIXELS // 4 // math.prod(self.teacher.input_size)))
        yield from images[:number].split(LAYER_BATCH)

    def layers(self) -> list[LayerError]:
        """Return the SQNR of each convolutional and linear layer."""
        if self.config.quant.equalization:
            raise ValueError("the student's channels are scaled differently from the teacher's (quant.equalization)")
        return layer_errors(self.teacher.graph, self.student.net, self._layer_images())

    def ranges(self) -> list[RangeCount]:
        """Return a histogram of the input of each activation quantizer."""
        return range_counts(self.student.net, self._layer_images())

    def _to_pixels(self, images: Tensor) -> np.ndarray:
        """Return normalized images (N, C, H, W) as pixel values (N, H, W, 3), black 0 and white 1.

        Unless C is 3, only the first channel is returned: (N, H, W, 1).
        """
        black, white = self.teacher.pixel_range()
        pixels = (images - black) / (white - black)
        pixels = pixels if pixels.shape[1] == 3 else pixels[:, :1]
        return pixels.permute(0, 2, 3, 1).double().numpy()


def _spread(rows: Tensor, number: int) -> Tensor:
    """Return at most ``number`` of the rows (N,), evenly spaced, in order."""
    return rows if len(rows) <= number else rows[torch.linspace(0, len(rows) - 1, number).round().long()]


def _amplitude(images: Tensor) -> np.ndarray:
    """Return the mean |DFT| (H, W) over images (N, C, H, W) and channels, zero frequency in the center."""
    total = sum(torch.fft.fft2(part.double()).abs().sum(dim=(0, 1)) for part in images.split(BATCH))
    assert isinstance(total, Tensor)
    return torch.fft.fftshift(total / (images.shape[0] * images.shape[1])).numpy()


def _profile(amplitude: np.ndarray) -> np.ndarray:
    """Return the radial profile of a spectrum (H, W): means over rings, up to the shorter side's Nyquist frequency."""
    height, width = amplitude.shape
    rows, cols = (np.arange(size) - size // 2 for size in (height, width))
    ring = np.rint(np.hypot(rows[:, None], cols[None, :])).astype(int)
    return np.array([amplitude[ring == radius].mean() for radius in range(min(height, width) // 2 + 1)])
