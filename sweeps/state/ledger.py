"""The folder of a sweep: its plans, its records, its tables, and the lock that keeps a second sweep out. Knows neither Ray nor torch.

Layout::

    sweep.json            what the sweep is; a changed one is rejected
    plans/TRIAL.json      written when a trial is proposed: its settings, its run, later its objective per epoch
    plans/TRIAL.stop      asks a trial of several workers to stop
    records/TRIAL.json    written when a trial has ended: completed, pruned or failed
    runs/, store/         the runs' own folders and the synthetic sets
    trials.csv, leaderboard.csv

Plans and records are the whole state of a sweep: the search is rebuilt from them, so a killed driver loses nothing that counts.
Where the sweep lies at an address (an object store), the folder is this machine's copy of it: read from there when it is opened, and
every file that is written goes there as well.
"""

import json
import math
import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from synq.common.environment import environment
from synq.common.files import read_json, write_json_atomic
from synq.config.run import config_digest, config_to_dict
from synq.runs.record import RunRecord, read_record, write_record

from ..leaderboard.records import Tables
from ..search_config import SearchConfig
from ..space import BITS, value_of
from ..spec import SweepSpec
from .folder import SweepFolder
from .plans import FORMAT, Plan, plan_values, read_plan, read_sweep_file, set_recipe, unfinished_record
from .trial_task import TrialTask

TABLES = ("trials.csv", "leaderboard.csv")
TABLE_SHARE = 0.1
"""Most of the driver's time that goes into rewriting the tables; in a sweep of thousands they then miss the last few trials."""


class Ledger:
    """Plans and records of one sweep, in memory and on disk."""

    def __init__(self, spec: SweepSpec) -> None:
        self.spec = spec
        self.root = spec.output_dir
        self.folder = SweepFolder(spec.output_dir, spec.address)
        self.plans: dict[str, Plan] = {}
        self.records: dict[str, RunRecord] = {}
        self.teachers: dict[str, dict[str, Any]] = {}
        """What is known of each group's teacher (name, digest, input_size), for records of runs that did not get far."""
        self.sets: dict[str, list[str]] = {}
        """Names of the synthetic sets in the store, by what they are made of (`set_recipe`)."""
        self.earlier: list[RunRecord] | None = None
        """Records of the sweeps that this one learns from, once read."""
        self.tables = Tables()
        self._by_group: dict[tuple[str, str], dict[str, Plan]] = {}
        self._environment: dict[str, Any] | None = None
        self._tables_due = 0.0

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Ray Tune pickles its parts for its own resume, which is not used: the folder is the state

    def open(self) -> None:
        """Take the folder: lock it, check that it holds this sweep, read what is there.

        Raises:
            ValueError: Another sweep runs in the folder, or it holds a different one, or a file in it is damaged.
            OSError: The folder cannot be written.
        """
        self.folder.take()
        try:
            self._check_identity()
            read = [read_plan(path) for path in (self.root / "plans").glob("*.json")]
            for plan in sorted(read, key=lambda plan: (plan.group, plan.stage, plan.index, plan.trial)):
                self._keep(plan)
            for path in sorted((self.root / "records").glob("*.json")):
                self._read_record(path)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Give the folder back."""
        self.folder.give_back()

    def _read_record(self, path: Path) -> None:
        record = read_record(path)
        if record.status == "failed" and self.spec.search.retry_failed and path.stem in self.plans:
            self.folder.remove(f"records/{path.name}")
            return
        self.records[path.stem] = record
        self.tables.add(record, path.stem, source=str(path))

    def know(self, group: str, facts: dict[str, Any], eval_digest: str) -> None:
        """Note what a group's teacher is, and reject records that other files of the same name gave.

        Args:
            group: Key of the group.
            facts: name, digest and input_size of the teacher.
            eval_digest: Fingerprint of the labeled images, "" without.

        Raises:
            ValueError: A record of the group was made with other weights or measured on other images.
        """
        self.teachers[group] = facts
        for name, record in self.records.items():
            if name not in self.plans or self.plans[name].group != group:
                continue
            then = record.teacher.get("digest") or facts["digest"]
            labels = record.eval_digest if record.status == "completed" else eval_digest
            for what, same in (("weights", then == facts["digest"]), ("labeled images", labels == eval_digest)):
                if not same:
                    raise ValueError(
                        f"`output_dir` must hold one sweep, but {name} in {self.root} was made with other {what} of the same "
                        "file name: put the old file back or choose another output_dir"
                    )

    def record_path(self, trial: str) -> Path:
        """Return the path of a trial's record."""
        return self.root / "records" / f"{trial}.json"

    def task(self, plan: Plan) -> TrialTask:
        """Return the task of a planned trial: its run, the sweep's folder, its resources."""
        return TrialTask(
            trial=plan.trial,
            group=plan.group,
            stage=plan.stage,
            config=plan.config,
            config_digest=plan.config_digest,
            teacher=self.teachers.get(plan.group, {}),
            second_objective=self.spec.search.second_objective,
            sets=tuple(self.sets.get(set_recipe(plan.config), [])),
            folder=str(self.root),
            address=self.spec.address,
            gpus=self.spec.search.gpus_per_worker,
            workers=self.spec.search.workers_per_trial,
            cpus=self.spec.search.cpus_per_worker,
            max_failures=self.spec.search.max_failures,
        )

    def add_plan(self, plan: Plan) -> None:
        """Write a plan (again)."""
        self._keep(plan)
        self.folder.write(f"plans/{plan.trial}.json", plan_values(plan))

    def note(self, trial: str, history: Mapping[int, float]) -> None:
        """Write what a running trial has reported: a driver that starts again puts it into the rungs where it belongs."""
        self.add_plan(replace(self.plans[trial], history=sorted(history.items())))

    def ask_to_stop(self, trial: str) -> None:
        """Leave a sign that the workers of a trial look for after each epoch."""
        self.folder.write(f"plans/{trial}.stop", {})

    def group_plans(self, group: str, stage: str = "search") -> list[Plan]:
        """Plans of a group in the order in which they were proposed."""
        return list(self._by_group.get((group, stage), {}).values())

    def num_plans(self, group: str) -> int:
        """Number of a group's search trials."""
        return len(self._by_group.get((group, "search"), {}))

    def num_open(self, group: str) -> int:
        """Number of a group's search trials without a record."""
        return sum(trial not in self.records for trial in self._by_group.get((group, "search"), {}))

    def next_index(self, group: str) -> int:
        """Number of a group's next search trial."""
        plans = self._by_group.get((group, "search"), {})
        return plans[next(reversed(plans))].index + 1 if plans else 0

    def _keep(self, plan: Plan) -> None:
        self.plans[plan.trial] = plan
        self._by_group.setdefault((plan.group, plan.stage), {})[plan.trial] = plan

    def settle(
        self,
        trial: str,
        *,
        status: str,
        reason: str,
        history: list[tuple[int, float]],
        seconds: float,
        began: float | None = None,
        host: str = "",
    ) -> RunRecord:
        """Make the record of an ended trial final: its own where it wrote one, else a pruned or failed one. Rewrites the tables.

        Args:
            trial: Name of the trial.
            status: pruned or failed, should the trial have left no record.
            reason: Why.
            history: (epoch, objective) as reported.
            seconds: Seconds it ran.
            began: When its work began, in seconds since 1970; None where it reported nothing.
            host: The machine it ran on, as far as it reported.
        """
        path = self.record_path(trial)
        plan = replace(self.plans[trial], history=history)
        self.add_plan(plan)
        if (self.root / "plans" / f"{trial}.stop").exists():  # heeded; should the trial be run anew, it is to run
            self.folder.remove(f"plans/{trial}.stop")
        if self.folder.fetch(f"records/{path.name}"):
            record = read_record(path)
        else:
            self._environment = self._environment or environment()
            teacher = self.teachers.get(plan.group, {})
            values = {
                **self._environment,
                "host": host,
                "started": "" if began is None else datetime.fromtimestamp(began, UTC).isoformat(timespec="seconds"),
                "total_seconds": seconds,
                "objective_value": history[-1][1] if history else None,
            }
            record = unfinished_record(plan.config, trial, status=status, reason=reason, teacher=teacher, values=values)
            write_record(path, record)
            self.folder.send(f"records/{path.name}")
        self.records[trial] = record
        self.tables.add(record, trial)
        if time.monotonic() >= self._tables_due:
            self.write_tables()
        return record

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
        """Completed search trials of a group, the `top_k` best first; of each bit-width, where the search goes over them."""
        sign = 1 if self.spec.search.minimize else -1
        scored: dict[str, list[tuple[float, int, Plan]]] = {}
        for plan in self.group_plans(group):
            record = self.records.get(plan.trial)
            if record is not None and record.status == "completed" and _finite(record.objective_value):
                place = scored.setdefault(value_of(plan.config, BITS), [])
                place.append((sign * float(record.objective_value or 0.0), plan.index, plan))
        return [plan for part in scored.values() for *_, plan in sorted(part, key=lambda item: item[:2])[:top_k]]

    def finish(self) -> None:
        """Note that the sweep has come to its end: `--num-trials +N` then means N more than it has."""
        there = read_json(self.root / "sweep.json")
        number = max(self.spec.search.trials, there.get("finished", 0))
        self.folder.write("sweep.json", {**there, "finished": number})

    def _check_identity(self) -> None:
        """Reject a folder that holds another sweep: its trials would be mixed with these."""
        groups = {}
        for group in self.spec.groups:
            values = config_to_dict(group.base)
            digest = config_digest(group.base)
            groups[group.key] = {
                "config_digest": digest,
                "teacher": values["teacher"]["spec"],
                "weights": values["teacher"]["weights"],
            }
            quant = group.base.quant
            wide = quant.last_bits and quant.last_bits_for_input and quant.act_points == "relu"
            if wide and self.spec.search.two_objectives:
                # The bit-widths are searched, and the base may have the one at which this setting counts for nothing.
                groups[group.key]["last_input"] = "wide"
        search = self.spec.search
        space: list[Any] = [asdict(dimension) for dimension in self.spec.dimensions]
        if search.sampler == "points":  # further points may widen their ranges
            space = sorted(dimension.name for dimension in self.spec.dimensions)
        both = [search.objective, search.second_objective] if search.two_objectives else search.objective
        mine = json.loads(json.dumps({"format": FORMAT, "objective": both, "groups": groups, "space": space}))
        path = self.root / "sweep.json"
        there = read_sweep_file(path)
        if there:
            for key in ("objective", "groups", "space"):
                if _comparable(there.get(key)) != _comparable(mine[key]):
                    raise ValueError(
                        f"`output_dir` must be new or hold the same sweep, but {self.root} holds one with other {key}; another "
                        "`name` in the spec, or `--output-dir`, begins a new one"
                    )
        elif any((self.root / "records").iterdir()):
            raise ValueError(
                f"`output_dir` must be new or hold the same sweep, but {self.root} holds records without sweep.json"
            )
        self.spec = replace(self.spec, search=settled_budget(self.spec.search, there))
        finished = {"finished": there["finished"]} if "finished" in there else {}
        number = max(self.spec.search.trials, there.get("search", {}).get("num_trials") or 0)
        values = {
            **asdict(self.spec.search),
            "num_trials": number,
            "output_dir": "",
            "study_storage": "",
        }  # may hold a password
        write_json_atomic(path, {**mine, **finished, "search": values})
        self.folder.send(path.name)


def settled_budget(search: SearchConfig, there: Mapping[str, Any]) -> SearchConfig:
    """Turn "N more" into a number. An extension that was itself interrupted is finished first, not extended.

    Args:
        search: As asked for.
        there: Content of the folder's sweep.json, {} for a new sweep.

    Raises:
        ValueError: More is asked of a sweep that is not there.
    """
    if not search.more_trials:
        return search
    before = there.get("search", {}).get("num_trials")
    if before is None:
        raise ValueError(f"`num_trials` must be a whole number for a new sweep, but got +{search.more_trials}")
    number = before + (search.more_trials if there.get("finished") == before else 0)
    return replace(search, num_trials=number, more_trials=0)


def _comparable(value: Any) -> Any:
    """Paths count by their last part, so that a moved folder of weights is still the same sweep (the digest covers the rest)."""
    if isinstance(value, dict):
        return {key: _comparable(part) for key, part in value.items()}
    return value.rsplit("/", 1)[-1] if isinstance(value, str) else value


def _finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)
