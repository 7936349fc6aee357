"""The identity of a run: the digest of the settings that determine its result. Standard library only."""

import hashlib
import json
import os
import re
from collections.abc import Callable
from typing import Any, TypeVar

from synq.config.finetune import inactive_keys
from synq.config.parsing import config_to_dict, with_overrides
from synq.config.plugins import KINDS, Kind, is_added, is_file, versioned
from synq.config.quant import RESEARCH, end_bits
from synq.config.synthesis import ADDED_LATER

T = TypeVar("T")
DIGEST_FORMAT = 5
"""Format of digests, and of `config.json`. Raise it with every change of a key or default that makes an old
configuration mean another run."""
ENGINE_RULES = 4
"""Version of the rules by which an engine's students are built and computed: which tensors are on a grid, at how many
bits, and the engine's arithmetic. Raise it with every change of them, so that no finished student of earlier rules is
taken for one of today's."""
WEIGHT_INDEX_SUFFIX = ".index.json"
"""End of the name of the index of sharded weights, such as model.safetensors.index.json."""
WEIGHT_SUFFIXES = (".safetensors", ".pth", ".th", ".pt", ".tar", ".bin", ".ckpt", WEIGHT_INDEX_SUFFIX)
SPECS = (
    ("teacher", "spec"),
    ("teacher", "weights"),
    ("evaluation", "dataset"),
    ("synthesis", "method"),
    ("synthesis", "source"),
    ("finetune", "own_term"),
)
FOLDERS = (("evaluation", "data_dir"), ("runtime", "output_dir"), ("runtime", "store_dir"))


def absolute_path(path: str) -> str:
    """Return `path` as absolute, ~ and $VARIABLES expanded; an address such as s3://bucket stays as it is.

    Raises:
        ValueError: A variable in the path is not set: a file called "$NAME/..." is never meant.
    """
    expanded = os.path.expandvars(os.path.expanduser(path))
    unset = re.search(r"\$(\w+|\{\w+\})", expanded)
    if unset is not None:
        raise ValueError(f"environment variable {unset.group()} must be set, but is not (used in {path})")
    return path if "://" in path else os.path.abspath(expanded)


def hub_folder(name: str) -> str | None:
    """Return the folder that a model of Hugging Face is in, or None for a name on the hub.

    Args:
        name: What follows ``hf:``. It is a path if it starts like one, or is a folder that exists.
    """
    path = os.path.expandvars(os.path.expanduser(name))
    return path if path.startswith(("/", "./", "../")) or path in (".", "..") or os.path.isdir(path) else None


def map_spec_path(spec: str, function: Callable[[str], str]) -> str:
    """Apply `function` to the file path inside a spec, if there is one.

    npz:FILE, imagefolder:PATH, folder:PATH, hf:FOLDER, FILE.py:FACTORY and the name of a weights file hold a path;
    bundled:NAME, digits, IMAGENET1K_V1 or a name on Hugging Face's hub do not.
    """
    source, _, rest = spec.partition(":")
    if source == "hf" and rest:
        return f"hf:{function(rest)}" if hub_folder(rest) is not None else spec
    if source in ("npz", "imagefolder", "folder") and rest:
        return f"{source}:{function(rest)}"
    path, _, factory = spec.rpartition(":")
    if path.endswith(".py"):
        return f"{function(path)}:{factory}"
    is_file = spec.lower().endswith(WEIGHT_SUFFIXES) or (os.sep in spec and ":" not in spec)
    return function(spec) if is_file else spec


def _changed(
    values: dict[str, Any], keys: tuple[tuple[str, str], ...], function: Callable[[str], str]
) -> dict[str, str]:
    """Return the new values, by dotted key, of those `keys` that are set; a text for a user's function stays."""
    given = {f"{part}.{key}": values[part][key] for part, key in keys if values[part][key]}
    kept = {kind.setting for kind in KINDS if kind.has_text and _is_text_of(kind, given.get(kind.setting, ""))}
    return {name: value if name in kept else function(value) for name, value in given.items()}


def _is_text_of(kind: Kind, value: str) -> bool:
    return is_added(kind, value) and not is_file(value)


def resolved(kind: Kind, value: str) -> str:
    """Return the value of a setting with absolute paths, and with the version of what a user added.

    Args:
        kind: The kind that the setting may name.
        value: The value.

    Raises:
        ValueError: As `versioned`.
        FileNotFoundError: As `versioned`.
    """
    return versioned(kind, value if kind.has_text and _is_text_of(kind, value) else map_spec_path(value, absolute_path))


def make_absolute(config: T) -> T:
    """Return a copy whose file paths are absolute, relative to the current folder (a trial runs in a separate folder).

    Covers weights files, FILE.py:FACTORY, hf:FOLDER, npz:FILE, imagefolder:PATH and every folder; addresses (s3://...)
    stay. What a user added (`synq.config.plugins`) gets its version.

    Raises:
        ValueError: As `versioned`.
        FileNotFoundError: As `versioned`.
    """
    values = config_to_dict(config)
    specs = _changed(values, SPECS, lambda spec: map_spec_path(spec, absolute_path))
    for kind in KINDS:
        if kind.setting in specs:
            specs[kind.setting] = versioned(kind, specs[kind.setting])
    return with_overrides(config, specs | _changed(values, FOLDERS, absolute_path))


def not_given(value: Any) -> bool:
    """Return whether a setting that was added later has its default, None or False; a weight of 0 is a choice."""
    return value is None or value is False


def config_digest(config: object, *, with_seeds: bool = True, with_evaluation: bool = True) -> str:
    """Return the digest of everything in a `RunConfig` that determines its result, 16 hexadecimal digits.

    Excluded: the name, folders, device, memory format, compilation, threads, progress, tracker, the batch size of the
    evaluation, and inactive keys. Files count by their name only, so that a checkout may move; the record has a
    separate digest of the teacher's weights. The evaluation is included, because a record holds one measurement; the
    student itself does not depend on it.

    Args:
        config: The run.
        with_seeds: False excludes `seed` and `data_seed`: the digest is then equal for all seeds of one setting.
        with_evaluation: False excludes the evaluation: the digest is then that of the student, whatever measures it.
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
    quant["first_bits"], quant["last_bits"] = end_bits(quant["target"], quant["first_bits"], quant["last_bits"])
    left_out = [(values, "name"), (values["finetune"], "log_every")]
    left_out += [(values["finetune"], key) for key in inactive_keys(values["finetune"], quant["learned_steps"])]
    if quant["target"] == RESEARCH:  # also because it was added later than the others
        left_out += [(quant, "target"), (quant, "portable")]
    else:
        left_out += [(quant, "act_points")]
        quant["rules"] = ENGINE_RULES
    left_out += [] if quant["float_attention"] else [(quant, "float_attention")]  # added later
    if (
        quant["target"] != RESEARCH
        or quant["act_points"] == "inputs"
        or quant["last_bits"] in (None, quant["act_bits"])
    ):
        left_out += [(quant, "last_bits_for_input")]
    left_out += [(values, "reconstruction")] if quant["rounding"] == "nearest" else []
    left_out += [(values["evaluation"], key) for key in ("batch_size", "data_dir")]
    # Settings that were added later: left out where not given, so that the digests of earlier configurations stay.
    added = ("resize_size", "interpolation")
    left_out += [(values["evaluation"], key) for key in added if values["evaluation"][key] is None]
    left_out += [(quant, key) for key in ("power_of_two_scales", "scale_shift") if not quant[key]]
    left_out += [(quant, "softmax")] if quant["softmax"] == "uniform" else []
    left_out += [(values["synthesis"], key) for key in ("source", *ADDED_LATER) if not_given(values["synthesis"][key])]
    left_out += [] if with_evaluation else [(values, "evaluation")]
    left_out += [] if with_seeds else [(values, "seed"), (values, "data_seed")]
    for table, key in left_out:
        del table[key]
    text = json.dumps({"format": DIGEST_FORMAT, **values}, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
