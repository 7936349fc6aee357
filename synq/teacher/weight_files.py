"""Weight files: search of a network's tensors in what a file holds, strict loading into a module."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from synq.common.error_text import some_of
from synq.common.notices import print_notice
from synq.config.identity import WEIGHT_SUFFIXES
from synq.teacher.state_dicts import NESTS, Fit, best_fit, is_counter, parts_of
from synq.teacher.weight_readers import read_content

_HALVES = (torch.float16, torch.bfloat16)
_FLOATS = (torch.float32, torch.float64, *_HALVES)
"""Types of real numbers that need no scales; 8-bit floats need some, which a state dict does not define."""
_SHARD = "-of-"


def is_weight_file(weights: str) -> bool:
    """Return whether `weights` is a path instead of a weights name: it has a known suffix or a path separator."""
    return weights.lower().endswith(WEIGHT_SUFFIXES) or "/" in weights or "\\" in weights


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Read the state dict of a weight file without executing any code in it.

    Args:
        path: See `load_weights`. The state dict may be nested under state_dict_ema, model_ema, state_dict,
            model_state_dict, model or net (in that order), or be the only table of tensors in the file.

    Returns:
        Tensors by name, on the CPU, with the stored dtypes.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If the file is damaged, contains no tensors or several tables of them, or requires unsafe
            unpickling.
    """
    path = Path(path).expanduser()
    content = outer = read_content(path)
    while isinstance(content, Mapping):
        nest = next((key for key in NESTS if isinstance(content.get(key), Mapping)), None)
        if nest is None:
            break
        content = content[nest]
    tensors = {str(k): v for k, v in content.items() if isinstance(v, Tensor)} if isinstance(content, Mapping) else {}
    if tensors:
        return tensors
    parts = parts_of(outer)
    tables = list(dict.fromkeys(part.table for part in parts))
    if len(tables) == 1 and tables[0]:
        return {part.key: part.tensor for part in parts}
    raise _without_state_dict(outer, tables, path)


def load_weights(module: nn.Module, path: str | Path) -> None:
    """Load a weight file into ``module`` strictly: all names, shapes and kinds of numbers must match.

    The module's tensors are searched in the whole file: nested in other tables (``state_dict``, ``model``, any key),
    with prefixes that wrappers add (``module.``, ``_orig_mod.``, ``model.``, any other), or in several files. Where
    they are found more than once, averaged weights (EMA) go before raw ones, and common names before others; the file
    is rejected if that leaves a choice. The batch counters of BatchNorm may be absent: inference does not read them.

    Args:
        module: The untrained model; changed in place.
        path: ``.safetensors``, a file of ``torch.save`` (read with ``weights_only=True``), or the index of a sharded
            set (``*.index.json``); ~ is expanded.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If the file is damaged or of another kind, or names, shapes or kinds of numbers differ; the message
            lists the first few, and whether the model or the file lacks them.
    """
    path = Path(path).expanduser()
    expected = {name: value for name, value in module.state_dict().items() if isinstance(value, Tensor)}
    if any(is_lazy(value) for value in expected.values()):
        raise ValueError(
            f"teacher must have layers of known sizes, but {type(module).__name__} has lazy ones without shapes: "
            "write their sizes (Conv2d for LazyConv2d), or call the model once in its factory"
        )
    content = read_content(path)
    parts = parts_of(content)
    if not parts:
        raise _without_state_dict(content, [], path)
    try:
        fit = best_fit(parts, expected)
    except ValueError as error:
        raise ValueError(f"`teacher.weights` must hold the model once, but got {path}: {error}") from None
    what = _mismatch(fit, expected, path) or _unusable(fit.tensors, expected)
    if what:
        raise ValueError(f"`teacher.weights` must match the model {type(module).__name__}, but got {path}: {what}")
    _print_choices(fit, expected, path)
    # Into the module's state dict, whose metadata has the versions of the layers: MNASNet rejects a dict without.
    state = module.state_dict()
    state.update({name: tensor for name, tensor in fit.tensors.items() if not _is_odd_counter(name, tensor)})
    module.load_state_dict(state)


def _mismatch(fit: Fit, expected: Mapping[str, Tensor], path: Path) -> str:
    """Return the differences in names and shapes, "" if there are none."""
    given = fit.tensors
    missing = [name for name in expected if name not in given and not is_counter(name)]
    reshaped = [name for name in expected if name in given and given[name].shape != expected[name].shape]
    problems = []
    if missing:
        problems.append(f"{len(missing)} tensors of the model are not in the file ({some_of(missing)})")
    if fit.extra:
        problems.append(f"{len(fit.extra)} tensors of the file are not in the model ({some_of(fit.extra)})")
    if reshaped:
        shapes = [f"{name} {tuple(given[name].shape)} in the file, {tuple(expected[name].shape)}" for name in reshaped]
        problems.append(f"{len(reshaped)} shapes differ ({some_of(shapes)} in the model)")
    if not problems:
        return ""
    hint = ""
    only_head = not missing and not fit.extra and all(_differs_in_rows(given[n], expected[n]) for n in reshaped)
    if only_head and len(reshaped) <= 2:
        hint = "; the file's classifier has another number of classes: set `teacher.num_classes`"
    elif missing and _SHARD in path.name:
        hint = "; it is one file of several: give their index, such as model.safetensors.index.json"
    elif fit.prefix and len(missing) < len(expected):
        hint = f"; compared with the names that start with {fit.prefix!r}"
    return "; ".join(problems) + hint


def _unusable(given: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> str:
    """Return the first tensor whose kind, type or values the module cannot take, and why; "" if there is none."""
    for name, value in expected.items():
        if name in given and not is_counter(name):
            reason = _reason_against(given[name], value.dtype)
            if reason:
                return f"tensor {name} {reason}"
    return ""


def _reason_against(tensor: Tensor, dtype: torch.dtype) -> str:
    """Return why a tensor cannot be loaded for one of type `dtype`, "" if it can."""
    kind = str(tensor.dtype).removeprefix("torch.")
    if tensor.is_meta:
        return "has no values (it is on the meta device): save the model after its weights are loaded"
    if tensor.is_nested or tensor.layout is not torch.strided:
        layout = "nested" if tensor.is_nested else str(tensor.layout).removeprefix("torch.")
        return f"is not dense ({layout}): store tensor.to_dense()"
    if tensor.is_quantized:
        return f"is quantized ({kind}): a teacher has float weights; store those, or tensor.dequantize()"
    if dtype.is_floating_point and tensor.dtype not in _FLOATS:
        return f"has type {kind}, but must be float: store the float weights, not their codes"
    if not dtype.is_floating_point and (_kind_of(tensor.dtype) != _kind_of(dtype)):
        return f"has type {kind}, but must be {str(dtype).removeprefix('torch.')}"
    if dtype == torch.float32 and tensor.dtype == torch.float64:
        largest = torch.finfo(torch.float32).max
        if bool(((tensor.abs() > largest) & tensor.isfinite()).any()):
            return "has values of float64 that float32 cannot hold"
    return ""


def _is_odd_counter(name: str, tensor: Tensor) -> bool:
    return is_counter(name) and bool(tensor.is_complex() or _reason_against(tensor, tensor.dtype))


def _kind_of(dtype: torch.dtype) -> str:
    if dtype is torch.bool:
        return "bool"
    return "float" if dtype.is_floating_point else "complex" if dtype.is_complex else "integer"


def _print_choices(fit: Fit, expected: Mapping[str, Tensor], path: Path) -> None:
    """Print what a user may not expect: other types of numbers, averaged weights, tensors that were left."""
    pairs = [(value.dtype, fit.tensors[name].dtype) for name, value in expected.items() if name in fit.tensors]
    if (torch.float32, torch.float64) in pairs:
        print_notice(f"note: {path} stores float64: weights are rounded to float32")
    halves = sorted({str(given).removeprefix("torch.") for kind, given in pairs if given in _HALVES and kind != given})
    if halves:
        print_notice(
            f"note: {path} stores {' and '.join(halves)}: weights are exactly these values, computed with in float32"
        )
    if fit.others:
        left = f"{len(fit.others)} tensors outside {fit.prefix!r} are not the model's ({some_of(fit.others)})"
        print_notice(f"note: {path}: {left}")
    if fit.rivals:
        print_notice(f"note: {path} holds the model several times: {fit.prefix!r} is taken, not {some_of(fit.rivals)}")


def _without_state_dict(content: object, tables: list[str], path: Path) -> ValueError:
    found = f"with {type(content).__name__}"
    if isinstance(content, Mapping):
        keys = some_of([str(key) for key in content]) or "none"
        found += f" of the keys {keys}"
    if tables:
        found = f"with several tables of tensors: {some_of([table or '(top)' for table in tables])}"
    return ValueError(f"`teacher.weights` must contain a state dict (names and tensors), but got {path} {found}")


def _differs_in_rows(given: Tensor, expected: Tensor) -> bool:
    return given.ndim == expected.ndim and given.shape[1:] == expected.shape[1:] and given.ndim in (1, 2, 4)
