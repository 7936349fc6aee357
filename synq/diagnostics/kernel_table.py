"""The kernels of a student in an engine, step by step: integer, in floats or rejected, and why."""

from collections import Counter
from dataclasses import replace
from importlib.util import find_spec
from typing import Any, get_args

from synq.common.text_tables import Row, to_text
from synq.config.quant import RESEARCH, TARGETS, QuantConfig
from synq.diagnostics.published_rules import PUBLISHED, broken_rules
from synq.engines.deployed import program_of_any_range, surveyed_program
from synq.engines.forms import MEASURED, Runs, step_forms
from synq.quant.student import Student

COLUMNS = ("layer", "operation", "kernel", "runs", "weight_bits", "input_bits", "output_bits", "reason")
HEADINGS = {"weight_bits": "W", "input_bits": "in", "output_bits": "out", "reason": "why"}
"""Short headings of the table; in and out are the bits of the codes that are read and made."""
INSPECT_TARGETS = TARGETS
"""Values of the option ``--target``: engines whose files SynQ writes, and those of which only rules are published."""
CONFORMS, BREAKS = "conforms", "breaks a rule"
"""Values of ``runs`` by published rules."""


def for_target(quant: QuantConfig, target: str | None) -> tuple[QuantConfig, str]:
    """Return the quantization to inspect, and the engine whose published rules to check; "" for none.

    Args:
        quant: The quantization.
        target: One of `INSPECT_TARGETS`; None keeps that of the quantization.

    Raises:
        ValueError: If the target is unknown, or a setting does not fit it.
    """
    if target is None:
        return quant, ""
    if target not in INSPECT_TARGETS:
        raise ValueError(f"`target` must be one of {', '.join(INSPECT_TARGETS)}, but got {target}")
    if target in PUBLISHED:
        return replace(quant, target="onnxruntime"), target
    return replace(quant, target=target), ""  # type: ignore[arg-type]


def kernel_table(
    student: Student, quant: QuantConfig, input_size: tuple[int, int, int], rules: str = ""
) -> dict[str, Any]:
    """Return the kernels of a student in its engine as plain JSON values.

    Args:
        student: Built with ``quant``.
        quant: The quantization.
        input_size: (C, H, W) of one image.
        rules: Engine whose published rules the standard ONNX file is checked against instead; "" for none.

    Returns:
        ``engine`` (name and version at which the forms were measured), ``measured`` (false: by published rules, not
        run), ``counts`` by what a kernel runs on, ``incomplete`` (why the list ends before the logits, or "") and
        ``steps``: one row with COLUMNS and ``output``, the name of the value, for each step. Empty under target
        research, which is for no engine.

    Raises:
        ValueError: If the rules are to be checked but the student has no file, or a package for it is missing.
    """
    if quant.target == RESEARCH:
        return {}
    if rules := rules or (quant.target if quant.target in PUBLISHED else ""):
        return _by_rules(student, quant, input_size, rules)
    try:
        program, incomplete = surveyed_program(student.net, quant, input_size)
        found_steps = step_forms(program)
    except ValueError as error:  # the network as a whole has no form: the reason is the result of an inspection
        found_steps, incomplete = [], str(error)
    rows = [
        {
            "layer": found.layer,
            "operation": found.operation,
            "kernel": found.form.name,
            "runs": found.form.runs,
            "weight_bits": found.weight_bits,
            "input_bits": found.input_bits,
            "output_bits": found.output_bits,
            "reason": found.form.reason,
            "output": found.output,
        }
        for found in found_steps
    ]
    return _table(MEASURED[quant.target], rows, get_args(Runs), measured=True, incomplete=incomplete)


def table_text(found: dict[str, Any]) -> str:
    """Return a table as text with an empty line after it; "" for an empty one."""
    return f"{to_text(found['steps'], COLUMNS, HEADINGS)}\n" if found else ""


def kernel_summary(found: dict[str, Any]) -> str:
    """Return the counts of a table as one line; "" for an empty one."""
    if not found:
        return ""
    counts, engine = found["counts"], found["engine"]
    if not found["measured"]:
        general = "".join(f"; {line}" for line in found["general"])
        return (
            f"by the published rules of {engine}, not run: {counts[CONFORMS]} steps conform, {counts[BREAKS]} break one"
            f"{general}"
        )
    parts = [f"{counts['integer']} steps in integers", f"{counts['float']} in floats", f"{counts['rejected']} rejected"]
    end = "; the list ends there, before the logits" if found["incomplete"] else ""
    return f"{', '.join(parts)} (measured in {engine}){end}"


def _table(engine: str, rows: list[Row], kinds: tuple[str, ...], *, measured: bool, **others: Any) -> dict[str, Any]:
    counts = Counter(row["runs"] for row in rows)
    return {
        "engine": engine,
        "measured": measured,
        "counts": {kind: counts[kind] for kind in kinds},
        **others,
        "steps": rows,
    }


def _by_rules(student: Student, quant: QuantConfig, input_size: tuple[int, int, int], rules: str) -> dict[str, Any]:
    if find_spec("onnx") is None:
        raise ValueError(f"`target` {rules} must have the package onnx, but it is missing: pip install 'synq[export]'")
    program = program_of_any_range(student.net, quant, input_size)
    by_step, general = broken_rules(program, rules)
    rows = [
        {
            "layer": found.layer,
            "operation": found.operation,
            "kernel": "not run",
            "runs": BREAKS if by_step.get(found.output) else CONFORMS,
            "weight_bits": found.weight_bits,
            "input_bits": found.input_bits,
            "output_bits": found.output_bits,
            "reason": _first(by_step.get(found.output, [])),
            "output": found.output,
        }
        for found in step_forms(replace(program, target="onnxruntime"))  # of these, what no engine decides
    ]
    return _table(PUBLISHED[rules], rows, (CONFORMS, BREAKS), measured=False, incomplete="", general=general)


def _first(lines: list[str]) -> str:
    return lines[0] + (f" (and {len(lines) - 1} more)" if len(lines) > 1 else "") if lines else ""
