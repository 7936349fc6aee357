"""Which files a run names, and which of its settings decide its result. Works on dotted keys, so it needs no configuration class."""

import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from synq.config.parsing import config_to_dict, with_overrides

T = TypeVar("T")
DIGEST_FORMAT = 3
LATER_SETTINGS: dict[str, dict[str, Any]] = {
    "synthesis": {"start": "white"},
    "teacher": {"output": None},
    "quant": {"layer_weight_bits": {}, "layer_act_bits": {}, "last_bits_for_input": False},
    "finetune": {"grad_clip_relative": None},
}
"""Settings that came later, with the value that names what had been done before: old runs keep their digests by it."""
WEIGHT_SUFFIXES = (".safetensors", ".pth", ".th", ".pt", ".tar", ".bin")
SPECS = (("teacher", "spec"), ("teacher", "weights"), ("evaluation", "dataset"))
FOLDERS = (("evaluation", "data_dir"), ("runtime", "output_dir"), ("runtime", "store_dir"))


def absolute_path(path: str) -> str:
    """Return `path` seen from the current folder, ~ and $VARIABLES expanded; an address such as s3://bucket stays as it is.

    Raises:
        ValueError: If a variable is not set: a file called "$NAME/..." is never what was meant.
    """
    expanded = os.path.expandvars(os.path.expanduser(path))
    unset = re.search(r"\$(\w+|\{\w+\})", expanded)
    if unset is not None:
        raise ValueError(f"environment variable {unset.group()} must be set, but {path} names it and it is not")
    return path if "://" in path else os.path.abspath(expanded)


def map_spec_path(spec: str, function: Callable[[str], str]) -> str:
    """Apply `function` to the file path inside a spec, where there is one.

    npz:FILE, imagefolder:PATH, FILE.py:FACTORY and the name of a weights file hold a path; bundled:NAME, digits or IMAGENET1K_V1 do not.
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
    """New values, by dotted key, of those `keys` that are set."""
    return {f"{part}.{key}": function(values[part][key]) for part, key in keys if values[part][key]}


def make_absolute(config: T) -> T:
    """Return a copy whose file paths are absolute, seen from the current folder (a trial runs in a folder of its own).

    Covers weights files, FILE.py:FACTORY, npz:FILE, imagefolder:PATH and every folder; addresses (s3://...) are left alone.
    """
    values = config_to_dict(config)
    specs = _changed(values, SPECS, lambda spec: map_spec_path(spec, absolute_path))
    return with_overrides(config, specs | _changed(values, FOLDERS, absolute_path))


def idle_keys(finetune: Mapping[str, Any], learned_steps: str) -> set[str]:
    """Return the keys of `finetune` that decide nothing, because what they belong to is switched off."""
    switches = {
        "perturb_size": finetune["perturb_weight"] != 0,
        "cam_method": finetune["cam_weight"] != 0,
        "hard_labels": finetune["ce_weight"] != 0,
        "step_lr_factor": learned_steps != "none",
    }
    return {key for key, is_on in switches.items() if not is_on}


def settings_of_its_day(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a stored run; those that came later, and whose default is not what was done before, are filled in."""
    filled = dict(config)
    for part, later in LATER_SETTINGS.items():
        if isinstance(filled.get(part), Mapping):
            filled[part] = {**later, **filled[part]}
    return filled


def config_digest(config: object, *, with_seeds: bool = True) -> str:
    """Return 16 hexadecimal digits that name what decides the result of a `RunConfig`.

    Left out: the name, folders, device, layout, compilation, threads, progress, tracker, the evaluation's batch size, and settings of
    what is switched off. Files count by their name only, so that
    a checkout may move; the teacher's weights have a digest of their own in the record.

    Args:
        config: The run.
        with_seeds: False leaves out `seed` and `data_seed`: the same for all repetitions of one setting.
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
    if quant["act_points"] == "inputs" or quant["last_bits"] in (None, quant["act_bits"]):
        quant["last_bits_for_input"] = False  # it decides nothing
    left_out = [(values, "name"), (values["finetune"], "log_every")]
    left_out += [(values["finetune"], key) for key in idle_keys(values["finetune"], values["quant"]["learned_steps"])]
    left_out += [
        (values[part], key)
        for part, later in LATER_SETTINGS.items()
        for key, value in later.items()
        if values[part][key] == value
    ]
    left_out += [(values, "reconstruction")] if values["quant"]["rounding"] == "nearest" else []
    left_out += [(values["evaluation"], key) for key in ("batch_size", "data_dir")]
    left_out += [] if with_seeds else [(values, "seed"), (values, "data_seed")]
    for table, key in left_out:
        del table[key]
    text = json.dumps({"format": DIGEST_FORMAT, **values}, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
