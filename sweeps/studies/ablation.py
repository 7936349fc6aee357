"""Ablation of SynQ's components: all combinations of low-pass filter, CAM loss and soft labels, paired by seed.

Every row of a bit-width is trained on the same synthetic sets with the same seeds, so a difference between rows is the
effect of components. The runs are ordinary runs: an interrupted ablation resumes, a completed run is only read. The
rows are those of the paper's ablation (its Table 3) and distillation alone.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from synq.common.files import write_text_atomic
from synq.common.text_tables import to_csv, to_markdown
from synq.config.finetune import SWITCHED_OFF
from synq.config.run import RunConfig, parse_bits, with_overrides
from synq.runs.record import RunRecord

from ..leaderboard.columns import ABLATION_TABLE, headings, keys
from ..stats import Gain, mean, paired_gain, std
from .settings_file import check_bits, check_rows, check_seeds, read_settings

Overrides = Mapping[str, Any]
Cell = tuple[str, str, int]

IDEAS: dict[str, Overrides] = {idea: {f"finetune.{key}": off} for idea, (key, off) in SWITCHED_OFF.items()}
"""Overrides that disable each idea. Without soft labels every image has a hard label, as in methods before SynQ."""
DISTILLATION = "distillation only"
"""The row without any hard label, CAM or filter."""
ROWS: dict[str, tuple[str, ...]] = {
    "none": (),
    "filter": ("filter",),
    "CAM": ("CAM",),
    "soft labels": ("soft labels",),
    "filter + CAM": ("filter", "CAM"),
    "filter + soft labels": ("filter", "soft labels"),
    "CAM + soft labels": ("CAM", "soft labels"),
    "all": ("filter", "CAM", "soft labels"),
    DISTILLATION: (),
}
"""Rows by name: the components that are on."""
REFERENCE = "none"
SHOWN = (
    "bits", "row", "filter", "cam", "soft_labels", "num_seeds", "rtn_top1", "top1_mean", "drop_mean", "gain_over_none",
    "gain_t", "gain_p", "significant", "kl_mean",
)  # fmt: skip
"""Columns of ablation.md; standard deviations and errors are in the cells of what they belong to."""
NOTE = """\
x: on. Gain: top-1 minus that of `none`, paired by seed, ± its standard error; t = gain / standard error.
p: two-sided paired t-test of each row alone; significant: yes where p < 0.05; -: one seed or no spread, no test.
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class AblationSpec:
    """The file of an ablation."""

    name: str
    """Name of the runs and of the folder of the tables."""
    bits: tuple[str, ...]
    """Bit-widths, for example W3A3."""
    seeds: tuple[int, ...]
    """Seeds; each drives both the synthetic set and the fine-tuning."""
    rows: tuple[str, ...] = tuple(ROWS)
    """Rows, in this order."""
    base: RunConfig = field(default_factory=RunConfig)
    """The run with every component on; its name is `name`, its bit-widths and seeds are not used."""

    def __post_init__(self) -> None:
        check_bits(self.bits)
        check_seeds(self.seeds)
        check_rows(self.rows, ROWS)


def load_ablation(path: str | Path) -> AblationSpec:
    """Read the file of an ablation: name, bits, seeds, rows (all, if left out) and the run's settings in [base].

    Raises:
        FileNotFoundError: The file does not exist.
        ValueError: It is damaged, or a key is unknown, missing or out of range.
    """
    spec = read_settings(AblationSpec, path, "ablation", required=("name", "bits", "seeds"), base="base")
    try:
        base = with_overrides(spec.base, {"name": spec.name})
        plan(base, spec.bits, spec.seeds, spec.rows)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return replace(spec, base=base)


def row_overrides(row: str) -> dict[str, Any]:
    """Return the overrides of a row over the run with every component on."""
    off = {key: value for idea, changes in IDEAS.items() if idea not in ROWS[row] for key, value in changes.items()}
    return {**off, "finetune.ce_weight": 0.0} if row == DISTILLATION else off


def plan(
    base: RunConfig, bits: Sequence[str], seeds: Sequence[int], rows: Sequence[str] = tuple(ROWS)
) -> dict[Cell, RunConfig]:
    """Return the run of every (bits, row, seed); a seed drives both the synthetic set and the fine-tuning.

    Raises:
        ValueError: A component is already off in `base`, so that a run would be compared with itself, or a list is
            empty or has an unknown entry.
    """
    for name, off in (*SWITCHED_OFF.values(), ("ce_weight", 0.0), ("epochs", 0)):
        value = getattr(base.finetune, name)
        if value == off:
            raise ValueError(f"`finetune.{name}` must be on in the run that is ablated, but got {value}")
    check_bits(bits)
    check_seeds(seeds)
    check_rows(rows, ROWS)
    runs = {}
    for label in bits:
        weight_bits, act_bits = parse_bits(label)
        for seed in seeds:
            for row in rows:
                changes = {"quant.weight_bits": weight_bits, "quant.act_bits": act_bits, **row_overrides(row)}
                runs[label, row, seed] = with_overrides(base, {**changes, "seed": seed, "data_seed": seed})
    return runs


def table(records: Mapping[Cell, RunRecord]) -> list[dict[str, Any]]:
    """Return one line per (bits, row), in the order given.

    The gain is the mean over seeds of top1(row) - top1("none") on the same seed: pairing removes the variance that the
    rows share. The columns are those of `columns.ABLATION_TABLE`; for the statistics see `stats.paired_gain`.
    """
    lines = []
    for label, row in dict.fromkeys((label, row) for label, row, _ in records):
        cells = {seed: r for (a, b, seed), r in records.items() if (a, b) == (label, row)}
        reference = {seed: r for (a, b, seed), r in records.items() if (a, b) == (label, REFERENCE)}
        differences = [
            r.top1 - other.top1
            for seed, r in cells.items()
            if (other := reference.get(seed)) is not None and r.top1 is not None and other.top1 is not None
        ]
        gain = paired_gain(differences) if row != REFERENCE else None
        first = next(iter(cells.values()))
        lines.append(
            {
                "bits": label,
                "protocol": first.protocol,
                "act_points": first.act_points,
                "row": row,
                "num_seeds": len(cells),
                "teacher_top1": first.teacher_top1,
                "rtn_top1": mean(r.rtn_top1 for r in cells.values()),
                "top1_mean": mean(r.top1 for r in cells.values()),
                "top1_std": std(r.top1 for r in cells.values()),
                "drop_mean": mean(r.drop for r in cells.values()),
                "kl_mean": mean(r.fidelity.get("kl") for r in cells.values()),
                "kept_share": mean(r.kept_share for r in cells.values()),
                "num_eval": first.num_eval,
                "seconds_mean": mean(r.seconds.get("finetune") for r in cells.values()),
                **{idea.lower().replace(" ", "_"): "x" if idea in ROWS[row] else "" for idea in IDEAS},
                **_gain_cells(gain),
            }
        )
    return lines


def _gain_cells(gain: Gain | None) -> dict[str, Any]:
    values = {"gain_over_none": None, "gain_stderr": None, "gain_t": None, "gain_p": None, "significant": ""}
    if gain is None:
        return values
    return dict(zip(values, (gain.mean, gain.stderr, gain.t, gain.p, gain.significant), strict=True))


def markdown(lines: Sequence[Mapping[str, Any]]) -> str:
    """Return the table as Markdown, followed by a legend."""
    shown = [
        {
            **line,
            "rtn_top1": format_value(line["rtn_top1"]),
            "top1_mean": format_value(line["top1_mean"], spread=line["top1_std"]),
            "drop_mean": format_value(line["drop_mean"]),
            "gain_over_none": format_value(line["gain_over_none"], spread=line["gain_stderr"], signed=True),
            "gain_t": format_value(line["gain_t"]),
            "gain_p": format_value(line["gain_p"], 3),
            "significant": line["significant"] or "-",
            "kl_mean": format_value(line["kl_mean"], 4),
        }
        for line in lines
    ]
    return to_markdown(shown, SHOWN, headings(ABLATION_TABLE)) + "\n" + NOTE


def write_tables(folder: Path, lines: Sequence[dict[str, Any]]) -> None:
    """Write ablation.csv and ablation.md, atomically.

    Raises:
        OSError: The folder cannot be written, or the disk is full.
    """
    write_text_atomic(folder / "ablation.csv", to_csv(lines, keys(ABLATION_TABLE)))
    write_text_atomic(folder / "ablation.md", markdown(lines))


def format_value(value: float | None, digits: int = 2, *, spread: float | None = None, signed: bool = False) -> str:
    """Return a number as text: "90.61", "90.61 ± 0.16", "+0.36 ± 0.22", or "-" for None."""
    if value is None:
        return "-"
    text = f"{value:{'+' if signed else ''}.{digits}f}"
    return text if spread is None else f"{text} ± {spread:.{digits}f}"
