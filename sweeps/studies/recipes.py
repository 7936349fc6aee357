"""A recipe: one complete setting, run on several seeds next to its baselines and compared with its expected results.

The rows of its table share the teacher, labeled images and seeds:

    ptq        the students of the recipe's runs before fine-tuning; needs no run
    naive      rounding to nearest on uniform grids, no preparation and no fine-tuning
    noise      Gaussian noise instead of the synthetic images
    real       real images, as many as the recipe's synthetic ones: the ceiling
    inputs     quantized inputs of every layer, the image included, instead of quantized non-linearities
    recipe     the setting itself
    published  a published result, from the recipe's file; never measured here

The runs are ordinary runs: an interrupted recipe resumes, a completed run is only read. Imports neither Ray nor torch.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from synq.common.files import write_text_atomic
from synq.common.text_tables import to_csv, to_markdown
from synq.config.parsing import require
from synq.config.run import (
    EvaluationConfig,
    FinetuneConfig,
    QuantConfig,
    ReconstructionConfig,
    RunConfig,
    SynthesisConfig,
    TeacherConfig,
    load_config,
    parse_bits,
    with_overrides,
)
from synq.config.synthesis import OWN_IMAGES
from synq.runs.record import RunRecord

from ..leaderboard.columns import RECIPE_TABLE, headings, keys
from ..stats import mean, std
from .ablation import format_value
from .expected import RECIPE, Cell, Expected, Published
from .settings_file import check_rows, check_seeds, read_part, read_settings

PTQ = "ptq"
NAIVE, REAL = "naive", "real"
ROWS: dict[str, Mapping[str, Any]] = {
    NAIVE: {
        "quant.softmax": "uniform",
        "quant.scale_shift": False,
        "quant.equalization": False,
        "quant.bn_correction": False,
        "quant.rounding": "nearest",
        "finetune.epochs": 0,
        "finetune.warmup_epochs": 0.0,
    },
    "noise": {"synthesis.method": "gaussian", "synthesis.low_first": False},
    REAL: {"synthesis.method": OWN_IMAGES, "synthesis.low_first": False},
    "inputs": {"quant.act_points": "inputs"},
    RECIPE: {},
}
"""Rows that are runs, and their overrides over the recipe; the images of ``REAL`` are those of its file."""
SHOWN = (
    "row", "protocol", "act_points", "bits", "num_seeds", "teacher_top1", "top1_mean", "drop_mean", "seconds_mean",
    "set_seconds_mean", "source",
)  # fmt: skip
"""Columns of recipe.md; standard deviations and errors are in the cells of what they belong to."""
NOTE = """\
top-1: mean ± standard deviation over the seeds. Drop: teacher minus student, ± its standard error, paired on the same
images. Seconds of one run without its synthetic images, and of making these, in this run or in an earlier one.
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """The file of a recipe."""

    name: str
    """Name of the runs and of the folder of the tables."""
    bits: str
    """Bit-widths, for example W3A3."""
    seeds: tuple[int, ...]
    """Seeds; each drives both the synthetic set and the fine-tuning."""
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    """The pre-trained classifier."""
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    """The evaluation."""
    synthesis: SynthesisConfig = field(default_factory=SynthesisConfig)
    """The synthetic images."""
    quant: QuantConfig = field(default_factory=QuantConfig)
    """The quantization of the student, except its bit-widths: they are `bits`."""
    finetune: FinetuneConfig = field(default_factory=FinetuneConfig)
    """The fine-tuning of the student."""
    reconstruction: ReconstructionConfig = field(default_factory=ReconstructionConfig)
    """The learning of the rounding, if any."""
    expected: Expected | None = None
    """Expected result, if known."""
    published: Published | None = None
    """Published result, if any."""
    real_images: str | None = None
    """Unlabeled real images for the row real, as `synthesis.source`; None leaves that row out."""

    def __post_init__(self) -> None:
        parse_bits(self.bits)
        check_seeds(self.seeds)

    def base(self) -> RunConfig:
        """Return the run of the recipe's row, with seeds 0.

        Raises:
            ValueError: The settings are inconsistent.
        """
        parts = ("teacher", "evaluation", "synthesis", "quant", "finetune", "reconstruction")
        config = RunConfig(name=self.name, **{part: getattr(self, part) for part in parts})
        weight_bits, act_bits = parse_bits(self.bits)
        return with_overrides(config, {"quant.weight_bits": weight_bits, "quant.act_bits": act_bits})


def load_recipe(path: str | Path) -> Recipe:
    """Read the file of a recipe.

    Raises:
        FileNotFoundError: The file is absent.
        ValueError: It is damaged, or a key is unknown (the nearest known one is named), missing or out of range.
    """
    content, source = load_config(path, "spec"), str(path)
    parts: dict[str, Any] = {}
    if "expected" in content:
        parts["expected"] = read_part(Expected, content["expected"], "expected", source)
    if "published" in content:
        parts["published"] = read_part(Published, content["published"], "published", source)
    recipe = read_settings(Recipe, path, "recipe", required=("name", "bits", "seeds", "teacher"), apart=tuple(parts))
    recipe = replace(recipe, **parts)
    try:
        plan(recipe.base(), recipe.seeds, [RECIPE])
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None
    return recipe


def plan(
    base: RunConfig, seeds: Sequence[int], rows: Sequence[str] | None = None, real_images: str | None = None
) -> dict[Cell, RunConfig]:
    """Return the run of every (row, seed); a seed drives both the synthetic set and the fine-tuning.

    Args:
        base: The run of the recipe's row.
        seeds: The seeds.
        rows: Rows to run; by default all that differ from the recipe, and the recipe.
        real_images: `Recipe.real_images`.

    Raises:
        ValueError: A named row would equal the recipe or ptq, or has no images, or a list is empty or has an unknown
            entry.
    """
    check_seeds(seeds)
    check_rows(list(ROWS) if rows is None else rows, ROWS)
    if real_images is None:
        require("real_images", f"be given where there is a row {REAL}", real_images, REAL not in (rows or ()))
    redundant = [row for row in ROWS if row not in (RECIPE, REAL) and _is_redundant(row, base)]
    for row in set(redundant).intersection(rows or ()):
        for key, value in ROWS[row].items():
            require(key, f"be another one where there is a row {row} (choose other `rows`)", value, False)
    # Named activations only exist with the `act_points` of the recipe.
    invalid = [*(["inputs"] if base.quant.layer_act_bits else []), *([REAL] if real_images is None else [])]
    order = [row for row in ROWS if row in (rows or set(ROWS).difference(redundant, invalid))]
    source = {REAL: {"synthesis.source": real_images}}
    return {
        (row, seed): with_overrides(base, {**ROWS[row], **source.get(row, {}), "seed": seed, "data_seed": seed})
        for row in order
        for seed in seeds
    }


def _is_redundant(row: str, base: RunConfig) -> bool:
    """Return whether a row would equal the recipe, or naive its row ptq, which needs no run."""
    changes = ROWS[row]
    if row == NAIVE:
        changes = {key: value for key, value in changes.items() if not key.startswith("finetune.")}
    return with_overrides(base, changes) == base


def table(records: Mapping[Cell, RunRecord], published: Published | None = None) -> list[dict[str, Any]]:
    """Return one line per row, in the order given after ptq, and the published result last.

    drop_stderr is the mean of the seeds' standard errors (`RunRecord.drop_stderr`), an upper bound of that of the mean
    drop: the seeds share their images, so more seeds do not make it smaller. seconds_mean leaves out the synthetic
    sets, of which a run makes only those that the store lacks; set_seconds_mean is what making them took.
    """
    lines: list[dict[str, Any]] = []
    before = {
        (PTQ, seed): _before_finetuning(r) for (row, seed), r in records.items() if row == RECIPE and r.loss_history
    }
    records = {**before, **records}
    for row in dict.fromkeys(row for row, _ in records):
        runs = {seed: record for (name, seed), record in records.items() if name == row}
        first = next(iter(runs.values()))
        lines.append(
            {
                "row": row,
                "model": first.model,
                "protocol": first.protocol,
                "act_points": first.act_points,
                "bits": f"W{first.weight_bits}A{first.act_bits}",
                "num_seeds": len(runs),
                "seeds": " ".join(map(str, runs)),
                "teacher_top1": first.teacher_top1,
                "top1_mean": mean(r.top1 for r in runs.values()),
                "top1_std": std(r.top1 for r in runs.values()),
                "drop_mean": mean(r.drop for r in runs.values()),
                "drop_stderr": mean(r.drop_stderr for r in runs.values()),
                "num_eval": first.num_eval,
                "seconds_mean": mean(r.seconds_without_sets for r in runs.values()),
                "set_seconds_mean": mean(r.set_seconds for r in runs.values()),
                "commit": "; ".join(sorted({r.commit for r in runs.values()})),
                "device": "; ".join(sorted({r.device for r in runs.values()})),
                "source": "measured",
            }
        )
    if published is not None:
        teacher, top1 = published.teacher_top1, published.top1
        numbers = {"teacher_top1": teacher, "top1_mean": top1, "drop_mean": teacher - top1}
        bits = lines[0]["bits"] if lines else ""
        lines.append({"row": "published", "bits": bits, **numbers, "source": published.source})
    return [{column: line.get(column) for column in keys(RECIPE_TABLE)} for line in lines]


def _before_finetuning(record: RunRecord) -> RunRecord:
    """Return the record of a run as if it had ended before its fine-tuning."""
    measured = record.rtn_top1 is not None and record.teacher_top1 is not None
    total = record.total_seconds
    return replace(
        record,
        top1=record.rtn_top1,
        drop=record.teacher_top1 - record.rtn_top1 if measured else None,  # type: ignore[operator]
        lost=record.rtn_lost,
        gained=record.rtn_gained,
        total_seconds=None if total is None else total - record.seconds.get("finetune", 0.0),
    )


def markdown(lines: Sequence[Mapping[str, Any]], comparison: str = "") -> str:
    """Return the table as Markdown, followed by a legend, the conditions of the measurement and the comparison."""
    shown = [
        {
            **line,
            "protocol": line["protocol"] or "-",
            "act_points": line["act_points"] or "-",
            "num_seeds": line["num_seeds"] or "-",
            "teacher_top1": format_value(line["teacher_top1"]),
            "top1_mean": format_value(line["top1_mean"], spread=line["top1_std"]),
            "drop_mean": format_value(line["drop_mean"], spread=line["drop_stderr"]),
            "seconds_mean": format_value(line["seconds_mean"], 0),
            "set_seconds_mean": format_value(line["set_seconds_mean"], 0),
        }
        for line in lines
    ]
    parts = [to_markdown(shown, SHOWN, headings(RECIPE_TABLE)), "\n", NOTE]
    measured = next((line for line in lines if line["num_seeds"]), None)
    if measured is not None:
        images = "no labeled images" if measured["num_eval"] is None else f"{measured['num_eval']} labeled images"
        where = f"commit {measured['commit']} | {measured['device']}"
        parts.append(f"{measured['model']} | seeds {measured['seeds']} | {images} | {where}\n")
    return "".join(parts) + (comparison and f"\n{comparison}\n")


def write_tables(folder: Path, lines: Sequence[dict[str, Any]], comparison: str = "") -> None:
    """Write recipe.csv and recipe.md, atomically.

    Raises:
        OSError: The folder cannot be written, or the disk is full.
    """
    write_text_atomic(folder / "recipe.csv", to_csv(lines, keys(RECIPE_TABLE)))
    write_text_atomic(folder / "recipe.md", markdown(lines, comparison))
