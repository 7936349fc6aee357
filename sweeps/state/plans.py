"""Plans of proposed trials as files, and records of trials without a result. Imports neither Ray nor torch."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from synq.common.digests import read_sealed_json, report_unsealed
from synq.config.parsing import check_format, shown
from synq.config.run import RunConfig, config_digest, config_to_dict
from synq.runs.record import RunRecord, Status

from ..leaderboard.ranking import read_setting
from .trial_log import log_name

FORMAT = 2
"""Version of the format of plans and of sweep.json."""
REMOVE_SWEEP = "remove it; the command of the sweep makes it again if all plans and records fit its spec"
"""What to do about a file that is no sweep.json."""
REMOVE = "remove it; the plan is made again from the trial's record, or another trial is proposed"
"""What to do about a file that is no plan."""
_KINDS = {
    "trial": str,
    "group": str,
    "stage": str,
    "index": int,
    "params": dict,
    "config": dict,
    "config_digest": str,
    "history": list,
    "attempt": int,
}
REASON_LENGTH = 500
"""Maximum length of the reason in a record, in characters."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """A proposed trial."""

    trial: str
    """Name of the trial; the stem of its files."""
    group: str
    """Key of its group."""
    stage: Literal["search", "final"]
    """search, or final for a re-run on a further seed."""
    index: int
    """Index within the group's search; for a re-run, the index of the trial that it repeats."""
    params: dict[str, Any]
    """Parameters of the searcher, from which the proposal can be replayed."""
    config: RunConfig
    """Config of the run."""
    config_digest: str
    """Digest of the config."""
    history: list[tuple[int, float]] = field(default_factory=list)
    """(epoch, objective) as reported during the run."""
    attempt: int = 1
    """Number of the attempt, from 1: `--retry` begins the next one, and records of earlier ones do not count."""


def in_order(plans: Iterable[Plan]) -> list[Plan]:
    """Return plans in the order in which they were proposed, group by group."""
    return sorted(plans, key=lambda plan: (plan.group, plan.stage, plan.index, plan.trial))


def new_plan(
    trial: str, group: str, stage: Literal["search", "final"], index: int, params: dict[str, Any], config: RunConfig
) -> Plan:
    """Return the plan of a trial that has not started; the arguments are its fields."""
    digest = config_digest(config)
    return Plan(trial=trial, group=group, stage=stage, index=index, params=params, config=config, config_digest=digest)


def read_plan(path: Path) -> Plan:
    """Read the plan of a trial from its file.

    Raises:
        DamagedFileError: The file is no JSON, or differs from its digest.
        ValueError: The file is no plan, that of another trial, or of another format version.
    """
    content, is_sealed = read_sealed_json(path)
    plan = parse_plan(content, path, is_sealed=is_sealed)
    if not is_sealed:
        report_unsealed(path)
    return plan


def parse_plan(content: Any, path: Path, *, is_sealed: bool) -> Plan:
    """Return the plan of a trial from the content of its file.

    Args:
        content: The JSON value, without its digest.
        path: The file, for its name and for messages.
        is_sealed: Whether the content has been compared with its digest.

    Raises:
        ValueError: The content is no plan, that of another trial, or of another format version.
    """
    if isinstance(content, dict) and "format" in content:
        check_format(path, "the plan of a trial", content.pop("format"), FORMAT, "run the sweep again in a new folder")
    if isinstance(content, dict):
        content = {"attempt": 1, **content}
    if not isinstance(content, dict) or set(content) != set(Plan.__dataclass_fields__):
        raise ValueError(f"`{path}` must hold the plan of a trial, but has other keys: {REMOVE}")
    for name, kind in _KINDS.items():
        if type(content[name]) is not kind:
            raise ValueError(
                f"`{path}` must hold the plan of a trial, but got {name} = {shown(content[name])}: {REMOVE}"
            )
    if content["trial"] != path.stem:
        raise ValueError(f"`{path}` must hold the plan of its name, but it is that of {content['trial']}: {REMOVE}")
    config, _ = read_setting(content["config"], source=str(path))  # what trials share is parsed once
    if not is_sealed and config_digest(config) != content["config_digest"]:
        raise ValueError(f"`{path}` must have the configuration of its digest, but has another: {REMOVE}")
    try:
        history = [(int(epoch), float(value)) for epoch, value in content["history"] if value is not None]
    except (ValueError, TypeError, OverflowError):
        raise ValueError(
            f"`{path}` must hold the plan of a trial, but got history = {shown(content['history'])}: {REMOVE}"
        ) from None
    return Plan(**{**content, "config": config, "history": history})


def read_sweep_file(path: Path) -> dict[str, Any]:
    """Return the content of a sweep.json; {} if the file does not exist.

    Raises:
        DamagedFileError: The file is no JSON, or differs from its digest.
        ValueError: The file is not one of a sweep, or of another format version.
    """
    if not path.is_file():
        return {}
    content, is_sealed = read_sealed_json(path, REMOVE_SWEEP)
    if not isinstance(content, dict) or "format" not in content:
        raise ValueError(f"`{path}` must hold a sweep's search and groups, but it does not: {REMOVE_SWEEP}")
    cure = "another `name` in the spec, or `--output-dir`, begins a new sweep"
    check_format(path, "a sweep", content["format"], FORMAT, cure)
    if found := _sweep_misfit(content):
        raise ValueError(f"`{path}` must hold a sweep, but got {found}: {REMOVE_SWEEP}")
    if not is_sealed:
        report_unsealed(path)
    return content


def _sweep_misfit(content: Mapping[str, Any]) -> str:
    """Return the first field of a sweep.json that no reader expects, as "FIELD = VALUE"; "" without one."""
    kinds = {"search": dict, "groups": dict, "space": list, "finished": int, "constraints": dict, "stopped": dict}
    for name, kind in kinds.items():
        if name in content and type(content[name]) is not kind:
            return f"{name} = {shown(content[name])}"
    number = content.get("search", {}).get("num_trials", 0)
    return "" if type(number) is int else f"search.num_trials = {shown(number)}"


def plan_values(plan: Plan) -> dict[str, Any]:
    """Return a plan as JSON values for its file: the config as nested dicts, `attempt` only after the first."""
    values = {name: getattr(plan, name) for name in Plan.__dataclass_fields__}
    params = {key: list(value) if isinstance(value, tuple) else value for key, value in plan.params.items()}
    if plan.attempt == 1:
        del values["attempt"]
    return {"format": FORMAT, **values, "params": params, "config": config_to_dict(plan.config)}


def set_recipe(config: RunConfig) -> str:
    """Return the settings that determine the synthetic sets of a run, as one JSON text."""
    teacher, synthesis = config_to_dict(config.teacher), config_to_dict(config.synthesis)
    evaluation = {"heldout_images": config.evaluation.heldout_images}
    return json.dumps([teacher, synthesis, evaluation, config.data_seed], sort_keys=True)


def unfinished_record(
    config: RunConfig,
    trial: str,
    *,
    status: Status,
    reason: str,
    teacher: Mapping[str, Any],
    values: Mapping[str, Any] | None = None,
) -> RunRecord:
    """Return the record of a run without a result.

    Args:
        config: Config of the run.
        trial: Name of the trial.
        status: Any but completed.
        reason: Reason of the status; line breaks become spaces, and it is cut after 500 characters.
        teacher: Known fields of the teacher (name, digest, input_size).
        values: Other known fields of the record.
    """
    quant, evaluation = config.quant, config.evaluation
    known = {
        "log": log_name(trial),
        "status": status,
        "reason": " ".join(reason.split())[:REASON_LENGTH],
        "name": trial,
        "config": config_to_dict(config),
        "config_digest": config_digest(config),
        "seed": config.seed,
        "data_seed": config.data_seed,
        "teacher": {"spec": config.teacher.spec, **teacher},
        "model": teacher.get("name", config.name),
        "weight_bits": quant.weight_bits,
        "act_bits": quant.act_bits,
        "protocol": config.protocol,
        "act_points": quant.points,
        "objective": evaluation.objective,
    }
    return RunRecord(**{**known, **(values or {})})
