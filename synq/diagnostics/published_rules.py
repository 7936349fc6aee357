"""Published rules of engines that do not run here, step by step of a program: which steps of its file break one."""

from synq.engines.program import Program

PUBLISHED = {"tensorrt": "TensorRT", "qnn": "QNN HTP"}
"""Engines whose rules for Q/DQ graphs are known (`synq.export.conformance`), with their names."""


def broken_rules(program: Program, engine: str) -> tuple[dict[str, list[str]], list[str]]:
    """Return the published rules of an engine that the standard ONNX file of a program breaks.

    Args:
        program: A program of the target onnxruntime.
        engine: Key of `PUBLISHED`.

    Returns:
        What is wrong, without repetitions, by the output of the step; and what concerns the file as a whole.

    Raises:
        ValueError: If the engine has no rules here.
    """
    from synq.export.conformance import violations
    from synq.export.standard_onnx import onnx_with_owners

    model, owners = onnx_with_owners(program)
    by_step: dict[str, dict[str, None]] = {}
    general: list[str] = []
    for line in violations(model, engine):  # type: ignore[arg-type]
        node, _, text = line.partition(": ")
        if node in owners:
            by_step.setdefault(owners[node], {})[text] = None
        else:
            general.append(line)
    return {output: list(lines) for output, lines in by_step.items()}, general
