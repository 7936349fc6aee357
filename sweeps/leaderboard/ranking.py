"""Runs as rows, and rows in their ranks: what a table says of a record, and what may be compared with what. No Ray, no torch.

Ranks start again for everything that must not be compared (`Ranking`): model and its weights (`teacher_digest`, first 16 digits),
bit-widths (those of the first and last layer too; empty: as the rest), protocol, act_points, objective, the images and the fidelity
measure of the objective, and the labelled images. Within a ranking a row is one setting; its runs differ in their seeds only.
Settings measured on more seeds come first, because one lucky seed is no evidence; then the better mean objective. `num_data_seeds`
counts the synthetic sets' seeds behind a row: 1 with num_seeds > 1 says that data_seed was fixed, so that top1_std leaves out what
the set contributes. `pareto_size` and `pareto_bitops` look across bit-widths: 1 where no other row that was measured in the same way
is at least as good in mean objective and size (bit operations) and better in one of them.
"""

import functools
import json
import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

from synq.common.text_tables import Row, csv_line
from synq.config.identity import idle_keys
from synq.config.run import FinetuneConfig, RunConfig, config_digest, config_from_dict
from synq.runs.record import DEPLOYED, RunRecord

LEADERBOARD_COLUMNS = (
    "rank", "model", "weight_bits", "act_bits", "protocol", "act_points", "objective", "objective_value", "top1_mean", "top1_std",
    "num_seeds", "num_failed", "teacher_top1", "rtn_top1", "drop", "num_eval", "size_bytes", "bitops", "lowpass_cutoff", "cam_weight",
    "ce_weight", "difficulty_threshold", "lr", "set_digest", "config_digest", "commit", "versions", "device", "seconds",
    "num_data_seeds", "first_bits", "last_bits", "teacher_digest", "best", "pareto_size", "pareto_bitops", "fidelity_measure",
    *DEPLOYED, "layer_bits",
)  # fmt: skip
"""Columns of leaderboard.csv. New ones are appended; none is ever renamed."""
TRIAL_COLUMNS = (
    "trial", "status", "reason", "model", "weight_bits", "act_bits", "protocol", "act_points", "objective", "objective_value", "top1",
    "top5", "teacher_top1", "rtn_top1", "drop", "num_eval", "seed", "data_seed", "size_bytes", "bitops", "lowpass_cutoff", "cam_weight",
    "ce_weight", "difficulty_threshold", "lr", "kept_share", "set_digest", "heldout_digest", "config_digest", "commit", "versions",
    "device", "host", "started", "seconds", *DEPLOYED,
)  # fmt: skip
"""Columns of trials.csv. New ones are appended; none is ever renamed."""
TEXT_COLUMNS = frozenset(
    ("model", "protocol", "act_points", "objective", "set_digest", "config_digest", "commit", "versions", "device",
     "teacher_digest", "fidelity_measure", "layer_bits")
)  # fmt: skip
"""Columns of leaderboard.csv that hold texts; the others hold numbers."""
SETTINGS = ("lowpass_cutoff", "cam_weight", "ce_weight", "difficulty_threshold", "lr")
PLACED = LEADERBOARD_COLUMNS.index("best")
"""From here on a row depends on the other rows, for three columns."""
OWN = ("name", "finetune", "seed", "data_seed")
TRAINING = tuple(part.name for part in fields(FinetuneConfig) if part.name != "log_every")


class Ranking(NamedTuple):
    """What rows share that may be ranked against each other."""

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
        """Sort key; wide widths first."""
        widths = (-self.weight_bits, -self.act_bits)
        edges = (-(self.first_bits or 0), -(self.last_bits or 0))
        return (self.model, *widths, self.protocol, *edges, *self[6:])

    def group(self) -> tuple[Any, ...]:
        """What is known of a run before anything is measured, its teacher apart."""
        return self[:9]

    def measure(self) -> tuple[str, ...]:
        """What the figures were measured with: the teacher's weights, the very images, labelled ones included, and the measure."""
        return self[9:]

    def family(self) -> "Ranking":
        """The same at any width: rows that a Pareto front may hold together."""
        return self._replace(weight_bits=0, act_bits=0, first_bits=None, last_bits=None, layer_bits="")


class Setting(NamedTuple):
    """Equal for two runs exactly if `config_digest(..., with_seeds=False)` is."""

    shared: str
    """That digest for a run of the same teacher, images, widths and measurement that does not train."""
    training: tuple[Any, ...]
    """How it trains."""


def read_setting(config: Mapping[str, Any], source: str = "") -> tuple[RunConfig, Setting]:
    """Check the configuration of a record and name its setting.

    Reading a configuration and making its digest take a millisecond each. The runs of a sweep differ in their training and their
    seeds, so everything else is read and named once.

    Args:
        config: As it stands in the record.
        source: Where it stands, for messages.

    Raises:
        ValueError: As `config_from_dict`.
    """
    try:
        shared, digest = _shared(json.dumps({key: value for key, value in config.items() if key not in OWN}))
        finetune = config_from_dict(FinetuneConfig, config.get("finetune", {}))
        own = {key: config[key] for key in OWN if key in config}
        if any(type(own.get(key, 0)) is not int for key in ("seed", "data_seed")):
            raise TypeError("seed")
        whole = replace(shared, **{**own, "finetune": finetune})
    except (ValueError, TypeError):
        config_from_dict(RunConfig, config, source=source)  # the same refusal, with the key's full name
        raise
    values = {name: getattr(finetune, name) for name in TRAINING}
    idle = idle_keys(values, whole.quant.learned_steps)
    return whole, Setting(digest, tuple(None if name in idle else value for name, value in values.items()))


@functools.lru_cache(maxsize=4096)
def _shared(text: str) -> tuple[RunConfig, str]:
    config = config_from_dict(RunConfig, {**json.loads(text), "finetune": {"epochs": 0}})
    return config, config_digest(config, with_seeds=False)


@dataclass(frozen=True, slots=True)
class Run:
    """What the tables need of a record; it costs far less memory."""

    ranking: Ranking
    """Where the run would be ranked; what a failed one has not measured is empty."""
    setting: Setting
    """What it shares with its repetitions on other seeds."""
    row: Row
    """Its row of trials.csv."""
    line: str
    """The row as text."""
    place: tuple[Any, ...]
    """Sort key of trials.csv; the line decides between two runs of one name, so that no order of reading can."""

    @property
    def seeds(self) -> tuple[int, int]:
        """Seeds of fine-tuning and of the synthetic set."""
        return self.row["seed"], self.row["data_seed"]

    @property
    def is_result(self) -> bool:
        """Whether the run has an objective to be ranked by."""
        value = self.row["objective_value"]
        return self.row["status"] == "completed" and value is not None and math.isfinite(value)


def read_run(record: RunRecord, source: str = "") -> Run:
    """Return what the tables need of a record.

    Args:
        record: The record.
        source: Where it was read, for messages; by default its name is said.

    Raises:
        ValueError: The configuration does not read.
    """
    config, setting = read_setting(record.config, source or f"record {record.name}")
    row: Row = {column: getattr(record, column, None) for column in TRIAL_COLUMNS}
    row |= _settings(record, config)
    versions = " ".join(f"{name}={version}" for name, version in sorted(record.versions.items()))
    row |= {"trial": record.name, "seconds": record.total_seconds, "versions": versions}
    row |= {column: record.deployment.get(column) for column in DEPLOYED}
    ranking, line = _ranking(record, config), csv_line(row.values())
    return Run(
        ranking, setting, row, line, (ranking.order()[:9], record.name, record.config_digest, record.started, line)
    )


def _ranking(record: RunRecord, config: RunConfig) -> Ranking:
    evaluation, synthetic = config.evaluation, record.objective == "synthetic"
    return Ranking(
        model=record.model,
        weight_bits=record.weight_bits,
        act_bits=record.act_bits,
        protocol=record.protocol,
        first_bits=config.quant.first_bits,
        last_bits=config.quant.last_bits,
        layer_bits=config.quant.layer_label,
        act_points=record.act_points,
        objective=record.objective,
        teacher_digest=str(record.teacher.get("digest", "")),
        eval_digest=record.eval_digest,
        heldout_digest=record.heldout_digest if synthetic else "",
        dataset="" if synthetic else Path(str(evaluation.dataset)).name,
        num_images="" if synthetic else str(evaluation.num_images),
        selection_fraction="" if synthetic else str(evaluation.selection_fraction),
        # As recorded: a record without it was measured by the KL, whatever is the default today.
        fidelity_measure=str(record.config.get("evaluation", {}).get("fidelity_measure") or "kl") if synthetic else "",
    )


def _settings(record: RunRecord, config: RunConfig) -> Row:
    """The searched settings; the cutoff always in DFT bins, None (no filter) as a word, because an empty cell reads as unknown."""
    if not record.config.get("finetune"):
        return dict.fromkeys(SETTINGS)
    values = {name: getattr(config.finetune, name) for name in SETTINGS}
    if values["lowpass_cutoff"] is None:
        values["lowpass_cutoff"] = "None"
    elif config.finetune.lowpass_unit == "nyquist":
        size = record.teacher.get("input_size")  # unknown where a run failed before its teacher was loaded
        values["lowpass_cutoff"] = values["lowpass_cutoff"] * min(size[-2:]) / 2 if size else None
    return values


@dataclass(slots=True)
class Standing:
    """One row of the leaderboard and what places it among the others."""

    ranking: Ranking
    """Rows of other rankings are not compared with it."""
    row: Row
    """Its cells; the rank and the columns from `best` on that depend on other rows are filled in last."""
    objective_std: float | None
    """Sample standard deviation of the objective over the seeds; None for one seed."""
    cost: float = field(init=False)
    """The mean objective, so that lower is better."""
    head: str = field(init=False)
    tail: str = field(init=False)
    """The cells that do not depend on other rows, as text: those before and those after the ones that do."""

    def __post_init__(self) -> None:
        self.cost = self.row["objective_value"] * (-1 if self.ranking.objective == "selection" else 1)
        cells = [self.row[column] for column in LEADERBOARD_COLUMNS]
        self.head = csv_line(cells[1:PLACED])
        self.tail = csv_line([None, *cells[PLACED + 3 :]])

    def merit(self) -> tuple[Any, ...]:
        """Sort key within a ranking; the text decides between rows that are equally good."""
        return (-self.row["num_seeds"], self.cost, self.row["config_digest"], self.head)

    def line(self) -> str:
        """The row as a line of CSV."""
        row = self.row
        size, bitops = ("" if row[mark] is None else row[mark] for mark in ("pareto_size", "pareto_bitops"))
        return f"{row['rank']},{self.head},{row['best']},{size},{bitops}{self.tail}"


def standings(runs: Iterable[Run]) -> list[Standing]:
    """Return the rows of one setting: one for each ranking in which it has a result.

    objective_value, top1_mean, teacher_top1, rtn_top1 and drop are means over the setting's completed seeds (`num_seeds`), top1_std is
    the sample standard deviation (denominator num_seeds - 1; empty for one seed), seconds is the mean of one run. set_digest and
    config_digest are those of the completed run with the lowest seeds. num_failed counts seeds on which a run of the setting failed
    and none was completed, here or in another folder. A pruned run is no result: it neither ranks nor counts.
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
        rows.append(_standing(ranking, members, len(lost - done)))
    return rows


def _standing(ranking: Ranking, runs: Sequence[Run], num_failed: int) -> Standing:
    by_seed: dict[tuple[int, int], Row] = {}
    # Its whole content decides between two records of one run, so that no order of reading can.
    for run in sorted(runs, key=lambda run: (run.seeds, run.row["started"], run.row["host"], repr(run.row))):
        by_seed.setdefault(run.seeds, run.row)  # the same run twice (merged sweeps) counts once
    kept = list(by_seed.values())
    row: Row = {column: kept[0].get(column) for column in LEADERBOARD_COLUMNS}
    row |= {
        column: _mean(kept, column)
        for column in ("objective_value", "teacher_top1", "rtn_top1", "drop", "seconds", *DEPLOYED)
    }
    row |= {column: "; ".join(sorted({run[column] for run in kept})) for column in ("commit", "versions", "device")}
    row |= {
        "top1_mean": _mean(kept, "top1"),
        "top1_std": _std(kept, "top1"),
        "num_seeds": len(kept),
        "num_failed": num_failed,
        "num_data_seeds": len({data_seed for _, data_seed in by_seed}),
        "first_bits": ranking.first_bits,
        "last_bits": ranking.last_bits,
        "layer_bits": ranking.layer_bits or None,
        "teacher_digest": ranking.teacher_digest[:16],
        "fidelity_measure": ranking.fidelity_measure,
    }
    return Standing(ranking, row, _std(kept, "objective_value"))


def _known(rows: Iterable[Row], column: str) -> list[float]:
    return [row[column] for row in rows if row[column] is not None]


def _mean(rows: Iterable[Row], column: str) -> float | None:
    values = _known(rows, column)
    return statistics.fmean(values) if values else None


def _std(rows: Iterable[Row], column: str) -> float | None:
    values = _known(rows, column)
    return statistics.stdev(values) if len(values) > 1 else None
