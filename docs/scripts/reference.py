"""Writes docs/reference/ from the code: commands, settings, keys of a sweep, columns, variables, Python API.

    python docs/scripts/reference.py            write the pages
    python docs/scripts/reference.py --check    write nothing; exit code 1 if a page is not what the code gives

The pages are kept in the repository, so that they can be read without a build; a test runs the same check.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from textwrap import dedent

SCRIPTS = Path(__file__).resolve().parent
sys.path[:0] = [str(SCRIPTS), str(SCRIPTS.parents[1])]  # the modules next to this one, and the package of this checkout

from reference_api import api_page  # noqa: E402
from reference_text import ROOT, table  # noqa: E402
from reference_variables import environment_page  # noqa: E402

from synq.cli import GROUP, SECTIONS  # noqa: E402
from synq.config.command_help import GROUPS, field_docs, settings_rows  # noqa: E402
from synq.config.command_line import Command  # noqa: E402
from synq.config.parsing import dotted_keys  # noqa: E402
from synq.config.run import RunConfig  # noqa: E402
from synq.sweeps.constraints import CONSTRAINED  # noqa: E402
from synq.sweeps.leaderboard.columns import (  # noqa: E402
    ABLATION_TABLE,
    BEST_TABLE,
    COMPARE_TABLE,
    FIDELITY_TABLE,
    RECIPE_TABLE,
    RUN_COLUMNS,
    Column,
    In,
)
from synq.sweeps.leaderboard.settings import COLUMN_KEYS, setting_column  # noqa: E402
from synq.sweeps.search_config import SearchConfig  # noqa: E402
from synq.sweeps.space import DEFAULT_SPACE, Dimension  # noqa: E402
from synq.sweeps.spec_file import MODEL_KEYS, SpecFile  # noqa: E402

FOLDER = ROOT / "docs" / "reference"
NOTICE = "<!-- Made by docs/scripts/reference.py from the code. Do not edit. -->\n\n"

SPEC_EXAMPLES = """\
## The search space

A `[space]` replaces the default one. Each table in it is one searched setting of `finetune` or `quant`, or
`synthesis.method`:

```toml
[space."finetune.lr"]    # or [space.finetune.lr]
type = "float"           # the bounds are included
low = 1e-4
high = 1e-2
log = true               # searched by its logarithm

[space."finetune.difficulty_threshold"]
type = "float"
low = 0.3
high = 0.9
step = 0.1               # sampler grid needs a step, or a choice

[space."finetune.epochs"]
type = "int"             # step is 1 unless given
low = 5
high = 30

[space."finetune.lowpass_cutoff"]
type = "float"
low = 0.4
high = 1.6
optional = true          # also tried: none, the filter switched off

[space."quant.act_range"]
type = "choice"
values = ["minmax", "mse"]

[space."finetune.perturb_size"]
type = "float"
low = 0.01
high = 0.1
when = {"finetune.perturb_weight" = "> 0"}   # exists only where this one, also searched, is above 0
```

"""
SPEC_NOTES = """
Not searched: bit-widths (groups, `bits`; a dimension with `second_objective`), engines (groups, `targets`),
`quant.act_points` and the other settings that decide a ranking, and `synthesis.*` other than `synthesis.method`, since
a sweep makes its synthetic sets before its trials.

`[constraints]` bounds metrics of the students: CONSTRAINED. A number is the largest
value; a table has `max`, `min` or both ([what they do](../how-to/sweep.md#bounds-on-size-cost-latency-or-drop)).

`[[points]]` hold settings by the same names, `"finetune.lr" = 0.01`; what a point leaves out has the value of `[base]`.

TOML has no empty value: `"none"` (or `"None"`) unsets a setting that may be unset. One setting has `none` among its
values, `evaluation.dataset`: `none` counts no labels, `None` takes the set of the bundled classifier.

`$NAME` and `${NAME}` in a text are replaced by the environment variable. An unknown key is rejected with the nearest
known one.
"""
SETTING_NOTES = """\
Every setting of `synthesis`, `quant`, `reconstruction` and `finetune` that differs between the runs of a table is a
column `params.KEY` at the end of `trials.csv`, `leaderboard.csv` and `compare.csv`, with the value of the configuration
(`params.finetune.lowpass_cutoff` in its unit, `lowpass_cutoff` in DFT bins), in the order below. A cell reads `None`
where a setting is unset and is empty where it is unknown. The DataFrames of `synq.sweeps` also have the searched
settings that took one value.

In a terminal, in `synq show` and on a page only settings that vary between the rows have a column, under the heading
below; those that most sweeps search and those that this one searches are named once above the table if they do not
vary. `synq leaderboard --where`, `--columns` and `--sort` take any setting, also those of `teacher`, `evaluation` and
`runtime`, by its key, such as `finetune.momentum`.
"""
COLUMN_NOTES = """
## Reading the tables

A ranking holds rows of one model, bit-width, protocol, quantization points, objective and fidelity measure; nothing
else is compared. Settings with more seeds come first (one lucky seed is no evidence), then the better mean objective.
`trials.csv` has pruned and failed runs with their reason; they are never ranked. Top-1 is that of the last epoch, never
of the best one. Failed seeds are counted (`num_failed`), not averaged.

- `protocol` is A where all layers are low-bit with static ranges, else B ([more](../concepts.md#protocols)).
- `pareto_size`, `pareto_bitops` are 1 where no row measured in the same way, at any bit-width, is at least as good in
  mean objective and in size (BitOps) and better in one; rows that violate a constraint do not count.
- `violates` is empty without `[constraints]`. Rows where it is not come after all others, and have `best` 0.
- `layer_bits` reads `conv1=W8 relu_3=A8`; `last_bits=weights_only` where `quant.last_bits_for_input` is off.
- `num_data_seeds` is 1 with `num_seeds` above 1 where `data_seed` was fixed: `top1_std` then lacks a part.
- `size_bytes` counts the packed tensors, `packed_bytes` the whole exported file with its header.
- `latency_ratio` is below 1 where the student is faster than float; times are empty before an export, and where they
  varied too much.

Read digests as text, and keep rows without a filter (pandas takes a digest of digits, or one like 12e45678, for a
number, and the cell "None" for a missing value):

```python
import pandas

digests = {"config_digest": str, "set_digest": str, "heldout_digest": str, "teacher_digest": str, "commit": str}
table = pandas.read_csv("runs/demo/leaderboard.csv", dtype=digests)
table.groupby("lowpass_cutoff", dropna=False)
```
"""


def commands_page() -> str:
    """Return the page of all commands."""
    lines = ["# Commands\n", "Every command has `--help` (the essentials) and `--help-all`. Exit codes: 0 done, 1 a "
             "run or a check failed, 2 input rejected with one line, 130 interrupted.\n"]  # fmt: skip
    for title, commands in SECTIONS.items():
        rows = [(f"[`synq {name}`](#synq-{name})", work) for name, (_, work) in commands.items()]
        lines += [f"**{title[:1].upper()}{title[1:]}**\n", table(("command", ""), rows)]
    lines += ["`accelerate launch synq/train.py` takes the arguments of `synq train` and starts several processes; "
              "`python launch/sweep.py`, also after `ray job submit ... --`, those of `synq sweep`.\n"]  # fmt: skip
    return "\n".join(lines) + "".join(command_section(name) for name in GROUP.modules)


def command_section(name: str) -> str:
    """Return the section of one command."""
    command = GROUP.get_command(None, name)  # type: ignore[arg-type]  # the context is not used
    assert isinstance(command, Command)
    rows = [(f"`{part.metavar}`", part.help) for part in command.own_arguments]
    for part in command.own_options:
        value = "" if part.is_flag else f" {part.metavar or part.type.name.upper()}{' ...' if part.several else ''}"
        rows.append((f"`{part.opts[0]}{value}`", part.help or ""))
    parts = [" ".join(text.split()) for text in (command.help or "").split("\n\n")]
    lines = [f"\n## synq {name}\n", f"```text\nsynq {name} {command.usage_line}\n```\n", "\n\n".join(parts) + "\n"]
    lines += [table(("option", ""), rows)] if rows else []
    if command.settings:
        lines += ["All [settings of a run](settings.md) are options, too: `--finetune.lr 0.001`.\n"]
    if command.examples:
        lines += [f"```text\n{dedent(command.examples.replace('%(prog)s', f'synq {name}').rstrip())}\n```\n"]
    return "\n".join([*lines, f"Exit codes: {command.exit_codes}.\n"])


def settings_page() -> str:
    """Return the page of the settings of a run."""
    lines = [
        f"# Settings of a run\n\nThe {len(dotted_keys(RunConfig))} settings of `synq train`, by table of a settings "
        "file. On the command line a setting is `--TABLE.KEY VALUE`; in TOML it is `KEY = value` below `[TABLE]`. "
        '`none` in a file is `"none"`.\n'
    ]
    for group in ("", *GROUPS):
        keys = [key for key in dotted_keys(RunConfig) if key.rpartition(".")[0] == group]
        lines += [f"## {group or 'run'}\n", (field_docs(RunConfig)[group] if group else "The run itself.") + "\n"]
        rows = []
        for key, (left, right) in zip(keys, settings_rows(RunConfig(), keys), strict=True):
            text, _, default = right.rpartition(" (default: ")
            rows.append((f"`{key}`", f"`{left.split(' ', 1)[1]}`", f"`{default[:-1]}`", text))
        lines.append(table(("setting", "value", "default", ""), rows))
    return "\n".join(lines)


def spec_page() -> str:
    """Return the page of the keys of a sweep."""
    lines = ["# Keys of a sweep\n", "The keys of the TOML or JSON file (or Python dict) that `synq sweep` reads. Keys "
             "of the top level come before the tables.\n", "## Budget, search, resources\n"]  # fmt: skip
    docs, specials = field_docs(SearchConfig), {"num_trials": "8, or the whole grid or list", "name": "the file's name"}
    defaults = {name: getattr(SearchConfig(), name) for name in docs}
    rows = [(f"`{key}`", specials.get(key, f"`{toml(defaults[key])}`"), doc) for key, doc in docs.items()
            if key not in ("more_trials", "retry")]  # fmt: skip
    lines += [table(("key", "default", ""), rows), "## Models, bit-widths, settings\n"]
    rows = [(f"`{key}`", doc) for key, doc in field_docs(SpecFile).items() if not key.startswith("search")]
    lines += [table(("key", ""), rows)]
    lines += [f"An entry of `models` is a text such as `torchvision:resnet18`, or a table with the settings of "
              f"[`teacher`](settings.md#teacher) and {', '.join(f'`{key}`' for key in MODEL_KEYS)} (its own settings, "
              "which override `[base]`).\n", SPEC_EXAMPLES]  # fmt: skip
    rows = [(f"`{key}`", doc) for key, doc in field_docs(Dimension).items() if key != "name"]
    lines += [table(("key of a table below `[space]`", ""), rows), "The default space:\n"]
    rows = [(f"`{name}`", ", ".join(f"{key} {value}" for key, value in keys.items()))
            for name, keys in DEFAULT_SPACE.items()]  # fmt: skip
    return "\n".join([*lines, table(("setting", "range"), rows)]) + SPEC_NOTES.replace(
        "CONSTRAINED", ", ".join(f"`{name}`" for name in CONSTRAINED)
    )


def toml(value: object) -> str:
    """Return a default as written in TOML."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    return "[]" if value == () else f'"{value}"' if isinstance(value, str) and value != "none" else str(value)


def columns_page() -> str:
    """Return the page of all columns."""
    lines = ["# Columns of the tables\n", "## trials.csv and leaderboard.csv\n"]
    lines += ["`trials.csv` has one row per run, `leaderboard.csv` one per setting with means over its seeds. The "
              "heading is that of a terminal. After these columns both files have [one for each setting that "
              "varies](#settings-that-vary).\n"]  # fmt: skip
    rows = []
    for column in RUN_COLUMNS:
        files = [name for flag, name in ((In.TRIALS, "trials"), (In.BOARD, "leaderboard")) if flag in column.tables]
        rows.append((f"`{column.key}`", column.heading if column.short else "", column.unit, ", ".join(files),
                     column.meaning))  # fmt: skip
    lines.append(table(("column", "heading", "unit", "file", ""), rows))
    lines += ["## Settings that vary\n", SETTING_NOTES]
    names = [(f"`{setting.key}`", setting.heading) for setting in map(setting_column, COLUMN_KEYS)]
    lines.append(table(("column", "heading"), names))
    best = "Best settings (`synq show`, reports), with a column for each setting that was searched or varies"
    tables = {best: BEST_TABLE, "compare.csv (`synq leaderboard --compare`)": COMPARE_TABLE,
              "recipe.csv": RECIPE_TABLE, "ablation.csv": ABLATION_TABLE,
              "fidelity_study.csv": FIDELITY_TABLE}  # fmt: skip
    for title, columns in tables.items():
        lines += [f"## {title}\n", table(("column", "unit", ""), [_row(column) for column in columns])]
    return "\n".join(lines) + COLUMN_NOTES


def _row(column: Column) -> tuple[str, str, str]:
    return f"`{column.key}`", column.unit, column.meaning


PAGES = {
    "commands.md": commands_page,
    "settings.md": settings_page,
    "sweep-keys.md": spec_page,
    "columns.md": columns_page,
    "environment.md": environment_page,
    "python.md": api_page,
}


def stale() -> list[str]:
    """Return the names of the pages that are not what the code gives."""
    kept = {path.name: path.read_text(encoding="utf-8") for path in FOLDER.glob("*.md")}
    return [name for name, make in PAGES.items() if kept.get(name) != NOTICE + make()]


def main(argv: Sequence[str]) -> int:
    """Write or check the pages and return the exit code."""
    if "--check" in argv:
        names = stale()
        print(f"stale: {', '.join(names)}; run python docs/scripts/reference.py" if names else "up to date")
        return 1 if names else 0
    FOLDER.mkdir(exist_ok=True)
    for name, make in PAGES.items():
        (FOLDER / name).write_text(NOTICE + make(), encoding="utf-8")
    print(f"{FOLDER}: {', '.join(PAGES)}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
