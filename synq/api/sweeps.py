"""`synq.sweeps.run`: a search from Python, and its result as tables."""

import contextlib
import functools
import html
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from synq.common.notices import muted
from synq.runs.record import FAILURES, RunRecord

if TYPE_CHECKING:
    from pandas import DataFrame

    from synq.api.run import Run

SHOWN = ("rank", "model", "weight_bits", "act_bits", "objective_value", "top1_mean", "num_seeds", "drop")
"""Columns of the leaderboard in a notebook, before the searched settings."""


class SweepFailedError(RuntimeError):
    """No trial of a group was completed, or too many failed; `synq.sweeps.open` reads what there is."""


class SweepResult:
    """A sweep, finished or not, from `synq.sweeps.run` or `synq.sweeps.open`.

    Attributes:
        path: Folder of the sweep.
    """

    def __init__(self, path: str | Path) -> None:
        """Read the records of a sweep.

        Args:
            path: Folder of the sweep.

        Raises:
            FileNotFoundError: There is no sweep.
            ValueError: A file is damaged.
        """
        from synq.sweeps.leaderboard.frames import all_settings
        from synq.sweeps.reports.sweep_view import read_sweep

        self.path = Path(path)
        self._view = read_sweep(self.path)
        self._records = list(self._view.records.values())
        self._settings = all_settings([self.path], self._records)

    @functools.cached_property
    def trials(self) -> "DataFrame":
        """One row per trial: the columns of trials.csv, and `params.KEY` for every searched setting."""
        from synq.sweeps.leaderboard.frames import trial_frame

        return trial_frame(self._records, self._settings, self._view.constraints)

    @functools.cached_property
    def leaderboard(self) -> "DataFrame":
        """One row per setting, ranked: the columns of leaderboard.csv, and `params.KEY` for every searched setting."""
        from synq.sweeps.leaderboard.frames import leaderboard_frame

        return leaderboard_frame(self._records, self._settings, self._view.constraints)

    @property
    def groups(self) -> list[str]:
        """Names of the groups, one for each model, bit-width and target, each with a ranking."""
        return self._view.groups

    def best(self, group: str | None = None, *, model: Any = None) -> "Run":
        """Return the best run of a group: of its first setting on the leaderboard, the first seed.

        It satisfies the constraints of the sweep.

        Args:
            group: One of `groups`; None takes the only one.
            model: As for `synq.open_run`.

        Raises:
            ValueError: There are several groups and none was chosen, or the group has no completed trial that satisfies
                the constraints.
        """
        from synq.api.run import open_run

        choices = ", ".join(self.groups)
        if group is None and len(self.groups) > 1:
            raise ValueError(f"`group` must be one of {choices}, because there are several, but got none")
        chosen = group if group is not None else next(iter(self.groups), "")
        if chosen not in self.groups:
            raise ValueError(f"`group` must be one of {choices}, but got {chosen!r}")
        digests = {plan.config_digest for plan in self._view.plans.values() if plan.group == chosen}
        violated: list[str] = []
        for standing in self._view.standings():
            digest = standing.row["config_digest"]
            if digest in digests and standing.is_violating:
                violated.append(standing.row["violates"])
            elif digest in digests:
                name = next(key for key, record in self._view.records.items() if record.config_digest == digest)
                return open_run(self._view.paths[name], model=model)
        if violated:
            raise ValueError(
                f"`constraints` must be satisfied by a trial of {chosen}, but the first one has {violated[0]}: see "
                "`leaderboard`"
            )
        raise ValueError(f"`group` must have a completed trial, but {chosen} has none: see `trials`")

    def report(self, output: str | Path | None = None) -> Path:
        """Write the HTML page of the sweep: the leaderboard, its charts, and its best runs.

        Args:
            output: File or folder of the page; None means report.html in the sweep's folder.

        Returns:
            The page.
        """
        from synq.sweeps.reports.make import make_report

        return make_report([self.path], output)[0]

    def __str__(self) -> str:
        done = sum(record.status == "completed" for record in self._records)
        running = len(self._view.running)
        left = f", {running} without a result" if running else ""
        return f"sweep {self._view.name}: {done} of {len(self._records)} trials completed{left}; {self.path}"

    def __repr__(self) -> str:
        return f"<synq.sweeps.SweepResult {self}>"

    def _repr_html_(self) -> str:
        names = [*SHOWN, *(name for name in self.leaderboard.columns if name.startswith("params."))]
        return f"<div><b>{html.escape(str(self))}</b>{self.leaderboard[names].to_html(index=False)}</div>"


def run(
    spec: str | Path | Mapping[str, Any],
    *,
    output_dir: str | Path | None = None,
    num_trials: int | None = None,
    max_concurrent: int | None = None,
    report: bool | None = None,
    retry: Sequence[str] = (),
    retry_failed: bool = False,
    progress: bool = True,
    on_trial: Callable[[RunRecord], None] | None = None,
) -> SweepResult:
    """Search over models, bit-widths and settings, and rank the results.

    Trials run in processes of Ray, on this machine or on the cluster that RAY_ADDRESS names. The same call resumes a
    sweep that was stopped (by Ctrl-C, for example), and returns at once if it is finished.

    Args:
        spec: A .toml or .json file, or a mapping with the keys of one, such as models, bits, targets, base, space,
            sampler, seeds. A setting in `space` may be given as a list of its values.
        output_dir: Folder of the sweep; None takes that of the spec, by default runs/NAME.
        num_trials: Number of trials of each group; None takes that of the spec.
        max_concurrent: Maximum number of concurrent trials; None takes that of the spec.
        report: Whether to write report.html at the end; None takes that of the spec, by default true.
        retry: Statuses of an earlier call whose trials are run again: failed, diverged, pre-empted, lost.
        retry_failed: Whether to run trials of all these statuses again.
        progress: Whether to print a line, or a live table, for each trial; False prints nothing.
        on_trial: Called with the record of each ended trial.

    Raises:
        ValueError: Invalid input, before anything is computed.
        OSError: A file, the storage or Ray failed.
        SweepFailedError: A group has no completed trial, no trial satisfies the constraints, or too many failed.
        KeyboardInterrupt: It was interrupted; the same call resumes it.
    """
    with _environment(), muted(not progress):
        from synq.sweeps.driver.cluster import output_root, prepare_environment
        from synq.sweeps.spec_file import load_spec, spec_from_dict

        options = {
            "output_dir": None if output_dir is None else str(output_dir),
            "num_trials": num_trials,
            "max_concurrent": max_concurrent,
            "report": report,
            "retry": list(FAILURES if retry_failed else retry) or None,
        }
        given = {key: value for key, value in options.items() if value is not None}
        if isinstance(spec, Mapping):
            resolved = spec_from_dict({**_plain(spec), **given}, root=output_root())
        else:
            resolved = load_spec(spec, given, root=output_root())
        prepare_environment()
        from synq.sweeps.driver import tuner

        code = tuner.run_sweep(resolved, quiet=not progress, on_trial=on_trial)
        if code == tuner.INTERRUPTED:
            raise KeyboardInterrupt
        if code:
            raise SweepFailedError(_reason(resolved.output_dir))
        return SweepResult(resolved.output_dir)


def open(path: str | Path) -> SweepResult:
    """Read a sweep, finished or not.

    Args:
        path: Folder of the sweep.

    Raises:
        FileNotFoundError: There is no sweep.
        ValueError: A file is damaged.
    """
    return SweepResult(path)


@contextlib.contextmanager
def _environment() -> Iterator[None]:
    """Put back the environment variables, which Ray reads, after the ``with`` block."""
    before = dict(os.environ)
    try:
        yield
    finally:
        for name in set(os.environ) - set(before):
            del os.environ[name]
        os.environ.update(before)


def _plain(spec: Mapping[str, Any]) -> dict[str, Any]:
    """Return a spec as a file would have it: a list of values in [space] as a choice, paths as text."""
    from torch import nn

    models = spec.get("models", ())
    for model in models if isinstance(models, list | tuple) else (models,):
        parts = (model, *model.values()) if isinstance(model, Mapping) else (model,)
        if any(isinstance(part, nn.Module) for part in parts):
            raise ValueError(
                "`models` must be specs or tables of settings, which other processes can load, such as "
                "FILE.py:FACTORY, but got a network in memory"
            )
    values = {key: str(value) if isinstance(value, Path) else value for key, value in spec.items()}
    if isinstance(space := values.get("space"), Mapping):
        values["space"] = {
            key: {"type": "choice", "values": list(value)} if isinstance(value, list | tuple) else value
            for key, value in space.items()
        }
    return values


def _reason(folder: Path) -> str:
    """Return why a sweep failed, with the reason of a failed trial."""
    from synq.sweeps.constraints import constraints_text

    result = SweepResult(folder)
    failed = [record for record in result._records if record.status in FAILURES]
    bounds = constraints_text(result._view.constraints)
    none = "no trial satisfies them" if bounds and len(failed) < len(result._records) else "no trial was completed"
    why = f"{failed[-1].name}: {failed[-1].reason}" if failed else none
    bounded = f", none that satisfies {bounds}" if bounds else ""
    return f"the sweep in {folder} has no result in a group{bounded}, or too many failed trials ({len(failed)}); {why}"
