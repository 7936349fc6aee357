"""The folder of a sweep: its plans, its records, its tables, and the lock that keeps a second sweep out. Knows neither Ray nor torch.

Layout::

    sweep.json            what the sweep is; a changed one is refused
    plans/TRIAL.json      written when a trial is proposed: its settings, its run, later its objective per epoch
    records/TRIAL.json    written when a trial has ended: completed, pruned or failed
    runs/, store/         the runs' own folders and the synthetic sets
    trials.csv, leaderboard.csv

Plans and records are the whole state of a sweep: the search is rebuilt from them, so a killed driver loses nothing that counts.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from sweeps.leaderboard import load_record, write_tables
from sweeps.spec import SweepSpec
from synq.configs import RunConfig, config_digest, config_from_dict, config_to_dict
from synq.results import RunRecord, environment, read_json, read_record, write_json_atomic, write_record

FORMAT = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """One proposed trial."""

    trial: str
    """Name of the trial; the stem of its files."""
    group: str
    """Key of its group."""
    stage: str
    """search, or final for a re-run on a further seed."""
    index: int
    """Number within the group's search; for a re-run, that of the trial it repeats."""
    params: dict[str, Any]
    """The search's own parameters, from which the proposal can be replayed."""
    config: dict[str, Any]
    """The run, resolved."""
    config_digest: str
    """Digest of the run."""
    history: list[tuple[int, float]] = field(default_factory=list)
    """(epoch, objective) as reported while it ran."""


class Ledger:
    """Plans and records of one sweep, in memory and on disk."""

    def __init__(self, spec: SweepSpec) -> None:
        self.spec = spec
        self.root = spec.output_dir
        self.plans: dict[str, Plan] = {}
        self.records: dict[str, RunRecord] = {}
        self.teachers: dict[str, dict[str, Any]] = {}
        """What is known of each group's teacher (name, digest, input_size), for records of runs that did not get far."""
        self._environment: dict[str, Any] | None = None
        self._lock = FileLock(self.root / "sweep.lock")

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Ray Tune pickles its parts for a resume of its own, which is not used: the folder is the state

    def open(self) -> None:
        """Take the folder: lock it, check that it holds this sweep, read what is there.

        Raises:
            ValueError: Another sweep runs in the folder, or it holds a different one, or a file in it is damaged.
            OSError: The folder cannot be written.
        """
        try:
            for folder in ("plans", "records"):
                (self.root / folder).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OSError(f"`output_dir` must be writable, but got {self.root}: {error.strerror}") from error
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise ValueError(f"`output_dir` must not be in use, but another sweep runs in {self.root}") from None
        try:
            self._check_identity()
            for path in sorted((self.root / "plans").glob("*.json")):
                plan = _plan(read_json(path), path)
                self.plans[plan.trial] = plan
            for path in sorted((self.root / "records").glob("*.json")):
                self.records[path.stem] = load_record(path)
        except BaseException:
            self._lock.release()
            raise

    def close(self) -> None:
        """Give the folder back."""
        self._lock.release()

    def know(self, group: str, facts: dict[str, Any], eval_digest: str) -> None:
        """Note what a group's teacher is, and refuse to go on with records of other files of the same name.

        Args:
            group: Key of the group.
            facts: name, digest and input_size of the teacher.
            eval_digest: Fingerprint of the labelled images, "" without.

        Raises:
            ValueError: A record of the group was made with other weights or measured on other images.
        """
        self.teachers[group] = facts
        for name, record in self.records.items():
            if name not in self.plans or self.plans[name].group != group:
                continue
            then = record.teacher.get("digest") or facts["digest"]
            labels = record.eval_digest if record.status == "completed" else eval_digest
            for what, same in (("weights", then == facts["digest"]), ("labelled images", labels == eval_digest)):
                if not same:
                    raise ValueError(
                        f"`output_dir` must hold one sweep, but {name} in {self.root} was made with other {what} of the same "
                        "file name: put the old file back or choose another output_dir"
                    )

    def record_path(self, trial: str) -> Path:
        """Where the record of a trial stands."""
        return self.root / "records" / f"{trial}.json"

    def add_plan(self, plan: Plan) -> None:
        """Write a plan (again)."""
        self.plans[plan.trial] = plan
        values = asdict(plan)
        values["params"] = {
            key: list(value) if isinstance(value, tuple) else value for key, value in plan.params.items()
        }
        write_json_atomic(self.root / "plans" / f"{plan.trial}.json", {"format": FORMAT, **values})

    def note(self, trial: str, history: Mapping[int, float]) -> None:
        """Write what a running trial has reported: a driver that starts again puts it into the rungs where it belongs."""
        self.add_plan(replace(self.plans[trial], history=sorted(history.items())))

    def group_plans(self, group: str, stage: str = "search") -> list[Plan]:
        """Plans of a group in the order in which they were proposed."""
        found = [plan for plan in self.plans.values() if plan.group == group and plan.stage == stage]
        return sorted(found, key=lambda plan: (plan.index, plan.trial))

    def settle(
        self, trial: str, *, status: str, reason: str, history: list[tuple[int, float]], seconds: float
    ) -> RunRecord:
        """Make the record of an ended trial final: its own where it wrote one, else a pruned or failed one. Rewrites the tables.

        Args:
            trial: Name of the trial.
            status: pruned or failed, should the trial have left no record.
            reason: Why.
            history: (epoch, objective) as reported.
            seconds: Seconds it ran.
        """
        path = self.record_path(trial)
        plan = replace(self.plans[trial], history=history)
        self.add_plan(plan)
        if path.exists():
            record = read_record(path)
        else:
            self._environment = self._environment or environment()
            config = config_from_dict(RunConfig, plan.config)
            teacher = self.teachers.get(plan.group, {})
            values = {
                **self._environment,
                "total_seconds": seconds,
                "objective_value": history[-1][1] if history else None,
            }
            record = unfinished_record(config, trial, status=status, reason=reason, teacher=teacher, values=values)
            write_record(path, record)
        self.records[trial] = record
        self.write_tables()
        return record

    def write_tables(self) -> None:
        """Rewrite trials.csv and leaderboard.csv."""
        write_tables(list(self.records.values()), self.root)

    def best(self, group: str) -> list[Plan]:
        """Completed search trials of a group, best first."""
        sign = 1 if self.spec.search.minimise else -1
        scored = []
        for plan in self.group_plans(group):
            record = self.records.get(plan.trial)
            if record is not None and record.status == "completed" and _finite(record.objective_value):
                scored.append((sign * float(record.objective_value or 0.0), plan.index, plan))
        return [plan for _, _, plan in sorted(scored, key=lambda item: item[:2])]

    def _check_identity(self) -> None:
        """Refuse a folder that holds another sweep: its trials would be mixed with these."""
        groups = {}
        for group in self.spec.groups:
            values = config_to_dict(group.base)
            digest = config_digest(group.base)
            groups[group.key] = {
                "config_digest": digest,
                "teacher": values["teacher"]["spec"],
                "weights": values["teacher"]["weights"],
            }
        space = [asdict(dimension) for dimension in self.spec.dimensions]
        mine = json.loads(
            json.dumps({"format": FORMAT, "objective": self.spec.search.objective, "groups": groups, "space": space})
        )
        path = self.root / "sweep.json"
        if path.exists():
            there = read_json(path)
            for key in ("format", "objective", "groups", "space"):
                if not isinstance(there, dict) or _comparable(there.get(key)) != _comparable(mine[key]):
                    raise ValueError(
                        f"`output_dir` must be new or hold the same sweep, but {self.root} holds one with other {key}"
                    )
        elif any((self.root / "records").iterdir()):
            raise ValueError(
                f"`output_dir` must be new or hold the same sweep, but {self.root} holds records without sweep.json"
            )
        write_json_atomic(path, {**mine, "search": {**asdict(self.spec.search), "output_dir": ""}})


def unfinished_record(
    config: RunConfig,
    trial: str,
    *,
    status: str,
    reason: str,
    teacher: Mapping[str, Any],
    values: Mapping[str, Any] | None = None,
) -> RunRecord:
    """Return the record of a run that has no result.

    Args:
        config: The run.
        trial: Name of the trial.
        status: pruned or failed.
        reason: Why, one line.
        teacher: What is known of the teacher.
        values: Further fields of the record that are known.
    """
    quant, evaluation = config.quant, config.evaluation
    known = {
        "status": status,
        "reason": " ".join(reason.split())[:500],
        "name": trial,
        "config": config_to_dict(config),
        "config_digest": config_digest(config),
        "seed": config.seed,
        "data_seed": config.data_seed,
        "teacher": {"spec": config.teacher.spec, **teacher},
        "model": teacher.get("name", config.name),
        "weight_bits": quant.weight_bits,
        "act_bits": quant.act_bits,
        "protocol": quant.protocol,
        "act_points": quant.act_points,
        "objective": evaluation.objective,
    }
    return RunRecord(**{**known, **(values or {})})


def _comparable(value: Any) -> Any:
    """Paths count by their last part, so that a moved folder of weights is still the same sweep (the digest says the rest)."""
    if isinstance(value, dict):
        return {key: _comparable(part) for key, part in value.items()}
    return value.rsplit("/", 1)[-1] if isinstance(value, str) else value


def _plan(content: Any, path: Path) -> Plan:
    if (
        not isinstance(content, dict)
        or content.pop("format", None) != FORMAT
        or set(content) != set(Plan.__dataclass_fields__)
    ):
        raise ValueError(
            f"`{path}` must hold the plan of a trial; remove it and its record to have the trial proposed again"
        )
    return Plan(**{**content, "history": [(int(epoch), float(value)) for epoch, value in content["history"]]})


def _finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)
