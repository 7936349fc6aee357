"""Random files of images, arrays, weights and sweep specs, and what must be true of each of them.

`INPUTS` has one function per kind: it takes a generator of random numbers and an empty folder, writes a file and reads
it. It returns "read" or the one line of the rejection, and raises AssertionError or any other exception for a fault.
"""

import io
import json
import random
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save as save_safetensors
from torch import nn

from fuzz.files_damage import damaged
from fuzz.files_specs import spec_file
from synq.evaluation.labeled import load_labeled
from synq.evaluation.labeled_arrays import read_idx
from synq.sweeps.spec_file import load_spec
from synq.teacher.weight_files import load_weights

MAX_LINE = 700
SIZE = 8


def outcome(work: Callable[[], object], file: Path) -> str:
    """Return "read", or the line of a rejection that names the file; anything else is a fault."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            work()
    except (ValueError, OSError) as error:
        text = str(error)
        assert text and "\n" not in text.strip() and len(text) < MAX_LINE, f"not one line: {text!r}"
        assert file.name in text, f"does not name {file.name}: {text!r}"
        return text
    return "read"


# --- images ---

_MODES = {
    "png": ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"),
    "jpg": ("L", "RGB", "CMYK"),
    "bmp": ("1", "L", "P", "RGB"),
    "gif": ("L", "P", "RGB"),
    "webp": ("RGB", "RGBA"),
    "ppm": ("1", "L", "RGB", "I;16"),
    "tif": ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "I;16", "I", "F"),
}


def _image(rng: random.Random, mode: str) -> Image.Image:
    width, height = (rng.choice((1, 2, 7, 8, 9, 31)) for _ in range(2))
    draw = np.random.default_rng(rng.randrange(2**32))
    if mode in ("I;16", "I", "F"):
        kind = {"I;16": np.uint16, "I": np.int32, "F": np.float32}[mode]
        return Image.fromarray(draw.integers(0, 65536, (height, width)).astype(kind))
    bands = len(Image.new(mode, (1, 1)).getbands())
    if mode == "1":
        return Image.fromarray(draw.integers(0, 2, (height, width), dtype=np.uint8) * 255).convert("1")
    if mode == "P":
        return Image.fromarray(draw.integers(0, 256, (height, width, 3), dtype=np.uint8)).quantize(16)
    return Image.frombytes(mode, (width, height), draw.integers(0, 256, (height, width, bands), np.uint8).tobytes())


def image_file(rng: random.Random, folder: Path) -> str:
    """An image of a random format, mode, orientation and number of frames, half of them damaged, in a class folder."""
    suffix = rng.choice(list(_MODES))
    mode = rng.choice(_MODES[suffix])
    image, options = _image(rng, mode), {}  # type: Image.Image, dict[str, Any]
    if rng.random() < 0.2 and suffix in ("png", "jpg", "webp"):
        exif = Image.Exif()
        exif[274] = rng.randrange(10)
        options["exif"] = exif
    if rng.random() < 0.2 and suffix in ("png", "gif", "webp", "tif"):
        options |= {"save_all": True, "append_images": [image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)]}
    if rng.random() < 0.3 and suffix in ("png", "gif") and mode in ("L", "P"):
        options["transparency"] = rng.randrange(16)
    buffer = io.BytesIO()
    kind = {"jpg": "JPEG", "tif": "TIFF"}.get(suffix, suffix.upper())
    image.save(buffer, format=kind, **options)
    data = buffer.getvalue()
    if rng.random() < 0.7:
        data, _ = damaged(data, rng)
    file = folder / "0" / f"image.{rng.choice((suffix, suffix, 'png', 'JPG'))}"
    file.parent.mkdir()
    file.write_bytes(data)
    channels = rng.choice((1, 3, 3))

    def read() -> None:
        labeled = load_labeled(
            f"imagefolder:{folder}", (channels, SIZE, SIZE), (0.0,) * channels, (1.0,) * channels, num_classes=2
        )
        assert len(labeled) == 1
        labeled.fingerprint()
        images, _ = labeled.batch(torch.tensor([0]))
        assert images.shape == (1, channels, SIZE, SIZE) and 0 <= float(images.min()) <= float(images.max()) <= 1

    return outcome(read, file)


def array_file(rng: random.Random, folder: Path) -> str:
    """An npz archive or an IDX file of random shape and type, most of them damaged."""
    shape = rng.choice(((4, 8, 8), (4, 8, 8, 3), (4, 8, 8, 1), (4, 9, 8), (0, 8, 8), (4, 0, 8), (4, 3, 8, 8), (8,)))
    kind = rng.choice((np.uint8, np.uint8, np.uint8, np.float32, np.int64, bool))
    images, labels = np.ones(shape, kind), np.arange(len(np.ones(shape))) % 3
    if rng.random() < 0.7:
        buffer = io.BytesIO()
        save = np.savez_compressed if rng.random() < 0.5 else np.savez
        save(buffer, **{rng.choice("xxxz"): images, rng.choice("yyyl"): labels.astype(rng.choice((int, int, float)))})
        data, file = buffer.getvalue(), folder / "a.npz"
    else:
        data, file = b"\0\0\x08\x03" + b"".join(n.to_bytes(4, "big") for n in (4, 8, 8)) + bytes(256), folder / "a-idx"
    if rng.random() < 0.8:
        data, _ = damaged(data, rng)
    file.write_bytes(data)

    def read() -> None:
        if file.suffix != ".npz":
            assert read_idx(file).dtype == np.uint8
            return
        labeled = load_labeled(f"npz:{file}", (3, SIZE, SIZE), (0.0,) * 3, (1.0,) * 3, num_classes=3)
        labeled.fingerprint()
        assert labeled.batch(torch.arange(len(labeled)))[0].shape == (len(labeled), 3, SIZE, SIZE)

    return outcome(read, file)


# --- weights ---


def _network() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 5))


def _strange(rng: random.Random, tensor: torch.Tensor) -> object:
    convert: tuple[Callable[[torch.Tensor], object], ...] = (
        lambda t: t.half(),
        lambda t: t.bfloat16(),
        lambda t: t.double(),
        lambda t: t.to(torch.int8),
        lambda t: t.to(torch.complex64),
        lambda t: t.to_sparse() if t.ndim else t,
        lambda t: t.to("meta"),
        lambda t: t[None],
        lambda t: t.flatten()[:1],
        lambda t: t.expand(2, *t.shape),
        lambda t: t.tolist(),
        lambda t: t.numpy(),
        lambda t: None,
        lambda t: {"value": t},
        lambda t: t.float() * float("nan"),
    )
    return rng.choice(convert)(tensor)


def _wrapped(rng: random.Random, state: dict[str, Any], other: dict[str, Any]) -> object:
    prefix = rng.choice(("", "", "module.", "model.", "_orig_mod.", "module._orig_mod.", "backbone.", "ema_model."))
    content: Any = {prefix + name: value for name, value in state.items()}
    if rng.random() < 0.2:
        content |= {rng.choice(("ema.", "teacher.", "model.")) + name: value for name, value in other.items()}
    if rng.random() < 0.2:
        content[rng.choice(("criterion.weight", "n_averaged", "model.extra", "0"))] = torch.ones(2)
    for _ in range(rng.choice((0, 0, 1, 2))):
        key = rng.choice(("state_dict", "model", "weights", "ema", "state_dict_ema", "net", 3))
        content = {key: content, "epoch": 3, "optimizer": {"state": {0: {"exp_avg": torch.ones(4)}}}}
    return [content, 3] if rng.random() < 0.05 else content


def weight_file(rng: random.Random, folder: Path) -> str:
    """A state dict in a random container with strange tensors, half of them damaged; what loads must be equal."""
    torch.manual_seed(rng.randrange(2**31))
    network, other = _network(), _network()
    state: dict[str, Any] = {name: value.clone() for name, value in network.state_dict().items()}
    changed = dict(state)
    for name in rng.sample(list(state), rng.choice((0, 0, 0, 1, 2))):
        if rng.random() < 0.2:
            del changed[name]
        else:
            changed[name] = _strange(rng, state[name])
    content = _wrapped(rng, changed, dict(other.state_dict()))
    suffix = rng.choice((".pth", ".pt", ".bin", ".ckpt", ".safetensors", ".SafeTensors"))
    plain = isinstance(content, dict) and all(_is_storable(value) for value in content.values())
    buffer = io.BytesIO()
    if plain and rng.random() < 0.5:
        buffer.write(save_safetensors({str(k): v.contiguous().clone() for k, v in content.items()}))  # type: ignore[union-attr]
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.save(content, buffer, _use_new_zipfile_serialization=rng.random() < 0.7)
    data, is_damaged = buffer.getvalue(), rng.random() < 0.6
    if is_damaged:
        data, _ = damaged(data, rng)
    file = folder / f"w{suffix}"
    file.write_bytes(data)
    target = _network()

    def read() -> None:
        load_weights(target, file)

    said = outcome(read, file)
    if said == "read" and not is_damaged:
        for name, value in target.state_dict().items():
            given = changed.get(name)
            if isinstance(given, torch.Tensor) and not name.endswith("num_batches_tracked"):
                twin = other.state_dict()[name]  # averaged weights, where the file holds both
                found = value.nan_to_num(7.0)
                assert any(torch.equal(found, t.to(value.dtype).nan_to_num(7.0)) for t in (given, twin)), name
    return said


def _is_storable(value: object) -> bool:
    return isinstance(value, torch.Tensor) and not (value.is_sparse or value.is_meta)


def index_file(rng: random.Random, folder: Path) -> str:
    """The index of a sharded set, changed or damaged."""
    state = _network().state_dict()
    files = {name: f"model-0000{number % 2 + 1}-of-00002.safetensors" for number, name in enumerate(state)}
    for file in set(files.values()):
        (folder / file).write_bytes(save_safetensors({n: state[n] for n, place in files.items() if place == file}))
    changed: dict[str, Any] = dict(files)
    for name in rng.sample(list(files), rng.choice((0, 1))):
        changed[name] = rng.choice(("gone.bin", "../x.bin", "", ".", 3, None, "a\0b", "x" * 300, [], "w.index.json"))
    index: Any = {"metadata": {"total_size": 9}, "weight_map": changed}
    index = rng.choice((index, index, index, index, changed, [index], {"weight_map": list(changed)}, 3))
    data = json.dumps(index).encode()
    if rng.random() < 0.5:
        data, _ = damaged(data, rng)
    path = folder / "model.safetensors.index.json"
    path.write_bytes(data)
    return outcome(lambda: load_weights(_network(), path), path)


def sweep_spec(rng: random.Random, folder: Path) -> str:
    """A spec of a sweep with odd values, as TOML or JSON, a part of them damaged as files."""
    name, data = spec_file(rng)
    if rng.random() < 0.3:
        data, _ = damaged(data, rng)
    file = folder / name
    file.write_bytes(data)
    return outcome(lambda: load_spec(file, root=folder), file)


INPUTS: dict[str, Callable[[random.Random, Path], str]] = {
    "image": image_file,
    "array": array_file,
    "weights": weight_file,
    "index": index_file,
    "spec": sweep_spec,
}
