"""Drawings of a run's fine-tuning, layers and answers. Each takes plain values and gives a figure, or says why not."""

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import MaxNLocator

from synq.diagnostics.probe_parts import REACH, Answers, LayerError, RangeCount
from synq.runs.record import RunRecord

from .drawing import COLORS, draw
from .page import Figure, Gap

MOST_CLASSES = 20
"""Classes up to which a confusion is drawn as a matrix; with more of them its largest entries are."""
NUM_CONFUSED = 15
NUM_DIFFICULTY_BINS = 10
NO_LOSS = ("epoch", "seconds", "lr", "kept", "objective_value", "gradient norm")
"""What stands beside the terms of the loss in an epoch's line."""
ROW = 0.16
"""Height of one layer's line in inches."""


def error_by_difficulty(found: Answers | str, threshold: float, *, uses_labels: bool) -> Figure | Gap:
    """Error rate against difficulty (paper, Fig. 3); without labels the share of other answers than the teacher's."""
    title = (
        "Errors against difficulty"
        if not isinstance(found, Answers) or found.labeled
        else "Disagreement against difficulty"
    )
    if isinstance(found, str):
        return Gap(title=title, reason=found)
    bins = np.minimum((found.difficulty * NUM_DIFFICULTY_BINS).astype(int), NUM_DIFFICULTY_BINS - 1)
    counts = np.bincount(bins, minlength=NUM_DIFFICULTY_BINS)
    reference = found.labels if found.labeled else found.teacher
    wrong = {
        "student": found.student != reference,
        **({"teacher": found.teacher != reference} if found.labeled else {}),
    }
    middles = (np.arange(NUM_DIFFICULTY_BINS) + 0.5) / NUM_DIFFICULTY_BINS

    def plot(canvas: Canvas) -> None:
        axes = canvas.subplots()
        for (name, errors), color in zip(wrong.items(), COLORS, strict=False):
            sums = np.bincount(bins, weights=errors, minlength=NUM_DIFFICULTY_BINS)
            rates = np.divide(100 * sums, counts, out=np.full(len(sums), math.nan), where=counts > 0)
            spread = np.sqrt(rates * (100 - rates) / np.maximum(counts, 1))
            axes.errorbar(middles, rates, spread, marker="o", color=color, label=name, capsize=2)
        for middle, count in zip(middles, counts, strict=True):
            axes.annotate(
                str(count),
                (middle, 0),
                (0, -8),
                textcoords="offset points",
                ha="center",
                va="top",
                fontsize=7,
                color="#5b6675",
            )
        axes.axvline(threshold, color="#4f5d73", linestyle="--", label=f"difficulty_threshold {threshold:g}")
        axes.set(xlim=(0, 1), ylim=(-14, 108), xlabel="difficulty: 1 - the teacher's probability of the label")
        axes.set_ylabel("error rate [%]" if found.labeled else "other class than the teacher's [%]")
        canvas.legend(loc="outside right upper")

    caption = (
        f"{len(found.labels)} {found.source} in {NUM_DIFFICULTY_BINS} bins; the small figures are the images in each, the bars one standard error. Below 0.5 the teacher "
        "cannot be wrong about the label. "
        + (
            "Synthetic images right of the dashed line have no hard label in training."
            if uses_labels
            else "No hard label was used in training."
        )
    )
    return draw("difficulty", title, caption, plot)


def losses(record: RunRecord) -> list[Figure | Gap]:
    """Loss terms and, where it was measured, the objective by epoch."""
    history = record.loss_history
    if not history:
        return [Gap(title="Loss by epoch", reason="the run trained for no epoch")]
    terms = [name for name in history[-1] if name not in NO_LOSS]
    epochs = [int(line.get("epoch", i + 1)) for i, line in enumerate(history)]

    def plot(canvas: Canvas) -> None:
        axes = canvas.subplots()
        for name in terms:
            values = [line.get(name) for line in history]
            if any(value for value in values):
                axes.plot(epochs, [math.nan if value is None else value for value in values], marker=".", label=name)
        axes.set(yscale="log", xlabel="epoch", ylabel="mean over the epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        canvas.legend(loc="outside right upper")

    caption = f"Means over each of {len(history)} epochs: the loss, and its terms before their weights (log scale; a term that is zero is left out)."
    figures: list[Figure | Gap] = [draw("losses", "Loss by epoch", caption, plot)]
    values = [
        (epoch, line["objective_value"])
        for epoch, line in zip(epochs, history, strict=True)
        if line.get("objective_value") is not None
    ]
    if values:

        def plot_objective(canvas: Canvas) -> None:
            axes = canvas.subplots()
            axes.plot(*zip(*values, strict=True), marker=".")
            axes.set(xlabel="epoch", ylabel=f"{record.objective} objective")
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))

        better = "higher" if record.objective == "selection" else "lower"
        figures.append(
            draw(
                "objective",
                "Objective by epoch",
                f"Measured after each of {len(values)} epochs; {better} is better.",
                plot_objective,
            )
        )
    return figures


def layer_errors(found: Sequence[LayerError] | str) -> Figure | Gap:
    """Signal to quantization noise of each layer."""
    title = "Quantization error of each layer"
    if isinstance(found, str):
        return Gap(title=title, reason=found)

    def plot(canvas: Canvas) -> None:
        axes = canvas.subplots()
        path_overrides = range(len(found))
        axes.plot(
            [_finite(layer.weight_db) for layer in found], path_overrides, "o", label="weight alone", color=COLORS[0]
        )
        axes.plot(
            [_finite(layer.output_db) for layer in found],
            path_overrides,
            "s",
            label="output, all before it included",
            color=COLORS[1],
        )
        axes.set_yticks(path_overrides, [f"{layer.name} ({layer.bits} bit)" for layer in found])
        axes.set(xlabel="signal to quantization noise [dB], more is better", ylim=(len(found) - 0.4, -0.6))
        axes.legend(
            loc="upper center", bbox_to_anchor=(0.4, 1 + 0.5 / max(2.0, ROW * len(found))), ncols=2, frameon=False
        )

    caption = (
        f"{len(found)} layers from input to output: 10 log10 of the power of the teacher's values over that of the student's difference "
        "from them, fine-tuning included. The layer that is far below its neighbors is the first candidate for more bits."
    )
    return draw("layers", title, caption, plot, (6.8, 1.2 + ROW * max(len(found), 4)))


def _finite(value: float) -> float:
    return value if math.isfinite(value) else math.nan


def range_strips(found: Sequence[RangeCount] | str) -> Figure | Gap:
    """Histograms of what enters each activation quantizer, in units of its range."""
    title = "Activations and their ranges"
    if isinstance(found, str):
        return Gap(title=title, reason=found)
    if not found:
        return Gap(title=title, reason="no activation of this student is quantized")

    def plot(canvas: Canvas) -> None:
        axes = canvas.subplots()
        shares = np.log10(np.maximum(np.array([one.shares for one in found]), 1e-6))
        shown = axes.imshow(
            shares,
            aspect="auto",
            cmap="Blues",
            vmin=-6,
            vmax=0,
            extent=(-REACH, REACH, len(found), 0),
            interpolation="nearest",
        )
        ends = [max(-one.low, one.high) for one in found]
        for values in (
            [one.low / end for one, end in zip(found, ends, strict=True)],
            [one.high / end for one, end in zip(found, ends, strict=True)],
        ):
            axes.vlines(values, np.arange(len(found)) + 0.1, np.arange(len(found)) + 0.9, color=COLORS[1], linewidth=2)
        axes.set_yticks(
            np.arange(len(found)) + 0.5,
            [f"{one.name.removeprefix('act_quantizers.')} ({one.bits} bit)" for one in found],
        )
        least = min(one.low / end for one, end in zip(found, ends, strict=True))
        axes.set(xlabel="value / larger end of the range", xlim=(-REACH if least < 0 else -0.1, REACH))
        axes.grid(False)
        canvas.colorbar(shown, label="log10 share of the values")

    clipped = max(found, key=lambda one: one.clipped)
    caption = (
        f"A line for each of {len(found)} quantized activations; the red marks are the ends of its range. Most is cut off at "
        f"{clipped.name.removeprefix('act_quantizers.')}: {100 * clipped.clipped:.2g} % of the values."
    )
    return draw("ranges", title, caption, plot, (6.8, 1.0 + ROW * max(len(found), 4)))


def confusion(found: Answers | str, num_classes: int) -> Figure | Gap:
    """Answers of the teacher against those of the student."""
    title = "Teacher against student"
    if isinstance(found, str):
        return Gap(title=title, reason=found)
    same = 100 * float((found.teacher == found.student).mean())
    about = f"{len(found.labels)} {found.source}; the two agree on {same:.1f} %."
    pairs, counts = np.unique(np.stack([found.teacher, found.student]), axis=1, return_counts=True)
    if num_classes <= MOST_CLASSES:
        matrix = np.zeros((num_classes, num_classes), dtype=int)
        matrix[pairs[0], pairs[1]] = counts

        def plot(canvas: Canvas) -> None:
            axes = canvas.subplots()
            off = matrix.copy()
            np.fill_diagonal(off, 0)
            shown = axes.imshow(off, cmap="Reds", vmin=0, vmax=max(1, off.max()))
            for i in range(num_classes):
                for j in range(num_classes):
                    if matrix[i, j]:
                        dark = i != j and off[i, j] > 0.6 * off.max()
                        axes.text(
                            j,
                            i,
                            str(matrix[i, j]),
                            ha="center",
                            va="center",
                            fontsize=7,
                            color="white" if dark else "black",
                        )
            axes.set(xlabel="class by the student", ylabel="class by the teacher")
            axes.set_xticks(range(num_classes))
            axes.set_yticks(range(num_classes))
            axes.grid(False)
            canvas.colorbar(shown, label="images on which they differ", ticks=MaxNLocator(integer=True))

        return draw("confusion", title, f"{about} Color: only where they differ.", plot, (5.6, 4.4))
    differing = [(int(count), f"{t} -> {s}") for (t, s), count in zip(pairs.T, counts, strict=True) if t != s]
    if not differing:
        return Gap(title=title, reason=f"{about} There is nothing to draw.")
    differing = sorted(differing, key=lambda pair: -pair[0])[:NUM_CONFUSED]

    def plot_bars(canvas: Canvas) -> None:
        axes = canvas.subplots()
        axes.barh([name for _, name in differing], [count for count, _ in differing])
        axes.invert_yaxis()
        axes.set(xlabel="images", ylabel="class by the teacher -> by the student")

    return draw(
        "confusion",
        title,
        f"{about} The {len(differing)} most frequent differences.",
        plot_bars,
        (6.4, 0.9 + 0.22 * len(differing)),
    )
