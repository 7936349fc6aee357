"""Plans, records and tables of a sweep, in memory and in its folder, which is locked against a second driver.

Layout::

    sweep.json            search and groups of the sweep; a spec that differs is rejected
    plans/TRIAL.json      written when a trial is proposed: its settings, its config, later its objective per epoch
    plans/TRIAL.stop      requests a trial of several workers to stop
    records/TRIAL.json    written when a trial has ended, in whatever way
    logs/TRIAL.log        what the trial printed
    runs/, store/         folders of the runs, and the synthetic sets
    trials.csv, leaderboard.csv

Plans and records are the whole state of a sweep: the search is rebuilt from them, so a killed driver loses no results.
For a sweep at an address (an object store), the folder is this machine's copy: it is downloaded when the ledger is
opened, and every file that is written is uploaded as well. Imports neither Ray nor torch.
"""

import time
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from synq.common.digests import write_sealed_json
from synq.common.environment import environment
from synq.common.files import DamagedFileError
from synq.runs.record import RunRecord, Status, read_record, write_record

from ..leaderboard.records import Tables
from ..spec import SweepSpec
from .best_plans import best_plans, completed
from .folder import SweepFolder
from .identity import check_identity, rebuilt_identity, settled_identity, stored_identity
from .plans import Plan, in_order, plan_values, read_sweep_file, set_recipe, unfinished_record
from .recovery import read_state
from .trial_log import last_host, log_name
from .trial_task import TrialTask

TABLES = ("trials.csv", "leaderboard.csv")
TABLE_SHARE = 0.1
"""Maximum share of the driver's time for rewriting the tables; in a sweep of thousands they lag by a few trials."""


class Ledger:
    """Plans and records of one sweep, in memory and on disk."""

    def __init__(self, spec: SweepSpec) -> None:
        self.spec = spec
        self.root = spec.output_dir
        self.folder = SweepFolder(spec.output_dir, spec.address)
        self.plans: dict[str, Plan] = {}
        self.records: dict[str, RunRecord] = {}
        self.teachers: dict[str, dict[str, Any]] = {}
        """name, digest and input_size of each group's teacher, for records of runs that ended early."""
        self.sets: dict[str, list[str]] = {}
        """Names of the synthetic sets in the store, by the settings that determine them (`set_recipe`)."""
        self.earlier: list[RunRecord] | None = None
        """Records of the earlier sweeps from which the search starts; None until they are read."""
        self.stopped: dict[str, dict[str, Any]] = {}
        """Groups whose search `stop_when` has ended, with the `reason` and the budget, `num_trials`, at that time."""
        self.tables = Tables(constraints=spec.constraints)
        self._by_group: dict[tuple[str, str], dict[str, Plan]] = {}
        self._environment: dict[str, Any] | None = None
        self._tables_due = 0.0

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Ray Tune pickles callbacks and searchers for its own resume, which is not used

    def open(self) -> None:
        """Lock the folder, check that it has this sweep, and read its plans and records.

        Raises:
            ValueError: Another driver uses the folder, it has a different sweep, or a file in it is damaged.
            OSError: The folder is not writable.
        """
        self._take()
        try:
            stored, reason = stored_identity(self.root)
            if not reason:
                check_identity(stored, self.spec)
            plans, records = read_state(self.folder, self.spec)
            if reason and (plans or records):
                stored = rebuilt_identity(plans, records, self.spec, reason)
            self._begin(stored, plans, records)
        except BaseException:
            self.close()
            raise

    def _take(self) -> None:
        self.folder.take()

    def _begin(self, stored: Mapping[str, Any], plans: dict[str, Plan], records: dict[str, RunRecord]) -> None:
        """Begin with the state of the folder.

        Args:
            stored: Content of sweep.json; {} for a new sweep.
            plans, records: As from `read_state`.
        """
        self._write_identity(stored)
        for plan in in_order(plans.values()):
            self._keep(plan)
        for trial, record in records.items():
            self._keep_record(trial, record)

    def close(self) -> None:
        """Release the locks of the folder."""
        self.folder.give_back()

    @property
    def lost(self) -> str:
        """Reason why this driver must stop, because another one may run the sweep; "" while there is none."""
        return self.folder.lost

    def sync(self) -> list[Plan]:
        """Read what other drivers have changed and return the plans; a sweep of one driver has none."""
        return []

    def freed(self) -> list[Plan]:
        """Return the plans without a record that no living driver runs; a sweep of one driver knows them already."""
        return []

    def elsewhere(self, trial: str) -> bool:
        """Return whether another living driver runs a trial."""
        return False

    def claim(self, plan: Plan) -> bool:
        """Write a new plan, and return whether its trial is this driver's to run."""
        self.add_plan(plan)
        return True

    def take_over(self, plan: Plan) -> Plan | None:
        """Write the plan of an interrupted trial and return it as it is now; None if it is not this driver's to run."""
        self.add_plan(plan)
        return plan

    def exclusive(self, what: str) -> AbstractContextManager[None]:
        """Return a context in which no other driver of the sweep does `what`."""
        return nullcontext()

    def _keep_record(self, trial: str, record: RunRecord) -> None:
        if record.status in self.spec.search.retry and trial in self.plans:
            self.folder.remove(f"records/{trial}.json")
            self.add_plan(replace(self.plans[trial], attempt=self.plans[trial].attempt + 1))
            return
        self.records[trial] = record
        self.tables.add(record, trial, source=str(self.record_path(trial)))

    def know(self, group: str, facts: dict[str, Any], eval_digest: str, earlier_digest: str = "") -> None:
        """Register the teacher of a group, and reject records made with other files of the same name.

        Args:
            group: Key of the group.
            facts: name, digest and input_size of the teacher.
            eval_digest: Digest of the labeled images; "" without.
            earlier_digest: The same images' digest as earlier versions computed it, which their records have.

        Raises:
            ValueError: A record of the group was made with other weights or measured on other images.
        """
        self.teachers[group] = facts
        known = (eval_digest, earlier_digest or eval_digest)
        for name, record in self.records.items():
            if name not in self.plans or self.plans[name].group != group:
                continue
            digest = record.teacher.get("digest") or facts["digest"]
            labels = record.eval_digest if record.status == "completed" else eval_digest
            for what, same in (("weights", digest == facts["digest"]), ("labeled images", labels in known)):
                if not same:
                    raise ValueError(
                        f"`output_dir` must hold one sweep, but {name} in {self.root} was made with other {what} of "
                        "the same file name: put the old file back or choose another output_dir"
                    )

    def record_path(self, trial: str) -> Path:
        """Return the path of a trial's record."""
        return self.root / "records" / f"{trial}.json"

    def task(self, plan: Plan) -> TrialTask:
        """Return the task of a planned trial: its config, the sweep's folder, its resources."""
        return TrialTask(
            trial=plan.trial,
            group=plan.group,
            stage=plan.stage,
            config=plan.config,
            config_digest=plan.config_digest,
            teacher=self.teachers.get(plan.group, {}),
            sets=tuple(self.sets.get(set_recipe(plan.config), [])),
            folder=str(self.root),
            address=self.spec.address,
            gpus=self.spec.search.gpus_per_worker,
            workers=self.spec.search.workers_per_trial,
            cpus=self.spec.search.cpus_per_worker,
            max_failures=self.spec.search.max_failures,
        )

    def add_plan(self, plan: Plan) -> None:
        """Write a plan, replacing an earlier version."""
        self._keep(plan)
        self.folder.write(f"plans/{plan.trial}.json", plan_values(plan))

    def note(self, trial: str, history: Mapping[int, float]) -> None:
        """Write the objectives that a running trial has reported, from which a restarted driver rebuilds the rungs.

        Args:
            trial: Name of the trial.
            history: Objective by epoch.
        """
        self.add_plan(replace(self.plans[trial], history=sorted(history.items())))

    def ask_to_stop(self, trial: str) -> None:
        """Write the file that makes the workers of a trial stop; they check for it after each epoch."""
        self.folder.write(f"plans/{trial}.stop", {"stop": True})

    def group_plans(self, group: str, stage: str = "search") -> list[Plan]:
        """Return the plans of a group in the order in which they were proposed."""
        return list(self._by_group.get((group, stage), {}).values())

    def num_plans(self, group: str) -> int:
        """Return the number of search trials of a group."""
        return len(self._by_group.get((group, "search"), {}))

    def num_open(self, group: str) -> int:
        """Return the number of search trials of a group without a record."""
        return sum(trial not in self.records for trial in self._by_group.get((group, "search"), {}))

    def next_index(self, group: str) -> int:
        """Return the index of the next search trial of a group."""
        plans = self._by_group.get((group, "search"), {})
        return max((plan.index for plan in plans.values()), default=-1) + 1

    def _keep(self, plan: Plan) -> None:
        self.plans[plan.trial] = plan
        self._by_group.setdefault((plan.group, plan.stage), {})[plan.trial] = plan

    def settle(
        self,
        trial: str,
        *,
        status: Status,
        reason: str,
        history: list[tuple[int, float]],
        seconds: float,
        began: float | None = None,
        host: str = "",
    ) -> RunRecord:
        """Finalize the record of an ended trial and update the tables.

        The record is the one that the trial wrote, else a new one with the given status.

        Args:
            trial: Name of the trial.
            status: Any but completed, for a trial that wrote no record.
            reason: Reason of that status.
            history: (epoch, objective) as reported.
            seconds: Duration of the trial in seconds.
            began: Start time in seconds since 1970; None if the trial reported nothing.
            host: Machine of the trial; "" if it reported none: it is then that of the log, if any.

        Returns:
            The record.
        """
        path = self.record_path(trial)
        plan = replace(self.plans[trial], history=history)
        self.add_plan(plan)
        if (self.root / "plans" / f"{trial}.stop").exists():  # done; if the trial is run again, it must not stop
            self.folder.remove(f"plans/{trial}.stop")
        if self.folder.fetch(f"records/{path.name}"):
            record = read_record(path)
        else:
            self._environment = self._environment or environment()
            teacher = self.teachers.get(plan.group, {})
            values = {
                **self._environment,
                "host": host or last_host(self.root / log_name(trial)),
                "started": "" if began is None else datetime.fromtimestamp(began, UTC).isoformat(timespec="seconds"),
                "total_seconds": seconds,
                "objective_value": history[-1][1] if history else None,
            }
            record = unfinished_record(plan.config, trial, status=status, reason=reason, teacher=teacher, values=values)
            self.folder.log_end(trial, f"{status}: {reason}")
            write_record(path, record)
            self.folder.send(f"records/{path.name}")
        self.records[trial] = record
        self.tables.add(record, trial)
        if time.monotonic() >= self._tables_due:
            self.write_tables()
        return record

    def end_early(self) -> None:
        """Add the records of trials that ended while the driver was being stopped, and rewrite the tables.

        A trial writes its record before Ray Tune reports to the driver that it has ended.
        """
        for trial in sorted(self.plans.keys() - self.records.keys()):
            name = f"records/{trial}.json"
            if self.folder.fetch(name):
                try:
                    record = read_record(self.record_path(trial))
                except DamagedFileError as error:
                    self.folder.set_aside(name, f"{error}; its trial goes on from the folder of its run")
                    continue
                self.records[trial] = record
                self.tables.add(record, trial)
        self.write_tables()

    def write_tables(self) -> None:
        """Rewrite trials.csv and leaderboard.csv."""
        self.folder.check_present()
        started = time.monotonic()
        self.tables.write(self.root)
        for name in TABLES:
            self.folder.send(name)
        ended = time.monotonic()
        self._tables_due = ended + (ended - started) / TABLE_SHARE

    def best(self, group: str, top_k: int = 1) -> list[Plan]:
        """Return the plans of the best completed search trials of a group, as `best_plans`."""
        return best_plans(self.spec, self.group_plans(group), self.records, top_k)

    def result(self, plan: Plan) -> RunRecord | None:
        """Return the record of a completed trial; None if it has not completed."""
        return completed(self.records.get(plan.trial))

    def stop_group(self, group: str, reason: str) -> None:
        """End the search of a group before its budget is spent.

        The decision is kept, because trials that were running then end later and might change it: a resumed sweep goes
        on with the group only if its budget was raised, or `stop_when` is budget.
        """
        self.stopped[group] = {"reason": reason, "num_trials": self.spec.search.trials, "after": self.num_plans(group)}
        stored = read_sweep_file(self.root / "sweep.json")
        self.folder.write("sweep.json", {**stored, "stopped": self.stopped})

    def finish(self) -> None:
        """Mark the sweep as finished, so that `--num-trials +N` then means N more trials than it has."""
        stored = read_sweep_file(self.root / "sweep.json")
        number = max(self.spec.search.trials, stored.get("finished", 0))
        self.folder.write("sweep.json", {**stored, "finished": number})

    def _write_identity(self, stored: Mapping[str, Any]) -> None:
        """Resolve the number of trials and write sweep.json."""
        self.spec, values = settled_identity(self.spec, stored)
        self.stopped = values.get("stopped", {})
        write_sealed_json(self.root / "sweep.json", values)
        self.folder.send("sweep.json")
