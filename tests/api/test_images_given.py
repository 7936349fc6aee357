"""Images as users write them down: a path as text, and objects that are not images."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import synq
from support.api_tools import INPUT, RESEARCH, GrayNet, labeled


def test_a_path_of_labeled_images_may_be_a_text(in_tmp: Path) -> None:
    images, labels = labeled()
    pixels = (images * 255).round().numpy().astype(np.uint8)[:, 0]
    np.savez("lab.npz", x=pixels, y=labels.numpy())
    for number, (image, label) in enumerate(zip(pixels, labels.tolist(), strict=True)):
        file = in_tmp / "photos" / f"class{label}" / f"{number:02}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(file)
    called = {**INPUT, "config": RESEARCH, "epochs": 0, "progress": False}
    run = synq.quantize(GrayNet(), dataset=f"{in_tmp}/lab.npz", output_dir="out", **called)
    assert run.config.evaluation.dataset == f"npz:{in_tmp}/lab.npz"
    for text in ("lab.npz", "./lab.npz", "photos", f"{in_tmp}/photos", "npz:lab.npz", "imagefolder:photos"):
        assert run.evaluate(text).teacher_top1 == run.record.teacher_top1
    for text, reason in (("cifar", "did you mean cifar10"), ("npy:a/b.npz", "must be one of digits")):
        with pytest.raises(ValueError, match=reason):
            run.evaluate(text)
    with pytest.raises(FileNotFoundError, match=r"none\.npz"):
        run.evaluate("none.npz")


def test_a_dict_of_arrays_is_named(tmp_path: Path) -> None:
    images, labels = labeled()
    called = {**INPUT, "config": RESEARCH, "epochs": 0, "output_dir": tmp_path, "progress": False}
    for given, form in (
        (
            {"dataset": {"image": images, "label": labels}},
            r"`dataset` .* a dict of image, label: give \(images, labels",
        ),
        ({"images": {"train": [images]}}, "`images` .* a dict of train: give its images from it"),
    ):
        with pytest.raises(ValueError, match=form):
            synq.quantize(GrayNet(), **given, **called)
