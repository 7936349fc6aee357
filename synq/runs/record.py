"""The record of a run and files that are whole or absent. Standard library only.

Every file that counts as a result is written under another name in the same folder, flushed to the disk and renamed, so that
a reader, or a run killed at any instant, never meets half of it.
"""

import dataclasses
import functools
import json
import math
import os
import platform
import subprocess
import tempfile
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import synq
from synq.config.identity import settings_of_its_day
from synq.config.quant import protocol_words

SCHEMA_VERSION = 1
PACKAGES = ("synq", "torch", "torchvision", "accelerate", "ray", "optuna", "numpy")
DEPLOYED = ("onnx_bytes", "packed_bytes", "latency_ms", "float_latency_ms")
"""Figures of `deployment` that are columns of the tables, filled where a student was exported."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunRecord:
    """Everything that is reported of one run. One JSON file; numbers in percent unless said otherwise; None: not measured."""

    schema_version: int = SCHEMA_VERSION
    """Version of this list of fields."""
    status: Literal["completed", "failed", "pruned"] = "completed"
    """How the run ended."""
    reason: str = ""
    """Why a run failed or was pruned."""
    name: str = ""
    """Name of the run."""
    config: dict[str, Any] = field(default_factory=dict)
    """The resolved configuration."""
    config_digest: str = ""
    """Digest of what decides the result, seeds included (`config_digest`)."""
    seed: int = 0
    """Seed of fine-tuning."""
    data_seed: int = 0
    """Seed of the synthetic set."""
    teacher: dict[str, Any] = field(default_factory=dict)
    """The teacher's spec, digest, name, num_classes and input_size."""
    model: str = ""
    """The teacher's short name."""
    weight_bits: int = 0
    """Bits of the weights."""
    act_bits: int = 0
    """Bits of the activations."""
    protocol: str = ""
    """A: all layers low-bit, static; B: first or last layer at another width, or learned steps or rounding."""
    act_points: str = ""
    """Which activations are low-bit: relu or inputs."""
    objective: str = ""
    """What a sweep optimises: synthetic or selection."""
    objective_value: float | None = None
    """Value of the objective after the last epoch; synthetic: the configured fidelity measure, lower is better; selection: top-1,
    higher is better."""
    fidelity: dict[str, float | None] = field(default_factory=dict)
    """Nearness of the student to the teacher on the held-out synthetic images, by name."""
    teacher_top1: float | None = None
    """Top-1 of the teacher on the labelled images."""
    rtn_top1: float | None = None
    """Top-1 of the student before fine-tuning (round-to-nearest, or the learned rounding)."""
    top1: float | None = None
    """Top-1 of the student after the last epoch."""
    top5: float | None = None
    """Top-5 of the student after the last epoch."""
    drop: float | None = None
    """teacher_top1 - top1, on the same images, in percentage points."""
    num_eval: int | None = None
    """Number of labelled images behind the top-1 figures."""
    rtn_fidelity: dict[str, float | None] = field(default_factory=dict)
    """As `fidelity`, before fine-tuning."""
    size_bytes: float | None = None
    """Size of the student's parameters at their widths, in bytes."""
    bitops: float | None = None
    """Bit operations of one image: sum over layers of multiplications x weight bits x activation bits."""
    kept_share: float | None = None
    """Share (0..1) of training images whose difficulty is at most the threshold."""
    set_digest: str = ""
    """Digest of the synthetic training set."""
    heldout_digest: str = ""
    """Digest of the held-out synthetic set."""
    eval_digest: str = ""
    """Fingerprint of the labelled images, "" without."""
    loss_history: list[dict[str, Any]] = field(default_factory=list)
    """Loss terms of each epoch."""
    warnings: list[str] = field(default_factory=list)
    """What the user should know about this result."""
    layers: list[dict[str, Any]] = field(default_factory=list)
    """What is quantized at which width, and what stays float."""
    commit: str = "unknown"
    """Commit of the code; -dirty where files differ from it."""
    versions: dict[str, str] = field(default_factory=dict)
    """Versions of Python and of the packages used."""
    device: str = ""
    """Device in words."""
    host: str = ""
    """Name of the machine."""
    started: str = ""
    """Start, ISO 8601, UTC."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Seconds of each stage."""
    total_seconds: float | None = None
    """Seconds of the whole run, earlier parts of a resumed one included."""
    codes_changed: float | None = None
    """Share (0..1) of the integer weights that fine-tuning changed."""
    lost: int | None = None
    """Labelled images that the teacher has right and the student wrong, after the last epoch."""
    gained: int | None = None
    """Labelled images that the teacher has wrong and the student right; drop = 100 (lost - gained) / num_eval."""
    rtn_lost: int | None = None
    """As `lost`, before fine-tuning."""
    rtn_gained: int | None = None
    """As `gained`, before fine-tuning."""
    rounding: dict[str, Any] = field(default_factory=dict)
    """What equalisation, correction and the learning of the rounding did before fine-tuning, each with its figures."""
    deployment: dict[str, Any] = field(default_factory=dict)
    """Of the exported files: sizes in bytes, milliseconds of one image on a CPU, comparisons with the student; empty before an export."""


def write_bytes_atomic(path: str | Path, content: bytes) -> None:
    """Write `content` to `path` so that the file is either the old one or the whole new one.

    Raises:
        OSError: The folder or the disk refuses; the error names `path`, and no temporary file stays behind.
    """
    path = Path(path)
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(temporary, 0o666 & ~mask)  # mkstemp makes 0600, which would hide results from a team on a shared disk
        os.replace(temporary, path)
    except BaseException as error:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise OSError(error.errno, error.strerror or str(error), str(path)) from error
        raise


def check_writable(folder: Path) -> None:
    """Refuse a run's folder that cannot be written, before the work and not after it.

    Raises:
        OSError: Naming the folder above it and the reason.
    """
    probe = folder / ".writable"
    try:
        write_bytes_atomic(probe, b"")
    except OSError as error:
        reason = error.strerror or str(error)
        raise OSError(f"runtime.output_dir must be writable, but got {folder.parent}: {reason}") from error
    probe.unlink(missing_ok=True)


def write_text_atomic(path: str | Path, text: str) -> None:
    """As `write_bytes_atomic`, for UTF-8 text."""
    write_bytes_atomic(path, text.encode("utf-8"))


def write_json_atomic(path: str | Path, value: object) -> None:
    """As `write_bytes_atomic`, for strict JSON: NaN and infinities become null, tuples become lists."""
    write_text_atomic(path, json.dumps(_strict(value), indent=2, allow_nan=False) + "\n")


def _strict(value: object) -> object:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _strict(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(part) for part in value]
    return value


def read_json(path: str | Path) -> Any:
    """Read a JSON file.

    Raises:
        FileNotFoundError: The file is absent.
        ValueError: The file is damaged; the message names it.
    """
    try:
        return json.loads(Path(path).read_bytes())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        ours = Path(path).suffix == ".json"
        advice = f"is damaged ({error}); remove it to have it made again" if ours else "does not"
        raise ValueError(f"`{path}` must hold JSON, but it {advice}") from None


def write_record(path: str | Path, record: RunRecord) -> None:
    """Write a record as JSON, by rename."""
    write_json_atomic(path, {part.name: getattr(record, part.name) for part in dataclasses.fields(record)})


def read_record(path: str | Path) -> RunRecord:
    """Read a record.

    Raises:
        FileNotFoundError: The file is absent.
        ValueError: The file is damaged, of another version, or not a record.
    """
    content = read_json(path)
    if not isinstance(content, dict):
        raise ValueError(f"`{path}` must hold a run record, but got a {type(content).__name__}")
    version = content.get("schema_version")
    if version != SCHEMA_VERSION:
        raise ValueError(f"`{path}` must hold a run record of version {SCHEMA_VERSION}, but got version {version!r}")
    types = _record_types()
    if "config" not in content:
        raise ValueError(f"`{path}` must hold a run record, but it has no config")
    unknown = sorted(set(content) - set(types))
    if unknown:
        raise ValueError(f"`{path}` must hold a run record, but got the unknown key {unknown[0]!r}")
    for name, value in content.items():
        if not _fits(types[name], value):
            raise ValueError(f"`{path}` must hold a run record, but got {name} = {value!r:.80}")
    return RunRecord(**content | {"config": settings_of_its_day(content["config"])})


@functools.cache  # reading the hints takes longer than reading a record
def _record_types() -> dict[str, Any]:
    return typing.get_type_hints(RunRecord)


def _fits(hint: Any, value: object) -> bool:
    """Whether a JSON value may stand in a field of type `hint`; containers are judged by their outer type only."""
    if value is None:
        return type(None) in typing.get_args(hint)
    if typing.get_origin(hint) is Literal:
        return value in typing.get_args(hint)
    kinds = (
        [kind for kind in typing.get_args(hint) if kind is not type(None)]
        if type(None) in typing.get_args(hint)
        else [hint]
    )
    kind = typing.get_origin(kinds[0]) or kinds[0]
    return isinstance(value, int | float if kind is float else kind) and (kind is bool or not isinstance(value, bool))


def run_protocol(record: RunRecord) -> str:
    """Return the protocol of a run with the widths of its ends: "A", "B (8/8)"."""
    quant = record.config.get("quant", {})
    return protocol_words(record.protocol, quant.get("first_bits"), quant.get("last_bits"))


def summary_line(record: RunRecord) -> str:
    """One line for a person, for example "resnet20 W4A4 A relu | teacher 91.48 | RTN 80.90 | final 90.40 | drop 1.08 | 132 s"."""
    quant = record.config.get("quant", {})
    mixed = " mixed" if quant.get("layer_weight_bits") or quant.get("layer_act_bits") else ""
    bits = f"W{record.weight_bits}A{record.act_bits}{mixed}"
    head = f"{record.model or record.name} {bits} {run_protocol(record)} {record.act_points}".rstrip()
    parts = [head]
    if record.status != "completed":
        parts.append(f"{record.status}: {record.reason}" if record.reason else record.status)
    if record.top1 is not None:
        figures = (
            ("teacher", record.teacher_top1),
            ("RTN", record.rtn_top1),
            ("final", record.top1),
            ("drop", record.drop),
        )
        parts += [f"{name} {value:.2f}" for name, value in figures if value is not None]
    elif record.status == "completed":
        parts.append("no labels")
    if record.objective_value is not None and (record.top1 is None or record.objective == "selection"):
        parts.append(f"{record.objective} objective {record.objective_value:.4g}")
    if record.total_seconds is not None:
        parts.append(f"{record.total_seconds:.0f} s")
    return " | ".join(parts)


def environment() -> dict[str, Any]:
    """Return what a figure depends on besides its settings: commit, versions and host.

    The commit is that of the checkout this file lies in, with the mark -dirty where tracked files differ from it, or "unknown"
    (installed from a wheel, or sent to a cluster without its .git folder, unless the variable SYNQ_COMMIT says it).
    """
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {"commit": os.environ.get("SYNQ_COMMIT") or _commit(), "versions": versions, "host": platform.node()}


def _commit() -> str:
    root = Path(synq.__file__).resolve().parent.parent
    if not (
        root / ".git"
    ).exists():  # never the commit of a project that merely has this one in its virtual environment
        return "unknown"
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return done.stdout.strip() if done.returncode == 0 and done.stdout.strip() else "unknown"
