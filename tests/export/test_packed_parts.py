"""R8: packed files with a right digest and wrong parts are one line that names file and part."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from support.integer_students import student
from support.small_nets import plain
from synq.export.packed import _digest, load_packed, save_packed
from synq.quant.integer_form import integer_form

Change = Callable[[dict[str, Tensor], dict[str, str]], object]


def set_scale(metadata: dict[str, str], value: object) -> None:
    rows = json.loads(metadata["activations"])
    rows[0][2] = value
    metadata["activations"] = json.dumps(rows)


CHANGES: dict[str, tuple[Change, str]] = {
    "no norms": (lambda _, metadata: metadata.pop("norms"), "it has no 'norms'"),
    "no structure": (lambda _, metadata: metadata.pop("structure"), "it has no 'structure'"),
    "no shift": (lambda tensors, _: tensors.pop("*.shift"), "it has no tensor *.shift"),
    "no codes": (lambda tensors, _: tensors.pop(next(n for n in tensors if n.endswith("codes"))), "has no tensor"),
    "a gain too few": (lambda tensors, _: tensors.update({"*.gain": tensors["*.gain"][1:]}), "*.gain is ("),
    "a gain too many": (
        lambda tensors, _: tensors.update({"*.gain": torch.cat([tensors["*.gain"], torch.ones(1)])}),
        "*.gain is (",
    ),
    "NaN": (lambda tensors, _: tensors.update({"*.gain": tensors["*.gain"] * float("nan")}), "*.gain has NaN"),
    "float codes": (
        lambda tensors, _: tensors.update({n: x.float() for n, x in tensors.items() if n.endswith("codes")}),
        "torch.float32, not any number of torch.uint8",
    ),
    "codes too few": (
        lambda tensors, _: tensors.update({n: x[1:] for n, x in tensors.items() if n.endswith("codes")}),
        "codes of",
    ),
    "wide zero points": (
        lambda tensors, _: tensors.update({"*.zero_point": tensors["*.zero_point"].int()}),
        "*.zero_point is (",
    ),
    "a negative step": (lambda _, metadata: set_scale(metadata, -0.1), "has the scale -0.1"),
    "a step that is a text": (lambda _, metadata: set_scale(metadata, "x"), "has the scale 'x'"),
    "layers that are none": (lambda _, metadata: metadata.update(layers="[1]"), "must hold a packed student"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_r8_a_wrong_part_is_named(name: str, tmp_path: Path) -> None:
    path, net = tmp_path / "model.safetensors", student(plain()).net
    save_packed(path, integer_form(net))
    load_packed(path, net)
    with safe_open(path, framework="pt") as file:
        tensors = {key: file.get_tensor(key) for key in list(file.keys())}
        metadata = dict(file.metadata())
    del metadata["digest"]
    change, text = CHANGES[name]
    change(tensors, metadata)
    tensors = {key: tensor.contiguous() for key, tensor in tensors.items()}
    path.write_bytes(save(tensors, metadata | {"digest": _digest(tensors, metadata)}))
    with pytest.raises(ValueError, match=r"model.safetensors|codes of") as caught:
        load_packed(path, net)
    assert text in str(caught.value) and "\n" not in str(caught.value)
