"""The model card of an exported student: card.json for programs, README.md for people."""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from synq import __version__
from synq.common.digests import write_sealed_json
from synq.common.files import write_text_atomic
from synq.config.identity import map_spec_path
from synq.config.run import RunConfig, config_digest, config_from_dict, config_to_dict
from synq.config.synthesis import OWN_IMAGES
from synq.export.card_text import card_markdown
from synq.runs.record import RunRecord, read_record

CARD_VERSION = 1


def card_values(record: RunRecord, siblings: Sequence[RunRecord]) -> dict[str, Any]:
    """Return the content of card.json.

    Args:
        record: The run's record, with its deployment metrics.
        siblings: Completed runs with the same settings, one per seed, including this run.
    """
    config = config_from_dict(RunConfig, record.config)
    is_own = config.synthesis.method == OWN_IMAGES or config.synthesis.is_added
    tops = [run.top1 for run in siblings if run.top1 is not None]
    floats = [row for row in record.layers if row["bits"] == 32]
    return {
        "card_version": CARD_VERSION,
        "synq": __version__,
        "name": record.name,
        "teacher": record.teacher,
        "weight_bits": record.weight_bits,
        "act_bits": record.act_bits,
        "protocol": record.protocol,
        "layer_bits": config.quant.layer_label,
        "act_points": record.act_points,
        "data_free": record.objective == "synthetic" and not is_own,
        "images": map_spec_path(config.synthesis.method, os.path.basename),
        "accuracy": {
            "teacher_top1": record.teacher_top1,
            "rtn_top1": record.rtn_top1,
            "top1": record.top1,
            "drop": record.drop,
            "num_eval": record.num_eval,
            "seeds": [[run.seed, run.data_seed] for run in siblings],
            "top1_mean": mean(tops) if tops else None,
            "top1_std": stdev(tops) if len(tops) > 1 else None,
        },
        "fidelity": record.fidelity,
        "expected_agreement": record.expected_agreement,
        "deployment": record.deployment,
        "float_tensors": [{"name": row["name"], "kind": row["kind"], "role": row["role"]} for row in floats],
        "digests": {"config": record.config_digest, "set": record.set_digest, "labels": record.eval_digest},
        "config": config_to_dict(config),
        "commit": record.commit,
        "versions": record.versions,
        "device": record.device,
        "started": record.started,
    }


def siblings_of(record: RunRecord, folder: Path) -> list[RunRecord]:
    """Return the completed runs in the parent folder with the same settings and teacher, by seed, including the run."""
    own = _settings_digest(record)
    found = {(record.seed, record.data_seed): record}
    for path in sorted(folder.parent.glob(f"{record.name}-*/record.json")):
        other = readable_record(path)
        if other is None:
            continue
        same = other.status == "completed" and other.teacher.get("digest") == record.teacher.get("digest")
        if same and other.eval_digest == record.eval_digest and _settings_digest(other) == own:
            found.setdefault((other.seed, other.data_seed), other)
    return [found[seeds] for seeds in sorted(found)]


def readable_record(path: Path) -> RunRecord | None:
    """Return a record with a valid configuration, or None if the file is damaged or written by another version."""
    try:
        record = read_record(path)
        config_from_dict(RunConfig, record.config)
    except (ValueError, OSError):
        return None
    return record


def write_card(folder: Path, values: Mapping[str, Any]) -> None:
    """Write card.json and README.md atomically.

    Args:
        folder: Folder of the exported files.
        values: From `card_values`.

    Raises:
        OSError: If a file cannot be written.
    """
    text = card_markdown(values)
    write_text_atomic(folder / "README.md", text)
    digest = hashlib.sha256(text.encode()).hexdigest()
    write_sealed_json(folder / "card.json", {**values, "readme_sha256": digest})


def is_card(path: Path) -> bool:
    """Return whether a file is a card.json that was written by `write_card`."""
    try:
        return "card_version" in json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, TypeError):
        return False


def _settings_digest(record: RunRecord) -> str:
    return config_digest(config_from_dict(RunConfig, record.config), with_seeds=False)
