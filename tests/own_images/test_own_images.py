"""Unlabeled images of the user as the training set: every kind of source, its identity, and its own ranking."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import synq
from support.api_tools import INPUT, RESEARCH, SIZE, GrayNet, labeled
from synq.config.run import config_digest, with_overrides
from synq.evaluation.image_objects import ImageObjects
from synq.runs.record import RunRecord

COUNT = 20
OWN = {**RESEARCH, "synthesis": {key: value for key, value in RESEARCH["synthesis"].items() if key != "num_images"}}


@pytest.fixture(scope="module")
def pixels() -> np.ndarray:
    images, _ = labeled(COUNT, seed=3)
    return (images * 255).round().to(torch.uint8).squeeze(1).numpy()


@pytest.fixture
def pictures(pixels: np.ndarray, tmp_path: Path) -> Path:
    folder = tmp_path / "pictures" / "deep"
    folder.mkdir(parents=True)
    for number, values in enumerate(pixels):
        Image.fromarray(values).resize((24, 24), Image.Resampling.NEAREST).save(folder / f"{number:03}.png")
    return folder.parent


def quantize(images: Any, folder: Path, **more: Any) -> synq.Run:
    called = {**INPUT, "epochs": 1, "config": OWN, "progress": False, **more}
    return synq.quantize(GrayNet(), images=images, output_dir=folder, **called)


class _Items(torch.utils.data.Dataset[tuple[Tensor, int]]):
    def __init__(self, images: Tensor) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.images[index], -1


def test_all_sources_of_the_same_images_give_the_same_set(pixels: np.ndarray, tmp_path: Path) -> None:
    floats = torch.from_numpy(pixels).float()[:, None] / 255
    file = tmp_path / "own.npz"
    np.savez(file, x=pixels)

    def stream() -> Iterator[Image.Image]:
        yield from map(Image.fromarray, pixels)

    sources = [file, f"npz:{file}", pixels, floats, _Items(floats), stream(), list(map(Image.fromarray, pixels))]
    sources.append(torch.utils.data.DataLoader(_Items(floats), batch_size=8))
    runs = [quantize(source, tmp_path / str(number), epochs=0) for number, source in enumerate(sources)]
    assert len({run.record.set_digest for run in runs}) == 1
    images, labels = runs[0].images.images, runs[0].images.labels
    torch.testing.assert_close(images, (floats - 0.5) / 0.25)
    assert torch.equal(labels, runs[0].teacher.graph(images).argmax(1))


def test_a_folder_is_resized_as_the_labeled_images_are(pictures: Path, pixels: np.ndarray, tmp_path: Path) -> None:
    run = quantize(pictures, tmp_path / "out", epochs=1)
    assert run.images.images.shape == (COUNT, *SIZE)
    assert run.config.synthesis.num_images == COUNT and run.config.finetune.batch_size == 16
    from synq.evaluation.labeled_images import read_image
    from synq.teacher.preprocessing import default_rule

    first = read_image(pictures / "deep" / "000.png", SIZE, default_rule(SIZE))
    torch.testing.assert_close(run.images.images[0], (first.float() / 255 - 0.5) / 0.25)


def test_a_run_on_own_images_has_its_own_protocol_and_ranking(pixels: np.ndarray, tmp_path: Path) -> None:
    own = quantize(pixels, tmp_path, dataset=labeled())
    zero_shot = quantize(None, tmp_path, dataset=labeled())
    assert own.record.protocol == "A own_images" and zero_shot.record.protocol == "A"
    assert own.record.heldout_digest == zero_shot.record.heldout_digest, "measured on the same synthetic images"
    assert own.record.set_digest != zero_shot.record.set_digest
    board = synq.sweeps.leaderboard(tmp_path)
    assert list(board["rank"]) == [1, 1] and set(board["protocol"]) == {"A", "A own_images"}
    assert set(board["params.synthesis.method"]) == {"inversion", "own_images"}
    from synq.sweeps.leaderboard.records import read_tables
    from synq.sweeps.leaderboard.views import single_ranking

    with pytest.raises(ValueError, match="protocol"):
        single_ranking(read_tables([tmp_path])[0].standings())
    assert quantize(pixels, tmp_path, dataset=labeled()).record == own.record, "found again"
    exported = own.export(formats=["packed"])
    card = (exported.folder / "README.md").read_text()
    assert "not zero-shot" in card
    assert "| 16 synthetic |" in card and f"| {COUNT} own |" in card and f"{16 + COUNT} synthetic" not in card


def test_images_that_have_changed_are_another_set(pictures: Path, tmp_path: Path) -> None:
    quantize(pictures, tmp_path / "out", epochs=0)
    changed = Image.new("L", (24, 24), 7)
    changed.save(pictures / "deep" / "000.png")
    with pytest.raises(ValueError, match=r"`synthesis\.source` must have the images of the set .* has changed since"):
        quantize(pictures, tmp_path / "out", epochs=1)


def test_a_finished_run_is_not_taken_for_one_of_other_images(pictures: Path, tmp_path: Path) -> None:
    done = quantize(pictures, tmp_path / "out", epochs=0)
    assert quantize(pictures, tmp_path / "out", epochs=0).record == done.record
    Image.new("L", (24, 24), 7).save(pictures / "deep" / "000.png")
    with pytest.raises(ValueError, match="has changed since"):
        quantize(pictures, tmp_path / "out", epochs=0)
    other = tmp_path / "elsewhere" / pictures.name
    other.mkdir(parents=True)
    for number in range(COUNT):
        Image.new("L", (24, 24), number).save(other / f"{number}.png")
    with pytest.raises(ValueError, match="another source of the same name"):
        quantize(other, tmp_path / "out", epochs=0)


def test_images_that_are_resized_by_another_rule_are_other_images(pictures: Path, tmp_path: Path) -> None:
    known = {"mean": (0.5,), "std": (0.25,), "input_size": SIZE, "interpolation": "bilinear"}
    quantize(pictures, tmp_path / "out", epochs=0, preprocessing={**known, "crop_pct": 1.0})
    with pytest.raises(ValueError, match="is resized by another rule"):
        quantize(pictures, tmp_path / "out", epochs=0, preprocessing={**known, "crop_pct": 0.5})


def test_the_digest_is_of_what_a_student_sees(pixels: np.ndarray) -> None:
    floats = torch.from_numpy(pixels).float()[:, None] / 255

    def digest(data: Any, labeled: bool = False) -> str:
        return ImageObjects(data, "images", labeled=labeled).digest

    assert digest(floats) == digest(_Items(floats)) == digest((floats, torch.zeros(COUNT))), "labels do not matter"
    assert digest((floats, torch.zeros(COUNT).long()), True) != digest((floats, torch.ones(COUNT).long()), True)
    assert digest(floats) != digest(list(map(Image.fromarray, pixels))), "these are resized as image files"


class _Stream(torch.utils.data.IterableDataset[tuple[Tensor, int]]):
    def __len__(self) -> int:
        return 3

    def __iter__(self) -> Iterator[tuple[Tensor, int]]:
        yield from ((torch.full(SIZE, 0.2 * number), number) for number in range(3))


def test_data_that_can_only_be_iterated() -> None:
    loader = torch.utils.data.DataLoader(_Stream(), batch_size=None)
    found = [ImageObjects(data, "dataset", labeled=True) for data in (_Stream(), loader)]
    assert [each.labels.tolist() for each in found if each.labels is not None] == [[0, 1, 2]] * 2
    assert found[0].digest == found[1].digest and found[0].sizes == {SIZE[1:]}


def test_fewer_images_are_a_fixed_choice(pixels: np.ndarray, tmp_path: Path) -> None:
    sets = [quantize(pixels, tmp_path / name, epochs=0, num_images=5).record.set_digest for name in ("a", "b")]
    other = quantize(pixels, tmp_path / "c", epochs=0, num_images=5, seed=1).record.set_digest
    assert sets[0] == sets[1] != other


def test_their_number_may_be_chosen_in_the_settings(pixels: np.ndarray, tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text("[synthesis]\nnum_images = 5\n[finetune]\nbatch_size = 16\n")
    whole = synq.RunConfig()
    chosen = with_overrides(whole, {"synthesis.num_images": 5, "finetune.batch_size": 4})
    cases: list[tuple[Any, int | None, int]] = [
        ({**OWN, "synthesis.num_images": 5}, None, 5),
        ({**OWN, "synthesis.num_images": 5}, 6, 6),
        ({**OWN, "finetune.batch_size": 2000}, None, COUNT),
        ({**OWN, "finetune.batch_size": 2000}, 7, 7),
        (file, None, 5),
        (chosen, None, 5),
        (whole, None, COUNT),
    ]
    from synq.api.quantize import MANY, _with_own
    from synq.api.settings import chosen_num_images, settings_of

    np.savez(tmp_path / "own.npz", x=pixels)
    for config, argument, expected in cases:
        number = argument if argument is not None else chosen_num_images(config)
        settings = settings_of(config, {"synthesis.num_images": MANY})
        found = _with_own(settings, f"npz:{tmp_path / 'own.npz'}", number)
        assert found.synthesis.num_images == expected >= found.finetune.batch_size
    run = quantize(pixels, tmp_path / "out", config=cases[0][0], epochs=0)
    assert run.images.images.shape == (5, *SIZE)
    with pytest.raises(ValueError, match=r"`synthesis\.num_images` must be a finite number >= 1"):
        quantize(pixels, tmp_path / "out", num_images=0)


def test_an_argument_may_make_the_settings_valid(tmp_path: Path) -> None:
    from synq.api.settings import settings_of

    file = tmp_path / "run.toml"
    file.write_text("[finetune]\nbatch_size = 2000\n")
    for config in ({"finetune.batch_size": 2000}, file):
        assert settings_of(config, {"synthesis.num_images": 3000}).finetune.batch_size == 2000
        with pytest.raises(ValueError, match=r"must be <= `synthesis\.num_images` \(1024, the default\)"):
            settings_of(config, {"seed": 1})


def test_what_cannot_be_read_is_rejected(pixels: np.ndarray, tmp_path: Path) -> None:
    normalized = (torch.from_numpy(pixels).float()[:, None] / 255 - 0.5) / 0.25
    cases = [
        (normalized, "not normalized ones"),
        (pixels.astype(np.int32), "type uint8 or float"),
        ([], "must hold images, but is empty"),
        (3, "must be images, a data set or an iterable"),
        (np.zeros((4, 12, 24), np.uint8), "aspect ratio"),
        (np.zeros((4, 12, 12, 3), np.uint8), r"1 channel\(s\)"),
    ]
    for images, reason in cases:
        with pytest.raises(ValueError, match=reason):
            quantize(images, tmp_path / "out")
    with pytest.raises(ValueError, match=r"`synthesis\.num_images` must be at most 20"):
        quantize(pixels, tmp_path / "out", num_images=21)
    with pytest.raises(FileNotFoundError, match="`images` must name an existing"):
        quantize(tmp_path / "absent", tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="has none"):
        quantize(tmp_path / "empty", tmp_path / "out")
    assert not list(tmp_path.glob("out/run-*/record.json"))


def test_the_settings_name_the_source() -> None:
    plain = synq.RunConfig()
    own = with_overrides(plain, {"synthesis.method": "own_images", "synthesis.source": "folder:/a/photos"})
    moved = with_overrides(own, {"synthesis.source": "folder:/b/photos"})
    assert config_digest(own) == config_digest(moved) != config_digest(plain)
    assert own.protocol == "A own_images"
    with pytest.raises(ValueError, match=r"`synthesis\.source` must be given exactly for method own_images"):
        with_overrides(plain, {"synthesis.method": "own_images"})
    with pytest.raises(ValueError, match=r"`synthesis\.source` must be given exactly for method own_images"):
        with_overrides(plain, {"synthesis.source": "folder:x"})
    assert RunRecord(protocol="A own_images") == replace(RunRecord(), protocol="A own_images")


def test_by_command(pixels: np.ndarray, tmp_path: Path, capsys: pytest.CaptureFixture[str], as_args: Any) -> None:
    from synq.train import main

    np.savez(tmp_path / "own.npz", x=pixels)
    settings = {
        "synthesis.method": "own_images",
        "synthesis.source": f"npz:{tmp_path / 'own.npz'}",
        "synthesis.num_images": 20,
        "evaluation.heldout_images": 16,
        "synthesis.iterations": 2,
        "synthesis.start": "white",
        "finetune.epochs": 0,
        "evaluation.dataset": "none",
        "runtime.output_dir": str(tmp_path / "out"),
    }
    assert main(as_args(settings)) == 0
    assert "A own_images" in capsys.readouterr().out
    np.savez(tmp_path / "own.npz", x=pixels[:, :, :8])
    settings["runtime.output_dir"] = str(tmp_path / "other")
    assert main(as_args(settings)) == 2
    assert "must have the aspect ratio of the teacher's input" in capsys.readouterr().err
