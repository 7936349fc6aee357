"""The record of a run: its fields, its JSON file, its summary line. Standard library only."""

import dataclasses
import functools
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from synq.common.digests import read_sealed_json, report_unsealed, write_sealed_json
from synq.common.statistics import drop_stderr, drop_text
from synq.config.identity import DIGEST_FORMAT
from synq.config.parsing import check_format, shown
from synq.config.quant import RESEARCH, end_bits, protocol_label
from synq.config.run import RunConfig, config_digest, config_to_dict
from synq.runs.record_fields import misfit

SCHEMA_VERSION = 2
Status = Literal["completed", "failed", "diverged", "pre-empted", "lost", "pruned"]
"""How a run ended; docs/how-to/resume.md has what sets each, and which are run again."""
FAILURES: tuple[Status, ...] = ("failed", "diverged", "pre-empted", "lost")
"""Statuses of a run that ended without a result, and was not stopped by the scheduler."""
DEPLOYED = ("onnx_bytes", "packed_bytes", "latency_ms", "float_latency_ms", "latency_ratio")
"""Keys of `deployment` that are columns of the leaderboard; `synq export` fills them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunRecord:
    """Result and settings of one run, stored as one JSON file. Accuracies in percent; None: not measured."""

    schema_version: int = SCHEMA_VERSION
    """Format of the record. Raise it with every change of the meaning of a field."""
    status: Status = "completed"
    """How the run ended: completed, failed (by an error), diverged (its loss was not finite), pre-empted (its machine
    went away), lost (its process died, or its record is not visible) or pruned (stopped by the scheduler)."""
    reason: str = ""
    """Why a run was not completed."""
    name: str = ""
    """Name of the run."""
    config: dict[str, Any] = field(default_factory=dict)
    """The resolved configuration."""
    config_digest: str = ""
    """Digest of everything that determines the result, seeds included (`config_digest`)."""
    seed: int = 0
    """Seed of fine-tuning."""
    data_seed: int = 0
    """Seed of the synthetic set."""
    teacher: dict[str, Any] = field(default_factory=dict)
    """The teacher's spec, digest, name, num_classes, input_size, mean, std and activation map (cam), by which rule
    image files are resized for it (preprocessing; None is the default rule), and the mark of a user's code (code)."""
    model: str = ""
    """The teacher's short name."""
    weight_bits: int = 0
    """Bit-width of the weights."""
    act_bits: int = 0
    """Bit-width of the activations."""
    protocol: str = ""
    """A: uniform bit-widths, step sizes not learned, rounding to nearest; B: anything else. With own_images, as in "B
    own_images": trained on images of the user, not zero-shot."""
    act_points: str = ""
    """Which activations are quantized: relu, inputs, or those of an engine, by its name."""
    objective: str = ""
    """Objective of a sweep: synthetic or selection."""
    objective_value: float | None = None
    """Value of the objective after the last epoch; synthetic: the configured fidelity measure, lower is better;
    selection: top-1, higher is better."""
    fidelity: dict[str, float | None] = field(default_factory=dict)
    """Fidelity of the student to the teacher on the held-out synthetic images, by measure."""
    teacher_top1: float | None = None
    """Top-1 of the teacher on the labeled images."""
    rtn_top1: float | None = None
    """Top-1 of the student before fine-tuning (round-to-nearest, or the learned rounding)."""
    top1: float | None = None
    """Top-1 of the student after the last epoch."""
    top5: float | None = None
    """Top-5 of the student after the last epoch."""
    drop: float | None = None
    """teacher_top1 - top1, on the same images, in percentage points."""
    num_eval: int | None = None
    """Number of labeled images that top-1 is measured on."""
    rtn_fidelity: dict[str, float | None] = field(default_factory=dict)
    """As `fidelity`, before fine-tuning."""
    size_bytes: float | None = None
    """Size of the student's parameters at their bit-widths, in bytes."""
    bitops: float | None = None
    """Bit operations of one image: sum over layers of MACs x weight bits x activation bits."""
    kept_share: float | None = None
    """Share (0..1) of training images whose difficulty is at most the threshold."""
    set_digest: str = ""
    """Digest of the synthetic training set."""
    heldout_digest: str = ""
    """Digest of the held-out synthetic set."""
    eval_digest: str = ""
    """Digest of the labeled images, "" without labels."""
    evaluation: dict[str, Any] = field(default_factory=dict)
    """How the labeled images were chosen and preprocessed: set, subset, resizing and cropping; empty without labels."""
    loss_history: list[dict[str, Any]] = field(default_factory=list)
    """Loss terms of each epoch."""
    warnings: list[str] = field(default_factory=list)
    """Warnings about this result."""
    layers: list[dict[str, Any]] = field(default_factory=list)
    """Every weight and activation with its bit-width; 32 is float."""
    commit: str = "unknown"
    """Commit of the code, with -dirty if there were uncommitted changes."""
    versions: dict[str, str] = field(default_factory=dict)
    """Versions of Python and of the packages used."""
    device: str = ""
    """Name of the device."""
    host: str = ""
    """Name of the machine."""
    started: str = ""
    """Start, ISO 8601, UTC."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Seconds of each stage. Those of fine-tuning are of the student's training, also where it was trained by an
    earlier run (`student_of`) or before this one was resumed."""
    total_seconds: float | None = None
    """Sum of `seconds`: what the student cost, including training by an earlier run or before this one was resumed;
    synthetic sets in the store cost nothing."""
    codes_changed: float | None = None
    """Share (0..1) of the integer weights that fine-tuning changed."""
    lost: int | None = None
    """Labeled images that the teacher classifies correctly and the student does not, after the last epoch."""
    gained: int | None = None
    """Labeled images that the student classifies correctly and the teacher does not; drop = 100 (lost - gained) /
    num_eval."""
    rtn_lost: int | None = None
    """As `lost`, before fine-tuning."""
    rtn_gained: int | None = None
    """As `gained`, before fine-tuning."""
    rounding: dict[str, Any] = field(default_factory=dict)
    """Reports of equalization, grid of softmax, scale shift, AdaRound and batch-norm correction, where done."""
    deployment: dict[str, Any] = field(default_factory=dict)
    """Exported files: sizes in bytes, latency in milliseconds per image on a CPU, comparison with the student; empty
    before an export."""
    set_seconds: float | None = None
    """Seconds that making the two synthetic sets took, in this run or in an earlier one, summed over processes."""

    expected_agreement: dict[str, Any] = field(default_factory=dict)
    """Agreement with the teacher expected on real images, in percent, with its interval and the evidence: what
    `synq.runs.expected_agreement` returns; empty in a run of an earlier version or one that did not complete."""
    files: dict[str, str] = field(default_factory=dict)
    """SHA-256 of the run's student by its file name; empty in a run of an earlier version or one that did not
    complete."""
    budget: dict[str, Any] = field(default_factory=dict)
    """How the budget was chosen: quality, rung of the ladder, KL in nats of the student that is only rounded, the range
    of the weights that has it, and whether a time limit shortened it; empty where the settings were given."""
    student_of: str = ""
    """Name of the folder of the run that trained the student, if this one only measured it; "" if it trained it."""
    log: str = ""
    """Log file of the trial in the sweep's folder; "" for a run outside of a sweep."""

    @property
    def seconds_without_sets(self) -> float | None:
        """Seconds of the run apart from its synthetic sets; None where its duration is not known."""
        return None if self.total_seconds is None else self.total_seconds - self.seconds.get("synthesis", 0.0)

    @property
    def drop_stderr(self) -> float | None:
        """Standard error of `drop`, paired by image, in percentage points; None where it is not known."""
        if self.lost is None or self.gained is None or not self.num_eval:
            return None
        return drop_stderr(self.lost, self.gained, self.num_eval)


def write_config(path: str | Path, config: RunConfig) -> None:
    """Write the resolved settings of a run as JSON with its digest, atomically; `load_run` reads them."""
    write_sealed_json(path, {"format": DIGEST_FORMAT, **config_to_dict(config)})


def write_record(path: str | Path, record: RunRecord) -> None:
    """Write a record as JSON with its digest, atomically."""
    write_sealed_json(path, {part.name: getattr(record, part.name) for part in dataclasses.fields(record)})


def read_record(path: str | Path) -> RunRecord:
    """Read a record from JSON.

    Raises:
        FileNotFoundError: The file does not exist.
        DamagedFileError: The file is no JSON, or differs from its digest.
        ValueError: The file is of another version, or not a record.
    """
    content, is_sealed = read_sealed_json(path)
    if not isinstance(content, dict):
        raise ValueError(f"`{path}` must hold a run record, but got a {type(content).__name__}")
    for key in ("schema_version", "config"):
        if key not in content:
            raise ValueError(f"`{path}` must hold a run record, but it has no {key}")
    check_format(path, "a run record", content["schema_version"], SCHEMA_VERSION, "remove it and run it again")
    types = _record_types()
    unknown = sorted(set(content) - set(types))
    if unknown:
        raise ValueError(f"`{path}` must hold a run record, but got the unknown key {unknown[0]!r}")
    for name, value in content.items():
        if not _fits(types[name], value):
            raise ValueError(f"`{path}` must hold a run record, but got {name} = {shown(value)}")
    if found := misfit(content):
        raise ValueError(f"`{path}` must hold a run record, but got {found}")
    if not is_sealed:
        report_unsealed(path)
    return RunRecord(**content)


@functools.cache  # reading the hints takes longer than reading a record
def _record_types() -> dict[str, Any]:
    return typing.get_type_hints(RunRecord)


def _fits(hint: Any, value: object) -> bool:
    """Return whether a JSON value fits a field of type `hint`; of containers only the outer type is checked."""
    kind, choices, is_optional = _kind(hint)
    if value is None:
        return is_optional
    if choices:
        return value in choices
    return isinstance(value, (int, float) if kind is float else kind) and (kind is bool or not isinstance(value, bool))


@functools.cache
def _kind(hint: Any) -> tuple[type, tuple[Any, ...], bool]:
    """Return the outer type of a hint, its choices if it is a Literal, and whether None is allowed."""
    args = typing.get_args(hint)
    if typing.get_origin(hint) is Literal:
        return str, args, False
    inner = next(kind for kind in args if kind is not type(None)) if type(None) in args else hint
    return typing.get_origin(inner) or inner, (), type(None) in args


def run_folder(config: RunConfig) -> Path:
    """Return the folder of a run, `<output_dir>/<name>-<digest>`, with its `config_digest`."""
    return Path(config.runtime.output_dir) / f"{config.name}-{config_digest(config)}"


def run_protocol(record: RunRecord) -> str:
    """Return the protocol of a run with its first/last layer bits: "A", "B (8/8)"."""
    quant = record.config.get("quant", {})
    ends = end_bits(quant.get("target", RESEARCH), quant.get("first_bits"), quant.get("last_bits"))
    return protocol_label(record.protocol, *ends)


def summary_line(record: RunRecord) -> str:
    """Return a one-line summary: "resnet20 W4A4 A relu | teacher 91.48 | RTN 80.90 | final 90.40 | drop 1.08 | 132 s".

    The standard error of the drop, paired by image, is followed by the number of labeled images. The last part is the
    duration, and that of making the synthetic sets, in this run or before.
    """
    quant = record.config.get("quant", {})
    mixed = " mixed" if quant.get("layer_weight_bits") or quant.get("layer_act_bits") else ""
    bits = f"W{record.weight_bits}A{record.act_bits}{mixed}"
    head = f"{record.model or record.name} {bits} {run_protocol(record)} {record.act_points}".rstrip()
    parts = [head]
    if record.status != "completed":
        parts.append(f"{record.status}: {record.reason}" if record.reason else record.status)
    if record.top1 is not None:
        metrics = (("teacher", record.teacher_top1), ("RTN", record.rtn_top1), ("final", record.top1))
        parts += [f"{name} {value:.2f}" for name, value in metrics if value is not None]
        images = f" ({record.num_eval} images)" if record.num_eval else ""
        if record.drop is not None:
            parts.append(f"{drop_text(record.drop, record.drop_stderr)}{images}")
    elif record.status == "completed":
        parts.append("no labels")
    if record.objective_value is not None and (record.top1 is None or record.objective == "selection"):
        parts.append(f"{record.objective} objective {record.objective_value:.4g}")
    if record.total_seconds is not None and record.set_seconds is not None:
        parts.append(f"{record.seconds_without_sets:.0f} s + {record.set_seconds:.0f} s of synthesis")
    elif record.total_seconds is not None:
        parts.append(f"{record.total_seconds:.0f} s")
    return " | ".join(parts)
