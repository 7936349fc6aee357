"""Run a sweep: make each synthetic set once, run the trials with Ray Tune, and keep the tables up to date."""

import shutil
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import optuna
from ray import tune
from ray.tune.experiment import Trial

from synq.common.exit_codes import is_out_of_memory
from synq.common.text_tables import plural
from synq.runs.record import RunRecord
from synq.teacher.trust import trusting

from ..constraints import constraints_text
from ..leaderboard.settings import searched_in
from ..reports import PAGE
from ..spec import SweepSpec, run_config
from ..state.ledger import Ledger
from ..state.plans import Plan
from ..state.shared_ledger import open_ledger
from ..state.trial_task import trial_name
from .asha import SweepScheduler
from .callback import SweepCallback, SweepStopper
from .cluster import check_shared, cluster
from .dashboard import StudyCopy, journal
from .group_search import check_sampler
from .local_ray import LocalRayDiedError
from .outcome import group_lines, is_success
from .progress import Progress, print_leaderboard
from .searcher import SweepSearcher
from .stop_reason import StopReason, interruptible
from .synthetic_sets import make_all_sets, remote_function, replies

NO_RESULT, INTERRUPTED = 1, 130


def run_sweep(spec: SweepSpec, *, quiet: bool = False, on_trial: Callable[[RunRecord], None] | None = None) -> int:
    """Run a sweep, or resume an interrupted one.

    Args:
        spec: The sweep.
        quiet: Whether to print nothing.
        on_trial: Called with the record of each ended trial.

    Returns:
        Exit code: 0 if every group has a completed trial, 1 if one has none, no trial of any satisfies the constraints
        or too many failed, 130 if interrupted (the same command resumes).

    Raises:
        ValueError: Invalid input, before anything is computed.
        OSError: A file, the storage or Ray failed.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    check_sampler(spec)
    ledger = open_ledger(spec)
    ledger.open()
    try:
        return _run(ledger.spec, ledger, quiet, on_trial)
    finally:
        ledger.close()


def _run(spec: SweepSpec, ledger: Ledger, quiet: bool, on_trial: Callable[[RunRecord], None] | None) -> int:
    stop_reason = StopReason()
    if spec.search.is_shared:
        with ledger.exclusive("studies"):
            copy = StudyCopy(spec)
        searcher = SweepSearcher(spec, ledger, copy=copy, stop_reason=stop_reason)
        searcher.complete_copy()
    else:
        searcher = SweepSearcher(spec, ledger, journal(spec), stop_reason=stop_reason)
    was_finished = not searcher.num_left()
    with Progress(searcher.num_total(), quiet=quiet, on_trial=on_trial, constraints=spec.constraints) as progress:
        progress.known(ledger.records)
        where = spec.address or spec.output_dir
        size = f"{plural(len(spec.groups), 'group')} x {plural(spec.search.trials, 'trial')}"
        progress.log(f"sweep {spec.search.name} in {where}: {size}")
        if spec.constraints:
            progress.log(f"constraints: {constraints_text(spec.constraints)}")
        if ledger.plans:
            done = f"{len(ledger.records)} trials are there already"
            interrupted = f"{len(searcher.interrupted)} were interrupted"
            if others := sum(map(ledger.elsewhere, ledger.plans)):
                interrupted += f", {others} are run by other drivers"
            finished = "the sweep is finished; --num-trials +N adds N to each group"
            progress.log(f"{done}, {finished if was_finished else interrupted}")
        try:
            if searcher.num_left():
                with interruptible(), cluster(spec.search) as capacity:
                    if capacity.note:
                        progress.log(capacity.note)
                    progress.slots = capacity.concurrent(spec.search)
                    progress.log(f"{capacity.summary}; at most {plural(progress.slots, 'trial')} at a time")
                    if not spec.address:
                        check_shared(spec.output_dir)
                    _check_groups(spec, ledger)
                    with ledger.exclusive("sets") if spec.address else nullcontext():
                        make_all_sets(spec, ledger, progress)
                    _tune(spec, ledger, searcher, progress, stop_reason)
                    if not stop_reason:
                        searcher.sync()
                        searcher.complete_copy()
        except KeyboardInterrupt:
            ledger.end_early()
            progress.log(f"interrupted; the tables are in {where}, the same command resumes")
            return INTERRUPTED
        except LocalRayDiedError as error:
            ledger.end_early()
            progress.log(f"stopped: {error}; the same command goes on")
            return NO_RESULT
        except RuntimeError as error:  # Ray Tune expects no worker to be ended for memory while it starts
            if not is_out_of_memory(error.__cause__ or error):
                raise
            ledger.end_early()
            progress.log(
                "stopped: the memory is full, and Ray ended a trial's worker that was starting: end other work, or set "
                "`max_concurrent` lower; the same command goes on"
            )
            return NO_RESULT
    if stop_reason.storage:
        raise OSError(f"{stop_reason.storage}; once that is fixed, the same command resumes")
    ledger.write_tables()
    is_drawn = was_finished and _is_drawn(spec)  # a page drawn while trials were running may lack the last ones
    return _conclude(spec, ledger, searcher, progress, stop_reason, is_drawn=is_drawn)


def _conclude(
    spec: SweepSpec,
    ledger: Ledger,
    searcher: SweepSearcher,
    progress: Progress,
    stop_reason: StopReason,
    *,
    is_drawn: bool,
) -> int:
    """Print the results, draw the page unless it `is_drawn` already, and return the exit code."""
    if stop_reason.failed:
        progress.log(
            f"stopped: {stop_reason.failed}. The same command resumes; --retry-failed runs failed trials again"
        )
    elif not searcher.num_left():
        ledger.finish()
    if not progress.quiet:
        searched = searched_in({"space": [dimension.name for dimension in spec.dimensions]})
        print_leaderboard(ledger.tables.standings(), searched)
    where = spec.address or spec.output_dir
    progress.log(f"{where}/trials.csv\n{where}/leaderboard.csv")
    if spec.search.report and ledger.records:
        with ledger.exclusive("report"):
            is_drawn = is_drawn or (spec.search.is_shared and _is_drawn(spec))  # by another driver
            if not is_drawn:
                progress.log(f"drawing {PAGE} ...")
            progress.log(f"{where}/{PAGE}" if is_drawn else _report(spec, ledger))
    if progress.account():
        progress.log(progress.account())
    if ledger.records and not progress.quiet:
        export = "" if spec.address else f"; `synq export {where}/runs/RUN` writes the file of a run"
        progress.log(f"next: `synq show {where}` prints these tables again{export}")
    for line in group_lines(ledger, searcher.exhausted, searcher.invalid):
        progress.log(line)
    return NO_RESULT if stop_reason.failed or not is_success(ledger) else 0


def _is_drawn(spec: SweepSpec) -> bool:
    """Return whether the page exists and is newer than every record, so that a finished sweep ends at once."""
    folder = Path(spec.output_dir)
    page, records = folder / PAGE, (folder / "records").glob("*.json")
    return page.is_file() and all(file.stat().st_mtime < page.stat().st_mtime for file in records)


def _report(spec: SweepSpec, ledger: Ledger) -> str:
    """Make the sweep's page and return its path, or the reason why it failed: the sweep is finished all the same."""
    try:
        from ..reports.make import make_report

        with trusting([group.base.teacher.spec for group in spec.groups]):  # the spec of the sweep names them
            written = make_report([spec.output_dir])
        for path in written if spec.address else ():
            ledger.folder.send(str(path.relative_to(spec.output_dir)))
    except (Exception, SystemExit, KeyboardInterrupt) as error:  # also from the teacher's code, and on Ctrl-C
        reason = " ".join(str(error).split()) or type(error).__name__
        return f"no {PAGE}: {reason}; `synq report {spec.output_dir}` makes it"
    return f"{spec.address or spec.output_dir}/{written[0].name}"


def _check_groups(spec: SweepSpec, ledger: Ledger) -> None:
    """Load teacher, labeled images and student of every group on a worker, to fail before hours of synthesis.

    Raises:
        ValueError: Invalid input of a group.
    """
    from ..workers.trial import check_run

    check = remote_function(spec, check_run)
    waiting = {check.remote(run_config(spec, group, {})): group for group in spec.groups}
    for ready, reply in replies(waiting):
        group, facts = waiting[ready], reply["teacher"]
        facts = {**facts, "name": group.named or facts["name"]}
        ledger.know(group.key, facts, reply["eval_digest"], reply["earlier_digest"])
        if not reply["eval_digest"] and any(one.name == "drop" for one in spec.constraints):
            raise ValueError(f"`constraints.drop` must be left out without labeled images, but {group.key} has none")


def _tune(
    spec: SweepSpec, ledger: Ledger, searcher: SweepSearcher, progress: Progress, stop_reason: StopReason
) -> None:
    """Run the remaining trials. Ray's state is discarded: a later start resumes from the ledger."""
    from ..workers.entry import run_trial

    progress.start_clock()
    search = spec.search
    resources = {"cpu": search.cpus_per_worker, **({"gpu": search.gpus_per_worker} if search.gpus_per_worker else {})}
    if search.workers_per_trial > 1:  # workers have separate resources; the trial only starts them, on the head
        resources = {"cpu": 0, "node:__internal_head__": 0.001}
        searcher.limit = progress.slots  # Ray Tune does not count the resources of the workers
    scheduler = SweepScheduler(spec, ledger, stop_reason)

    def changed(plan: Plan) -> None:
        scheduler.absorb(plan)
        if plan.trial in ledger.records:
            progress.elsewhere(plan.trial, ledger.records[plan.trial])

    searcher.listeners.append(changed)
    with tempfile.TemporaryDirectory(prefix="synq-tune-") as scratch:
        tuner = tune.Tuner(
            tune.with_resources(run_trial, resources),
            tune_config=tune.TuneConfig(
                search_alg=searcher,
                scheduler=scheduler,
                num_samples=searcher.num_total() + len(ledger.plans),
                reuse_actors=True,
                trial_name_creator=_name,
                trial_dirname_creator=_name,
            ),
            run_config=tune.RunConfig(
                name=time.strftime("%Y%m%d-%H%M%S"),
                storage_path=scratch,
                verbose=0,
                callbacks=[SweepCallback(ledger, progress, stop_reason)],
                stop=SweepStopper(stop_reason),
                failure_config=tune.FailureConfig(max_failures=search.max_failures),
            ),
        )
        tuner.fit()
    if not any(map(ledger.elsewhere, ledger.plans)):  # else another driver may use it
        shutil.rmtree(spec.output_dir / "ray", ignore_errors=True)


def _name(trial: Trial) -> str:
    return trial_name(trial.config)
