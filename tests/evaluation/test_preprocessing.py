"""The rule of resizing: that of the weights, pixel by pixel, or the user's."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from torch import nn

from support.labeled_files import a_teacher, image_folder, npz
from synq.config.run import EvaluationConfig, QuantConfig, RunConfig, TeacherConfig, config_digest, with_overrides
from synq.evaluation.labeled import load_labeled, open_labeled
from synq.evaluation.measure import Measure
from synq.teacher.preprocessing import Preprocessing, default_rule, overridden, timm_rule, torchvision_rule
from synq.teacher.sources import build_source
from synq.teacher.teacher import load_teacher


def photograph(folder: Path, height: int, width: int) -> tuple[Path, Image.Image]:
    image = Image.fromarray(np.random.default_rng(3).integers(0, 256, (height, width, 3), dtype=np.uint8))
    (folder / "0").mkdir(parents=True, exist_ok=True)
    image.save(folder / "0" / "a.png")
    return folder, image


@pytest.mark.parametrize("shape", [(300, 400), (401, 300), (100, 90)])
@pytest.mark.parametrize(
    "name",
    [
        "ResNet50_Weights.IMAGENET1K_V1",
        "ResNet50_Weights.IMAGENET1K_V2",
        "EfficientNet_B1_Weights.IMAGENET1K_V2",
        "EfficientNet_V2_S_Weights.IMAGENET1K_V1",
        "Inception_V3_Weights.IMAGENET1K_V1",
    ],
)
def test_l_6_images_are_those_of_torchvisions_transforms(tmp_path: Path, name: str, shape: tuple[int, int]) -> None:
    from torchvision import models

    kind, _, member = name.partition(".")
    transforms = getattr(models, kind)[member].transforms()
    size = (3, transforms.crop_size[0], transforms.crop_size[0])
    folder, image = photograph(tmp_path, *shape)
    rule = torchvision_rule(transforms, name, size)
    data = load_labeled(
        f"imagefolder:{folder}", size, transforms.mean, transforms.std, num_classes=3, preprocessing=rule
    )
    expected = transforms(image)
    assert torch.allclose(data[0][0], expected, atol=1e-6)
    assert torch.equal(data[0][0], expected) and name in data.rule


@pytest.mark.parametrize("shape", [(300, 400), (401, 300)])
@pytest.mark.parametrize("name", ["resnet18.a1_in1k", "tf_efficientnet_lite0.in1k", "convnext_base.clip_laion2b"])
@pytest.mark.parametrize("use_test_size", [False, True])
def test_l_6_images_are_those_of_timms_transforms(
    tmp_path: Path, name: str, shape: tuple[int, int], use_test_size: bool
) -> None:
    timm = pytest.importorskip("timm")
    from timm.data import create_transform, resolve_data_config

    cfg = timm.models.get_pretrained_cfg(name)
    cfg = {"crop_pct": 0.9, "interpolation": "bicubic", "crop_mode": "squash"} if cfg is None else cfg.to_dict()
    cfg = {"input_size": (3, 224, 224), **cfg}
    settings = resolve_data_config(pretrained_cfg=cfg, use_test_size=use_test_size)
    folder, image = photograph(tmp_path, *shape)
    rule = timm_rule(cfg, settings["input_size"])
    data = load_labeled(
        f"imagefolder:{folder}",
        settings["input_size"],
        settings["mean"],
        settings["std"],
        num_classes=3,
        preprocessing=rule,
    )
    assert torch.allclose(data[0][0], create_transform(**settings, is_training=False)(image), atol=1e-5)


@pytest.mark.parametrize("mode", ["squash", "border", "center"])
def test_l_6_crop_modes_of_timm(tmp_path: Path, mode: str) -> None:
    pytest.importorskip("timm")
    from timm.data import create_transform, resolve_data_config

    cfg = {
        "input_size": (3, 40, 64),
        "crop_pct": 0.8,
        "interpolation": "bicubic",
        "crop_mode": mode,
        "mean": (0.5,) * 3,
    }
    settings = resolve_data_config(pretrained_cfg=cfg)
    for shape in ((90, 60), (60, 90), (20, 31)):
        folder, image = photograph(tmp_path / mode, *shape)
        data = load_labeled(
            f"imagefolder:{folder}",
            (3, 40, 64),
            settings["mean"],
            settings["std"],
            num_classes=3,
            preprocessing=timm_rule(cfg, (3, 40, 64)),
        )
        expected = create_transform(**settings, is_training=False)(image)
        assert torch.allclose(data[0][0], expected, atol=1e-5), shape


def test_l_6_the_teacher_brings_the_rule_of_its_weights() -> None:
    pytest.importorskip("timm")
    for spec, input_size, expected in (
        ("torchvision:regnet_y_400mf", None, (232, 232)),
        ("torchvision:regnet_y_400mf", (3, 112, 112), (116, 116)),
        ("timm:resnet18.a1_in1k", None, (235, 235)),
    ):
        rule = build_source(TeacherConfig(spec=spec, weights="random", input_size=input_size)).preprocessing
        assert rule is not None and rule.resize_size == expected, spec
    config = TeacherConfig(spec="torchvision:resnet18", weights="random", input_size=(3, 32, 32), num_classes=10)
    rule = load_teacher(config).preprocessing
    assert rule is not None and rule.resize_size == (37, 37) and "ResNet18_Weights" in rule.describe()
    assert load_teacher(TeacherConfig()).preprocessing is None


def test_l_6_the_user_may_override_the_rule(tmp_path: Path, config: RunConfig) -> None:
    rule = torchvision_rule(
        SimpleNamespace(resize_size=[232], crop_size=[224], interpolation=SimpleNamespace(value="bicubic")),
        "W",
        (3, 32, 32),
    )
    assert (rule.resize_size, rule.interpolation) == ((33, 33), "bicubic")
    changed = overridden(rule, (3, 32, 32), 40, None)
    assert (changed.resize_size, changed.interpolation) == ((40, 40), "bicubic") and "resize_size" in changed.source
    assert overridden(rule, (3, 32, 32), None, "nearest").interpolation == "nearest"
    assert overridden(rule, (3, 32, 32), None, None) == rule
    assert overridden(default_rule((3, 32, 64)), (3, 32, 64), 48, None).resize_size == (48, 96)
    with pytest.raises(ValueError, match=r"`evaluation.resize_size` must be at least the teacher's input size, 32"):
        overridden(rule, (3, 32, 32), 31, None)
    for values, words in (({"resize_size": 0}, "resize_size"), ({"interpolation": "cubic"}, "interpolation")):
        with pytest.raises(ValueError, match=f"`evaluation.{words}` must"):
            EvaluationConfig(**values)  # type: ignore[arg-type]
    image_folder(tmp_path / "set", 2)
    spec = f"imagefolder:{tmp_path}/set"
    labeled = open_labeled(
        EvaluationConfig(dataset=spec, resize_size=10, interpolation="bicubic"), a_teacher((1, 8, 8))
    )
    assert labeled is not None and "shorter side to 10 (bicubic" in labeled.rule
    npz(tmp_path / "a.npz")
    with pytest.raises(ValueError, match=r"`evaluation.resize_size` must be left out for npz:"):
        open_labeled(EvaluationConfig(dataset=f"npz:{tmp_path}/a.npz", resize_size=10), a_teacher((1, 8, 8)))
    assert config_digest(config) != config_digest(with_overrides(config, {"evaluation.resize_size": 256}))


def test_l_6_measuring_uses_the_rule(
    make_classifier: Callable[..., nn.Module], tmp_path: Path, accelerator: Accelerator
) -> None:
    image_folder(tmp_path / "set", 3)
    settings = EvaluationConfig(dataset=f"imagefolder:{tmp_path}/set")
    rule = Preprocessing(resize_size=(9, 9), interpolation="lanczos", source="a test")
    measure = Measure.prepare(settings, a_teacher((1, 8, 8), preprocessing=rule), accelerator, quant=QuantConfig())
    assert measure.labeled is not None and measure.labeled.rule == rule.describe()
    plain = Measure.prepare(settings, a_teacher((1, 8, 8)), accelerator, quant=QuantConfig())
    assert measure.labels_digest != plain.labels_digest and plain.has_labels_of(plain.labels_digest)
    assert not plain.has_labels_of(measure.labels_digest) and not plain.has_labels_of("")
