"""Figures of a run's fine-tuning, layers and predictions.

Each function takes plain values, or the reason why there are none, and returns a figure or a gap with the reason.
"""

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import MaxNLocator

from synq.diagnostics.probe_parts import REACH, LayerError, Predictions, RangeCount
from synq.runs.record import RunRecord

from .drawing import COLORS, WIDTH, draw
from .page import Figure, Gap

MOST_CLASSES = 20
"""Most classes for a confusion matrix; with more classes its largest entries are drawn as bars."""
NUM_CONFUSED = 15
NUM_DIFFICULTY_BINS = 10
NO_LOSS = ("epoch", "seconds", "lr", "kept", "objective_value", "gradient norm")
"""Keys of an epoch in `loss_history` that are not loss terms."""
ROW = 0.16
"""Height of the row of one layer in inches."""


def error_by_difficulty(found: Predictions | str, threshold: float, *, uses_labels: bool) -> Figure | Gap:
    """Return a figure of the error rate against difficulty (paper, Fig. 3).

    Without labels the rate is that of disagreement with the teacher.
    """
    title = (
        "Errors against difficulty"
        if not isinstance(found, Predictions) or found.labeled
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
        axes.set_ylabel("error rate [%]" if found.labeled else "disagreement with the teacher [%]")
        canvas.legend(loc="outside lower center", ncols=3)

    caption = (
        f"{len(found.labels)} {found.source} in {NUM_DIFFICULTY_BINS} bins; small numbers: images per bin; bars: one "
        "standard error. Below 0.5 the teacher always predicts the label. "
        + (
            "In training, synthetic images right of the dashed line have no hard label."
            if uses_labels
            else "No hard labels were used in training."
        )
    )
    return draw("difficulty", title, caption, plot)


def losses(record: RunRecord) -> list[Figure | Gap]:
    """Return figures of the loss terms and, if it was measured, of the objective by epoch."""
    history = record.loss_history
    if not history:
        return [Gap(title="Loss by epoch", reason="no epoch was trained")]
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
        canvas.legend(loc="outside lower center", ncols=3)

    caption = (
        f"Means over each of {len(history)} epochs: the loss and its unweighted terms (log scale; terms that are zero "
        "are left out)."
    )
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
    """Return a figure of the signal-to-quantization-noise ratio (SQNR) of each layer."""
    title = "Quantization error of each layer"
    if isinstance(found, str):
        return Gap(title=title, reason=found)

    def plot(canvas: Canvas) -> None:
        axes = canvas.subplots()
        positions = range(len(found))
        axes.plot([_finite(layer.weight_db) for layer in found], positions, "o", label="weight", color=COLORS[0])
        axes.plot(
            [_finite(layer.output_db) for layer in found],
            positions,
            "s",
            label="output, all layers before it quantized",
            color=COLORS[1],
        )
        axes.set_yticks(positions, [f"{layer.name} ({layer.bits} bit)" for layer in found])
        axes.set(xlabel="SQNR [dB], higher is better", ylim=(len(found) - 0.4, -0.6))
        canvas.legend(loc="outside lower center", ncols=2)

    caption = (
        f"{len(found)} layers from input to output. Signal-to-quantization-noise ratio: 10 log10 of the power of the "
        "teacher's values over that of the difference of the fine-tuned student. A layer far below its neighbors is "
        "the first candidate for more bits."
    )
    return draw("layers", title, caption, plot, (WIDTH, 1.2 + ROW * max(len(found), 4)))


def _finite(value: float) -> float:
    return value if math.isfinite(value) else math.nan


def range_strips(found: Sequence[RangeCount] | str) -> Figure | Gap:
    """Return a figure of the histogram of each activation quantizer's input, in units of its range."""
    title = "Activations and their ranges"
    if isinstance(found, str):
        return Gap(title=title, reason=found)
    if not found:
        return Gap(title=title, reason="this student has no quantized activation")

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
        bounds = [max(-one.low, one.high) for one in found]
        for values in (
            [one.low / bound for one, bound in zip(found, bounds, strict=True)],
            [one.high / bound for one, bound in zip(found, bounds, strict=True)],
        ):
            axes.vlines(values, np.arange(len(found)) + 0.1, np.arange(len(found)) + 0.9, color=COLORS[1], linewidth=2)
        axes.set_yticks(
            np.arange(len(found)) + 0.5,
            [f"{one.name.removeprefix('act_quantizers.')} ({one.bits} bit)" for one in found],
        )
        least = min(one.low / bound for one, bound in zip(found, bounds, strict=True))
        axes.set(xlabel="value / largest absolute bound of the range", xlim=(-REACH if least < 0 else -0.1, REACH))
        axes.grid(False)
        canvas.colorbar(shown, label="log10 fraction of the values", location="bottom", aspect=40)

    clipped = max(found, key=lambda one: one.clipped)
    caption = (
        f"One row for each of {len(found)} quantized activations; red marks: bounds of its range. Most values are "
        f"clipped at {clipped.name.removeprefix('act_quantizers.')}: {100 * clipped.clipped:.2g} %."
    )
    return draw("ranges", title, caption, plot, (WIDTH, 1.5 + ROW * max(len(found), 4)))


def confusion(found: Predictions | str, num_classes: int) -> Figure | Gap:
    """Return a figure of the classes predicted by the teacher against those predicted by the student."""
    title = "Predicted classes of teacher and student"
    if isinstance(found, str):
        return Gap(title=title, reason=found)
    same = 100 * float((found.teacher == found.student).mean())
    about = f"{len(found.labels)} {found.source}; teacher and student agree on {same:.1f} %."
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
            axes.set(xlabel="class predicted by the student", ylabel="class predicted by the teacher")
            axes.set_xticks(range(num_classes))
            axes.set_yticks(range(num_classes))
            axes.grid(False)
            ticks = MaxNLocator(integer=True)
            canvas.colorbar(
                shown, label="images with different predictions", ticks=ticks, location="bottom", aspect=40, shrink=0.8
            )

        return draw("confusion", title, f"{about} Color: only different predictions.", plot, (WIDTH, 5.2))
    differing = [(int(count), f"{t} -> {s}") for (t, s), count in zip(pairs.T, counts, strict=True) if t != s]
    if not differing:
        return Gap(title=title, reason=f"{about} There is no difference to draw.")
    differing = sorted(differing, key=lambda pair: -pair[0])[:NUM_CONFUSED]

    def plot_bars(canvas: Canvas) -> None:
        axes = canvas.subplots()
        axes.barh([name for _, name in differing], [count for count, _ in differing])
        axes.invert_yaxis()
        axes.set(xlabel="images", ylabel="class of the teacher -> of the student")

    return draw(
        "confusion",
        title,
        f"{about} The {len(differing)} most frequent differences.",
        plot_bars,
        (WIDTH, 0.9 + 0.22 * len(differing)),
    )
