"""The integer form of a student in one safetensors file, each weight code at its own bit-width.

    <layer>.codes   uint8, the codes minus their smallest possible value, packed (`pack`)
    *.zero_point    int8, the zero points of all layers' output channels, concatenated in the order of `layers`
    *.gain          float32, the factor on each channel's accumulator (`integer_form.py`); then those of the batch norms
    *.shift         float32, likewise, of the layers that have one and of the batch norms
    <name>          float32, every other tensor of the network, such as PReLU slopes

The header's metadata: `format` and `version`, `layers`, `activations` and `norms` (JSON: names, bits, shapes, scales),
`structure` (SHA-256 of the graph), `about` (JSON, free), `digest` (SHA-256 over tensors and metadata). The file does
not hold the network: `load_packed` is given one.

Packing: code i occupies the bits [i b, (i + 1) b) of the stream, least significant bit first; bit j of the stream is
    bit j mod 8 of
byte j div 8. Codes are stored unsigned, as code - quant_min, so the bytes are the same on every machine.
"""

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_safetensors
from torch import Tensor, fx

from synq.common.faults import reading
from synq.common.files import write_bytes_atomic
from synq.config.parsing import check_format
from synq.quant.integer_form import integer_form
from synq.quant.integer_layers import ChannelAffine, Codes, IntegerActivation, IntegerLayer

FORMAT, VERSION = "synq packed student", 3


def save_packed(path: str | Path, form: fx.GraphModule, about: Mapping[str, Any] | None = None) -> int:
    """Write an integer form atomically and return the size of the file in bytes.

    Args:
        path: The file.
        form: A network of ``integer_form``.
        about: Further metadata, as plain JSON values.

    Raises:
        OSError: The folder cannot be written, or the disk is full.
    """
    layers, activations = integer_parts(form)
    tensors: dict[str, Tensor] = {}
    for name, layer in layers.items():
        weight = layer.integer_weight
        raised = weight.codes.to(torch.int16) - weight.quant_min
        tensors[f"{name}.codes"] = torch.from_numpy(pack(raised.numpy(), weight.bits))
    norms = channel_affines(form)
    affine: list[IntegerLayer | ChannelAffine] = [*layers.values(), *norms.values()]
    tensors["*.zero_point"] = torch.cat([layer.integer_weight.zero_point for layer in layers.values()]).to(torch.int8)
    tensors["*.gain"] = torch.cat([part.gain for part in affine])
    tensors["*.shift"] = torch.cat([torch.zeros(0), *(part.shift for part in affine if part.shift is not None)])
    tensors |= _others(form)
    metadata = {
        "format": FORMAT,
        "version": str(VERSION),
        "layers": _to_json(
            [
                [name, layer.integer_weight.bits, list(layer.integer_weight.codes.shape), layer.shift is not None]
                for name, layer in layers.items()
            ]
        ),
        "activations": _to_json([[name, part.bits, part.scale, part.zero_point] for name, part in activations.items()]),
        "norms": _to_json([[name, len(norm.gain)] for name, norm in norms.items()]),
        "about": _to_json(dict(about or {})),
        "structure": _structure(form),
    }
    metadata["digest"] = _digest(tensors, metadata)
    content = to_safetensors(tensors, metadata)
    write_bytes_atomic(path, content)
    return len(content)


def read_packed(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a packed file and check it against its digest.

    Returns:
        Its tensors, and its metadata (`layers`, `activations`, `norms`, `about` as values).

    Raises:
        FileNotFoundError: The file is missing.
        ValueError: It is damaged, of another kind or version.
    """
    path = Path(path)
    if not path.is_file():
        kind = "is a folder" if path.is_dir() else "does not exist"
        raise FileNotFoundError(f"a packed student must be a file, but {path} {kind}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in list(file.keys())}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"a packed student must be a safetensors file, but {path} is damaged: {error}") from error
    if metadata.get("format") != FORMAT:
        raise ValueError(
            f"a packed student must have the format {FORMAT!r} in its metadata, but {path} has another or none"
        )
    version = metadata.get("version", "")
    number = int(version) if version.isdigit() else None
    check_format(path, "a packed student", number, VERSION, "run it again and export it")
    if metadata.pop("digest", None) != _digest(tensors, metadata):
        raise ValueError(f"a packed student must match its digest, but {path} does not: its content was changed")
    with reading(path, "a packed student"):
        facts = {name: json.loads(metadata[name]) for name in ("layers", "activations", "norms", "about")}
        facts["structure"] = metadata["structure"]
    return tensors, facts


def load_packed(path: str | Path, student: fx.GraphModule) -> fx.GraphModule:
    """Return the integer form that a packed file holds, bitwise equal to the one that was written.

    Args:
        path: The file.
        student: The network of a ``Student`` of the same teacher and bit-widths; only its structure is used, not its
            parameters, and its ranges need not be observed.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is damaged, of another version, or of another network.
    """
    tensors, facts = read_packed(path)
    with reading(path, "a packed student"):
        return _filled(path, tensors, facts, integer_form(student, empty=True))


def _filled(
    path: str | Path, tensors: dict[str, Tensor], facts: dict[str, Any], form: fx.GraphModule
) -> fx.GraphModule:
    layers, activations = integer_parts(form)
    found = [(name, bits, tuple(shape)) for name, bits, shape, _ in facts["layers"]]
    wanted = [(n, x.integer_weight.bits, tuple(x.integer_weight.codes.shape)) for n, x in layers.items()]
    found_acts = [(name, bits) for name, bits, *_ in facts["activations"]]
    wanted_acts = [(name, part.bits) for name, part in activations.items()]
    if found != wanted or found_acts != wanted_acts:
        pairs = [*zip(found, wanted, strict=False), *zip(found_acts, wanted_acts, strict=False)]
        counts = (len(found) + len(found_acts), len(wanted) + len(wanted_acts))
        odd = next((pair for pair in pairs if pair[0] != pair[1]), counts)
        raise ValueError(f"a packed student must fit its network, but {path} has {odd[0]} where {odd[1]} is expected")
    norms = channel_affines(form)
    channels_of = [[name, len(norm.gain)] for name, norm in norms.items()]
    if facts["norms"] != channels_of or facts["structure"] != _structure(form):
        raise ValueError(
            f"a packed student must fit its network, but {path} was written from a network that computes something else"
        )
    sizes = [shape[0] for _, _, shape in found]
    _check_tensors(path, tensors, facts, sizes, [len(norm.gain) for norm in norms.values()])
    zero_points = iter(tensors["*.zero_point"].split(sizes))
    channels = [*sizes, *(len(norm.gain) for norm in norms.values())]
    shifted = [*(has_shift for *_, has_shift in facts["layers"]), *(True for _ in norms)]
    gains = iter(tensors["*.gain"].split(channels))
    shifts = iter(tensors["*.shift"].split([number for number, has in zip(channels, shifted, strict=True) if has]))
    for (name, bits, shape), has_shift in zip(found, shifted, strict=False):
        raised = unpack(tensors[f"{name}.codes"].numpy(), bits, math.prod(shape))
        codes = torch.from_numpy(raised.astype(np.int16) - 2 ** (bits - 1)).to(torch.int8).reshape(shape)
        layers[name].fill(
            Codes(codes=codes, scale=torch.ones(shape[0]), zero_point=next(zero_points).to(torch.int32), bits=bits),
            next(gains).clone(),
            next(shifts).clone() if has_shift else None,
        )
    for norm in norms.values():
        norm.gain.copy_(next(gains))
        norm.shift.copy_(next(shifts))
    for name, _, scale, zero_point in facts["activations"]:
        activations[name].scale, activations[name].zero_point = float(scale), int(zero_point)
    others = _others(form)
    missing = [name for name in others if name not in tensors]
    if missing:
        raise ValueError(f"a packed student must fit its network, but {path} has no {missing[0]}")
    form.load_state_dict({**form.state_dict(), **{name: tensors[name] for name in others}})
    return form


def _check_tensors(
    path: str | Path, tensors: Mapping[str, Tensor], facts: Mapping[str, Any], sizes: list[int], norms: list[int]
) -> None:
    """Check type, length and values of the tensors that are read by position, and the scales of the activations.

    Raises:
        ValueError: One is missing or wrong; the message names it.
    """
    shifted = sum(size for size, (*_, has_shift) in zip(sizes, facts["layers"], strict=True) if has_shift)
    wanted: dict[str, tuple[torch.dtype, int | None]] = {
        "*.zero_point": (torch.int8, sum(sizes)),
        "*.gain": (torch.float32, sum(sizes) + sum(norms)),
        "*.shift": (torch.float32, shifted + sum(norms)),
        **{f"{name}.codes": (torch.uint8, None) for name, *_ in facts["layers"]},
    }
    rule = f"`{path}` must hold a packed student, but"
    for name, (dtype, length) in wanted.items():
        tensor = tensors.get(name)
        if tensor is None:
            raise ValueError(f"{rule} it has no tensor {name}")
        if tensor.dtype != dtype or tensor.ndim != 1 or (length is not None and len(tensor) != length):
            shape = "any number of" if length is None else str(length)
            raise ValueError(f"{rule} {name} is {tuple(tensor.shape)} {tensor.dtype}, not {shape} {dtype}")
        if dtype == torch.float32 and not bool(tensor.isfinite().all()):
            raise ValueError(f"{rule} {name} has NaN or infinity")
    for name, _, scale, zero_point in facts["activations"]:
        is_scale = isinstance(scale, int | float) and math.isfinite(scale) and scale > 0
        if not is_scale or type(zero_point) is not int:
            raise ValueError(
                f"{rule} activation {name} has the scale {scale!r:.40} and the zero point {zero_point!r:.40}"
            )


def integer_parts(form: fx.GraphModule) -> tuple[dict[str, IntegerLayer], dict[str, IntegerActivation]]:
    """Return the integer layers and the integer activations of an integer form, by name."""
    modules = dict(form.named_modules())
    layers = {name: module for name, module in modules.items() if isinstance(module, IntegerLayer)}
    return layers, {name: module for name, module in modules.items() if isinstance(module, IntegerActivation)}


def channel_affines(form: fx.GraphModule) -> dict[str, ChannelAffine]:
    """Return the batch norms of an integer form, by name."""
    return {name: module for name, module in form.named_modules() if isinstance(module, ChannelAffine)}


def _others(form: fx.GraphModule) -> dict[str, Tensor]:
    """Return copies of the tensors of the network except those of integer layers and batch norms."""
    layers, _ = integer_parts(form)
    parts = {"integer_weight.codes", "integer_weight.zero_point", "gain", "shift"}
    own = {f"{name}.{part}" for name in (*layers, *channel_affines(form)) for part in parts}
    # Cloned: tensors that share memory (tied PReLU slopes) cannot be written by safetensors.
    return {
        name: tensor.clone(memory_format=torch.contiguous_format)
        for name, tensor in form.state_dict().items()
        if name not in own
    }


def _structure(form: fx.GraphModule) -> str:
    """Return the SHA-256 digest of the graph and of the settings of its layers, without their tensors."""
    called = [form.get_submodule(str(node.target)) for node in form.graph.nodes if node.op == "call_module"]
    settings = [part.extra_repr() if isinstance(part, IntegerLayer) else repr(part) for part in called]
    settings = [
        "" if isinstance(part, IntegerActivation) else text for part, text in zip(called, settings, strict=True)
    ]
    return hashlib.sha256("\n".join([form.code, *settings]).encode()).hexdigest()


def _digest(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    digest = hashlib.sha256(_to_json(dict(sorted(metadata.items()))).encode())
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        digest.update(_to_json([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _to_json(value: object) -> str:
    return json.dumps(value, separators=(",", ":"), allow_nan=False)


def packed_size(count: int, bits: int) -> int:
    """Return the bytes that ``count`` codes of ``bits`` bits take."""
    return -(-count * bits // 8)


def pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """Return codes, any shape, in [0, 2^bits), as a row of bytes; unused bits of the last one are 0.

    ``pack(np.array([1, 2, 3]), 3)`` gives the bytes 0b11010001 and 0: 1 + (2 << 3) + (3 << 6), of which 8 bits go in
    the first.

    Raises:
        ValueError: If ``bits`` is not in [1, 8], or a code does not fit in it.
    """
    _check_bits(bits)
    flat = np.asarray(codes).reshape(-1)
    if flat.size and not (int(flat.min()) >= 0 and int(flat.max()) < 2**bits):
        raise ValueError(f"codes must be in [0, {2**bits - 1}] for {bits} bits, but got {flat.min()} to {flat.max()}")
    spread = np.unpackbits(flat.astype(np.uint8)[:, None], axis=1, count=bits, bitorder="little")
    return np.packbits(spread.reshape(-1), bitorder="little")


def unpack(packed: np.ndarray, bits: int, count: int) -> np.ndarray:
    """Return the ``count`` codes of ``bits`` bits in a row of bytes, as uint8 (count,).

    Raises:
        ValueError: If the row has another length than so many codes take.
    """
    _check_bits(bits)
    if packed.size != packed_size(count, bits):
        raise ValueError(
            f"{count} codes of {bits} bits must take {packed_size(count, bits)} bytes, but got {packed.size}"
        )
    stream = np.unpackbits(packed.astype(np.uint8, copy=False), count=count * bits, bitorder="little")
    return np.packbits(stream.reshape(count, bits), axis=1, bitorder="little").reshape(count)


def _check_bits(bits: int) -> None:
    if not 1 <= bits <= 8:
        raise ValueError(f"bits must be in [1, 8], but got {bits}")
