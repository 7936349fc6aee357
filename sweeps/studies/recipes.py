"""A recipe: one complete setting, run on several seeds next to its baselines and compared with its expected results.

The rows of its table share the teacher, labeled images and seeds:

    ptq        the students of the recipe's runs before fine-tuning; needs no run
    noise      Gaussian noise instead of the synthetic images
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
from synq.config.parsing import between, require
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
from synq.runs.record import RunRecord

from ..leaderboard.columns import RECIPE_TABLE, headings, keys
from ..stats import mean, pooled_stderr, std
from .ablation import format_value
from .settings_file import check_rows, check_seeds, read_part, read_settings

Cell = tuple[str, int]
PTQ, RECIPE = "ptq", "recipe"
ROWS: dict[str, Mapping[str, Any]] = {
    "noise": {"synthesis.method": "gaussian"},
    "inputs": {"quant.act_points": "inputs"},
    RECIPE: {},
}
"""Rows that are runs, and their overrides over the recipe."""
SHOWN = (
    "row", "protocol", "act_points", "bits", "num_seeds", "teacher_top1", "top1_mean", "drop_mean", "seconds_mean",
    "set_seconds_mean", "source",
)  # fmt: skip
"""Columns of recipe.md; standard deviations and errors are in the cells of what they belong to."""
NOTE = """\
top-1: mean ± standard deviation over the seeds. Drop: teacher minus student, ± its standard error, paired on the same
images. Seconds of one run without its synthetic images, and of making these, in this run or in an earlier one.
"""
TOLERANCE = 3
"""A measurement agrees with the expected result within so many standard errors."""
ROUNDING = 0.005
"""Largest rounding error of a number with two decimals."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Expected:
    """Expected result of the recipe's row; every key is required. Numbers in percent unless stated otherwise."""

    top1: float
    """Mean over the seeds."""
    std: float
    """Sample standard deviation over the seeds; 0 for one seed."""
    drop: float
    """Mean of teacher minus student, in percentage points."""
    images: int
    """Number of labeled images it was measured on."""
    teacher_top1: float
    """Top-1 of the teacher on them."""
    seeds: tuple[int, ...]
    """Seeds that were run."""
    commit: str
    """Commit of the code."""
    hardware: str
    """Description of the machine."""
    minutes: float
    """Minutes for all seeds of the row."""

    def __post_init__(self) -> None:
        for name in ("top1", "teacher_top1"):
            between(f"expected.{name}", getattr(self, name), 0, 100)
        between("expected.drop", self.drop, -100, 100)
        between("expected.std", self.std, 0)
        between("expected.images", self.images, 1)
        between("expected.minutes", self.minutes, 0)
        check_seeds(self.seeds)


@dataclass(frozen=True, kw_only=True, slots=True)
class Published:
    """A published result at the same bit-widths."""

    top1: float
    """Published top-1, in percent."""
    teacher_top1: float
    """Top-1 of the teacher in the publication, in percent."""
    source: str
    """Publication and table."""

    def __post_init__(self) -> None:
        for name in ("top1", "teacher_top1"):
            between(f"published.{name}", getattr(self, name), 0, 100)


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


def plan(base: RunConfig, seeds: Sequence[int], rows: Sequence[str] | None = None) -> dict[Cell, RunConfig]:
    """Return the run of every (row, seed); a seed drives both the synthetic set and the fine-tuning.

    Args:
        base: The run of the recipe's row.
        seeds: The seeds.
        rows: Rows to run; by default all that differ from the recipe, and the recipe.

    Raises:
        ValueError: A named row would equal the recipe, or a list is empty or has an unknown entry.
    """
    check_seeds(seeds)
    check_rows(list(ROWS) if rows is None else rows, ROWS)
    redundant = [row for row in ROWS if row != RECIPE and with_overrides(base, ROWS[row]) == base]
    for row in set(redundant).intersection(rows or ()):
        for key, value in ROWS[row].items():
            require(key, f"be another one where there is a row {row} (choose other `rows`)", value, False)
    # Named activations only exist with the `act_points` of the recipe.
    invalid = ["inputs"] if base.quant.layer_act_bits else []
    order = [row for row in ROWS if row in (rows or set(ROWS).difference(redundant, invalid))]
    return {
        (row, seed): with_overrides(base, {**ROWS[row], "seed": seed, "data_seed": seed})
        for row in order
        for seed in seeds
    }


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


def compare(expected: Expected, records: Mapping[Cell, RunRecord], same_settings: bool = True) -> str:
    """Return one line that compares the recipe's row with its expected result.

    It agrees within 3 standard errors of the difference of two means over seeds (`stats.pooled_stderr`) plus the
    rounding error of the expected top-1. Results of other settings, images or teachers are not compared.

    Args:
        expected: The expected result.
        records: The runs, by (row, seed).
        same_settings: Whether the runs use the file's settings unchanged.
    """
    runs = [record for (row, _), record in records.items() if row == RECIPE]
    where = f"commit {expected.commit}, {expected.hardware}"
    head = f"expected {format_value(expected.top1, spread=expected.std)} ({where})"
    top1 = mean(record.top1 for record in runs)
    if top1 is None:
        return f"{head}, not measured"
    spread = std(record.top1 for record in runs)
    measured = f"measured {format_value(top1, spread=spread)}"
    images, teacher = runs[0].num_eval, runs[0].teacher_top1
    stderr = pooled_stderr((expected.std, len(expected.seeds)), (spread or 0.0, len(runs)))
    reasons = (
        (same_settings, "the settings were changed"),
        (images == expected.images, f"it is on {images} images and not on {expected.images}"),
        (
            teacher is not None and abs(teacher - expected.teacher_top1) <= ROUNDING + 1e-9,
            f"the teacher has {format_value(teacher)} and not {expected.teacher_top1:.2f}",
        ),
        (stderr is not None, "one seed each has no standard error"),
    )
    for holds, reason in reasons:
        if not holds:
            return f"{measured}; not comparable with the {head} of the file, because {reason}"
    assert stderr is not None
    within = abs(top1 - expected.top1) <= TOLERANCE * stderr + ROUNDING
    verdict = f"{'within' if within else 'OUTSIDE'} {TOLERANCE} standard errors"
    return f"{head}, {measured}: {verdict} ({TOLERANCE * stderr:.2f})"


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
