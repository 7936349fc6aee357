"""Summary of how a classifier would be quantized, layer by layer and in total, before any computation."""

from typing import Any

from torch import fx

from synq.common.text_tables import Row
from synq.config.quant import ACT_POINTS, BY_RULES, RESEARCH, protocol_label
from synq.config.run import QuantConfig
from synq.diagnostics.kernel_table import kernel_summary, kernel_table
from synq.diagnostics.transformer_grids import grids_line, transformer_grids
from synq.engines.deployed import check_deployable
from synq.export.export import missing_packages
from synq.export.operation_check import unexportable_operations
from synq.network.attention.locations import locate_attention, softmaxes
from synq.network.bn_stats import bn_targets
from synq.network.op_traits import node_module
from synq.quant.cost import FLOAT_BITS, TensorRow, float_bytes
from synq.quant.integer_form import integer_form
from synq.quant.points import NOT_ROUNDED
from synq.quant.student import Student
from synq.teacher.teacher import Teacher

COLUMNS = ("node", "kind", "output", "parameters", "macs", "weight_bits", "output_bits", "bitops", "note")
HEADINGS = {"macs": "MACs", "weight_bits": "W", "output_bits": "out", "bitops": "BitOps"}
"""Short headings of the table; W and out are the bits of weight and output, 32 means float."""
CAM_METHODS = {"closed_form": "in closed form", "autograd": "by a backward pass through the head"}
"""How the channel weights of a class activation map are computed."""
UNITS = ("", "k", "M", "G", "T")
SYNTHESIS_NOTE, CAM_NOTE = "guides synthesis", "class activation map"


def inspect(teacher: Teacher, student: Student, quant: QuantConfig, rules: str = "") -> dict[str, Any]:
    """Return the properties of a teacher and of its student as plain JSON values.

    Args:
        teacher: The classifier.
        student: The student that `build_student` makes of it.
        quant: The bits.
        rules: Engine whose published rules the file is checked against; "" for none.

    Returns:
        ``teacher`` (source, digest, input, classes, parameters, bytes), ``synthesis`` (the batch norms that guide it,
        the number of attentions, which do so where there are none, and of those in which no axis keeps images apart),
        ``cam``, ``student`` (bits, bytes, MACs, BitOps, and BitOps of the float model), ``transformer`` (as
        `transformer_grids`), ``onnx`` (whether ``synq export`` can write the file, ONNX or that of
        the engine, and if not, or if not checked, why), ``kernels``
        (as `kernel_table`; empty under target research) and ``layers``: one row with COLUMNS for each node of the
        graph, in order of execution.

    Raises:
        ValueError: As `kernel_table`.
    """
    guides, cam, attentions = bn_targets(teacher.graph), teacher.cam, locate_attention(teacher.graph)
    weights = [row for row in student.rows if row.role == "weight"]
    macs, float_size = sum(row.macs for row in weights), float_bytes(teacher.graph)
    return {
        "teacher": {
            "spec": teacher.spec,
            "name": teacher.name,
            "digest": teacher.digest,
            "input_size": list(teacher.input_size),
            "mean": list(teacher.mean),
            "std": list(teacher.std),
            "classes": teacher.num_classes,
            "parameters": sum(parameter.numel() for parameter in teacher.graph.parameters()),
            "bytes": float_size,
        },
        "synthesis": {
            "batch_norms": list(guides),
            "attention": len(attentions),
            "attention_left_out": len(softmaxes(teacher.graph)) - len(attentions),
            "channels": sum(len(target.mean) for target in guides.values()),
        },
        "cam": {
            "node": cam.node,
            "kind": cam.kind,
            "size": [cam.channels, cam.height, cam.width],
            "reason": cam.reason,
        },
        "student": {
            "bits": quant.label,
            "protocol": quant.protocol,
            "first_bits": quant.end_bits[0],
            "last_bits": quant.end_bits[1],
            "layer_bits": quant.layer_label,
            "act_points": quant.points,
            "bytes": student.size_bytes,
            "macs": macs,
            "bitops": student.bitops,
            "float_bitops": macs * FLOAT_BITS**2,
        },
        "transformer": transformer_grids(teacher.graph, student, quant),
        "onnx": _onnx(teacher, student, quant),
        "kernels": kernel_table(student, quant, teacher.input_size, rules),
        "layers": _layers(teacher, student, set(guides)),
    }


def summary(found: dict[str, Any]) -> str:
    """Return the result of `inspect` as a few lines of text, without the layers."""
    teacher, cam, student = found["teacher"], found["cam"], found["student"]
    norms, rows = found["synthesis"], found["layers"]
    size = " x ".join(map(str, teacher["input_size"]))
    at = (
        f"{cam['node']} ({' x '.join(map(str, cam['size']))}): {CAM_METHODS[cam['kind']]}"
        if cam["node"]
        else "none, the CAM term is off"
    )
    named = f" ({student['layer_bits']})" if student["layer_bits"] else ""
    protocol = protocol_label(student["protocol"], student["first_bits"], student["last_bits"])
    points = "act_points" if student["act_points"] in ACT_POINTS else "target"
    floats: dict[str, int] = {}
    for row in rows:
        if row["output_bits"] == FLOAT_BITS:
            floats[row["kind"]] = floats.get(row["kind"], 0) + 1
    file = "ONNX" if student["act_points"] in ACT_POINTS else "file"
    lines = {
        "teacher": (
            f"{teacher['spec']}: {teacher['parameters']:,} parameters, {_mib(teacher['bytes'])}, "
            f"{teacher['classes']} classes"
        ),
        "images": f"{size}, normalized (x - {_numbers(teacher['mean'])}) / {_numbers(teacher['std'])}",
        "synthesis": f"guided by {_guides(norms)}",
        "map": f"{at}; {cam['reason']}",
        "student": (
            f"{student['bits']}{named}, protocol {protocol}, {points} {student['act_points']}: "
            f"{_mib(student['bytes'])} ({student['bytes'] / teacher['bytes']:.3f} of float), "
            f"{_amount(student['macs'])} MACs, {_amount(student['bitops'])} bit operations "
            f"({student['bitops'] / student['float_bitops']:.3f} of float)"
        ),
        "float": "outputs of " + ", ".join(f"{n} {kind}" for kind, n in floats.items()) if floats else "nothing",
        "grids": grids_line(found["transformer"]),
        file: found["onnx"]["reason"] or f"every operation can be exported{_checked_note(student['act_points'])}",
    }
    if line := kernel_summary(found["kernels"]):
        lines["kernels"] = line
    return "".join(f"{name:<10} {text}\n" for name, text in lines.items() if text)


def _checked_note(points: str) -> str:
    return (
        "; the file is checked against the published rules of the engine, not run in it" if points in BY_RULES else ""
    )


def _onnx(teacher: Teacher, student: Student, quant: QuantConfig) -> dict[str, Any]:
    """Return whether the operations of the student can be in its file (None: not checked), and why not."""
    if quant.target != RESEARCH:
        try:
            check_deployable(student.net, quant, teacher.input_size)
        except ValueError as error:
            return {"exportable": False, "reason": f"cannot be exported: {error}"}
        return {"exportable": True, "reason": ""}
    if missing := missing_packages():
        reason = f"not checked, because {missing[0]} is missing: pip install 'synq[export]'"
        return {"exportable": None, "reason": reason}
    lines = unexportable_operations(integer_form(student.net, empty=True))
    return {"exportable": not lines, "reason": f"cannot be exported: {'; '.join(lines)}" if lines else ""}


def _guides(found: dict[str, Any]) -> str:
    if found["batch_norms"]:
        return f"{len(found['batch_norms'])} batch norms of {found['channels']:,} channels"
    count = found["attention"]
    seen = f"{count} attention{'s' if count > 1 else ''}" if count else "the positions of its maps"
    left_out = found["attention_left_out"]
    seen += f" ({left_out} more left out, in which no axis keeps the images of a batch apart)" if left_out else ""
    return f"labels and {seen}, without BatchNorm statistics"


def _layers(teacher: Teacher, student: Student, guides: set[str]) -> list[Row]:
    weights = {row.name: row for row in student.rows if row.role == "weight"}
    outputs = {row.name: row for row in student.rows if row.role == "activation"}
    counted: set[str] = set()
    nodes = [node for node in teacher.graph.graph.nodes if node.name in outputs]
    return [_row(teacher, node, outputs[node.name], weights, guides, counted) for node in nodes]


def _row(
    teacher: Teacher,
    node: fx.Node,
    output: TensorRow,
    weights: dict[str, TensorRow],
    guides: set[str],
    counted: set[str],
) -> Row:
    """Return the row of one node; parameters and MACs of a module are counted at its first call."""
    module, target = node_module(teacher.graph, node), str(node.target)
    first = module is not None and target not in counted
    if module is not None:
        counted.add(target)
    weight = weights.get(target) if first else None
    notes = [SYNTHESIS_NOTE] if module is not None and target in guides else []
    notes += [CAM_NOTE] if node.name == teacher.cam.node else []
    notes += [NOT_ROUNDED] if output.note == NOT_ROUNDED else []
    return {
        "node": node.name,
        "kind": "image" if node.op == "placeholder" else output.kind,
        "output": " x ".join(map(str, node.meta["shape"][1:])),
        "parameters": sum(p.numel() for p in module.parameters()) if module is not None and first else 0,
        "macs": weight.macs if weight else 0,
        "weight_bits": weight.bits if weight else None,
        "output_bits": output.bits,
        "bitops": weight.bitops if weight else 0,
        "note": ", ".join(notes),
    }


def _mib(size: int) -> str:
    return f"{size / 1024:.3g} KiB" if size < 1024**2 else f"{size / 1024**2:.1f} MiB"


def _amount(number: float) -> str:
    """Return a count with three digits and a unit prefix: 1820000000 is 1.82 G."""
    power = 0
    while number / 1000**power >= 999.5 and power < len(UNITS) - 1:
        power += 1
    return f"{number / 1000**power:.3g} {UNITS[power]}".strip()


def _numbers(values: list[float]) -> str:
    return f"({', '.join(f'{value:.4g}' for value in values)})"
