"""A call of the API leaves the process as it was: settings of PyTorch, state of Accelerate, standard error."""

import functools
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, ParamSpec, TypeVar

import torch
from accelerate.state import AcceleratorState, GradientState, PartialState

from synq.common.notices import muted
from synq.teacher.process_state import process_settings_kept

P = ParamSpec("P")
T = TypeVar("T")
_LOCK = threading.RLock()
"""Held by every call: Accelerate has one state for the whole process, so calls of several threads wait for each
other."""
_OPTIONS = {
    r"`teacher\.(weights|input_size|mean|std)`": r"`\1`",
    r"`--teacher\.weights random`": "`weights='random'`",
    r"`--teacher\.weights`": "`weights`",
    r"`evaluation\.dataset`": "`dataset`",
    r"`--evaluation\.dataset`": "`dataset`",
    r"memory:\w+ does not define": "the network does not define",
    r"set `finetune\.batch_size` to (\d+) or less": r"add config={'finetune.batch_size': \1}",
}
"""Names of settings in messages, and what they are called in a call of the API."""


@contextmanager
def session(*, progress: bool) -> Iterator[None]:
    """Give the ``with`` block the settings of a fresh process, and put back those of the caller afterwards.

    Gradients are enabled and inference mode and autocast disabled; the default device is the CPU and the default dtype
    float32. Random generators, the number of threads and the state of Accelerate are the caller's again afterwards.

    Args:
        progress: False prints no notice.
    """
    shared = (AcceleratorState, PartialState, GradientState)
    with _LOCK, process_settings_kept(), muted(not progress):
        before = [dict(state._shared_state) for state in shared]
        if torch.get_default_device().type != "cpu":
            torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                torch.set_autocast_enabled(device, False)
        # Left where the caller is inside `with torch.device(...)`.
        on_cpu = torch.device("cpu") if torch.get_default_device().type != "cpu" else nullcontext()
        try:
            with on_cpu, torch.inference_mode(False), torch.enable_grad():
                yield
        finally:
            for state, values in zip(shared, before, strict=True):
                state._shared_state.clear()
                state._shared_state.update(values)


def named_as_arguments(function: Callable[P, T]) -> Callable[P, T]:
    """Let the messages of a function name the arguments of the API instead of the settings of the command line.

    The type and the cause of an error stay.
    """

    @functools.wraps(function)
    def call(*arguments: P.args, **named: P.kwargs) -> T:
        try:
            return function(*arguments, **named)
        except (ValueError, OSError) as error:
            error.args = tuple(_as_argument(part) for part in error.args)
            raise

    return call


def _as_argument(part: Any) -> Any:
    if isinstance(part, str):
        for pattern, name in _OPTIONS.items():
            part = re.sub(pattern, name, part)
    return part
