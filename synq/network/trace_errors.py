"""Errors of tracing as one line: what in the forward pass cannot be traced, where, and what to write instead."""

import re
import traceback
from pathlib import Path

import torch

from synq.common.error_text import first_line

_OWN = (str(Path(torch.__file__).parent), str(Path(__file__).parent))
"""Folders whose frames are never the user's code."""
_SHOWN = 80
"""Largest number of characters of a line of code in a message."""
_ADVICE = (
    (r"^'?len|'len' is not supported|__len__", "Write x.size(0) instead of len(x)"),
    (
        r"int\(\)|float\(\)|interpreted as an integer|must be a string or a real number|real number, not|__index__",
        "Use sizes as they are and compute values with tensors, without int(), float(), range() or math",
    ),
    (r"cannot be iterated", "Write a loop over images, channels or pixels as operations on the whole tensor"),
    (
        r"not installed as a submodule",
        "Make the module that it calls an attribute of the network; a forward pass that is set on an instance "
        "(net.forward = ...) must be a method of its class",
    ),
    (
        r"ScriptFunction|ScriptMethod|TorchScript|but instead found type .*Proxy",
        "Leave out torch.jit.script: give the Python function or module that it was made from",
    ),
    (
        r"a tensor that is a constant",
        "Compute a new tensor instead, by torch.cat or torch.where, or fill one that is made for the images: "
        "x.new_zeros(x.size(0), ...)",
    ),
    (r"torch\.Size\(\)", "Pass the sizes as a tuple, without torch.Size"),
    (r"ndarray|numpy|__array", "Compute with torch instead of numpy in the forward pass"),
)
_CONTROL_FLOW = "Remove control flow that depends on tensor values from its forward pass"


def trace_failure(name: str, error: Exception) -> ValueError:
    """Return the error for a network that cannot be traced.

    Args:
        name: Class of the network.
        error: What torch.fx, or the network while it was traced, raised.
    """
    reason = first_line(error).partition(". ")[0].rstrip(".")
    advice = next((text for pattern, text in _ADVICE if re.search(pattern, reason)), _CONTROL_FLOW)
    return ValueError(f"teacher must be traceable by torch.fx, but {name} is not: {reason}{_location(error)}. {advice}")


def _location(error: Exception) -> str:
    """Return the innermost line of the user's code in a traceback, with its file, for a message; "" without one."""
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith(_OWN) and not frame.filename.startswith("<")
    ]
    if not frames:
        return ""
    line = " ".join((frames[-1].line or "").split())
    code = f": {line[:_SHOWN]}{'...' if len(line) > _SHOWN else ''}" if line else ""
    return f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno}{code})"
