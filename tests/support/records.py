"""Made-up records of runs, and readers of the tables that they give."""

import csv
import io
from dataclasses import replace
from pathlib import Path
from typing import Any

from synq.config.run import RunConfig, config_digest, config_to_dict, with_overrides
from synq.runs.record import RunRecord, write_record


def record(
    objective_value: float | None = 0.1, *, seed: int = 0, overrides: dict[str, Any] | None = None, **fields: Any
) -> RunRecord:
    """A completed run with settings of its own."""
    config = with_overrides(RunConfig(seed=seed, data_seed=seed), overrides or {})
    values: dict[str, Any] = {
        "name": f"t-{config_digest(config)}",
        "config": config_to_dict(config),
        "config_digest": config_digest(config),
        "seed": seed,
        "data_seed": seed,
        "teacher": {"digest": "aa", "input_size": [3, 32, 32]},
        "model": "net",
        "weight_bits": config.quant.weight_bits,
        "act_bits": config.quant.act_bits,
        "protocol": config.quant.protocol,
        "act_points": config.quant.points,
        "objective": config.evaluation.objective,
        "objective_value": objective_value,
        "top1": 90.0,
        "teacher_top1": 92.0,
        "rtn_top1": 80.0,
        "drop": 2.0,
        "num_eval": 100,
        "heldout_digest": "hh",
        "total_seconds": 10.0,
    }
    values |= fields
    both = (values["teacher_top1"], values["top1"])
    values["drop"] = fields.get("drop", None if None in both else both[0] - both[1])
    return RunRecord(**values)


def folder_of(path: Path, records: list[RunRecord]) -> str:
    """Write records as those of a sweep."""
    for number, item in enumerate(records):
        write_record(path / "records" / f"t{number}.json", replace(item, name=f"t{number}"))
    return str(path)


def bits(width: int, **more: Any) -> dict[str, Any]:
    return {"quant.weight_bits": width, "quant.act_bits": width, **{key.replace("__", "."): more[key] for key in more}}


def table(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


def markdown_cells(line: str) -> list[str]:
    """Split a line of a Markdown table as GitHub's reader does: a backslash takes the meaning from what follows it."""
    parts, position = [""], 0
    while position < len(line):
        letter = line[position]
        if letter == "\\":
            position += 1
            parts[-1] += line[position]
        elif letter == "|":
            parts.append("")
        else:
            assert letter not in "`*[]<>", f"{letter} would be acted on"
            parts[-1] += letter
        position += 1
    return [part.strip() for part in parts[1:-1]]
