"""Sets of every method: their labels, their manifest, and a key that covers exactly what determines them."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from synq.common.seeding import make_generator
from synq.config.run import SynthesisConfig
from synq.config.synthesis import SYNTHESIS_METHODS
from synq.synthesis.generate import ensure_set
from synq.synthesis.start_noise import WHITE, StartNoise
from synq.synthesis.store import SetStore, set_identity
from synq.teacher.pixel_range import PixelRange
from synq.teacher.teacher import Teacher

SIZE = (3, 9, 8)
PIXELS = PixelRange(torch.full((1, 3, 1, 1), -2.0), torch.full((1, 3, 1, 1), 2.0))


@pytest.fixture
def tiny_teacher(make_classifier: Callable[..., nn.Module]) -> Teacher:
    facts = SimpleNamespace(
        name="tiny",
        module=make_classifier(),
        num_classes=5,
        input_size=SIZE,
        digest="5c" * 32,
        pixel_range=lambda: PIXELS,
    )
    return cast(Teacher, facts)


@pytest.mark.parametrize("method", SYNTHESIS_METHODS)
@pytest.mark.parametrize("calib_centers", [False, True])
def test_whole_sets(tmp_path: Path, tiny_teacher: Teacher, method: str, calib_centers: bool) -> None:
    config = SynthesisConfig(
        method=method,  # type: ignore[arg-type]
        num_images=14,
        shard_size=5,
        iterations=3,
        latent_dim=8,
        calib_centers=calib_centers,
        center_iterations=2,
    )
    module = tiny_teacher.module
    before = {name: value.clone() for name, value in module.state_dict().items()}
    made = ensure_set(tiny_teacher, config, 0, SetStore(tmp_path), progress=False)
    assert made.images.shape == (14, 3, 9, 8)
    with torch.no_grad():
        predictions = module(made.images).argmax(1)
    assert made.manifest["agreement"] == pytest.approx((predictions == made.labels).double().mean().item())
    if config.assigns_labels:
        assert torch.bincount(made.labels, minlength=5).max() <= 3
    else:
        assert torch.equal(predictions, made.labels)
    assert (made.manifest["terms"]["centers"] > 0) == (calib_centers and method != "gaussian")
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert not any(part._forward_pre_hooks for part in module.modules())


IDENTITY_CASES = [
    # method, centers, a setting, another value, whether it makes another set
    ("inversion", False, "generator_lr", 0.5, False),
    ("inversion", False, "latent_dim", 7, False),
    ("inversion", False, "lr", 0.7, True),
    ("inversion", False, "swing_conv", True, True),
    ("inversion", False, "start", "white", True),
    ("zeroq", False, "start", "white", True),
    ("gdfq", False, "start", "white", False),
    ("gdfq", True, "start", "white", True),
    ("genie", False, "start", "white", False),
    ("gaussian", False, "start", "white", False),
    ("zeroq", False, "inception_weight", 0.7, False),
    ("zeroq", False, "hard_sample_gamma", 1.0, False),
    ("zeroq", True, "inception_weight", 0.7, True),
    ("zeroq", True, "hard_sample_gamma", 1.0, True),
    ("zeroq", False, "bns_weight", 0.5, True),
    ("zeroq", False, "lr", 0.7, True),
    ("gdfq", False, "lr", 0.7, False),
    ("gdfq", True, "lr", 0.7, True),
    ("gdfq", False, "generator_lr", 0.1, True),
    ("gdfq", False, "latent_dim", 7, True),
    ("gdfq", False, "hard_sample_gamma", 1.0, True),
    ("genie", False, "lr", 0.7, True),
    ("genie", False, "generator_lr", 0.1, True),
    ("genie", False, "swing_conv", False, True),
    ("genie", False, "swing_conv", True, False),
    ("gaussian", False, "iterations", 7, False),
    ("gaussian", False, "bns_form", "var_mean", False),
    ("gaussian", False, "calib_centers", True, False),
    ("gaussian", False, "shard_size", 5, True),
]


@pytest.mark.parametrize(("method", "centers", "name", "value", "counts"), IDENTITY_CASES)
def test_the_name_of_a_set_covers_what_decides_its_images(
    tmp_path: Path, tiny_teacher: Teacher, method: str, centers: bool, name: str, value: object, counts: bool
) -> None:
    """Against what is really made, in two stores: names differ exactly where images or terms do."""
    base = SynthesisConfig(
        method=method,  # type: ignore[arg-type]
        calib_centers=centers,
        num_images=8,
        shard_size=8,
        iterations=2,
        latent_dim=8,
        center_iterations=2,
        start="fitted" if name == "start" else "white",  # the fit is most of the time
    )
    other = replace(base, **{name: value})  # type: ignore[arg-type]
    identities = [set_identity("5c" * 32, SIZE, config, 0, "train") for config in (base, other)]
    assert (identities[0] != identities[1]) == counts
    sets = [
        ensure_set(tiny_teacher, config, 0, SetStore(tmp_path / str(index)), progress=False)
        for index, config in enumerate((base, other))
    ]
    assert (sets[0].digest != sets[1].digest) == counts
    assert (sets[0].manifest["terms"] != sets[1].manifest["terms"]) == counts


def test_sets_keep_their_names() -> None:
    """A change of the key makes every stored set unfindable: raise FORMAT_VERSION with it."""
    settings = {
        *("method", "start", "swing_conv"),
        *("num_images", "shard_size", "iterations", "lr", "schedule", "plateau_patience", "plateau_factor"),
        *("bns_weight", "bns_form", "inception_weight", "hard_sample_gamma", "calib_centers", "augment"),
    }
    assert set(set_identity("5c" * 32, SIZE, SynthesisConfig(start="white"), 0, "train")["synthesis"]) == settings
    centers = {"center_iterations", "center_weight", "center_depth"}
    config = SynthesisConfig(calib_centers=True, start="white")
    assert set(set_identity("5c" * 32, SIZE, config, 0, "train")["synthesis"]) == settings | centers
    config = replace(config, lr=0.5, num_images=14, shard_size=4, iterations=6, center_iterations=4)
    key = SetStore("/nowhere").key("7e" * 32, replace(config, augment="flip_shift"), 3, input_size=(1, 9, 8))
    assert key == "4382e01c62b67f145e8be8aa6f8ec47c"


def test_a_set_records_its_initial_noise_and_every_shard_has_it(tmp_path: Path, tiny_teacher: Teacher) -> None:
    config = SynthesisConfig(num_images=8, shard_size=4, iterations=0)
    made = ensure_set(tiny_teacher, config, 0, SetStore(tmp_path), progress=False)
    fitted = made.manifest["start_noise"]
    noise = StartNoise.from_values(fitted)
    assert noise != WHITE and [shard["start_noise"] for shard in made.manifest["shards"]] == [fitted] * 2
    for index in range(2):
        generator = make_generator("synthesis", 0, "train", "shard", index)
        white = torch.randn((4, *tiny_teacher.input_size), generator=generator)
        torch.testing.assert_close(made.images[4 * index : 4 * index + 4], PIXELS.clamp(noise.apply(white)))
    white_set = ensure_set(tiny_teacher, replace(config, start="white"), 0, SetStore(tmp_path), progress=False)
    assert "start_noise" not in white_set.manifest
    assert made.manifest["terms"]["bns"] < white_set.manifest["terms"]["bns"]
    other_seed = ensure_set(tiny_teacher, config, 1, SetStore(tmp_path), progress=False)
    assert other_seed.manifest["start_noise"] != fitted, "the probes are of the set's own seed"


def test_a_resumed_set_keeps_the_initial_noise_of_its_first_shard(
    tmp_path: Path, tiny_teacher: Teacher, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second fit may end elsewhere: other threads, another device. The first one's is written down."""
    config = SynthesisConfig(num_images=8, shard_size=4, iterations=0)
    store = SetStore(tmp_path)
    whole = ensure_set(tiny_teacher, config, 0, SetStore(tmp_path / "other"), progress=False)
    write, written = SetStore.write_part, []

    def stop_after_one(self: SetStore, path: Path, tensors: Mapping[str, Tensor], info: Mapping[str, Any]) -> None:
        if written:
            raise KeyboardInterrupt
        written.append(path)
        write(self, path, tensors, info)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(SetStore, "write_part", stop_after_one)
        ensure_set(tiny_teacher, config, 0, store, progress=False)
    monkeypatch.setattr("synq.synthesis.generate.fit_start", lambda *_, **__: pytest.fail("the noise was fitted again"))
    continued = ensure_set(tiny_teacher, config, 0, store, progress=False)
    assert torch.equal(continued.images, whole.images)
    assert not list(tmp_path.glob("*.partial")) and not list((tmp_path / "locks").glob("*.start.lock"))
