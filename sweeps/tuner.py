"""Run a sweep: make each synthetic set once, then let Ray Tune run the trials, and keep the tables up to date."""

import shutil
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import optuna
import ray
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from ray import tune
from ray.tune.experiment import Trial

from sweeps.cluster import check_shared, cluster
from sweeps.group_search import EPOCH, OBJECTIVE, STATUS
from sweeps.leaderboard import leaderboard_rows
from sweeps.ledger import Ledger
from sweeps.progress import Progress, print_leaderboard
from sweeps.search import SweepScheduler, SweepSearcher
from sweeps.spec import SweepSpec, run_config
from synq.configs import RunConfig, config_to_dict

NO_RESULT = 1
UNSEEN = "its record is not visible here: output_dir must be on a file system that all machines share"
INTERRUPTED = 130


class SweepCallback(tune.Callback):
    """Settles each ended trial in the ledger and shows it."""

    def __init__(self, ledger: Ledger, progress: Progress) -> None:
        self.ledger, self.progress = ledger, progress
        self.history: dict[str, dict[int, float]] = {}
        self.started: dict[str, float] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def on_trial_start(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """Note when a trial began; a resumed one keeps the epochs it had reported."""
        name = trial.config["trial"]
        self.started.setdefault(name, time.monotonic())
        self.history.setdefault(name, dict(self.ledger.plans[name].history))
        self.progress.running.setdefault(name, "starting")

    def on_trial_result(
        self, iteration: int, trials: list[Trial], trial: Trial, result: dict[str, Any], **info: Any
    ) -> None:
        """Note an epoch."""
        name, value = trial.config["trial"], result.get(OBJECTIVE)
        if STATUS not in result and EPOCH in result:
            if value is not None:
                history = self.history.setdefault(name, {})
                history[result[EPOCH]] = value
                self.ledger.note(name, history)
            self.progress.epoch(name, result[EPOCH], result["epochs"], value)

    def on_trial_complete(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """Settle a trial that ended by itself or was stopped."""
        last = trial.last_result or {}
        if STATUS in last:  # it ended by itself and has written its record; read here only if it can be seen here
            self._settle(trial, "failed", UNSEEN)
        else:
            epoch = last.get(EPOCH, 0)
            self._settle(trial, "pruned", f"stopped after epoch {epoch}: weak among the trials of its group")

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """Settle a trial whose worker died too often."""
        error = trial.get_pickled_error() or trial.get_error() or "unknown"
        lines = str(error).strip().splitlines() or [type(error).__name__]
        self._settle(trial, "failed", f"the worker died {trial.num_failures} times: {lines[0]}")

    def _settle(self, trial: Trial, status: str, reason: str) -> None:
        name = trial.config["trial"]
        history = sorted(self.history.pop(name, {}).items())
        seconds = time.monotonic() - self.started.pop(name, time.monotonic())
        record = self.ledger.settle(name, status=status, reason=reason, history=history, seconds=seconds)
        self.progress.ended(name, record)


def run_sweep(spec: SweepSpec) -> int:
    """Run a sweep, or the rest of one.

    Returns:
        0 when every group has a completed trial, 1 when one has none, 130 when interrupted (run it again to go on).

    Raises:
        ValueError, OSError: Something the user should mend; nothing was computed in vain.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    ledger = Ledger(spec)
    ledger.open()
    try:
        return _run(spec, ledger)
    finally:
        ledger.close()


def _run(spec: SweepSpec, ledger: Ledger) -> int:
    searcher = SweepSearcher(spec, ledger, _storage(spec))
    with Progress(searcher.num_total()) as progress:
        progress.known(ledger.records)
        progress.say(
            f"sweep {spec.search.name} in {spec.output_dir}: {len(spec.groups)} groups x {spec.search.num_trials} trials"
        )
        if ledger.plans:
            progress.say(
                f"{len(ledger.records)} trials are there already, {len(searcher.interrupted)} were interrupted"
            )
        try:
            if searcher.num_left():
                with _interruptible(), cluster(spec.search) as remark:
                    if remark:
                        progress.say(remark)
                    check_shared(spec.output_dir)
                    _check_groups(spec, ledger)
                    _make_sets(spec, ledger, progress)
                    _tune(spec, ledger, searcher, progress)
        except KeyboardInterrupt:
            ledger.write_tables()
            progress.say(f"interrupted; the tables are in {spec.output_dir}, the same command goes on")
            return INTERRUPTED
    ledger.write_tables()
    print_leaderboard(leaderboard_rows(ledger.records.values()))
    print(f"{spec.output_dir / 'trials.csv'}\n{spec.output_dir / 'leaderboard.csv'}", flush=True)
    for key in sorted(searcher.exhausted):
        found, invalid = len(ledger.group_plans(key)), searcher.invalid.get(key)
        why = f"; others are not allowed together, for example: {invalid}" if invalid else ""
        print(f"{key}: the search found only {found} different settings{why}", flush=True)
    empty = [group.key for group in spec.groups if not ledger.best(group.key)]
    if empty:
        print(f"no trial was completed in {', '.join(empty)}; the lines above or trials.csv say why", flush=True)
    return NO_RESULT if empty else 0


def _check_groups(spec: SweepSpec, ledger: Ledger) -> None:
    """Open the teacher, the labelled images and the student of every group: what cannot work is said before hours of synthesis."""
    from sweeps.trial import check_run

    task = _task(spec, check_run)
    waiting = {task.remote(config_to_dict(run_config(spec, group, {}))): group for group in spec.groups}
    for ready, answer in _answers(waiting):
        group, facts = waiting[ready], answer["teacher"]
        ledger.know(group.key, {**facts, "name": group.named or facts["name"]}, answer["eval_digest"])


def _task(spec: SweepSpec, function: Callable[[dict[str, Any]], dict[str, Any]]) -> Any:
    """A function as a task of Ray with the resources of a trial."""
    search = spec.search
    return ray.remote(num_cpus=search.cpus_per_trial, num_gpus=search.gpus_per_trial, max_retries=2)(function)


def _answers(tasks: Iterable[Any]) -> Iterator[tuple[Any, dict[str, Any]]]:
    """Give tasks with their answers as they come in; an error ends the others and is raised."""
    waiting = list(tasks)
    while waiting:
        (ready, *_), waiting = ray.wait(waiting)
        answer = ray.get(ready)
        if "error" in answer:
            for other in waiting:
                ray.cancel(other, force=True)
            raise ValueError(answer["error"])
        yield ready, answer


def _make_sets(spec: SweepSpec, ledger: Ledger, progress: Progress) -> None:
    """Make every set that the trials will need, each once, as many at a time as the machines hold."""
    from sweeps.trial import make_sets

    needed: dict[str, RunConfig] = {}
    groups: dict[str, list[str]] = {}
    for group in spec.groups:
        base = group.base
        for seeds in dict.fromkeys([(base.seed, base.data_seed), *((seed, seed) for seed in spec.search.seeds)]):
            config = run_config(spec, group, {}, seeds=seeds)
            key = f"{config.teacher} {config.synthesis} {config.evaluation.heldout_images} {config.data_seed}"
            needed.setdefault(key, config)
            groups.setdefault(key, []).append(group.key)
    task = _task(spec, make_sets)
    waiting = {task.remote(config_to_dict(config)): (key, config) for key, config in needed.items()}
    started = time.monotonic()
    for key, config in needed.items():
        progress.running[f"synthetic set {groups[key][0].rpartition('-')[0]} seed {config.data_seed}"] = "being made"
    for ready, _ in _answers(waiting):
        key, config = waiting[ready]
        progress.running.pop(f"synthetic set {groups[key][0].rpartition('-')[0]} seed {config.data_seed}", None)
        images = config.synthesis.num_images
        seconds = time.monotonic() - started
        name = ledger.teachers[groups[key][0]]["name"]
        progress.say(f"synthetic set of {name}, seed {config.data_seed}: {images} images, ready after {seconds:.0f} s")


def _tune(spec: SweepSpec, ledger: Ledger, searcher: SweepSearcher, progress: Progress) -> None:
    """Run the trials that are left. Ray's own state is thrown away: the ledger is what a later start resumes from."""
    from sweeps.trial import run_trial

    progress.start_clock()
    search = spec.search
    resources = {"cpu": search.cpus_per_trial, **({"gpu": search.gpus_per_trial} if search.gpus_per_trial else {})}
    tuner = tune.Tuner(
        tune.with_resources(run_trial, resources),
        tune_config=tune.TuneConfig(
            search_alg=searcher,
            scheduler=SweepScheduler(spec, ledger),
            num_samples=searcher.num_total() + len(ledger.plans),
            reuse_actors=True,
            trial_name_creator=_trial_name,
            trial_dirname_creator=_trial_name,
        ),
        run_config=tune.RunConfig(
            name=time.strftime("%Y%m%d-%H%M%S"),
            storage_path=str(spec.output_dir / "ray"),
            verbose=0,
            callbacks=[SweepCallback(ledger, progress)],
            failure_config=tune.FailureConfig(max_failures=search.max_failures),
        ),
    )
    tuner.fit()
    shutil.rmtree(spec.output_dir / "ray", ignore_errors=True)


def _trial_name(trial: Trial) -> str:
    return str(trial.config["trial"])


def _storage(spec: SweepSpec) -> JournalStorage | None:
    """Return the journal for optuna-dashboard. It is a picture of the ledger, drawn anew at every start."""
    if not spec.search.journal:
        return None
    path = spec.output_dir / "optuna.journal"
    path.unlink(missing_ok=True)
    return JournalStorage(JournalFileBackend(str(path)))


@contextmanager
def _interruptible() -> Iterator[None]:
    """Let Ctrl-C and a polite kill (as `ray job stop` sends) end the sweep in order."""

    def interrupt(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
