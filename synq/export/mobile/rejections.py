"""The one line that rejects a step for which an engine has no exact integer kernel."""

from synq.engines.program import Step


def unsupported(
    target: str, step: Step, operation: str, cure: str = "replace it, or export with `--target exact`"
) -> str:
    """Return the message.

    Args:
        target: Name of the engine.
        step: The step.
        operation: What it is, as a noun.
        cure: What the user can do.
    """
    name = step.layer or step.output
    return f"`--target {target}` must have an exact integer kernel, but `{name}` is {operation}: {cure}"
