"""Processor time of a sweep's driver for each event of a trial, its memory and files, against the number of trials.

    python -m synq.sweeps.benchmarks.driver 200 2000 --nodes 8 --concurrent 16 --groups 4

Trials are stubs that sleep, report each epoch and write a real record with their own settings. Everything else is the
sweep as it is: Ray on several logical nodes of this machine, Optuna, ASHA, ledger, tables. Processor time is counted,
not wall time, so that other work on the machine matters less.
"""

import json
import math
import os
import random
import resource
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from synq.config.command_line import Command
from synq.config.command_options import FLOAT, INT, argument, option
from synq.config.run import RunConfig, config_from_dict, config_to_dict, with_overrides
from synq.runs.record import RunRecord, read_record, write_record

from ..state.trial_log import TrialLog, log_name
from ..state.trial_task import TrialTask
from .launcher import ROOT, finish, start

EPOCHS = 3
RECORD = "record.json"
"""File in the folder of all sweeps: the record of a real run, from which the records of the stubs are made."""
SECONDS = "seconds"
"""File next to it: the time that a stub takes."""
TRIALS = (100, 400)
"""Numbers of trials, the default."""
MODULE = "synq.sweeps.benchmarks.driver"


def stub_trial(values: dict[str, Any]) -> None:
    """Do what `run_trial` does for a driver, without training: a log, a report for each epoch, a record."""
    from ray import tune

    task = TrialTask.from_dict(values)
    folder = Path(task.folder)
    seconds = float((folder.parent.parent / SECONDS).read_text())
    began, lr = time.time(), task.config.finetune.lr
    value = 0.1 + 0.02 * abs(math.log(lr / 0.005)) + 0.01 * random.Random(task.config_digest).random()
    with TrialLog(folder / log_name(task.trial)) as log:
        log.event("starts")
        for epoch in range(1, EPOCHS + 1):
            time.sleep(seconds / EPOCHS)
            reported = value * (1 + 1 / epoch)
            log.write(f"epoch {epoch}/{EPOCHS}: objective {reported:.6g}\n")
            tune.report({"epoch": epoch, "epochs": EPOCHS, "objective_value": reported, "began": began})
        record = replace(
            read_record(folder.parent.parent / RECORD),
            name=task.trial,
            config=config_to_dict(task.config),
            config_digest=task.config_digest,
            weight_bits=task.config.quant.weight_bits,
            act_bits=task.config.quant.act_bits,
            objective_value=value,
            fidelity={"kl": value, "agreement": 95.0},
            teacher={**task.teacher},
            log=log_name(task.trial),
        )
        write_record(folder / "records" / f"{task.trial}.json", record)
        log.event("completed")
    last = {"status": "completed", "reason": "", "objective_value": value, "epoch": EPOCHS, "epochs": EPOCHS}
    sizes = {"size_bytes": record.size_bytes, "bitops": record.bitops, "drop": record.drop}
    tune.report({**last, **sizes, "began": began, "ended": time.time(), "gpu_bytes": 0})


def spec_values(folder: Path, trials: int, *, groups: int, concurrent: int, sampler: str) -> dict[str, Any]:
    """Return the spec of a sweep of so many trials, in groups that differ in their bits."""
    bits = [f"W{weight}A{act}" for act in range(8, 1, -1) for weight in range(8, 1, -1)][:groups]
    return {
        "name": "scale",
        "bits": bits,
        "num_trials": trials // groups,
        "seeds": [0],
        "sampler": sampler,
        "max_concurrent": concurrent,
        "output_dir": str(folder / "sweep"),
        "report": False,
        "base": {
            "synthesis": {"num_images": 32, "shard_size": 16, "iterations": 2, "start": "white"},
            "quant": {"calib_images": 32},
            "finetune": {"epochs": EPOCHS, "batch_size": 16},
            "evaluation": {"heldout_images": 16, "num_images": 64},
            "runtime": {"store_dir": str(folder.parent / "store"), "device": "cpu", "progress": False},
        },
    }


class Account:
    """Processor time of the functions of a driver that are called for events of trials, and the number of events."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.calls: Counter[str] = Counter()
        self.events: Counter[str] = Counter()
        self._depth = 0

    def watch(self, owner: type, name: str, event: Callable[[Any], str]) -> None:
        """Count the outermost calls of a method and their time.

        Args:
            owner, name: The method.
            event: Returns the kind of event of a result; "" for none.
        """
        method, key = getattr(owner, name), f"{owner.__name__}.{name}"

        def watched(*args: Any, **options: Any) -> Any:
            self._depth += 1
            before = time.thread_time()
            try:
                result = method(*args, **options)
            finally:
                self._depth -= 1
                if not self._depth:
                    self.seconds[key] += time.thread_time() - before
            self.calls[key] += 1
            if kind := event(result):
                self.events[kind] += 1
            return result

        setattr(owner, name, watched)


def _watched(account: Account) -> None:
    from ..driver.asha import SweepScheduler
    from ..driver.callback import SweepCallback
    from ..driver.searcher import SweepSearcher

    account.watch(SweepSearcher, "suggest", lambda result: "start" if isinstance(result, dict) else "")
    for owner, name, event in (
        (SweepSearcher, "on_trial_result", ""),
        (SweepSearcher, "on_trial_complete", ""),
        (SweepScheduler, "on_trial_add", ""),
        (SweepScheduler, "on_trial_result", ""),
        (SweepCallback, "on_step_end", ""),
        (SweepCallback, "on_trial_start", ""),
        (SweepCallback, "on_trial_result", "result"),
        (SweepCallback, "on_trial_complete", "end"),
        (SweepCallback, "on_trial_error", "end"),
    ):
        account.watch(owner, name, lambda _, event=event: event)  # type: ignore[misc]


def _processor_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def measure_driver(folder: Path, trials: int, **shape: Any) -> dict[str, Any]:
    """Run a sweep of stubs in this process, and return what its driver took.

    Args:
        folder: A new folder, in that with the record of a real run.
        trials: Number of trials.
        shape: Keys of `spec_values`.

    Returns:
        Events by kind; processor seconds of the process between the first and the last event, of those in functions of
        the sweep by name; peak bytes and those before the trials; number of files; seconds by the clock.
    """
    from ..driver import tuner
    from ..driver.cluster import prepare_environment
    from ..spec_file import spec_from_dict
    from ..workers import entry
    from .worker import Watch, own_memory

    prepare_environment()
    entry.run_trial = stub_trial
    account, found = Account(), dict[str, Any]()
    _watched(account)
    original = tuner._tune

    def timed(*args: Any) -> None:
        watch = Watch()
        watch.start()
        found.update(bytes_before=own_memory(), processor=-_processor_seconds(), clock=-time.monotonic())
        original(*args)
        found["processor"] += _processor_seconds()
        found["clock"] += time.monotonic()
        found["bytes"] = watch.stop()

    tuner._tune = timed  # type: ignore[assignment]
    code = tuner.run_sweep(spec_from_dict(spec_values(folder, trials, **shape)))
    if code:
        raise RuntimeError(f"the sweep of stubs must exit with code 0, but exited with {code}")
    files = Counter(path.parent.name for path in (folder / "sweep").rglob("*") if path.is_file())
    return {
        **found,
        "trials": trials,
        "events": dict(account.events),
        "own": dict(account.seconds),
        "calls": dict(account.calls),
        "files": sum(files.values()),
        "files_in": dict(files),
    }


def real_record(folder: Path) -> None:
    """Write the record of a real run of the bundled classifier in miniature."""
    from synq.pipeline import run

    values = spec_values(folder / "x", 1, groups=1, concurrent=1, sampler="random")["base"]
    config = config_from_dict(RunConfig, {**config_to_dict(RunConfig()), **values}, source="the benchmark")
    config = with_overrides(config, {"runtime.output_dir": str(folder / "real"), "finetune.epochs": 1})
    record: RunRecord = run(config)
    write_record(folder / RECORD, record)


def compare(
    numbers: tuple[int, ...], *, nodes: int, cpus: int, concurrent: int, groups: int, seconds: float, sampler: str
) -> list[dict[str, Any]]:
    """Return what the driver of a sweep of stubs takes for each number of trials, each in a new process.

    Args:
        numbers: Numbers of trials.
        nodes, cpus: Logical nodes of Ray on this machine, and logical CPUs of each.
        concurrent: Maximum number of concurrent trials.
        groups: Number of groups of a sweep.
        seconds: Time that a stub takes.
        sampler: Name of a sampler.

    Raises:
        WorkerError: A process failed.
    """
    from ..driver.cluster import prepare_environment

    prepare_environment()
    from ray.cluster_utils import Cluster

    found = []
    with tempfile.TemporaryDirectory(prefix="synq-scale-") as name:
        folder = Path(name)
        real_record(folder)
        (folder / SECONDS).write_text(str(seconds))
        os.environ.update(PYTHONPATH=str(ROOT), RAY_TMPDIR=name)  # not the folder of another Ray
        node: dict[str, Any] = {"num_cpus": cpus, "object_store_memory": 2**27}
        cluster = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
        try:
            for _ in range(nodes - 1):
                cluster.add_node(**node)
            os.environ["RAY_ADDRESS"] = str(cluster.address)
            for number in numbers:
                one = folder / f"trials-{number}"
                shape = [str(concurrent), str(groups), sampler]
                out, _ = finish(start([sys.executable, "-m", MODULE, "--one", str(one), str(number), *shape]))
                found.append(json.loads(out.strip().splitlines()[-1]))
        finally:
            cluster.shutdown()
    return found


def per_event(one: dict[str, Any], *, own: bool = False) -> float:
    """Return the processor time of an event in milliseconds: of the whole process, or in functions of the sweep."""
    seconds = sum(one["own"].values()) if own else one["processor"]
    return 1e3 * float(seconds) / sum(one["events"].values())


@click.command(
    "driver",
    cls=Command,
    examples="  python -m synq.sweeps.benchmarks.driver 200 2000 --nodes 8 --concurrent 16",
    exit_codes="0 done",
)
@argument("trials", nargs=-1, type=INT, help="numbers of trials, the fewest first (default: 100 400)")
@option("--nodes", type=INT, default=4, metavar="N", help="logical nodes of Ray on this machine (default: 4)")
@option("--cpus", type=INT, default=8, metavar="N", help="logical CPUs of each (default: 8)")
@option("--concurrent", type=INT, default=8, metavar="N", help="concurrent trials (default: 8)")
@option("--groups", type=INT, default=4, metavar="N", help="groups of the sweep (default: 4)")
@option("--seconds", type=FLOAT, default=1.0, metavar="X", help="time that a stub takes (default: 1)")
@option("--sampler", default="tpe", metavar="NAME", help="the sampler (default: tpe)")
def command(trials: tuple[int, ...], **options: Any) -> None:
    """Print what the driver of a sweep takes for each event of a trial, for each number of trials, as JSON lines."""
    found = compare(trials or TRIALS, **options)
    for one in found:
        milliseconds = {"ms_event": per_event(one), "ms_event_own": per_event(one, own=True)}
        print(json.dumps({**{key: round(value, 3) for key, value in milliseconds.items()}, **one}), flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        place, number, limit, parts, chosen = sys.argv[2:]
        from . import driver  # by its name, which the workers know

        shape = {"groups": int(parts), "concurrent": int(limit), "sampler": chosen}
        print(json.dumps(driver.measure_driver(Path(place), int(number), **shape)))
    else:
        command.run()
