"""Every column of every table of runs: its key, headings, unit and meaning.

The order of `RUN_COLUMNS` is the order of the columns everywhere. To add a column to trials.csv or leaderboard.csv,
append one `Column`, name the tables that show it, and compute its value in `ranking.py`. Keys are the names in the CSV
files: none is ever renamed, new ones come last in each file. A setting without a `Column` here gets one where it varies
(`settings.py`); these come after all others.

Imports neither Ray nor torch.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from enum import Flag, auto
from typing import Any, Literal

from synq.config.run import FinetuneConfig

Setting = float | str | None


class In(Flag):
    """The tables of runs."""

    TRIALS = auto()
    """trials.csv: one row per run."""
    BOARD = auto()
    """leaderboard.csv: one row per setting, means over its seeds."""
    TERMINAL = auto()
    """The output of `synq leaderboard`."""
    SWEEP = auto()
    """The output of a sweep at its end."""
    PAGE = auto()
    """The leaderboard of an HTML report."""


NOWHERE = In(0)
"""Tables of a column that is in neither trials.csv nor leaderboard.csv."""


@dataclass(frozen=True, slots=True)
class Column:
    """One column of a table."""

    key: str
    """Name in the CSV files, and key of the rows."""
    meaning: str
    """Description of its values, in one line."""
    tables: In = NOWHERE
    """Tables of runs that have the column."""
    short: str = ""
    """Heading in a terminal; by default the key."""
    title: str = ""
    """Heading in a report, without the unit; by default the short heading."""
    unit: str = ""
    """Unit of its numbers."""
    decimals: int | None = None
    """Decimal places in a report; by default four significant digits."""
    over_seeds: Literal["first", "mean", "all"] = "first"
    """Cell of leaderboard.csv for several runs of a setting: the first run's, the mean, or all distinct values."""
    is_text: bool = False
    """Whether its cells are compared as text, not as numbers."""
    texts: tuple[str, ...] = ()
    """Texts that may occur in a column of numbers."""
    setting: Callable[[FinetuneConfig, Any], Setting] | None = None
    """For a searched setting: returns its cell, given the configuration and the teacher's input size (C, H, W)."""
    unit_key: str = ""
    """For a searched setting: the key of its unit in the configuration."""

    @property
    def heading(self) -> str:
        """Return the heading in a terminal."""
        return self.short or self.key

    @property
    def page_heading(self) -> str:
        """Return the heading in a report."""
        return (self.title or self.heading) + (f" [{self.unit}]" if self.unit else "")


def _setting(
    key: str,
    meaning: str,
    short: str,
    title: str,
    *,
    cell: Callable[[FinetuneConfig, Any], Setting] | None = None,
    **more: Any,
) -> Column:
    """Return the column of a searched setting, by default the field of that name of the configuration."""
    return Column(key, meaning, _EVERYWHERE, short, title, setting=cell or (lambda f, _: getattr(f, key)), **more)


def _cutoff_in_bins(finetune: FinetuneConfig, input_size: Any) -> Setting:
    """Return the cutoff in DFT bins; "None" without a filter, because an empty cell means unknown."""
    cutoff = finetune.lowpass_cutoff
    if cutoff is None:
        return "None"
    if finetune.lowpass_unit != "nyquist":
        return cutoff
    return cutoff * min(input_size[-2:]) / 2 if input_size else None  # unknown if loading the teacher failed


_BOTH = In.TRIALS | In.BOARD
_EVERYWHERE = _BOTH | In.TERMINAL | In.SWEEP | In.PAGE
_PRINTED = In.BOARD | In.TERMINAL | In.SWEEP | In.PAGE

RUN_COLUMNS = (
    Column("rank", "place in its ranking, the best first", _PRINTED),
    Column("trial", "name of the run", In.TRIALS, is_text=True),
    Column("status", "completed, failed, diverged, pre-empted, lost, or pruned by the scheduler", In.TRIALS,
        is_text=True),
    Column("reason", "why a run was not completed", In.TRIALS, is_text=True),
    Column("model", "the teacher", _EVERYWHERE, is_text=True),
    Column("weight_bits", "bit-width of the weights", _EVERYWHERE, "W", "W", "bits"),
    Column("act_bits", "bit-width of the activations", _EVERYWHERE, "A", "A", "bits"),
    Column("protocol", "A: all layers low-bit, static ranges; B: any other; own_images: not zero-shot",
        _EVERYWHERE & ~In.SWEEP, is_text=True),
    Column("act_points", "quantized tensors: relu, inputs or an engine's", _EVERYWHERE, "points", "quantization points",
        is_text=True),
    Column(
        "objective", "what the search optimizes: synthetic or selection", _EVERYWHERE & ~In.SWEEP, is_text=True
    ),
    Column("objective_value", "the objective after the last epoch", _EVERYWHERE, "objective value",
        over_seeds="mean"),
    Column("top1", "top-1 accuracy of the student on the labeled images", In.TRIALS, "top-1", "top-1", "%", 2),
    Column("top5", "top-5 accuracy of the student on the labeled images", In.TRIALS, "top-5", "top-5", "%", 2),
    Column("top1_mean", "top-1 accuracy of the student, mean over seeds", _PRINTED, "top-1", "top-1", "%", 2),
    Column("top1_std", "sample standard deviation of top-1 over seeds; empty for one", _PRINTED, "std", "std", "%", 2),
    Column("num_seeds", "number of completed seeds", _PRINTED, "n", "seeds"),
    Column("num_failed", "seeds on which a run failed and none was completed", _PRINTED, "failed"),
    Column("teacher_top1", "top-1 accuracy of the teacher on the same images", _BOTH | In.SWEEP | In.PAGE, "teacher",
        "teacher top-1", "%", 2, "mean"),
    Column("rtn_top1", "top-1 accuracy of the student before fine-tuning", _BOTH | In.SWEEP | In.PAGE, "RTN",
        "top-1 before fine-tuning", "%", 2, "mean"),
    Column("drop", "top-1 of the teacher minus that of the student", _EVERYWHERE, "drop", "drop", "points", 2, "mean"),
    Column("num_eval", "number of labeled images that top-1 is measured on", _BOTH | In.PAGE, "images"),
    Column("seed", "seed of fine-tuning", In.TRIALS),
    Column("data_seed", "seed of the synthetic set", In.TRIALS),
    Column("size_bytes", "size of the packed parameters", _BOTH | In.PAGE, "bytes", "size", "bytes", 0),
    Column("bitops", "bit operations of one image: sum over layers of MACs x weight bits x activation bits",
        _BOTH | In.PAGE, "BitOps", decimals=0),
    _setting("lowpass_cutoff", "cutoff D0 of the Gaussian low-pass filter", "cutoff", "low-pass cutoff",
        unit="DFT bins", cell=_cutoff_in_bins, texts=("None",), unit_key="lowpass_unit"),
    _setting("cam_weight", "weight of the CAM loss (lambda)", "CAM", "CAM weight"),
    _setting("ce_weight", "weight of the cross-entropy with hard labels", "CE", "CE weight"),
    _setting("difficulty_threshold", "threshold tau above which an image has no hard label", "tau", "tau"),
    _setting("lr", "learning rate of fine-tuning", "lr", "learning rate"),
    Column("kept_share", "share (0..1) of the images whose hard label is used", In.TRIALS, "kept"),
    Column("set_digest", "digest of the synthetic training set", _BOTH, is_text=True),
    Column("heldout_digest", "digest of the held-out synthetic set", In.TRIALS, is_text=True),
    Column("config_digest", "digest of everything that decides the result", _BOTH, is_text=True),
    Column("commit", "commit of the code", _BOTH, is_text=True, over_seeds="all"),
    Column("versions", "versions of Python and of the packages", _BOTH, is_text=True, over_seeds="all"),
    Column("device", "device the run was made on", _BOTH, is_text=True, over_seeds="all"),
    Column("host", "name of the machine", In.TRIALS, is_text=True),
    Column("started", "start of the run, ISO 8601, UTC", In.TRIALS, is_text=True),
    Column("seconds", "duration of one run", _BOTH | In.SWEEP | In.PAGE, "s", "time", "s", 0, "mean"),
    Column("num_data_seeds", "different seeds of the synthetic set; 1 with num_seeds > 1: top1_std excludes "
        "its variance", In.BOARD),
    Column("first_bits", "bit-width of the first layer; empty: as the rest", In.BOARD | In.PAGE, title="first layer",
        unit="bits"),
    Column("last_bits", "bit-width of the last layer; empty: as the rest", In.BOARD | In.PAGE, title="last layer",
        unit="bits"),
    Column("teacher_digest", "first 16 digits of the digest of the teacher's weights", In.BOARD, is_text=True),
    Column("best", "1 for the first row of a ranking, else 0", In.BOARD),
    Column("pareto_size", "1 on the Pareto front of objective and size, across bit-widths", In.BOARD | In.TERMINAL,
        "Pareto"),
    Column("pareto_bitops", "1 on the Pareto front of objective and BitOps, across bit-widths", In.BOARD),
    Column("fidelity_measure", "fidelity measure of a synthetic objective", In.BOARD | In.PAGE,
        title="fidelity measure", is_text=True),
    Column("onnx_bytes", "size of the exported ONNX file", _BOTH, unit="bytes", decimals=0, over_seeds="mean"),
    Column("packed_bytes", "size of the exported packed file", _BOTH, unit="bytes", decimals=0, over_seeds="mean"),
    Column("latency_ms", "latency of the exported student, one image on a CPU; empty if the times varied too much",
        _BOTH, unit="ms", over_seeds="mean"),
    Column("float_latency_ms", "latency of the float model, the same way", _BOTH, unit="ms", over_seeds="mean"),
    Column("layer_bits", "layers with bit-widths different from the rest", In.BOARD | In.PAGE, title="layer bits",
        is_text=True),
    Column("latency_ratio", "latency of the exported student relative to that of the float model", _BOTH,
        "latency ratio", over_seeds="mean"),
    Column("log", "log file of the trial in the sweep's folder", In.TRIALS, is_text=True),
    Column("violates", "bounds of [constraints] that it violates: metric, value, bound; such rows are ranked last",
        _EVERYWHERE, is_text=True),
)  # fmt: skip
"""Columns of trials.csv and leaderboard.csv."""


def keys(columns: Iterable[Column]) -> tuple[str, ...]:
    """Return the keys of columns."""
    return tuple(column.key for column in columns)


def _of(table: In) -> tuple[str, ...]:
    return keys(column for column in RUN_COLUMNS if table in column.tables)


TEXT_COLUMNS = frozenset(column.key for column in RUN_COLUMNS if column.is_text)
TRIAL_COLUMNS = _of(In.TRIALS)
LEADERBOARD_COLUMNS = _of(In.BOARD)
TERMINAL_COLUMNS = _of(In.TERMINAL)
SWEEP_COLUMNS = _of(In.SWEEP)
PAGE_COLUMNS = _of(In.PAGE)
SETTINGS = {column.key: column for column in RUN_COLUMNS if column.setting is not None}
"""Searched settings, fields of FinetuneConfig, with their columns."""

_RUN = {column.key: column for column in RUN_COLUMNS}


def _shared(*names: str) -> list[Column]:
    return [_RUN[name] for name in names]


BEST_TABLE = (
    *_shared("model", "weight_bits", "act_bits", "protocol", "act_points", "objective_value", "top1_mean", "top1_std"),
    *_shared("num_seeds", "drop"),
    Column("trial", "run of its first seed"),
)
"""The best setting of each ranking, in reports and in `synq show`; `settings.best_columns` adds the settings."""

COMPARE_TABLE = (
    *_shared("model", "weight_bits", "act_bits", "protocol", "first_bits", "last_bits", "act_points", "objective"),
    *_shared("fidelity_measure"),
    Column("measure", "the same for rows measured on the same images, with the same teacher and fidelity measure"),
    Column("path", "the sweep, as given"),
    *_shared("objective_value"),
    Column("objective_diff", "objective value minus that of the first path", short="objective diff"),
    Column("objective_stderr", "standard error of that difference"),
    *_shared("top1_mean", "top1_std", "num_seeds", "drop"),
    Column("top1_diff", "top-1 minus that of the first path", short="top-1 diff", unit="points"),
    Column("top1_stderr", "standard error of that difference", unit="points"),
    *SETTINGS.values(),
    *_shared("teacher_digest", "config_digest", "layer_bits"),
)
"""compare.csv: the best row of each sweep in each ranking."""
COMPARE_COLUMNS = keys(COMPARE_TABLE)
COMPARE_SHOWN = (
    "model", "weight_bits", "act_bits", "protocol", "act_points", "objective", "measure", "path", "objective_value",
    "objective_diff", "top1_mean", "num_seeds", "drop", "top1_diff",
)  # fmt: skip
"""Columns of compare.md and of the terminal; standard deviations and errors are in the cells of what they belong to."""

_STUDY = (
    Column("row", "the variant"),
    Column("bits", "bit-widths, such as W4A4"),
    replace(_RUN["num_seeds"], short="seeds"),
    Column("drop_mean", "top-1 of the teacher minus that of the student, mean over seeds", short="drop", unit="points"),
)
"""Columns that ablations and recipes share."""
_ROW, _BITS, _NUM_SEEDS, _DROP = _STUDY

RECIPE_TABLE = (
    _ROW, *_shared("model", "protocol", "act_points"), _BITS, _NUM_SEEDS,
    Column("seeds", "the seeds"),
    *_shared("teacher_top1", "top1_mean", "top1_std"), _DROP,
    Column("drop_stderr", "standard error of the drop, paired on the same images", unit="points"),
    *_shared("num_eval"),
    Column("seconds_mean", "duration of one run without its synthetic images", short="seconds", unit="s"),
    *_shared("commit", "device"),
    Column("source", "measured, or the publication"),
    Column("set_seconds_mean", "duration of making its synthetic images, in this run or in an earlier one",
        short="synthesis seconds", unit="s"),
)  # fmt: skip
"""recipe.csv."""

ABLATION_TABLE = (
    _BITS, *_shared("protocol", "act_points"), _ROW, _NUM_SEEDS,
    *_shared("teacher_top1"), replace(_RUN["rtn_top1"], short="RTN top-1"), *_shared("top1_mean", "top1_std"), _DROP,
    Column("gain_over_none", "top-1 minus that of the row `none`, mean over shared seeds", short="gain over none"),
    Column("gain_stderr", "standard error of that mean"),
    Column("kl_mean", "KL(teacher || student) on held-out synthetic images", short="held-out KL", unit="nats"),
    *_shared("kept_share", "num_eval"),
    Column("seconds_mean", "duration of one fine-tuning", unit="s"),
    Column("filter", "x where the low-pass filter is on"),
    Column("cam", "x where the CAM loss is on", short="CAM"),
    Column("soft_labels", "x where difficult images have soft labels only", short="soft labels"),
    Column("gain_t", "t statistic of the gain: gain / standard error", short="t"),
    Column("gain_p", "two-sided p-value of the paired t-test", short="p"),
    Column("significant", "yes where p < 0.05, for each row alone"),
)  # fmt: skip
"""ablation.csv."""

FIDELITY_TABLE = (
    Column("group", "model and bit-widths; all: mean over groups"),
    Column("view", "perturbation of the held-out images"),
    Column("measure", "fidelity measure"),
    Column("num_trials", "number of trials", short="n"),
    Column("spearman", "Spearman's rank correlation of -measure with top-1", short="Spearman"),
    Column("low", "lower end of its 95 % bootstrap interval"),
    Column("high", "upper end of its 95 % bootstrap interval"),
    Column("kendall", "Kendall's tau of -measure with top-1", short="Kendall"),
    Column("spearman_top_half", "Spearman's rank correlation among the better half by top-1", short="upper half"),
    Column("picked_top1", "top-1 of the trial that the measure ranks first", unit="%"),
    Column("best_top1", "top-1 of the best trial", unit="%"),
    Column("regret", "best_top1 - picked_top1", unit="points"),
    Column(
        "beats_reference", "share of the bootstrap samples in which it ranks better than plain KL", short="beats KL"
    ),
)
"""fidelity_study.csv."""


def headings(columns: Iterable[Column]) -> dict[str, str]:
    """Return the headings of columns in a terminal or a Markdown table, by key."""
    return {column.key: column.heading for column in columns}


def page_texts(columns: Iterable[Column]) -> dict[str, Any]:
    """Return `headings`, `meanings` and `decimals` of a report's table, each by key."""
    columns = list(columns)
    return {
        "headings": {column.key: column.page_heading for column in columns},
        "meanings": {column.key: column.meaning for column in columns},
        "decimals": {column.key: column.decimals for column in columns if column.decimals is not None},
    }


def setting_cells(finetune: FinetuneConfig, input_size: Any) -> dict[str, Setting]:
    """Return the cells of the searched settings.

    Args:
        finetune: The configuration of fine-tuning.
        input_size: The teacher's input size (C, H, W), or None where it is unknown.
    """
    return {key: column.setting(finetune, input_size) for key, column in SETTINGS.items() if column.setting is not None}
