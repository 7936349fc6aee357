"""What a person must know who meets an exported student without us: card.json for programs, README.md for people."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from synq import __version__
from synq.common.text_tables import markdown_cell, to_markdown
from synq.config.quant import protocol_words
from synq.config.run import RunConfig, config_digest, config_from_dict, config_to_dict
from synq.runs.record import RunRecord, read_record, write_json_atomic, write_text_atomic

CARD_VERSION = 1
FILE_COLUMNS = (
    "file",
    "format",
    "KiB",
    "ratio to float",
    "images",
    "agreement %",
    "largest difference",
    "top-1 %",
    "integer kernels",
    "ms",
)
STATEMENT = """\
No image that a camera took was used to make this model: the training images were synthesized from the float classifier, and its weights,
ranges and settings rest on them alone. Labelled images, where figures name them, served the measurement and nothing else."""
SELECTED = """\
No image that a camera took moved a weight or a range of this model. Labelled images did help to choose its settings (objective selection);
the figures below are of the other labelled images."""
NOISE = """\
Made with Gaussian noise in the place of synthetic images, to compare with: nothing that a camera took was used, and nothing of the classifier's."""
SLOW = """\
Low widths buy size here, not speed: of {total} products ONNX Runtime runs {integers} in integers. Engines with kernels for these widths may differ."""

PLAIN_NAMES = {"Conv2d": "convolutions", "Linear": "linear layers"}
"""What people call the layers of a student."""


def card_values(record: RunRecord, siblings: Sequence[RunRecord]) -> dict[str, Any]:
    """Return the content of card.json.

    Args:
        record: The run's record, with its deployment figures.
        siblings: Completed runs of the same settings under all seeds, this one among them.
    """
    config = config_from_dict(RunConfig, record.config)  # an older record may lack what has come since
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
        "data_free": record.objective == "synthetic",
        "images": config.synthesis.method,
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
    """Return the completed runs beside a run's folder that share its settings and its teacher, by seed; itself among them."""
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
    """Return a record with a configuration that reads, or None: what lies beside a run may be damaged, or another version's."""
    try:
        record = read_record(path)
        config_from_dict(RunConfig, record.config)
    except (ValueError, OSError):
        return None
    return record


def card_markdown(values: Mapping[str, Any]) -> str:
    """Return the card for people."""
    accuracy, teacher, figures = values["accuracy"], values["teacher"], values["deployment"]
    bits, quant = f"W{values['weight_bits']}A{values['act_bits']}", values["config"]["quant"]
    protocol = protocol_words(values["protocol"], quant["first_bits"], quant["last_bits"])
    lines = [f"# {markdown_cell(teacher['name'])}, {bits}", ""]
    statement = NOISE if values["images"] == "gaussian" else STATEMENT
    lines += [statement if values["data_free"] else SELECTED, ""]
    facts = {
        "teacher": f"{teacher['spec']} (digest {teacher['digest'][:16]})",
        "input": f"(N, {', '.join(map(str, teacher['input_size']))}) float32, normalised: {_normalisation(values)}",
        "output": f"(N, {teacher['num_classes']}) logits",
        "widths": f"{bits}, protocol {protocol}, act_points {values['act_points']}{_single(values['layer_bits'])}",
        "accuracy": _accuracy(accuracy),
        "size": _size(figures),
        "speed": _speed(figures),
        "stays float": _stays_float(values["float_tensors"], figures["float_norms"]),
        "checked": _checked(figures),
        "made by": f"SynQ {values['synq']}, commit {values['commit'][:12]}, {values['device']}, {values['started']}",
        "digests": f"settings {values['digests']['config']}, synthetic set {values['digests']['set'][:16]}",
    }
    lines += [f"- **{name}**: {text}" for name, text in facts.items()]
    lines += ["", "## Files", "", to_markdown(file_rows(figures), FILE_COLUMNS)]
    lines += [
        "Agreement: images on which file and student choose the same class; largest difference: of any two logits, 0 where they are the same to the "
        "last bit. The simulation is the student as it was fine-tuned: it rounds floats, "
        "and sums them in float.",
        "See card.json for logits and digests.",
        "",
    ]
    lines += ["## How to run it", ""]
    for example in _examples(figures, teacher):
        lines += ["```python", example, "```", ""]
    lines += ["## Settings", "", "```json", json.dumps(_settings(values["config"]), indent=1), "```", ""]
    versions = ", ".join(f"{name} {version}" for name, version in values["versions"].items())
    return "\n".join([*lines, f"Versions: {versions}.", ""])


def _single(widths: str) -> str:
    return f"; apart from that: {markdown_cell(widths)}" if widths else ""


def file_rows(figures: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return one row per exported file and set of images, the float model last."""
    rows = []
    for file in figures["files"]:
        kernels = None
        if file["integer_kernels"] is not None:
            kernels = f"{file['integer_kernels']} of {file['integer_kernels'] + file['float_kernels']}"
        for number, found in enumerate(file["comparisons"]):
            first = number == 0
            rows.append(
                {
                    "file": file["name"],
                    "format": f"{file['format']} {file['container']}".strip(),
                    "KiB": _kib(file["bytes"]) if first else None,
                    "ratio to float": round(file["bytes"] / figures["float_bytes"], 3) if first else None,
                    "images": f"{found['images']} {found['source']}",
                    "agreement %": round(found["agreement_all"], 2),
                    "largest difference": float(f"{found['max_difference']:.2g}"),
                    "top-1 %": None if found["file_top1"] is None else round(found["file_top1"], 2),
                    "integer kernels": kernels if first else None,
                    "ms": round(file["latency_ms"], 2) if first and file["latency_ms"] is not None else None,
                }
            )
    for found in figures.get("own_rounding", ()):
        rows.append({"file": "(simulation)", "format": "float", "images": f"{found['images']} {found['source']}"})
        rows[-1] |= {"agreement %": round(found["agreement_all"], 2)}
        rows[-1] |= {"largest difference": float(f"{found['max_difference']:.2g}")}
    if "float_onnx_bytes" in figures:
        size, time = figures["float_onnx_bytes"], figures.get("float_latency_ms")
        rows.append({"file": "(float teacher)", "format": "onnx float", "KiB": _kib(size)})
        rows[-1] |= {"ratio to float": round(size / figures["float_bytes"], 3), "ms": time and round(time, 2)}
    return rows


def _kib(size: int) -> float:
    return round(size / 1024) if size >= 1024**2 else round(size / 1024, 1)


def write_card(folder: Path, values: Mapping[str, Any]) -> None:
    """Write card.json and README.md, by rename.

    Raises:
        OSError: The disk refuses.
    """
    write_json_atomic(folder / "card.json", dict(values))
    write_text_atomic(folder / "README.md", card_markdown(values))


def is_card(path: Path) -> bool:
    """Tell whether a file is a card that was written here."""
    try:
        return "card_version" in json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, TypeError):
        return False


def _settings_digest(record: RunRecord) -> str:
    return config_digest(config_from_dict(RunConfig, record.config), with_seeds=False)


def _settings(config: Mapping[str, Any]) -> dict[str, Any]:
    return {part: config[part] for part in ("synthesis", "quant", "reconstruction", "finetune", "seed", "data_seed")}


def _normalisation(values: Mapping[str, Any]) -> str:
    mean_, std = values["teacher"].get("mean"), values["teacher"].get("std")
    return "as the teacher's" if mean_ is None else f"(image in [0, 1] - {mean_}) / {std} per channel"


def _accuracy(accuracy: Mapping[str, Any]) -> str:
    if accuracy["top1"] is None:
        return "not measured: the run had no labelled images"
    text = (
        f"top-1 {accuracy['top1']:.2f} on {accuracy['num_eval']} labelled images (teacher {accuracy['teacher_top1']:.2f}, before "
        f"fine-tuning {accuracy['rtn_top1']:.2f})"
    )
    if accuracy["top1_std"] is not None:
        text += f"; {accuracy['top1_mean']:.2f} ± {accuracy['top1_std']:.2f} over {len(accuracy['seeds'])} seeds"
    return text


def _size(figures: Mapping[str, Any]) -> str:
    parts = [f"float weights {figures['float_bytes'] / 1024:.0f} KiB"]
    for key, name in (("packed_bytes", "packed"), ("onnx_bytes", "ONNX")):
        if figures.get(key):
            parts.append(f"{name} {figures[key] / 1024:.0f} KiB ({figures[key] / figures['float_bytes']:.3f} of them)")
    return ", ".join(parts) + f"; {figures['bitops'] / 1e9:.2f} G bit operations an image"


def _speed(figures: Mapping[str, Any]) -> str:
    if figures.get("latency_ms") is None:
        return "not measured"
    ratio = figures["float_latency_ms"] / figures["latency_ms"]
    first = next(file for file in figures["files"] if file["format"] == "onnx")
    words = f"{first['name']}: {figures['latency_ms']:.2f} ms an image in ONNX Runtime on the CPU, float {figures['float_latency_ms']:.2f} ms"
    words += f" ({ratio:.2f} times as fast)"
    integers, floats = first["integer_kernels"], first["float_kernels"]
    return f"{words}. {SLOW.format(integers=integers, total=integers + floats)}" if floats > integers else words


def _checked(figures: Mapping[str, Any]) -> str:
    tolerance, machine = figures["tolerance"], figures["machine"]
    beyond = f" (where its two largest logits are more than {tolerance['margin']} apart)" if tolerance["margin"] else ""
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    return (
        f"at least {tolerance['agreement']} % of the images in the student's class{beyond}, logits within {tolerance['mean_difference']} of "
        f"their standard deviation on average, or what differs no more than twice as much as the simulation; on {markdown_cell(machine['cpu'])}, "
        f"{machine['threads'] or 'all'} threads, {versions}"
    )


def _stays_float(rows: Sequence[Mapping[str, Any]], norms: int) -> str:
    kinds: dict[str, int] = {}
    for row in rows:
        if row["kind"] not in ("BatchNorm2d", "BatchNorm1d", "batch_norm"):
            kind = row["kind"].removeprefix("Quant")  # older records have it
            kinds[kind] = kinds.get(kind, 0) + 1
    listed = ", ".join(f"{number} {PLAIN_NAMES.get(kind, kind)}" for kind, number in kinds.items())
    kept = f"; {norms} batch norms, as a gain and a shift of each channel" if norms else ""
    return f"results of {listed}; biases{kept}" if listed else f"biases{kept}"


def _examples(figures: Mapping[str, Any], teacher: Mapping[str, Any]) -> list[str]:
    """Return a few lines of Python that run each kind of file, images normalised as above."""
    files = {file["format"]: file["name"] for file in reversed(figures["files"])}
    size = ", ".join(map(str, teacher["input_size"]))
    lines = {
        "onnx": (
            "import numpy as np, onnxruntime\n\n"
            f'session = onnxruntime.InferenceSession("{files.get("onnx")}")\n'
            f"images = np.zeros((1, {size}), np.float32)  # your images, normalised as above\n"
            '(logits,) = session.run(None, {"images": images})\n'
            "print(logits.argmax(1))"
        ),
        "torch": (
            "import torch\nimport torch.ao.quantization.fx._decomposed  # registers the operations\n\n"
            f'model = torch.export.load("{files.get("torch")}").module()\n'
            f"print(model(torch.zeros(1, {size})).argmax(1))  # your images, normalised as above"
        ),
        "packed": (
            "import torch\nfrom synq.export.load import load_student\n\n"
            f'model = load_student("{files.get("packed")}")\n'
            f"print(model(torch.zeros(1, {size})).argmax(1))  # your images, normalised as above"
        ),
    }
    return [text for kind, text in lines.items() if kind in files]
