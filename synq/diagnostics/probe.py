"""What a report shows of a finished run, computed from what the run has left: images, spectra, maps, errors of layers, answers.

    open_run -> images, their spectra -> answers of teacher and student -> maps, layers, ranges

Nothing here changes a file or a figure of the record. A part that cannot be had says why instead of failing the whole.
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
from torch import Tensor, fx, nn

from synq.diagnostics.probe_parts import (
    NUM_BINS,
    REACH,
    Answers,
    ImageGrid,
    LayerError,
    Maps,
    Probe,
    RangeCount,
    Spectra,
)
from synq.evaluation.fidelity import logits_of, sqnr_db
from synq.evaluation.measure import Measure
from synq.finetune.responses import TappedNetwork, teacher_response
from synq.network.tracing import with_features
from synq.quant.layers import ActQuantizer, QuantConv2d, QuantLinear
from synq.quant.prepare import prepare_student
from synq.quant.student import Student, build_student
from synq.runs.finished import Run, open_run
from synq.synthesis.lowpass import cutoff_in_bins
from synq.synthesis.run_sets import low_pass

NUM_IMAGES, LEAST_IMAGES = 1024, 64
"""Images that teacher and student are asked about: many small ones, few large ones."""
NUM_PIXELS = 2**23
"""Numbers in these images, about: so a page takes seconds and not minutes."""
GRID_CLASSES, GRID_IMAGES = 10, 8
"""Classes that the grid of images shows, and images of each."""
NUM_MAPS = 6
"""Images whose class-activation maps are shown."""
LAYER_IMAGES = 64
"""Images behind the errors and ranges of single layers, at most."""
BATCH, LAYER_BATCH = 64, 4
T = TypeVar("T")


def probe_run(
    folder: str | Path, path_overrides: Mapping[str, Any] | None = None, num_images: int | None = None
) -> Probe:
    """Look into a finished run, on the CPU.

    Args:
        folder: As for ``open_run``.
        places: As for ``open_run``.
        num_images: Images that the networks are asked about, at most; None: as many as take seconds.

    Raises:
        FileNotFoundError, ValueError: As ``open_run``: without teacher and student there is nothing to look into.
    """
    run = open_run(folder, path_overrides)
    bounded = max(LEAST_IMAGES, min(NUM_IMAGES, NUM_PIXELS // math.prod(run.teacher.input_size)))
    seen = _Seen(run, num_images or bounded)
    return Probe(
        record=run.record,
        images=_or_why(seen.grid),
        spectra=_or_why(seen.spectra),
        answers=_or_why(seen.answers),
        maps=_or_why(seen.maps),
        layers=_or_why(seen.layers),
        ranges=_or_why(seen.ranges),
    )


def _or_why(part: Callable[[], T]) -> T | str:
    try:
        return part()
    except Exception as error:  # one part that cannot be had must not cost the others
        return " ".join(str(error).split()) or type(error).__name__


class _Seen:
    """A run opened, and the images that its parts are computed on."""

    def __init__(self, run: Run, num_images: int) -> None:
        self.run, self.record, self.config = run, run.record, run.config
        self.teacher, self.student = run.teacher, run.student
        self.num_images = num_images
        self.no_labels = ""

    @functools.cached_property
    def _sets(self) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Images and labels of the held-out and of the training set."""
        train, heldout = self.run.synthetic_sets()
        return (heldout.images, heldout.labels), (train.images, train.labels)

    @functools.cached_property
    def _labeled(self) -> tuple[Tensor, Tensor] | None:
        """Labeled images that accuracy is reported on, evenly spread, where the run has some that still can be read."""
        try:
            measure = Measure.prepare(self.config.evaluation, self.teacher, Accelerator(cpu=True))
        except (ValueError, OSError) as error:
            self.no_labels = f" (the labeled ones cannot be read: {' '.join(str(error).split())})"
            return None
        if measure.labeled is None:
            return None
        if measure.labels_digest != self.record.eval_digest:
            self.no_labels = " (the labeled ones are others than the run was measured on)"
            return None
        rows = _spread(measure.reported, self.num_images)
        return measure.labeled.batch(rows)

    @functools.cached_property
    def _questions(self) -> tuple[str, bool, Tensor, Tensor]:
        """Images that both networks answer, with their labels: labeled ones, else held-out synthetic ones."""
        labeled = self._labeled
        if labeled is not None:
            return "labeled images", True, *labeled
        images, labels = self._sets[0]
        rows = _spread(torch.arange(len(labels)), self.num_images)
        return f"held-out synthetic images{self.no_labels}", False, images[rows], labels[rows]

    def grid(self) -> ImageGrid:
        images, labels = self._sets[1]
        classes = [int(label) for label in labels.unique()]
        classes = [classes[i] for i in _spread(torch.arange(len(classes)), GRID_CLASSES).tolist()]
        fewest = min(int((labels == label).sum()) for label in classes)
        rows = torch.stack([(labels == label).nonzero()[: min(GRID_IMAGES, fewest), 0] for label in classes])
        chosen = images[rows.flatten()]
        shape = (*rows.shape, *chosen.shape[2:])
        before, after = self._bright(chosen), self._bright(low_pass(chosen, self.config, None))
        return ImageGrid(
            before=before.clip(0, 1).reshape(*shape, -1),
            after=after.clip(0, 1).reshape(*shape, -1),
            classes=tuple(classes),
            num_images=len(images),
            channels=images.shape[1],
            clipped=float(((before < 0) | (before > 1)).mean()),
        )

    def spectra(self) -> Spectra:
        images, _ = self._sets[1]
        images = images[_spread(torch.arange(len(images)), self.num_images)]
        kinds = {"synthetic": images, "filtered": low_pass(images, self.config, None)}
        if self.config.finetune.lowpass_cutoff is None:
            del kinds["filtered"]
        labeled = self._labeled
        if labeled is not None:
            kinds["labeled (only looked at here)"] = labeled[0]
        amplitudes = {name: _amplitude(part) for name, part in kinds.items()}
        settings, (height, width) = self.config.finetune, images.shape[2:]
        cutoff = settings.lowpass_cutoff
        return Spectra(
            amplitudes=amplitudes,
            profiles={name: _profile(part) for name, part in amplitudes.items()},
            cutoff=None if cutoff is None else cutoff_in_bins(cutoff, settings.lowpass_unit, height, width),
            counts={name: len(part) for name, part in kinds.items()},
        )

    def answers(self) -> Answers:
        source, labeled, images, labels = self._questions
        told, got = logits_of(self.teacher.graph, images), logits_of(self.student.net, images)
        sure = told.double().softmax(1).gather(1, labels[:, None])[:, 0]
        arrays = (labels.numpy(), told.argmax(1).numpy(), got.argmax(1).numpy(), (1 - sure).numpy())
        names = ("labels", "teacher", "student", "difficulty")
        return Answers(source=source, labeled=labeled, **dict(zip(names, arrays, strict=True)))

    def maps(self) -> Maps:
        site = self.teacher.cam
        if site.kind == "none":
            raise ValueError(f"this network has no class-activation map: {site.reason}")
        source, _, images, labels = self._questions
        firsts = [int((labels == label).nonzero()[0, 0]) for label in labels.unique()]
        rows = torch.tensor(firsts)[_spread(torch.arange(len(firsts)), NUM_MAPS)]
        images, labels = images[rows], labels[rows]
        rounded = self._rounded()
        networks = {
            "teacher": (self.teacher.graph, site.node),
            "rounded to nearest": (rounded.net, rounded.cam_node),
            "student": (self.student.net, self.student.cam_node),
        }
        maps = {}
        for name, (net, node) in networks.items():
            found = teacher_response(TappedNetwork(net=with_features(net, node), cam_site=site), images, labels).cam
            assert found is not None
            maps[name] = found.numpy()
        return Maps(source=source, images=self._bright(images).clip(0, 1), labels=labels.numpy(), maps=maps)

    def _rounded(self) -> Student:
        """The teacher rounded to the nearest codes, at the student's widths and with ranges found in the same way."""
        plain = replace(
            self.config.quant, rounding="nearest", learned_steps="none", equalization=False, bn_correction=False
        )
        config = replace(self.config, quant=plain)
        student = build_student(self.teacher, plain)
        images = low_pass(self._sets[1][0][: plain.calib_images], config, None)
        pixels = self.teacher.pixel_range()
        prepare_student(student.net, self.teacher.graph, images, config, torch.device("cpu"), image_range=pixels)
        return student

    def _layer_images(self) -> Iterator[Tensor]:
        """Images that single layers are looked at on, in small batches: every tensor of a batch is held at one time."""
        _, _, images, _ = self._questions
        number = max(LAYER_BATCH, min(LAYER_IMAGES, NUM_PIXELS // 4 // math.prod(self.teacher.input_size)))
        yield from images[:number].split(LAYER_BATCH)

    def layers(self) -> list[LayerError]:
        if self.config.quant.equalization:
            raise ValueError(
                "the channels of this student are scaled otherwise than the teacher's (quant.equalization)"
            )
        kinds = (nn.Conv2d, nn.Linear)
        teacher, student = _Look(self.teacher.graph, kinds), _Look(self.student.net, kinds)
        powers: dict[str, Tensor] = {}
        for images in self._layer_images():
            wanted = teacher(images)
            for name, output in student(images).items():
                goal = wanted[name].double()
                sums = torch.stack([goal.square().sum(), (goal - output.double()).square().sum()])
                powers[name] = powers.get(name, 0) + sums
        errors = []
        for name, (signal, noise) in powers.items():
            layer, like = self.student.net.get_submodule(name), self.teacher.graph.get_submodule(name)
            assert isinstance(layer, QuantConv2d | QuantLinear) and isinstance(like.weight, Tensor)
            rounded = layer.weight_quantizer(layer.weight)
            errors.append(
                LayerError(
                    name=name,
                    bits=layer.weight_quantizer.bits,
                    weight_db=sqnr_db(like.weight, rounded.detach()),
                    output_db=math.inf if noise == 0 else float(10 * torch.log10(signal / noise)),
                )
            )
        return errors

    def ranges(self) -> list[RangeCount]:
        look = _Look(self.student.net, ActQuantizer, inputs=True)
        found: dict[str, tuple[Tensor, int, int]] = {}
        for images in self._layer_images():
            for name, values in look(images).items():
                low, high = self._range(name)
                reach, step = REACH * max(-low, high), (high - low) / (2 ** self._quantizer(name).bits - 1)
                # Half a step beyond the last code rounds to it without loss of range.
                beyond = int(((values < low - step / 2) | (values > high + step / 2)).sum())
                counts = torch.histc(values.double().clamp(-reach, reach), NUM_BINS, -reach, reach)
                before = found.get(name, (torch.zeros_like(counts), 0, 0))
                found[name] = (before[0] + counts, before[1] + beyond, before[2] + values.numel())
        ranges = []
        for name, (counts, beyond, number) in found.items():
            low, high = self._range(name)
            bits, shares = self._quantizer(name).bits, (counts / number).numpy()
            ranges.append(RangeCount(name=name, bits=bits, low=low, high=high, shares=shares, clipped=beyond / number))
        return ranges

    def _quantizer(self, name: str) -> ActQuantizer:
        quantizer = self.student.net.get_submodule(name)
        assert isinstance(quantizer, ActQuantizer)
        return quantizer

    def _range(self, name: str) -> tuple[float, float]:
        """Return the lowest and the highest value that a quantizer gives."""
        quantizer = self._quantizer(name)
        scale, zero = float(quantizer.scale), int(quantizer.zero_point)
        return scale * (quantizer.quant_min - zero), scale * (quantizer.quant_max - zero)

    def _bright(self, images: Tensor) -> np.ndarray:
        """Normalized images (N, C, H, W) as brightness, black 0 and white 1: (N, H, W, 3), or 1 for other numbers of channels."""
        black, white = self.teacher.pixel_range()
        bright = (images - black) / (white - black)
        bright = bright if bright.shape[1] == 3 else bright[:, :1]
        return bright.permute(0, 2, 3, 1).double().numpy()


class _Look(fx.Interpreter):
    """Runs a network and keeps what modules of some kinds put out, or take in, by module."""

    def __init__(self, net: fx.GraphModule, kinds: Any, *, inputs: bool = False) -> None:
        super().__init__(net)
        self.kinds, self.inputs = kinds, inputs
        self.kept: dict[str, list[Tensor]] = {}

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        output = super().call_module(target, args, kwargs)
        if isinstance(self.fetch_attr(target), self.kinds):
            self.kept.setdefault(str(target), []).append(args[0] if self.inputs else output)
        return output

    @torch.no_grad()
    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        """Return what was kept of one pass, flat."""
        self.kept = {}
        self.run(images)
        return {name: torch.cat([part.flatten() for part in parts]) for name, parts in self.kept.items()}


def _spread(rows: Tensor, number: int) -> Tensor:
    """At most ``number`` of the rows (N,), evenly spread over them, in order."""
    return rows if len(rows) <= number else rows[torch.linspace(0, len(rows) - 1, number).round().long()]


def _amplitude(images: Tensor) -> np.ndarray:
    """Mean |DFT| over images (N, C, H, W) and channels, (H, W), zero frequency in the middle."""
    total = sum(torch.fft.fft2(part.double()).abs().sum(dim=(0, 1)) for part in images.split(BATCH))
    assert isinstance(total, Tensor)
    return torch.fft.fftshift(total / (images.shape[0] * images.shape[1])).numpy()


def _profile(amplitude: np.ndarray) -> np.ndarray:
    """Means of (H, W) over rings around the middle, up to the Nyquist frequency of the shorter side."""
    height, width = amplitude.shape
    rows, cols = (np.arange(size) - size // 2 for size in (height, width))
    ring = np.rint(np.hypot(rows[:, None], cols[None, :])).astype(int)
    return np.array([amplitude[ring == radius].mean() for radius in range(min(height, width) // 2 + 1)])
