"""A classifier that is a Python object already: a copy of it as a teacher, the object itself unchanged."""

import copy
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from synq.common.error_text import one_line
from synq.config.run import TeacherConfig
from synq.teacher.input_format import input_format
from synq.teacher.sources import MEMORY, RANDOM, SourceModel
from synq.teacher.teacher import Teacher, load_teacher
from synq.teacher.user_code import slug
from synq.teacher.wrappers import check_layers, inside, unwrap_parts, unwrapped

DIGITS = 12
"""Hexadecimal digits of the digest in the spec of a teacher in memory."""
_HOOKS = (
    *("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called"),
    *("_forward_pre_hooks_with_kwargs", "_backward_hooks", "_backward_pre_hooks", "_state_dict_hooks"),
    *("_state_dict_pre_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks"),
)
_ENGINES = {
    ".onnx": "ONNX", ".tflite": "LiteRT", ".pte": "ExecuTorch", ".engine": "TensorRT", ".plan": "TensorRT",
    ".xml": "OpenVINO", ".pt2": "torch.export", ".torchscript": "TorchScript", ".pb": "TensorFlow", ".h5": "Keras",
    ".keras": "Keras", ".mlmodel": "Core ML", ".mlpackage": "Core ML",
}  # fmt: skip
"""Files that hold a compiled program, and what they are of."""
_ZIP = b"PK\x03\x04"
_TABLE = 2**20
"""Bytes at the end of an archive that are searched for a name."""
_WEIGHTS = (".safetensors", ".pth", ".pt", ".th", ".ckpt", ".bin", ".tar", ".pkl")


def memory_teacher(model: object, config: TeacherConfig, preprocessing: object = None) -> tuple[TeacherConfig, Teacher]:
    """Return a teacher of a network in memory, and its configuration.

    The teacher is a copy: the network keeps its device, mode, gradients, hooks and buffers. Hooks are not copied,
    unless they compute weights, which is rejected. The spec of the teacher, memory:NAME-DIGEST, has the start of the
    digest of its code and weights, so that a run of it is found again when the same network is given again.

    Args:
        model: A network, or an object with one as its `model` (a pipeline of Hugging Face).
        config: Settings of the teacher; its spec is replaced. What it leaves out is taken from the network's library
            (`input_format`).
        preprocessing: As for `input_format`.

    Raises:
        ValueError: It is no network that can be copied, or none that can be a teacher (as `load_teacher`), or its
            input size or normalization is unknown, or a weight file is given with it.
    """
    check_is_network(model)
    if config.weights not in (None, RANDOM):
        raise ValueError(
            f"`teacher.weights` must be left out, or be {RANDOM!r}, where the model is a network in memory, but got "
            f"{config.weights!r}: load that file into the network first (load_state_dict)"
        )
    module: Any = model if isinstance(model, nn.Module) else getattr(model, "model")  # noqa: B009
    network = inside(module)
    known = input_format(model, preprocessing, config.input_size)
    known = known.filled(input_format(network, None, config.input_size))
    name = slug(_architecture(network))
    source = SourceModel(
        module=_copy_of(network),
        name=name,
        input_size=known.input_size,
        mean=known.mean,
        std=known.std,
        preprocessing=known.rule,
    )
    unwrap_parts(source.module)
    teacher = load_teacher(replace(config, spec=f"{MEMORY}:{name}"), source)
    spec = f"{MEMORY}:{name}-{teacher.digest[:DIGITS]}"
    config = replace(config, spec=spec, input_size=teacher.input_size, mean=teacher.mean, std=teacher.std)
    return config, replace(teacher, spec=spec)


def check_is_network(model: object) -> None:
    """Raise ValueError, with the reason and the cure, if an object or a file is no network of layers.

    Args:
        model: Anything that a user may take for a network.
    """
    kind = type(model).__name__
    rule = "`model` must be a network of layers (torch.nn.Module) or a spec such as torchvision:resnet18"
    compiled = "a compiled program without layers to train: give the network that it was made from"
    if isinstance(model, type) and issubclass(model, nn.Module):
        raise ValueError(f"{rule}, but got the class {model.__name__}: call it, and load its weights")
    if isinstance(model, Path):
        raise ValueError(file_error(str(model)))
    if isinstance(model, torch.jit.ScriptModule | torch.jit.ScriptFunction):
        raise ValueError(f"{rule}, but got TorchScript ({kind}), {compiled}")
    if kind in ("ExportedProgram", "ModelProto", "InferenceSession", "CompiledModel", "Interpreter"):
        names = {"ExportedProgram": "torch.export", "CompiledModel": "OpenVINO", "Interpreter": "LiteRT"}
        raise ValueError(f"{rule}, but got {names.get(kind, 'ONNX')} ({kind}), {compiled}")
    if isinstance(model, Mapping) and any(isinstance(value, torch.Tensor) for value in model.values()):
        raise ValueError(f"{rule}, but got a dict of weights: build the network and call its load_state_dict")
    if not isinstance(model, nn.Module) and not isinstance(getattr(model, "model", None), nn.Module):
        raise ValueError(f"{rule}, but got {kind}")


def file_error(path: str) -> str:
    """Return why a file is no network, and the cure; "" if the name is not that of a file of a network.

    Args:
        path: Path of a file, or any text.
    """
    suffix = Path(path).suffix.lower()
    rule = "`model` must be a network of layers (torch.nn.Module) or a spec such as torchvision:resnet18"
    program = _ENGINES.get(suffix) or ("TorchScript" if _is_torchscript(path) else "")
    if program:
        return (
            f"{rule}, but {path} is {program}, a compiled program without layers to train: give the network that it "
            "was made from"
        )
    if suffix in _WEIGHTS:
        return f"{rule}, but {path} holds weights: build the network, load them into it, and give the network"
    if suffix == ".py":
        return f"{rule}, but got {path}: name the function in it that returns the network, {path}:FUNCTION"
    return ""


def _is_torchscript(path: str) -> bool:
    """Return whether a file is an archive of torch.jit.save, by the names at the end of its table of contents."""
    if not Path(path).is_file():
        return False
    with Path(path).open("rb") as file:
        if file.read(len(_ZIP)) != _ZIP:
            return False
        file.seek(max(0, file.seek(0, 2) - _TABLE))
        return b"/constants.pkl" in file.read()


def _copy_of(network: nn.Module) -> nn.Module:
    """Return a copy of a network on the CPU, without hooks.

    Raises:
        ValueError: It has layers without values, computes weights in hooks, or cannot be copied.
    """
    name = type(network).__name__
    check_layers(network, f"the network {name}", verb="be")
    memo: dict[int, Any] = {}
    for path, part in network.named_modules():
        for key in _HOOKS:
            hooks = part.__dict__.get(key)
            if hooks is None:
                continue
            for hook in hooks.values() if isinstance(hooks, Mapping) else ():
                owner = type(hook)
                if owner.__module__.startswith("torch.nn.utils") and owner.__name__ in ("WeightNorm", "SpectralNorm"):
                    raise ValueError(
                        f"teacher must have plain weights, but those of layer {path!r} are computed by a hook "
                        f"({owner.__name__}): call torch.nn.utils.remove_weight_norm or remove_spectral_norm first"
                    )
            memo[id(hooks)] = OrderedDict()
    try:
        made = copy.deepcopy(network, memo)
    except Exception as error:  # attributes of any type
        raise ValueError(
            f"the network must be one that copy.deepcopy can copy, but {name} raised {one_line(error)}"
        ) from error
    made = unwrapped(made)
    for tensor in (*made.parameters(), *made.buffers()):
        tensor.grad = None
    return made


def _architecture(network: nn.Module) -> str:
    known = getattr(network, "pretrained_cfg", None)
    found = known.get("architecture") if isinstance(known, Mapping) else None
    return str(found or type(network).__name__)
