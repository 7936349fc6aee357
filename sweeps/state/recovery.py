"""Plans and records of a sweep as its driver reads them: damaged files are set aside and made again from the others.

    record damaged       set aside; its trial goes on from its run's folder, which has the result or a checkpoint
    plan damaged, lost   made again from its record, so that the name of a record is never given to another trial
    both                 the trial is forgotten, another one is proposed
    sweep.json           made again if all plans and records fit the spec (`misfits`)

Imports neither Ray nor torch.
"""

import math
import re
from pathlib import Path
from typing import Literal

from synq.common.files import DamagedFileError
from synq.config.run import RunConfig, config_digest, config_from_dict
from synq.runs.record import RunRecord, read_record

from ..points import point_params
from ..space import value_of
from ..spec import SweepSpec, run_config
from .folder import SweepFolder
from .plans import Plan, plan_values, read_plan

_NAME = re.compile(r"(?P<group>.+)-t(?P<index>\d+)(?:-s(?P<seed>\d+))?")
"""Name of a trial."""


def read_state(folder: SweepFolder, spec: SweepSpec) -> tuple[dict[str, Plan], dict[str, RunRecord]]:
    """Read the plans and the records of a sweep, by the names of their trials.

    Args:
        folder: The sweep's folder, locked.
        spec: The sweep.

    Raises:
        ValueError: A file is that of another trial or sweep, or of another version.
    """
    records = _read_records(folder)
    plans = _read_plans(folder, records)
    for trial, record in records.items():
        if trial not in plans and (plan := _plan_of(trial, record, spec)) is not None:
            plans[trial] = plan
            folder.write(f"plans/{trial}.json", plan_values(plan))
    return plans, records


def _read_records(folder: SweepFolder) -> dict[str, RunRecord]:
    found = {}
    for path in sorted((folder.root / "records").glob("*.json")):
        try:
            record = read_record(path)
        except DamagedFileError as error:
            folder.set_aside(f"records/{path.name}", f"{error}; its trial goes on from the folder of its run")
            continue
        if record.name != path.stem:
            raise ValueError(
                f"`{path}` must hold the record of its name, but it is that of {record.name}: move it out of the "
                "sweep; a trial without a record is run again"
            )
        found[path.stem] = record
    return found


def _read_plans(folder: SweepFolder, records: dict[str, RunRecord]) -> dict[str, Plan]:
    found = {}
    for path in sorted((folder.root / "plans").glob("*.json")):
        try:
            found[path.stem] = read_plan(path)
        except DamagedFileError as error:
            instead = "it is made again from its record" if path.stem in records else "another trial is proposed"
            folder.set_aside(f"plans/{path.name}", f"{error}; {instead}")
            if path.stem not in records:  # a later trial of this name must not stop
                folder.remove(f"plans/{path.stem}.stop")
    return found


def _plan_of(trial: str, record: RunRecord, spec: SweepSpec) -> Plan | None:
    """Return the plan of a record that has none; None for one of no group of this sweep.

    Raises:
        ValueError: It has the name of a trial of this sweep, but other settings.
    """
    named = _NAME.fullmatch(trial)
    if named is None or named["group"] not in {group.key for group in spec.groups}:
        return None
    config = config_from_dict(RunConfig, record.config, source=f"record {trial}")
    stage: Literal["search", "final"] = "search" if named["seed"] is None else "final"
    if _current_digest(config, named["group"], spec) != record.config_digest:
        raise ValueError(
            f"`output_dir` must hold one sweep, but {trial} in {folder_of(spec)} has no plan, and a record with "
            "settings that are none of this sweep: move the record out of the sweep"
        )
    overrides = {dimension.name: value_of(config, dimension.name) for dimension in spec.dimensions}
    history = [(int(row.get("epoch", 0)), row.get("objective_value")) for row in record.loss_history]
    return Plan(
        trial=trial,
        group=named["group"],
        stage=stage,
        index=int(named["index"]),
        params=point_params(spec.dimensions, overrides) or {},
        config=config,
        config_digest=record.config_digest,
        history=[(epoch, float(value)) for epoch, value in history if value is not None and math.isfinite(value)],
    )


def folder_of(spec: SweepSpec) -> Path | str:
    """Return the address or the folder of a sweep, for messages."""
    return spec.address or spec.output_dir


def _current_digest(config: RunConfig, group_key: str, spec: SweepSpec) -> str:
    """Return the digest of the run that this sweep makes of the searched settings and the seeds of a run."""
    group = next(group for group in spec.groups if group.key == group_key)
    overrides = {dimension.name: value_of(config, dimension.name) for dimension in spec.dimensions}
    try:
        return config_digest(run_config(spec, group, overrides, seeds=(config.seed, config.data_seed)))
    except ValueError:  # no settings of this sweep
        return ""


def misfits(plans: dict[str, Plan], records: dict[str, RunRecord], spec: SweepSpec) -> list[str]:
    """Return the names of the trials whose plan or record is none of this sweep.

    Args:
        plans, records: As from `read_state`.
        spec: The sweep.
    """
    keys = {group.key for group in spec.groups}
    wrong = []
    for trial, plan in plans.items():
        record = records.get(trial)
        is_right = plan.group in keys and _current_digest(plan.config, plan.group, spec) == plan.config_digest
        if not is_right or (record is not None and record.config_digest != plan.config_digest):
            wrong.append(trial)
    return wrong + [trial for trial in records if trial not in plans]
