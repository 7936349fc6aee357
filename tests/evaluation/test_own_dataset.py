"""Labeled images of a user's function: by a name or a file, in a run, and what is rejected."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import TensorDataset

import synq
from support.added import install, nothing_added
from support.api_tools import INPUT, RESEARCH, SIZE, GrayNet, labeled
from synq.evaluation.labeled import LabeledSet, load_labeled

FILE = """
import numpy as np

def pair(part):
    rng = np.random.default_rng(len(part))
    return rng.integers(0, 256, (20, 12, 12), dtype=np.uint8), rng.integers(0, 5, 20)
"""


@pytest.fixture(autouse=True)
def _nothing_added(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with nothing_added(monkeypatch):
        yield


def load(spec: str, size: tuple[int, int, int] = SIZE) -> LabeledSet:
    return load_labeled(spec, size, (0.5,) * size[0], (0.25,) * size[0], num_classes=5)


@pytest.mark.parametrize("form", ["pair", "dataset", "iterable", "arrays"])
def test_a_function_returns_what_dataset_takes(form: str) -> None:
    images, labels = labeled(20)
    pixels = (images * 255).round().to(torch.uint8)
    forms: dict[str, Callable[[], Any]] = {
        "pair": lambda: (images, labels),
        "dataset": lambda: TensorDataset(images, labels),
        "iterable": lambda: iter([(image, int(label)) for image, label in zip(pixels, labels, strict=True)]),
        "arrays": lambda: (pixels[:, 0].numpy(), labels.tolist()),
    }
    synq.dataset_source("mine", version="1")(lambda text: forms[form]())
    found = load("mine@1")
    batch, classes = found.batch(torch.arange(20))
    assert torch.allclose(batch, (images - 0.5) / 0.25, atol=1e-6) and torch.equal(classes, labels)
    synq.dataset_source("plain", version="1")(lambda text: (images, labels))
    assert found.fingerprint() == load("plain").fingerprint(), "the digest is of the images and labels"


def test_a_function_gets_the_text_after_the_colon() -> None:
    texts: list[str] = []

    def source(text: str) -> tuple[Tensor, Tensor]:
        texts.append(text)
        return labeled(6, seed=len(text))

    synq.dataset_source("mine", version="1")(source)
    digests = {load(spec).fingerprint() for spec in ("mine", "mine@1:val", "mine:C:/test set")}
    assert texts == ["", "val", "C:/test set"] and len(digests) == 3


def test_images_of_another_size_are_resized_as_files_and_arrays_are() -> None:
    images, labels = labeled(6)
    synq.dataset_source("mine", version="1")(lambda text: (images, labels))
    found = load("mine", (3, 24, 24))
    assert found.is_resized and found.batch(torch.arange(6))[0].shape == (6, 3, 24, 24)
    assert found.rule.startswith("resize whole images from 12 x 12 to 24 x 24")


BAD: dict[str, tuple[Callable[[str], Any], str]] = {
    "nothing": (lambda text: None, "must return images and labels, but mine:x returned NoneType"),
    "path": (lambda text: "/data/val", "mine:x returned str"),
    "raises": (lambda text: [][1], "mine:x raised IndexError"),
    "exits": (lambda text: exit(1), "mine:x raised SystemExit"),
    "lazy": (lambda text: ((1 / 0, 0) for _ in range(3)), "mine:x raised ZeroDivisionError"),
    "labels": (lambda text: (labeled(4)[0], torch.arange(4) + 2), r"must be in 0\.\.4 .* but got 2\.\.5"),
    "lengths": (lambda text: (labeled(4)[0], torch.arange(3)), "`evaluation.dataset mine:x` must"),
    "range": (lambda text: (labeled(4)[0] * 255, torch.arange(4)), "`evaluation.dataset mine:x` must"),
    "nan": (lambda text: (labeled(4)[0] / 0 * 0, torch.arange(4)), "`evaluation.dataset mine:x` must"),
    "shape": (lambda text: (np.zeros((4, 2, 2, 2, 2), np.uint8), [0] * 4), "`evaluation.dataset mine:x` must"),
    "empty": (lambda text: ([], []), "`evaluation.dataset mine:x` must hold images, but is empty"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_labeled_set_is_rejected(name: str) -> None:
    function, reason = BAD[name]
    synq.dataset_source("mine", version="1")(function)
    with pytest.raises(ValueError, match=reason) as found:
        load("mine:x").batch(torch.arange(4))
    assert "\n" not in str(found.value)


def test_a_set_of_a_package_and_of_a_file_in_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path / "site", monkeypatch, "synq.dataset_sources", "pair", FILE)
    (tmp_path / "mine.py").write_text(FILE)

    def quantize(dataset: str) -> synq.Run:
        arguments: dict[str, Any] = {**INPUT, "config": RESEARCH, "epochs": 1, "progress": False}
        return synq.quantize(GrayNet(), dataset=dataset, output_dir=tmp_path / "out", **arguments)

    run = quantize("acme:val")
    assert run.record.config["evaluation"]["dataset"] == "acme@2.5:val" and run.record.num_eval == 20
    assert run.record.evaluation["dataset"] == "acme@2.5:val" and run.record.top1 is not None
    other = quantize(f"{tmp_path}/mine.py:pair")
    assert other.path != run.path and other.record.num_eval == 20
    assert other.record.config["evaluation"]["dataset"].startswith(f"{tmp_path}/mine.py:pair@")
    assert other.record.student_of == run.path.name, "the student does not depend on the labeled images"
    counted = run.evaluate("acme:some/folder.tar")
    assert counted.num_eval == 20 and counted.dataset == "acme@2.5:some/folder.tar", "the text is no path of ours"


def test_a_set_by_command(
    tmp_path: Path, tiny_settings: dict[str, object], as_args: Callable[..., list[str]], capsys: Any
) -> None:
    from synq.train import main

    file = tmp_path / "mine.py"
    file.write_text(FILE + "\ndef broken(part):\n    return 1 / 0\n")
    settings = {**tiny_settings, "runtime.output_dir": str(tmp_path / "out")}
    for name, reason in (("broken", "raised ZeroDivisionError"), ("pare", "did you mean `pair`")):
        assert main(as_args({**settings, "evaluation.dataset": f"{file}:{name}"})) == 2
        (line,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
        assert reason in line
    assert not (tmp_path / "out").exists()
