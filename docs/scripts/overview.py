"""Draws docs/overview.png: images made from the bundled classifier, and what they buy at few bits.

    python docs/scripts/overview.py        about two minutes on 2 CPU cores; runs are kept in runs/overview

Each bar is one run (seed 0, all layers at the same low bit-width, 620 labeled images that no run has seen).
"""

import sys
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import matplotlib as mpl  # noqa: E402

mpl.use("agg")

import matplotlib.pyplot as plt  # noqa: E402
import torch  # noqa: E402

from synq.config.run import RunConfig, with_overrides  # noqa: E402
from synq.pipeline import run  # noqa: E402
from synq.runs.record import RunRecord  # noqa: E402
from synq.runtime import make_accelerator  # noqa: E402
from synq.synthesis.run_sets import ensure_sets  # noqa: E402
from synq.teacher.teacher import load_teacher  # noqa: E402

BITS = (4, 3, 2)
SETTINGS = {"synthesis.num_images": 768, "synthesis.iterations": 75, "finetune.epochs": 30}
CLASSES, COLUMNS = 10, 5
INK, ROUNDED, TUNED = "#333333", "#b0b7c3", "#3f51b5"


def settings(bits: int) -> RunConfig:
    """Return the run of the bundled classifier at one bit-width."""
    config = with_overrides(RunConfig(name="overview"), SETTINGS)
    quant = replace(config.quant, weight_bits=bits, act_bits=bits)
    return replace(config, quant=quant, runtime=replace(config.runtime, output_dir="runs/overview", num_threads=1))


def first_of_each_class() -> torch.Tensor:
    """Return one training image per class, (classes, H, W), between 0 and 1."""
    config = settings(BITS[0])
    teacher = load_teacher(config.teacher)
    train_set, _ = ensure_sets(config, teacher, make_accelerator(config.runtime))
    chosen = torch.stack([train_set.images[int((train_set.labels == label).nonzero()[0])] for label in range(CLASSES)])
    images = chosen.float() * torch.tensor(teacher.std)[:, None, None] + torch.tensor(teacher.mean)[:, None, None]
    return images.mean(dim=1).clamp(0, 1)


def draw(images: torch.Tensor, records: dict[int, RunRecord]) -> plt.Figure:
    """Return the picture."""
    plt.rcParams.update({"font.size": 9, "text.color": INK, "axes.labelcolor": INK, "xtick.color": INK})
    figure = plt.figure(figsize=(8, 2.7), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=[1.25, 1])
    left.suptitle("images made from the classifier alone", fontsize=10)
    for label, axes in enumerate(left.subplots(CLASSES // COLUMNS, COLUMNS).flat):
        axes.imshow(images[label], cmap="gray", vmin=0, vmax=1)
        axes.set_title(f"as {label}", fontsize=8)
        axes.axis("off")
    axes = right.subplots()
    right.suptitle("top-1 of its low-bit copy", fontsize=10)
    teacher = next(iter(records.values())).teacher_top1
    axes.axhline(teacher, color=INK, linewidth=1, linestyle="--")
    axes.text(2.45, teacher + 1, f"teacher {teacher:.1f}", ha="right", va="bottom", fontsize=8)
    for position, record in enumerate(records.values()):
        bars = {-0.2: (record.rtn_top1, ROUNDED), 0.2: (record.top1, TUNED)}
        for offset, (value, color) in bars.items():
            axes.bar(position + offset, value, 0.38, color=color)
            inside = value > 20
            text = {"va": "top" if inside else "bottom", "color": "white" if inside and color == TUNED else INK}
            axes.text(
                position + offset, value - 2 if inside else value + 1, f"{value:.1f}", ha="center", fontsize=8, **text
            )
    axes.set_xticks(range(len(records)), [f"W{bits}A{bits}" for bits in records])
    axes.set_yticks([])
    axes.set_ylim(0, 128)
    axes.spines[["top", "right", "left"]].set_visible(False)
    handles = [plt.Rectangle((0, 0), 1, 1, color=color) for color in (ROUNDED, TUNED)]
    axes.legend(handles, ["rounded", "SynQ"], loc="upper left", ncols=2, fontsize=8, frameon=False)
    return figure


def main() -> int:
    """Make the runs and the picture."""
    records = {bits: run(settings(bits)) for bits in BITS}
    target = ROOT / "docs" / "overview.png"
    draw(first_of_each_class(), records).savefig(target, dpi=150, metadata={"Software": None})
    for bits, record in records.items():
        print(
            f"W{bits}A{bits}: teacher {record.teacher_top1:.2f}, rounded {record.rtn_top1:.2f}, SynQ {record.top1:.2f}"
        )
    print(f"{target}: {target.stat().st_size / 1000:.0f} kB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
