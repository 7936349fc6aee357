"""The identity of a run: the digest of the settings that determine its result. Works on plain values."""

import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from synq.config.parsing import config_to_dict, with_overrides

T = TypeVar("T")
DIGEST_FORMAT = 4
"""Format of digests, and of `config.json`. Raise it with every change of a key or default that makes an old
configuration mean another run."""
WEIGHT_SUFFIXES = (".safetensors", ".pth", ".th", ".pt", ".tar", ".bin")
SPECS = (("teacher", "spec"), ("teacher", "weights"), ("evaluation", "dataset"))
FOLDERS = (("evaluation", "data_dir"), ("runtime", "output_dir"), ("runtime", "store_dir"))


def absolute_path(path: str) -> str:
    """Return `path` as absolute, ~ and $VARIABLES expanded; an address such as s3://bucket is only expanded.

    Raises:
        ValueError: If a variable is not set: nobody means a file called "$NAME/...".
    """
    expanded = os.path.expandvars(os.path.expanduser(path))
    unset = re.search(r"\$(\w+|\{\w+\})", expanded)
    if unset is not None:
        raise ValueError(f"environment variable {unset.group()} must be set, but {path} names it and it is not")
    return path if "://" in path else os.path.abspath(expanded)


def map_spec_path(spec: str, function: Callable[[str], str]) -> str:
    """Apply `function` to the file path inside a spec, if there is one.

    npz:FILE, imagefolder:PATH, FILE.py:FACTORY and the name of a weights file hold a path; bundled:NAME, digits or
    IMAGENET1K_V1 do not.
    """
    source, _, rest = spec.partition(":")
    if source in ("npz", "imagefolder") and rest:
        return f"{source}:{function(rest)}"
    path, _, factory = spec.rpartition(":")
    if path.endswith(".py"):
        return f"{function(path)}:{factory}"
    is_file = spec.endswith(WEIGHT_SUFFIXES) or (os.sep in spec and ":" not in spec)
    return function(spec) if is_file else spec


def _changed(
    values: dict[str, Any], keys: tuple[tuple[str, str], ...], function: Callable[[str], str]
) -> dict[str, str]:
    """Return the new values, by dotted key, of those `keys` that are set."""
    return {f"{part}.{key}": function(values[part][key]) for part, key in keys if values[part][key]}


def make_absolute(config: T) -> T:
    """Return a copy whose file paths are absolute, seen from the current folder (a trial runs in a separate folder).

    Covers weights files, FILE.py:FACTORY, npz:FILE, imagefolder:PATH and every folder; addresses (s3://...) are left
    alone.
    """
    values = config_to_dict(config)
    specs = _changed(values, SPECS, lambda spec: map_spec_path(spec, absolute_path))
    return with_overrides(config, specs | _changed(values, FOLDERS, absolute_path))


def inactive_keys(finetune: Mapping[str, Any], learned_steps: str) -> set[str]:
    """Return the keys of `finetune` that have no effect because the term they belong to is switched off."""
    switches = {
        "perturb_size": finetune["perturb_weight"] != 0,
        "cam_method": finetune["cam_weight"] != 0,
        "hard_labels": finetune["ce_weight"] != 0,
        "step_lr_factor": learned_steps != "none",
    }
    return {key for key, is_on in switches.items() if not is_on}


def config_digest(config: object, *, with_seeds: bool = True) -> str:
    """Return 16 hexadecimal digits that identify everything in a `RunConfig` that determines its result.

    Left out: the name, folders, device, memory format, compilation, threads, progress, tracker, the evaluation's batch
        size, and inactive
    keys. Files count by their name only, so that a checkout may move; the record has a separate digest of the teacher's
    weights.

    Args:
        config: The run.
        with_seeds: False leaves out `seed` and `data_seed`: equal for all repetitions of one setting.
    """
    values = config_to_dict(config)
    names = _changed(
        values, SPECS, lambda spec: map_spec_path(spec, lambda path: os.path.basename(os.path.normpath(path)))
    )
    for name, text in names.items():
        part, _, key = name.partition(".")
        values[part][key] = text
    values["runtime"] = {"precision": values["runtime"]["precision"]}
    quant = values["quant"]
    left_out = [(values, "name"), (values["finetune"], "log_every")]
    left_out += [(values["finetune"], key) for key in inactive_keys(values["finetune"], quant["learned_steps"])]
    if quant["act_points"] == "inputs" or quant["last_bits"] in (None, quant["act_bits"]):
        left_out += [(quant, "last_bits_for_input")]
    left_out += [(values, "reconstruction")] if quant["rounding"] == "nearest" else []
    left_out += [(values["evaluation"], key) for key in ("batch_size", "data_dir")]
    left_out += [] if with_seeds else [(values, "seed"), (values, "data_seed")]
    for table, key in left_out:
        del table[key]
    text = json.dumps({"format": DIGEST_FORMAT, **values}, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
