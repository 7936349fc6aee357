"""Weight files: safe reading, search of the state dict, strict loading into a module."""

import argparse
import pickle
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from synq.config.identity import WEIGHT_SUFFIXES

# Keys under which training scripts store the state dict, by preference: authors report results of averaged weights.
_NESTS = ("state_dict_ema", "model_ema", "state_dict", "model_state_dict", "model", "net")
# Prefixes that wrappers (DataParallel, torch.compile, AveragedModel, Lightning) add to every name.
_PREFIXES = ("module.", "_orig_mod.", "model.", "net.")
_NUM_SHOWN = 3


def is_weight_file(weights: str) -> bool:
    """Return whether `weights` is a path instead of a weights name: it has a known suffix or a path separator."""
    return weights.lower().endswith(WEIGHT_SUFFIXES) or "/" in weights or "\\" in weights


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Read the state dict of a weight file without executing any code in it.

    Args:
        path: ``.safetensors``, or a file of ``torch.save`` (read with ``weights_only=True``). The state dict may be
            nested under state_dict_ema, model_ema, state_dict, model_state_dict, model or net (in that order).

    Returns:
        Tensors by name, on the CPU, with the stored dtypes.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If the file is damaged, contains no tensors, or requires unsafe unpickling.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"`teacher.weights` must name an existing file, but got {path}")
    content = _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)
    return _find_state_dict(content, path)


def load_weights(module: nn.Module, path: str | Path) -> None:
    """Load a weight file into ``module`` strictly: all names and shapes must match.

    Prefixes that wrappers add to every name (``module.``, ``_orig_mod.``, ...) are removed. The batch counters of
    BatchNorm may be absent: inference does not read them.

    Args:
        module: The untrained model; changed in place.
        path: See `read_weights`.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If names or shapes differ; the message lists the first few, and whether the model or the file lacks
            them.
    """
    expected = module.state_dict()
    given = _without_prefix(read_weights(path), set(expected))
    missing = [name for name in expected if name not in given and not name.endswith("num_batches_tracked")]
    extra = [name for name in given if name not in expected and name != "n_averaged"]
    reshaped = [name for name in expected if name in given and given[name].shape != expected[name].shape]
    problems = []
    if missing:
        problems.append(f"{len(missing)} tensors of the model are not in the file ({_join_first(missing)})")
    if extra:
        problems.append(f"{len(extra)} tensors of the file are not in the model ({_join_first(extra)})")
    if reshaped:
        shapes = [f"{name} {tuple(given[name].shape)} in the file, {tuple(expected[name].shape)}" for name in reshaped]
        problems.append(f"{len(reshaped)} shapes differ ({_join_first(shapes)} in the model)")
    if problems:
        hint = "; the file's classifier has another number of classes: set `teacher.num_classes`"
        only_head = not missing and not extra and all(_differs_in_rows(given[n], expected[n]) for n in reshaped)
        what = "; ".join(problems) + (hint if only_head and len(reshaped) <= 2 else "")
        raise ValueError(f"`teacher.weights` must match the model {type(module).__name__}, but got {path}: {what}")
    # Into the module's state dict, whose metadata has the versions of the layers: MNASNet rejects a dict without.
    expected.update({name: tensor for name, tensor in given.items() if name in expected})
    module.load_state_dict(expected)


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"`teacher.weights` must be a readable safetensors file, but got {path}: {error}") from error


def _read_torch(path: Path) -> object:
    # Metrics stored with the weights are often NumPy scalars or an argparse namespace: plain data, safe to unpickle.
    scalar = np.float64(0).__reduce__()[0]
    dtypes = [type(np.dtype(kind)) for kind in (np.float64, np.float32, np.int64)]
    safe: list[object] = [
        (scalar, "numpy.core.multiarray.scalar"),
        (scalar, "numpy._core.multiarray.scalar"),
        np.dtype,
        argparse.Namespace,
        *dtypes,
    ]
    try:
        with torch.serialization.safe_globals(safe):  # type: ignore[arg-type]
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"`teacher.weights` must contain plain tensors, but got {path}, which is damaged or contains Python "
            "objects that are not loaded for safety; "
            "where the model was trained, run torch.save(model.state_dict(), FILE)"
        ) from error
    except (RuntimeError, EOFError) as error:
        reason = str(error).splitlines()[0] if str(error) else "it is truncated"
        raise ValueError(
            f"`teacher.weights` must be a readable file of torch.save, but got {path}: {reason}"
        ) from error


def _find_state_dict(content: object, path: Path) -> dict[str, Tensor]:
    while isinstance(content, Mapping):
        nest = next((key for key in _NESTS if isinstance(content.get(key), Mapping)), None)
        if nest is None:
            break
        content = content[nest]
    tensors = {str(k): v for k, v in content.items() if isinstance(v, Tensor)} if isinstance(content, Mapping) else {}
    if not tensors:
        raise ValueError(
            f"`teacher.weights` must contain a state dict (names and tensors), but got {path} "
            f"with {type(content).__name__}"
        )
    return tensors


def _without_prefix(given: dict[str, Tensor], expected: set[str]) -> dict[str, Tensor]:
    given = {name: tensor for name, tensor in given.items() if name != "n_averaged"}
    while True:
        prefix = next((p for p in _PREFIXES if all(name.startswith(p) for name in given)), None)
        if prefix is None or any(name.startswith(prefix) for name in expected):
            return given
        given = {name.removeprefix(prefix): tensor for name, tensor in given.items()}


def _differs_in_rows(given: Tensor, expected: Tensor) -> bool:
    return given.ndim == expected.ndim and given.shape[1:] == expected.shape[1:] and given.ndim in (1, 2, 4)


def _join_first(names: list[str]) -> str:
    more = ", ..." if len(names) > _NUM_SHOWN else ""
    return ", ".join(names[:_NUM_SHOWN]) + more
