"""Writes docs/reference/ from the code: commands, settings, keys of a sweep, columns, variables, Python API.

    python docs/scripts/reference.py            write the pages
    python docs/scripts/reference.py --check    write nothing; exit code 1 if a page is not what the code gives

The pages are kept in the repository, so that they can be read without a build; a test runs the same check.
"""

import ast
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from textwrap import dedent

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import synq  # noqa: E402
from synq.cli import GROUP, SECTIONS  # noqa: E402
from synq.config.command_help import GROUPS, field_docs, settings_rows  # noqa: E402
from synq.config.command_line import Command  # noqa: E402
from synq.config.parsing import dotted_keys  # noqa: E402
from synq.config.run import RunConfig  # noqa: E402
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
from synq.sweeps.search_config import SearchConfig  # noqa: E402
from synq.sweeps.space import DEFAULT_SPACE, Dimension  # noqa: E402
from synq.sweeps.spec_file import MODEL_KEYS, SpecFile  # noqa: E402

FOLDER = ROOT / "docs" / "reference"
NOTICE = "<!-- Made by docs/scripts/reference.py from the code. Do not edit. -->\n\n"

VARIABLE = re.compile(
    r"(?:SYNQ|RAY|TUNE|AWS|MLFLOW|WANDB|XDG|OMP|CUDA|NCCL|GLOO)_[A-Z0-9_]+|(?:LOCAL_)?(?:RANK|WORLD_SIZE)|PYTHONPATH"
)
"""A text of the code that is the name of an environment variable."""
VARIABLES = {
    "For you to set": {
        "SYNQ_DATA_DIR": "Folder with the files of `cifar10`, `cifar100` and `fashion-mnist`, unless "
        "`evaluation.data_dir` is given (default: `data` in the current folder); the settings files of the CIFAR "
        "networks name it, too",
        "SYNQ_TRACEBACK": "`1` prints the traceback with the one line of an error",
        "SYNQ_COMMIT": "commit that records name where the code is no git checkout (a job's uploaded copy)",
        "SYNQ_CACHE_DIR": "folder of a machine's local copies for a sweep in an object store; not shared by machines "
        "(default: `synq` in `XDG_CACHE_HOME`)",
        "XDG_CACHE_HOME": "cache folder of the user (default: `~/.cache`)",
        "RAY_ADDRESS": "cluster that `synq sweep` and `synq check-cluster` join, from a machine of that cluster; "
        "without it they start Ray on this machine alone",
        "RAY_TMPDIR": "folder of Ray's session files (default: `/tmp`)",
        "AWS_ENDPOINT_URL_S3": "address of an object store other than Amazon's; before `AWS_ENDPOINT_URL`",
        "AWS_ENDPOINT_URL": "address of an object store other than Amazon's",
        "AWS_REGION": "region of the bucket; before `AWS_DEFAULT_REGION`",
        "AWS_DEFAULT_REGION": "region of the bucket (default: `us-east-1`)",
        "MLFLOW_TRACKING_URI": "server of `runtime.tracker` mlflow (default: `mlflow.db` in the run's folder)",
        "WANDB_PROJECT": "project of `runtime.tracker` wandb (default: `synq`)",
        "CUDA_VISIBLE_DEVICES": "GPUs that a process may use",
    },
    "Set by SynQ for Ray, unless you have set them": {
        "RAY_AUTH_MODE": "`disabled` for a local Ray, which listens on 127.0.0.1 only; on a cluster set `token` on the "
        "head and for `ray job submit` alike",
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "`0` for a local Ray: loopback only",
        "RAY_USAGE_STATS_ENABLED": "`0` for a local Ray: no usage report",
        "RAY_AIR_NEW_OUTPUT": "`0`: Tune's display is off",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "`0`: Ray does not hide GPUs from CPU trials",
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "`0.2`: how often trials of several processes forward their reports",
        "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "`1`: Tune's loggers are off",
        "TUNE_DISABLE_SIGINT_HANDLER": "`1`: Ctrl-C is handled by SynQ",
        "TUNE_PRINT_ALL_TRIAL_ERRORS": "`0`: errors of trials are in their records",
        "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "`0`: no warning about slow checkpoints of Tune",
        "PYTHONPATH": "extended by the root of a checkout, for Ray's workers",
    },
    "Always set by SynQ or a launcher": {
        "TUNE_FUNCTION_THREAD_TIMEOUT_S": "`60`: seconds in which a stopped trial may end its writes",
        "OMP_NUM_THREADS": "`runtime.num_threads`, in the processes of `--jobs`",
        "RAY_JOB_CONFIG_JSON_ENV_VAR": "set by `ray job submit`, whose environment then is that of the workers",
        "WORLD_SIZE": "set by `accelerate launch`: number of processes",
        "LOCAL_WORLD_SIZE": "set by `accelerate launch`: number of processes on this machine",
        "RANK": "set by `accelerate launch`: number of this process; process 0 prints",
    },
}
"""What each environment variable does that the code names; a page is not made while one is missing here."""

SPEC_EXAMPLES = """\
## The search space

A `[space]` replaces the default one. Each table in it is one searched setting of `finetune` or `quant`:

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
```

"""
SPEC_NOTES = """
Not searched: bit-widths (groups, `bits`; a dimension with `second_objective`), engines (groups, `targets`),
`quant.act_points` and the other settings that decide a ranking, and `synthesis.*`, since a sweep makes its synthetic
sets before its trials.

`[[points]]` hold settings by the same names, `"finetune.lr" = 0.01`; what a point leaves out has the value of `[base]`.

TOML has no empty value: `"none"` (or `"None"`) unsets a setting that may be unset. One setting has `none` among its
values, `evaluation.dataset`: `none` counts no labels, `None` takes the set of the bundled classifier.

`$NAME` and `${NAME}` in a text are replaced by the environment variable. An unknown key is rejected with the nearest
known one.
"""
COLUMN_NOTES = """
## Reading the tables

A ranking holds rows of one model, bit-width, protocol, quantization points, objective and fidelity measure; nothing
else is compared. Settings with more seeds come first (one lucky seed is no evidence), then the better mean objective.
`trials.csv` has pruned and failed runs with their reason; they are never ranked. Top-1 is that of the last epoch, never
of the best one.

Read digests as text, and keep rows without a filter (pandas takes a digest of digits, or one like 12e45678, for a
number, and the cell "None" for a missing value):

```python
import pandas

digests = {"config_digest": str, "set_digest": str, "heldout_digest": str, "teacher_digest": str, "commit": str}
table = pandas.read_csv("runs/demo/leaderboard.csv", dtype=digests)
table.groupby("lowpass_cutoff", dropna=False)
```
"""


def cell(text: object) -> str:
    """Return text for a cell of a Markdown table."""
    return " ".join(str(text).split()).replace("|", "\\|").replace("<", "&lt;")


def table(headings: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return a Markdown table."""
    lines = ["| " + " | ".join(headings) + " |", "|" + " --- |" * len(headings)]
    return "\n".join([*lines, *("| " + " | ".join(map(cell, row)) + " |" for row in rows)]) + "\n"


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
            if key not in ("more_trials", "retry_failed")]  # fmt: skip
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
    return "\n".join([*lines, table(("setting", "range"), rows)]) + SPEC_NOTES


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
              "heading is that of a terminal.\n"]  # fmt: skip
    rows = []
    for column in RUN_COLUMNS:
        files = [name for flag, name in ((In.TRIALS, "trials"), (In.BOARD, "leaderboard")) if flag in column.tables]
        rows.append((f"`{column.key}`", column.heading if column.short else "", column.unit, ", ".join(files),
                     column.meaning))  # fmt: skip
    lines.append(table(("column", "heading", "unit", "file", ""), rows))
    tables = {"Best settings (`synq show`, reports)": BEST_TABLE, "compare.csv (`synq leaderboard --compare`)":
              COMPARE_TABLE, "recipe.csv": RECIPE_TABLE, "ablation.csv": ABLATION_TABLE,
              "fidelity_study.csv": FIDELITY_TABLE}  # fmt: skip
    for title, columns in tables.items():
        lines += [f"## {title}\n", table(("column", "unit", ""), [_row(column) for column in columns])]
    return "\n".join(lines) + COLUMN_NOTES


def _row(column: Column) -> tuple[str, str, str]:
    return f"`{column.key}`", column.unit, column.meaning


def variables_read() -> set[str]:
    """Return the names of the environment variables in the texts of the code."""
    found: set[str] = set()
    for path in [*sorted((ROOT / "synq").rglob("*.py")), *sorted((ROOT / "sweeps").rglob("*.py"))]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and VARIABLE.fullmatch(node.value):
                found.add(node.value)
    return found


def environment_page() -> str:
    """Return the page of the environment variables.

    Raises:
        ValueError: `VARIABLES` lacks a variable that the code names, or has one that it does not name.
    """
    described = {name for part in VARIABLES.values() for name in part}
    if described != variables_read():
        names = ", ".join(sorted(described ^ variables_read()))
        raise ValueError(f"`VARIABLES` must have the variables of the code, but they differ in {names}")
    lines = ["# Environment variables\n"]
    for title, part in VARIABLES.items():
        lines += [f"## {title}\n", table(("variable", ""), [(f"`{name}`", text) for name, text in part.items()])]
    lines += ["Variables of `MALLOC_...`, `GLIBC_TUNABLES` and `LD_PRELOAD` that tune or replace the C allocator keep "
              "SynQ from tuning it. Weights & Biases, MLflow and object stores have more of their own.\n"]  # fmt: skip
    return "\n".join(lines)


def api_page() -> str:
    """Return the page of the Python API, whose entries mkdocstrings fills in."""
    names = getattr(synq, "__all__", ())
    lines = ["# Python API\n", "`import synq` loads neither torch nor ray; each name is imported when it is used. The "
             "built pages show signatures and docstrings.\n"]  # fmt: skip
    lines += [f"::: synq.{name}" for name in names if not name.startswith("__")]
    return "\n\n".join(lines) + "\n"


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
