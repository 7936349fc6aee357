"""Synthesis methods of a user: images in the store, in the identity of a set and in a run; what is rejected."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import synq
from support.added import install, nothing_added
from support.api_tools import INPUT, RESEARCH, SIZE, GrayNet
from synq.synthesis.dataset import load_set

LOW, HIGH = -2.0, 2.0
"""Normalized values of a black and a white pixel of `INPUT`."""
FILE = '''
import torch

def noise(inputs):
    """Uniform noise, with the teacher's predictions as labels."""
    pixels = torch.rand(len(inputs.labels), *inputs.input_size, generator=inputs.generator)
    images = inputs.clamp((pixels - inputs.mean[0]) / inputs.std[0])
    return images, inputs.module(images).argmax(1)
'''


@pytest.fixture(autouse=True)
def _nothing_added(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with nothing_added(monkeypatch):
        yield


def synthesize(folder: Path, method: str, **settings: Any) -> synq.SyntheticSet:
    config = {**RESEARCH, "synthesis": {**RESEARCH["synthesis"], "method": method, **settings}}
    return synq.synthesize(GrayNet(), **INPUT, config=config, output_dir=folder, progress=False)


def blocks(inputs: synq.SynthesisInputs) -> Tensor:
    """Return one image per class: its brightness is the class."""
    level = LOW + (HIGH - LOW) * inputs.labels.cpu().float() / 4
    return level.view(-1, 1, 1, 1).expand(-1, *inputs.input_size)


def test_the_images_of_a_method_are_the_training_set(tmp_path: Path) -> None:
    seen: list[synq.SynthesisInputs] = []

    @synq.synthesis_method("blocks", version="1")
    def method(inputs: synq.SynthesisInputs) -> Tensor:
        seen.append(inputs)
        inputs.progress(0.5)
        inputs.module.fc.weight.data.zero_()  # a copy: the teacher is not changed
        return blocks(inputs)

    made = synthesize(tmp_path, "blocks")
    assert made.images.shape == (32, *SIZE) and made.images.dtype == torch.float32 and len(seen) == 2
    assert torch.equal(made.images[:, 0, 0, 0], LOW + made.labels.float())
    assert torch.equal(made.labels, torch.cat([inputs.labels for inputs in seen]))
    first, second = seen
    assert (first.input_size, first.mean, first.std) == (SIZE, (0.5,), (0.25,)) and first.config.iterations == 2
    assert first.generator.initial_seed() != second.generator.initial_seed()
    assert not first.module.training and not any(weight.requires_grad for weight in first.module.parameters())
    assert made.manifest["synthesis"]["method"] == "blocks@1" and made.manifest["terms"]["bns"] > 0
    with torch.no_grad():
        share = float((GrayNet()(made.images).argmax(1) == made.labels).float().mean())
    assert made.manifest["agreement"] == pytest.approx(share)
    assert load_set(made.path).digest == synthesize(tmp_path, "blocks").digest == made.digest
    assert len(seen) == 2, "the set was in the store"


def test_a_run_is_of_the_version_of_its_method(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(FILE)

    def quantize() -> synq.Run:
        config = {**RESEARCH, "synthesis": {**RESEARCH["synthesis"], "method": f"{file}:noise"}}
        return synq.quantize(GrayNet(), **INPUT, config=config, epochs=1, output_dir=tmp_path / "out", progress=False)

    first = quantize()
    assert first.record.config["synthesis"]["method"].startswith(f"{file}:noise@") and first.record.protocol == "A"
    assert quantize().path == first.path, "the run was finished before"
    file.write_text(FILE.replace("torch.rand(", "0.5 * torch.rand("))
    second = quantize()
    assert second.path != first.path and second.record.set_digest != first.record.set_digest
    assert second.record.heldout_digest == first.record.heldout_digest, "the same held-out images for all methods"
    assert len(list((tmp_path / "out" / "store").glob("*/manifest.json"))) == 3
    opened = synq.open_run(first.path, model=GrayNet())
    assert opened.record == first.record


def test_an_entry_point_of_a_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path / "site", monkeypatch, "synq.synthesis_methods", "noise", FILE)
    made = synthesize(tmp_path, "acme")
    assert made.manifest["synthesis"]["method"] == "acme@2.5" and made.manifest["agreement"] == 1.0
    with pytest.raises(ValueError, match=r"`synthesis\.method` must be one of inversion, .* did you mean `acme`"):
        synthesize(tmp_path, "acmee")


def test_global_random_numbers_are_seeded_by_the_shard(tmp_path: Path) -> None:
    synq.synthesis_method("global", version="1")(
        lambda inputs: inputs.clamp(
            torch.randn(len(inputs.labels), *SIZE) + torch.from_numpy(np.random.randn(*SIZE)).float()
        )
    )
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = synthesize(tmp_path / "a", "global")
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    assert synthesize(tmp_path / "b", "global").digest == first.digest
    assert not torch.equal(first.images[:16], first.images[16:]), "shards differ"


BAD: dict[str, tuple[Callable[[synq.SynthesisInputs], Any], str]] = {
    "shape": (lambda inputs: blocks(inputs)[:, 0], r"must return images \(16, 1, 12, 12\), .* returned shape \(16, 12"),
    "number": (lambda inputs: blocks(inputs)[1:], r"returned shape \(15, 1, 12, 12\)"),
    "type": (lambda inputs: blocks(inputs).numpy(), "returned ndarray"),
    "nothing": (lambda inputs: None, "returned NoneType"),
    "bytes": (lambda inputs: blocks(inputs).to(torch.uint8), r"of a float type, but bytes@1 returned torch\.uint8"),
    "nan": (lambda inputs: blocks(inputs) / 0, "returned NaN or infinity"),
    "range": (
        lambda inputs: blocks(inputs) * 2,
        r"in \[-2, 2\] for channel 0, but range@1 returned -4 to 4: return inputs\.clamp\(images\)",
    ),
    "raises": (lambda inputs: inputs.nothing, "raises@1 raised AttributeError"),
    "exits": (lambda inputs: exit(3), "exits@1 raised SystemExit: 3"),
    "labels": (lambda inputs: (blocks(inputs), inputs.labels + 1), r"in 0\.\.4, but labels@1 returned 1\.\.5"),
    "floats": (lambda inputs: (blocks(inputs), inputs.labels.float()), r"floats@1 returned \(16,\) torch\.float32"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_image_is_rejected(name: str, tmp_path: Path) -> None:
    function, reason = BAD[name]
    synq.synthesis_method(name, version="1")(function)
    with pytest.raises(ValueError, match=reason) as found:
        synthesize(tmp_path, name)
    assert "\n" not in str(found.value)
    assert not list((tmp_path / "store").glob("*/manifest.json"))


def test_pixels_that_rounding_moved_are_clamped(tmp_path: Path) -> None:
    synq.synthesis_method("close", version="1")(lambda inputs: blocks(inputs).double() * 1.0005)
    images = synthesize(tmp_path, "close").images
    assert float(images.min()) == LOW and float(images.max()) == HIGH and images.dtype == torch.float32


def test_calibration_centers_are_not_for_methods_of_users(tmp_path: Path) -> None:
    synq.synthesis_method("blocks", version="1")(blocks)
    with pytest.raises(ValueError, match=r"`synthesis\.calib_centers` must be false for a method of yours"):
        synthesize(tmp_path, "blocks", calib_centers=True)


def test_every_setting_is_part_of_the_set_that_a_method_may_use(tmp_path: Path) -> None:
    synq.synthesis_method("blocks", version="1")(blocks)
    keys = {synthesize(tmp_path, "blocks", **changes).path for changes in ({}, {"latent_dim": 3}, {"lr": 0.5})}
    assert len(keys) == 3


def test_labels_that_the_images_do_not_show_are_reported(tmp_path: Path, capsys: Any) -> None:
    synq.synthesis_method("black", version="1")(lambda inputs: torch.full((len(inputs.labels), *SIZE), LOW))
    config = {**RESEARCH, "synthesis": {**RESEARCH["synthesis"], "method": "black"}}
    synq.synthesize(GrayNet(), **INPUT, config=config, output_dir=tmp_path)
    assert "black@1 makes images that do not show the classes that it was given" in capsys.readouterr().err


def test_a_method_by_command(
    tmp_path: Path, tiny_settings: dict[str, object], as_args: Callable[..., list[str]], capsys: Any
) -> None:
    from synq.train import main

    file = tmp_path / "mine.py"
    file.write_text(FILE + "\ndef broken(inputs):\n    return inputs.labels\n")
    settings = {**tiny_settings, "runtime.output_dir": str(tmp_path / "out")}
    assert main(as_args({**settings, "synthesis.method": f"{file}:noise"})) == 0
    capsys.readouterr()
    for name, reason in (("broken", "returned shape"), ("noize", "did you mean `noise`")):
        assert main(as_args({**settings, "synthesis.method": f"{file}:{name}"})) == 2
        (line,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
        assert reason in line
    assert main(as_args({**settings, "synthesis.method": f"{tmp_path}/none.py:noise"})) == 2
    assert "must name an existing Python file" in capsys.readouterr().err
