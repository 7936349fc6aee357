"""Ranking of runs: the rows of the tables, which of them are comparable, and their order. Imports no Ray, torch.

Ranks restart for everything that must not be compared (`Ranking`): model and its weights (`teacher_digest`), bit-widths
(those of the first and last layer too), protocol, act_points, objective, the images and the fidelity measure of the
objective, and the labeled images. Within a ranking a row is one setting; its runs differ in their seeds only. Settings
measured on more seeds come first, because one lucky seed is no evidence; then the better mean objective. Rows that
violate a constraint of their sweep come after all that do not, and none of them is best. `pareto_size` and
`pareto_bitops` compare across bit-widths: 1 if no other row measured in the same way that satisfies the constraints is
at least as good in mean objective and size (bit operations) and better in one of them. `columns.py` describes the
columns.
"""

import functools
import json
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

from synq.common.notices import print_notice
from synq.common.text_tables import Row, csv_line
from synq.config.finetune import inactive_keys
from synq.config.run import FinetuneConfig, RunConfig, config_digest, config_from_dict
from synq.runs.record import DEPLOYED, RunRecord
from synq.runs.record_checks import contradictions

from ..constraints import Constraint, violations
from ..stats import mean, std
from .columns import LEADERBOARD_COLUMNS, RUN_COLUMNS, SETTINGS, TRIAL_COLUMNS, setting_cells
from .settings import PREFIX, Values, read_settings, setting_cell, value_of

RANK_COLUMNS = ("rank", "best", "pareto_size", "pareto_bitops")
"""Columns of the leaderboard that depend on its other rows."""
PLACED = LEADERBOARD_COLUMNS.index("best")
"""Index of the first of three columns that depend on the other rows."""
COMPARED = ("objective_value", "top1", "top5", "teacher_top1", "rtn_top1", "size_bytes")
"""Metrics that two runs of one setting and seed have in common."""
SAME_RUN = 1e-4
"""Largest relative or absolute difference of them that the order of sums on another machine may make."""
PER_RUN = ("name", "finetune", "seed", "data_seed")
"""Keys of a configuration that differ between the runs of a sweep."""
TRAINING = tuple(part.name for part in fields(FinetuneConfig) if part.name != "log_every")
MEANS = tuple(column.key for column in RUN_COLUMNS if column.over_seeds == "mean")
COLLECTED = tuple(column.key for column in RUN_COLUMNS if column.over_seeds == "all")


class Ranking(NamedTuple):
    """Key of a ranking: rows with the same key are comparable."""

    model: str
    weight_bits: int
    act_bits: int
    protocol: str
    first_bits: int | None
    last_bits: int | None
    layer_bits: str
    act_points: str
    objective: str
    teacher_digest: str
    eval_digest: str
    heldout_digest: str
    dataset: str
    num_images: str
    selection_fraction: str
    fidelity_measure: str

    def order(self) -> tuple[Any, ...]:
        """Return the sort key of rankings: high bit-widths first."""
        bits = (-self.weight_bits, -self.act_bits)
        first_last = (-(self.first_bits or 0), -(self.last_bits or 0))
        return (self.model, *bits, self.protocol, *first_last, *self[6:])

    def group(self) -> tuple[Any, ...]:
        """Return the part of the key that is known before a run has measured anything, without its teacher."""
        return self[:9]

    def measure(self) -> tuple[str, ...]:
        """Return the part of the key about the measurement: the teacher's weights, all images, the fidelity measure."""
        return self[9:]

    def family(self) -> "Ranking":
        """Return the ranking without its bit-widths: rows of one family share a Pareto front."""
        return self._replace(weight_bits=0, act_bits=0, first_bits=None, last_bits=None, layer_bits="")


class Setting(NamedTuple):
    """Key of a setting: equal for two runs exactly if `config_digest(..., with_seeds=False)` is."""

    shared: str
    """Digest of everything but fine-tuning: teacher, images, bit-widths, evaluation."""
    training: tuple[Any, ...]
    """Values of the fine-tuning settings; None for an inactive key."""


def read_setting(config: Mapping[str, Any], source: str = "") -> tuple[RunConfig, Setting]:
    """Check the configuration of a record and return it with the key of its setting.

    Parsing a configuration and computing its digest take a millisecond each. The runs of a sweep differ in their
    training and their seeds only, so everything else is parsed and digested once (`_shared` caches it).

    Args:
        config: The configuration as recorded.
        source: Name of its file, for messages.

    Raises:
        ValueError: As `config_from_dict`.
    """
    try:
        shared, digest = _shared(json.dumps({key: value for key, value in config.items() if key not in PER_RUN}))
        finetune = config_from_dict(FinetuneConfig, config.get("finetune", {}))
        per_run = {key: config[key] for key in PER_RUN if key in config}
        if any(type(per_run.get(key, 0)) is not int for key in ("seed", "data_seed")):
            raise TypeError("seed")
        whole = replace(shared, **{**per_run, "finetune": finetune})
    except (ValueError, TypeError):
        config_from_dict(RunConfig, config, source=source)  # the same error, with the key's full name
        raise
    values = {name: getattr(finetune, name) for name in TRAINING}
    inactive = inactive_keys(values, whole.quant.learned_steps)
    return whole, Setting(digest, tuple(None if name in inactive else value for name, value in values.items()))


@functools.lru_cache(maxsize=4096)
def _shared(text: str) -> tuple[RunConfig, str]:
    config = config_from_dict(RunConfig, {**json.loads(text), "finetune": {"epochs": 0}})
    return config, config_digest(config, with_seeds=False)


@dataclass(frozen=True, slots=True)
class Run:
    """The part of a record that the tables need, which takes far less memory."""

    ranking: Ranking
    """Ranking of the run; fields that a failed run has not measured are empty."""
    setting: Setting
    """Key shared with the same setting on other seeds."""
    row: Row
    """Its row of trials.csv."""
    line: str
    """The row as a line of CSV."""
    settings: Values
    """All settings of the run."""
    sort_key: tuple[Any, ...]
    """Sort key of trials.csv; for equal names the line decides, so that the order does not depend on reading."""
    source: str
    """Its file, or the name of its record, for messages."""

    @property
    def seeds(self) -> tuple[int, int]:
        """Return the seeds of fine-tuning and of the synthetic set."""
        return self.row["seed"], self.row["data_seed"]

    @property
    def is_result(self) -> bool:
        """Whether the run has an objective to be ranked by."""
        value = self.row["objective_value"]
        return self.row["status"] == "completed" and value is not None and math.isfinite(value)


def read_run(record: RunRecord, source: str = "", constraints: Sequence[Constraint] = ()) -> Run:
    """Return the part of a record that the tables need.

    Args:
        record: The record.
        source: Its file, for messages; a record from a file is checked, one of this process is not.
        constraints: Those of its sweep.

    Raises:
        ValueError: The configuration is damaged, or the record contradicts it or itself.
    """
    config, setting = read_setting(record.config, source or f"record {record.name}")
    if source and (wrong := contradictions(record, config)):
        raise ValueError(
            f"`{source}` must fit its configuration and itself, but {'; '.join(wrong)}: move it out; a run without its "
            "record is measured again"
        )
    cells: Row = {column: getattr(record, column) for column in TRIAL_COLUMNS if hasattr(record, column)}
    trained = bool(record.config.get("finetune"))
    cells |= setting_cells(config.finetune, record.teacher.get("input_size")) if trained else dict.fromkeys(SETTINGS)
    versions = " ".join(f"{name}={version}" for name, version in sorted(record.versions.items()))
    cells |= {"trial": record.name, "seconds": record.total_seconds, "versions": versions}
    cells |= {column: record.deployment.get(column) for column in DEPLOYED}
    cells["violates"] = violations(constraints, cells)
    row = {column: cells[column] for column in TRIAL_COLUMNS}  # a KeyError for a column that nothing fills
    ranking, line = _ranking(record, config), csv_line(row.values())
    sort_key = (ranking.order()[:9], record.name, record.config_digest, record.started, line)
    return Run(ranking, setting, row, line, read_settings(config, trained=trained), sort_key, source or record.name)


def _ranking(record: RunRecord, config: RunConfig) -> Ranking:
    evaluation, synthetic = config.evaluation, record.objective == "synthetic"
    return Ranking(
        model=record.model,
        weight_bits=record.weight_bits,
        act_bits=record.act_bits,
        protocol=record.protocol,
        first_bits=config.quant.end_bits[0],
        last_bits=config.quant.end_bits[1],
        layer_bits=config.quant.layer_label,
        act_points=record.act_points,
        objective=record.objective,
        teacher_digest=str(record.teacher.get("digest", "")),
        eval_digest=record.eval_digest,
        heldout_digest=record.heldout_digest if synthetic else "",
        dataset="" if synthetic else Path(str(evaluation.dataset)).name,
        num_images="" if synthetic else str(evaluation.num_images),
        selection_fraction="" if synthetic else str(evaluation.selection_fraction),
        # A record without it was measured by the KL, independent of the current default.
        fidelity_measure=str(record.config.get("evaluation", {}).get("fidelity_measure") or "kl") if synthetic else "",
    )


@dataclass(slots=True)
class Standing:
    """One row of the leaderboard with the values that determine its rank."""

    ranking: Ranking
    """Ranking of the row."""
    row: Row
    """Its cells; `rank` and the three columns from `best` on depend on other rows and are filled in last."""
    objective_std: float | None
    """Sample standard deviation of the objective over the seeds; None for one seed."""
    settings: Values
    """All settings of its first run."""
    cost: float = field(init=False)
    """The mean objective, with its sign such that lower is better."""
    head: str = field(init=False)
    """The cells before `best` as text, the rank left out."""
    tail: str = field(init=False)
    """The cells after those that depend on other rows, as text."""

    def __post_init__(self) -> None:
        self.cost = self.row["objective_value"] * (-1 if self.ranking.objective == "selection" else 1)
        cells = [self.row[column] for column in LEADERBOARD_COLUMNS]
        self.head = csv_line(cells[1:PLACED])
        self.tail = csv_line([None, *cells[PLACED + 3 :]])

    def sort_key(self) -> tuple[Any, ...]:
        """Return the sort key within a ranking; the text breaks ties."""
        return (self.is_violating, -self.row["num_seeds"], self.cost, self.row["config_digest"], self.head)

    @property
    def is_violating(self) -> bool:
        """Whether the row violates a constraint of its sweep."""
        return bool(self.row["violates"])

    def cell(self, column: str) -> Any:
        """Return the cell of a column of leaderboard.csv, or of any setting as `params.KEY`."""
        if column.startswith(PREFIX):
            return setting_cell(value_of(self.settings, column.removeprefix(PREFIX)))
        return self.row[column]

    def line(self) -> str:
        """Return the row as a line of CSV, without the settings that vary."""
        row = self.row
        size, bitops = ("" if row[mark] is None else row[mark] for mark in ("pareto_size", "pareto_bitops"))
        return f"{row['rank']},{self.head},{row['best']},{size},{bitops}{self.tail}"


def standings(runs: Iterable[Run], constraints: Sequence[Constraint] = ()) -> list[Standing]:
    """Return the rows of one setting: one for each ranking in which it has a result.

    `Column.over_seeds` defines the cell of a column for several completed runs; "first" is the run with the lowest
    seeds. top1_std has the denominator num_seeds - 1. num_failed counts seeds on which a run of the setting
    failed and none was completed, here or in another folder. A pruned run is not a result: it neither ranks nor counts.

    Args:
        runs: The runs of one setting.
        constraints: Bounds on the cells of a row, so on the means over seeds.
    """
    results: dict[Ranking, list[Run]] = defaultdict(list)
    failed = []
    for run in runs:
        if run.is_result:
            results[run.ranking].append(run)
        elif run.row["status"] != "pruned":
            failed.append(run)
    rows = []
    for ranking, members in results.items():
        teacher, measure = ranking.teacher_digest, ranking.fidelity_measure
        lost = {
            run.seeds
            for run in failed
            if run.ranking.teacher_digest in ("", teacher) and run.ranking.fidelity_measure == measure
        }
        done = {run.seeds for other, group in results.items() if other.teacher_digest == teacher for run in group}
        rows.append(_standing(ranking, members, len(lost - done), constraints))
    return rows


def disagreement(one: Run, other: Run) -> str:
    """Return the first metric in which two runs of one setting and seed differ by more than rounding; "" if in none."""
    for name in COMPARED:
        values = (one.row[name], other.row[name])
        if None not in values and not math.isclose(*values, rel_tol=SAME_RUN, abs_tol=SAME_RUN):
            return f"{name} {values[0]:.6g} and {values[1]:.6g}"
    return ""


def _standing(ranking: Ranking, runs: Sequence[Run], num_failed: int, constraints: Sequence[Constraint]) -> Standing:
    by_seed: dict[tuple[int, int], Run] = {}
    # The whole content breaks ties between two records of one run, so that the order of reading does not matter.
    for run in sorted(runs, key=lambda run: (run.seeds, run.row["started"], run.row["host"], repr(run.row))):
        kept_run = by_seed.setdefault(run.seeds, run)  # a duplicate run (of merged sweeps) counts once
        if differing := disagreement(kept_run, run):
            print_notice(
                f"warning: {kept_run.source} and {run.source} are of one setting and seed, but differ: {differing}; "
                "the first is ranked; one is wrong, or they are of different machines or versions: `synq verify` both"
            )
    first, kept = next(iter(by_seed.values())), [run.row for run in by_seed.values()]
    cells: Row = {**kept[0], **dict.fromkeys(RANK_COLUMNS)}
    cells |= {column: mean(run[column] for run in kept) for column in MEANS}
    cells |= {column: "; ".join(sorted({run[column] for run in kept})) for column in COLLECTED}
    cells |= {
        "top1_mean": mean(run["top1"] for run in kept),
        "top1_std": std(run["top1"] for run in kept),
        "num_seeds": len(kept),
        "num_failed": num_failed,
        "num_data_seeds": len({data_seed for _, data_seed in by_seed}),
        "first_bits": ranking.first_bits,
        "last_bits": ranking.last_bits,
        "layer_bits": ranking.layer_bits or None,
        "teacher_digest": ranking.teacher_digest[:16],
        "fidelity_measure": ranking.fidelity_measure,
    }
    cells["violates"] = violations(constraints, cells)
    row = {column: cells[column] for column in LEADERBOARD_COLUMNS}  # a KeyError for a column that nothing fills
    return Standing(ranking, row, std(run["objective_value"] for run in kept), first.settings)
