"""The text of a model card: what the file is, how accurate and fast, how it was verified, and how to run it."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from synq.common.text_tables import markdown_cell, plural, to_markdown
from synq.config.plugins import SYNTHESIS_METHOD, is_added
from synq.config.quant import RESEARCH, end_bits, protocol_label
from synq.config.synthesis import OWN_IMAGES
from synq.export.timing import unstable_times
from synq.runs.expected_agreement import agreement_line, doubts

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
    "ms ratio to float",
    "ms spread %",
)
STATEMENT = """\
No camera image was used to make this model: the training images were synthesized from the float classifier, and the
weights, ranges and settings of the model depend on them only. Labeled images, where metrics refer to them, were used
for measurement only."""
SELECTED = """\
No camera image was used to train or calibrate this model. Labeled images were used to choose its settings (objective
selection); the metrics below are measured on other labeled images."""
NOISE = """\
The training images of this model are Gaussian noise instead of synthetic images, as a baseline: they depend neither on
camera images nor on the classifier."""
OWN = """\
This model is not zero-shot: it was trained and calibrated on unlabeled images of its maker, with the float classifier
as the teacher. Labeled images, where metrics refer to them, were used for measurement only, unless the objective is
selection."""
OWN_METHOD = """\
The training images of this model were made by a function of its maker, {}, which SynQ does not know: whether it used
camera images is for its maker to state. Labeled images, where metrics refer to them, were used for measurement only,
unless the objective is selection."""
SLOW = (
    "Low bit-widths reduce the size, not the latency: ONNX Runtime has integer kernels for {integers} of {total} "
    "convolutions and matrix products. A student trained with `quant.target onnxruntime` runs in integer kernels."
)
SLOWER = "**This file is slower than float on this processor**: "
"""Beginning of the speed of a file whose latency is above that of the float teacher."""

PLAIN_NAMES = {"Conv2d": "convolution", "Linear": "linear layer"}
"""Names of layer types in prose."""


def card_markdown(values: Mapping[str, Any]) -> str:
    """Return the text of README.md.

    Args:
        values: From `card_values`.
    """
    accuracy, teacher, metrics = values["accuracy"], values["teacher"], values["deployment"]
    bits, quant = f"W{values['weight_bits']}A{values['act_bits']}", values["config"]["quant"]
    protocol = protocol_label(values["protocol"], *end_bits(quant["target"], quant["first_bits"], quant["last_bits"]))
    overrides = f"; except for {markdown_cell(values['layer_bits'])}" if values["layer_bits"] else ""
    lines = [f"# {markdown_cell(teacher['name'])}, {bits}", ""]
    statement = NOISE if values["images"] == "gaussian" else STATEMENT
    if values["images"] == OWN_IMAGES:
        statement = OWN
    elif is_added(SYNTHESIS_METHOD, values["images"]):
        statement = OWN_METHOD.format(markdown_cell(values["images"]))
    elif not values["data_free"]:
        statement = SELECTED
    lines += [statement, ""]
    facts = {
        "teacher": f"{teacher['spec']} (digest {teacher['digest'][:16]})",
        "input": f"(N, {', '.join(map(str, teacher['input_size']))}) float32, normalized: {_normalization(values)}",
        "output": f"(N, {teacher['num_classes']}) logits",
        "bit-widths": f"{bits}, protocol {protocol}, {_points(quant)}{overrides}",
        "accuracy": _accuracy(accuracy),
        "expected": _expected(values["expected_agreement"]),
        "size": _size(metrics),
        "speed": speed_text(metrics),
        "stays float": _stays_float(
            values["float_tensors"], metrics["float_norms"], has_biases="engine" not in metrics
        ),
        "verified": _verified(metrics),
        "elsewhere": _elsewhere(metrics),
        "made by": f"SynQ {values['synq']}, commit {values['commit'][:12]}, {values['device']}, {values['started']}",
        "digests": f"settings {values['digests']['config']}, synthetic set {values['digests']['set'][:16]}",
    }
    lines += [f"- **{name}**: {text}" for name, text in facts.items() if text]
    lines += ["", "## Files", "", to_markdown(file_rows(metrics), FILE_COLUMNS)]
    lines += [
        "Agreement: percentage of images for which the file and the student predict the same class. Largest "
        "difference: between corresponding logits, 0 if all are bit-identical. The simulation is the student as it "
        "was fine-tuned, with fake quantization and float sums.",
        "See card.json for details and digests.",
        "",
    ]
    lines += ["## How to run it", ""]
    for example in _examples(metrics, teacher):
        lines += ["```python", example, "```", ""]
    lines += ["## Settings", "", "```json", json.dumps(_settings(values["config"]), indent=1), "```", ""]
    versions = ", ".join(f"{name} {version}" for name, version in values["versions"].items())
    return "\n".join([*lines, f"Versions: {versions}.", ""])


def file_rows(metrics: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return one table row per exported file and set of images, the float model last.

    Args:
        metrics: Deployment metrics of a record.

    Returns:
        Rows with the keys `FILE_COLUMNS`.
    """
    rows = []
    for file in metrics["files"]:
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
                    "ratio to float": round(file["bytes"] / metrics["float_bytes"], 3) if first else None,
                    "images": f"{found['images']} {found['source']}",
                    "agreement %": round(found["agreement_all"], 2),
                    "largest difference": float(f"{found['max_difference']:.2g}"),
                    "top-1 %": None if found["file_top1"] is None else round(found["file_top1"], 2),
                    "integer kernels": kernels if first else None,
                }
            )
            if first:
                rows[-1] |= _times(file)
    for found in metrics.get("own_rounding", ()):
        rows.append({"file": "(simulation)", "format": "float", "images": f"{found['images']} {found['source']}"})
        rows[-1] |= {"agreement %": round(found["agreement_all"], 2)}
        rows[-1] |= {"largest difference": float(f"{found['max_difference']:.2g}")}
    if "float_onnx_bytes" in metrics:
        size, time = metrics["float_onnx_bytes"], metrics.get("float_latency_ms")
        rows.append({"file": "(float teacher)", "format": "onnx float", "KiB": _kib(size)})
        rows[-1] |= {"ratio to float": round(size / metrics["float_bytes"], 3), "ms": time and round(time, 2)}
        if time is not None:
            rows[-1] |= {"ms ratio to float": 1}
    return rows


def _times(file: Mapping[str, Any]) -> dict[str, float | None]:
    """Return the cells of a file's latency."""
    time, ratio, spread = (file.get(key) for key in ("latency_ms", "latency_ratio", "latency_spread"))
    return {
        "ms": time and round(time, 2),
        "ms ratio to float": ratio and round(ratio, 2),
        "ms spread %": None if spread is None else round(100 * spread),
    }


def _kib(size: int) -> float:
    return round(size / 1024) if size >= 1024**2 else round(size / 1024, 1)


def _settings(config: Mapping[str, Any]) -> dict[str, Any]:
    return {part: config[part] for part in ("synthesis", "quant", "reconstruction", "finetune", "seed", "data_seed")}


def _elsewhere(metrics: Mapping[str, Any]) -> str:
    """Return what the published rules of engines that do not run here make of a file; "" if that is not known."""
    parts = []
    for engine, name in (("tensorrt", "TensorRT"), ("qnn", "QNN HTP")):
        if found := metrics.get("conformance", {}).get(engine):
            count, first = found["violations"], markdown_cell(found["first"])
            parts.append(f"{name} {f'{count} violations, such as: {first}' if count else 'conforms'}")
    return f"by the published rules, not run: {'; '.join(parts)}" if parts else ""


def _points(quant: Mapping[str, Any]) -> str:
    if quant["target"] == RESEARCH:
        return f"act_points {quant['act_points']}"
    return f"target {quant['target']}{' (portable)' if quant['portable'] else ''}"


def _normalization(values: Mapping[str, Any]) -> str:
    mean_, std = values["teacher"].get("mean"), values["teacher"].get("std")
    return "as the teacher's" if mean_ is None else f"(image in [0, 1] - {mean_}) / {std} per channel"


def _accuracy(accuracy: Mapping[str, Any]) -> str:
    if accuracy["top1"] is None:
        return "not measured: the run had no labeled images"
    text = (
        f"top-1 {accuracy['top1']:.2f} on {accuracy['num_eval']} labeled images "
        f"(teacher {accuracy['teacher_top1']:.2f}, before fine-tuning {accuracy['rtn_top1']:.2f})"
    )
    if accuracy["top1_std"] is not None:
        text += f"; {accuracy['top1_mean']:.2f} ± {accuracy['top1_std']:.2f} over {len(accuracy['seeds'])} seeds"
    return text


def _expected(field: Mapping[str, Any]) -> str:
    """Return the expected agreement on real images, and what is to be doubted."""
    return ". ".join([agreement_line(field), *(f"**Warning**: {text}" for text in doubts(field))])


def _size(metrics: Mapping[str, Any]) -> str:
    parts = [f"float weights {metrics['float_bytes'] / 1024:.0f} KiB"]
    for key, name in (("packed_bytes", "packed"), ("onnx_bytes", "ONNX")):
        if metrics.get(key):
            parts.append(f"{name} {metrics[key] / 1024:.0f} KiB ({metrics[key] / metrics['float_bytes']:.3f} of float)")
    return ", ".join(parts) + f"; {metrics['bitops'] / 1e9:.2f} G BitOps per image"


def speed_text(metrics: Mapping[str, Any]) -> str:
    """Return how fast the first file is next to float, or why that is not known."""
    if engine := metrics.get("checked_for"):
        return f"not measured: {engine} does not run here"
    if metrics.get("latency_ms") is None:
        spread = metrics.get("latency_spread")
        return "not measured" if spread is None else f"not stored: {unstable_times(spread)}"
    first = next(file for file in metrics["files"] if file["latency_ms"] is not None)
    threads = metrics["machine"]["threads"]
    clock = "processor time of one thread" if threads == 1 else f"{threads or 'all'} threads"
    text = (
        f"{first['name']}: {metrics['latency_ms']:.2f} ms per image in {metrics.get('engine', 'ONNX Runtime')} on the "
        f"CPU ({clock}), float {metrics['float_latency_ms']:.2f} ms ({1 / metrics['latency_ratio']:.2f} times as "
        f"fast); medians of runs in turns, spread {100 * metrics['latency_spread']:.0f} %"
    )
    text = (SLOWER if metrics["latency_ratio"] > 1 else "") + text
    integers, floats = first["integer_kernels"] or 0, first["float_kernels"] or 0
    return f"{text}. {SLOW.format(integers=integers, total=integers + floats)}" if floats > integers else text


def _session_entries(metrics: Mapping[str, Any]) -> Mapping[str, str]:
    files: Sequence[Mapping[str, Any]] = metrics["files"]
    return files[0].get("session_entries") or {} if files else {}


def session_warning(entries: Mapping[str, str]) -> str:
    """Return what a file that was verified with configuration entries of the session needs, in one sentence."""
    named = ", ".join(f"{name} = {value}" for name, value in entries.items())
    return (
        "this processor has no VNNI, so that ONNX Runtime's default session saturates sums of 8-bit weights and "
        f"computes another network: run the file with the session entry {named}, as it was verified, or make one that "
        "needs none by `--quant.portable true`"
    )


def _verified(metrics: Mapping[str, Any]) -> str:
    tolerance, machine = metrics["tolerance"], metrics["machine"]
    margin = f" (where its two largest logits differ by more than {tolerance['margin']})" if tolerance["margin"] else ""
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    threads = plural(machine["threads"], "thread") if machine["threads"] else "all threads"
    processor = ", ".join(part for part in (markdown_cell(machine["cpu"]), machine.get("instructions", "")) if part)
    where = f"; on {processor}, {threads}, {versions}"
    if "engine" in metrics:
        engine, agreed = metrics["engine"], min(found["agreement_all"] for found in metrics["files"][0]["comparisons"])
        images = sum(found["images"] for found in metrics["files"][0]["comparisons"])
        if for_engine := metrics.get("checked_for"):
            return (
                f"against the published rules of {for_engine}, all kept; not run in it. As the ONNX standard defines "
                f"the file, in {engine}: the student's class for {agreed:.2f} % of {images} images{where}"
            )
        entries = _session_entries(metrics)
        where += f"; {session_warning(entries)}" if entries else ""
        if metrics["exact"]:
            return f"in {engine}: every logit of {images} images bit-identical with the student{where}"
        return f"in {engine}: the student's class for {agreed:.2f} % of {images} images{where}"
    exact = "ONNX and packed files: bit-identical logits, because every step is exact in integers; all files: "
    return (exact if metrics.get("exact") else "") + (
        f"the student's class for at least {tolerance['agreement']} % of the images{margin}, logits within "
        f"{tolerance['mean_difference']} of their standard deviation on average, or at most twice the difference of "
        f"the simulation{where}"
    )


def _stays_float(rows: Sequence[Mapping[str, Any]], norms: int, *, has_biases: bool) -> str:
    """Return which values of a file are floats; the biases of a file for an engine are int32."""
    kinds: dict[str, int] = {}
    for row in rows:
        if row["kind"] not in ("BatchNorm2d", "BatchNorm1d", "batch_norm"):
            kinds[row["kind"]] = kinds.get(row["kind"], 0) + 1
    listed = ", ".join(
        plural(number, PLAIN_NAMES[kind]) if kind in PLAIN_NAMES else f"{number} {kind}"
        for kind, number in kinds.items()
    )
    kept = f"; {plural(norms, 'batch norm')}, as a gain and a shift per channel" if norms else ""
    parts = [f"outputs of {listed}"] * bool(listed) + ["biases"] * has_biases
    return "; ".join(parts) + kept if parts or kept else "nothing"


def _examples(metrics: Mapping[str, Any], teacher: Mapping[str, Any]) -> list[str]:
    """Return Python examples that run each kind of file, for images normalized as above."""
    files = {file["format"]: file["name"] for file in reversed(metrics["files"])}
    if metrics.get("checked_for"):
        return [_example_by_the_standard(files["onnx"], teacher["input_size"])]
    size = ", ".join(map(str, teacher["input_size"]))
    channels, height, width = teacher["input_size"]
    entries = _session_entries(metrics)
    added = (f'options.add_session_config_entry("{name}", "{value}")\n' for name, value in entries.items())
    options = "".join(["options = onnxruntime.SessionOptions()\n", *added])
    lines = {
        "onnx": (
            f"import numpy as np, onnxruntime\n\n{options if entries else ''}"
            f'session = onnxruntime.InferenceSession("{files.get("onnx")}"{", options" if entries else ""})\n'
            f"images = np.zeros((1, {size}), np.float32)  # your images, normalized as above\n"
            '(logits,) = session.run(None, {"images": images})\n'
            "print(logits.argmax(1))"
        ),
        "tflite": (
            "import numpy as np\nfrom ai_edge_litert.interpreter import Interpreter\n\n"
            f'model = Interpreter("{files.get("tflite")}").get_signature_runner()\n'
            f"images = np.zeros((1, {height}, {width}, {channels}), np.float32)  # yours, channels last, normalized\n"
            "print(next(iter(model(images=images).values())).argmax(1))"
        ),
        "pte": (
            "import torch\nfrom executorch.runtime import Runtime\n\n"
            f'program = Runtime.get().load_program("{files.get("pte")}")  # must live as long as its method\n'
            f"images = torch.zeros(1, {size})  # your images, normalized as above\n"
            "print(program.load_method('forward').execute([images])[0].argmax(1))"
        ),
        "torch": (
            "import torch\nimport torch.ao.quantization.fx._decomposed  # registers the operations\n\n"
            f'model = torch.export.load("{files.get("torch")}").module()\n'
            f"print(model(torch.zeros(1, {size})).argmax(1))  # your images, normalized as above"
        ),
        "packed": (
            "import torch\nfrom synq.export.load import load_student\n\n"
            f'model = load_student("{files.get("packed")}")\n'
            f"print(model(torch.zeros(1, {size})).argmax(1))  # your images, normalized as above"
        ),
    }
    return [text for kind, text in lines.items() if kind in files]


def _example_by_the_standard(file: str, size: Sequence[int]) -> str:
    """Return a Python example that runs a file for an engine that does not run here as it was verified."""
    return (
        "import numpy as np, onnxruntime\n\n"
        "options = onnxruntime.SessionOptions()  # as verified: each node as the ONNX standard defines it\n"
        "options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL\n"
        f'session = onnxruntime.InferenceSession("{file}", options)\n'
        f"images = np.zeros((1, {', '.join(map(str, size))}), np.float32)  # your images, normalized as above\n"
        '(logits,) = session.run(None, {"images": images})\n'
        "print(logits.argmax(1))"
    )
