"""Settings of the process that a user's file may change when it is imported, put back afterwards."""

import argparse
import os
import random
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import numpy as np
import torch

SEED = 0
"""Seed of Python's and NumPy's generators for a user's code: every process and every run must get the same weights."""


@contextmanager
def process_state_kept(name: str) -> Iterator[None]:
    """Put back, after the ``with`` block, what a user's file may change for the whole process.

    Put back are gradient mode, default dtype and device, number of threads, determinism, precision and autocast flags,
    random generators (seeded inside), warning filters and the current folder. The command line is that of a script
    without arguments, so that a file that parses arguments gets its defaults instead of ours.

    Args:
        name: The file or module, as the program name on that command line.
    """
    argv, parse_error = sys.argv, argparse.ArgumentParser.error
    with process_settings_kept():
        random.seed(SEED)
        np.random.seed(SEED)
        sys.argv = [name]
        argparse.ArgumentParser.error = _raise_instead  # type: ignore[method-assign, assignment]
        try:
            with warnings.catch_warnings():
                yield
        finally:
            sys.argv = argv
            argparse.ArgumentParser.error = parse_error  # type: ignore[method-assign]


@contextmanager
def process_settings_kept() -> Iterator[None]:
    """Put back, after the ``with`` block, settings of PyTorch, random generators and the current folder."""
    flags = [(read, put_back, read()) for read, put_back in _FLAGS]
    states = [(put_back, read()) for read, put_back in _STATES]
    try:
        yield
    finally:
        for read, put_back, value in flags:
            if read() != value:
                put_back(value)
        for put_back, value in states:
            put_back(value)


def _raise_instead(parser: argparse.ArgumentParser, message: str) -> NoReturn:
    """Replace the method that prints the usage and the message: the caller reports both in one line."""
    raise SystemExit(message)


def _set_default_device(device: torch.device) -> None:
    torch.set_default_device(None if device.type == "cpu" else device)


def _cuda_states() -> list[torch.Tensor] | None:
    return torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None


def _set_cuda_states(states: list[torch.Tensor] | None) -> None:
    """Put back the generators of all GPUs.

    None: CUDA had not been started, so that there was only a seed to come, that of the CPU's generator unless the
    caller gave CUDA another. It replaces the seed of the ``with`` block.
    """
    if states is None:
        torch.cuda.manual_seed_all(torch.initial_seed())  # without CUDA it is ignored, or waits until CUDA is started
    else:
        torch.cuda.set_rng_state_all(states)


def _set_folder(folder: str | None) -> None:
    if folder is not None:
        os.chdir(folder)


def _folder() -> str | None:
    try:
        return os.getcwd()
    except FileNotFoundError:  # it was removed while the process runs
        return None


def _set_deterministic(modes: tuple[bool, bool]) -> None:
    torch.use_deterministic_algorithms(modes[0], warn_only=modes[1])


def _attribute(owner: Any, name: str) -> tuple[Callable[[], Any], Callable[[Any], None]]:
    return lambda: getattr(owner, name), lambda value: setattr(owner, name, value)


def _autocast(device: str) -> tuple[Callable[[], Any], Callable[[Any], None]]:
    return lambda: torch.is_autocast_enabled(device), lambda value: torch.set_autocast_enabled(device, value)


_PRECISIONS = ("", "cuda.matmul", "cudnn", "cudnn.conv", "cudnn.rnn", "mkldnn", "mkldnn.matmul", "mkldnn.conv")
"""Parts of torch.backends with `fp32_precision`, the most general first; PyTorch has them since 2.9."""


def _precisions() -> tuple[str | None, bool | None, dict[str, str]]:
    """Return the precision of float32 by both interfaces of PyTorch: the former ones, and `fp32_precision` by part.

    The former ones raise where `fp32_precision` has been set to what they cannot express; they are None then.
    """
    former = _read(torch.get_float32_matmul_precision), _read(lambda: torch.backends.cudnn.allow_tf32)
    return *former, {name: part.fp32_precision for name, part in _precision_parts().items()}


def _read(read: Callable[[], Any]) -> Any:
    try:
        return read()
    except RuntimeError:  # "mix of the legacy and new APIs"
        return None


def _set_precisions(values: tuple[str | None, bool | None, dict[str, str]]) -> None:
    matmul, allow_tf32, by_part = values
    if matmul is not None:
        torch.set_float32_matmul_precision(matmul)
    if allow_tf32 is not None:
        torch.backends.cudnn.allow_tf32 = allow_tf32
    for name, part in _precision_parts().items():
        if part.fp32_precision != by_part[name]:
            part.fp32_precision = by_part[name]


def _precision_parts() -> dict[str, Any]:
    parts: dict[str, Any] = {}
    for name in _PRECISIONS:
        part: Any = torch.backends
        for step in filter(None, name.split(".")):
            part = getattr(part, step, None)
        if hasattr(part, "fp32_precision"):
            parts[name] = part
    return parts


_FLAGS: tuple[tuple[Callable[[], Any], Callable[[Any], Any]], ...] = (
    (torch.is_grad_enabled, torch.set_grad_enabled),
    (torch.get_default_dtype, torch.set_default_dtype),
    (torch.get_default_device, _set_default_device),
    (torch.get_num_threads, torch.set_num_threads),
    (_precisions, _set_precisions),
    (torch.is_anomaly_enabled, torch.autograd.set_detect_anomaly),
    (
        lambda: (
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
        ),
        _set_deterministic,
    ),
    *(_attribute(torch.backends.cudnn, name) for name in ("enabled", "benchmark", "deterministic")),
    *(_autocast(device) for device in ("cpu", "cuda")),
    (_folder, _set_folder),
)
"""Pairs of functions that read and set a setting of the process. Set only if it differs: setting determinism, for one,
imports the compiler of PyTorch, which takes seconds.
"""
_STATES: tuple[tuple[Callable[[], Any], Callable[[Any], Any]], ...] = (
    (torch.get_rng_state, torch.set_rng_state),
    (random.getstate, random.setstate),
    (np.random.get_state, np.random.set_state),
    (_cuda_states, _set_cuda_states),
)
"""The same for random generators; that of the CPU is put back before those of CUDA, which may take its seed."""
