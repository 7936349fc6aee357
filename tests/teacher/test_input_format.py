"""Input size and normalization as other libraries state them."""

from typing import Any

import pytest
import torch
from torch import nn

from synq.teacher.input_format import format_of, input_format

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def test_of_timm_models() -> None:
    import timm

    net = timm.create_model("resnet18", pretrained=False)
    found = input_format(net)
    assert (found.input_size, (found.mean, found.std)) == ((3, 224, 224), IMAGENET)
    assert found.rule is not None and found.rule.resize_size == (235, 235)
    gray = timm.create_model("resnet18", pretrained=False, in_chans=1)
    assert input_format(gray).mean is None, "the statistics of color images do not fit"
    data = timm.data.resolve_data_config({}, model=net)
    assert format_of(data).input_size == (3, 224, 224)  # type: ignore[union-attr]


def test_of_torchvision_weights() -> None:
    from torchvision.models import Inception_V3_Weights, ResNet18_Weights

    for knows in (ResNet18_Weights.IMAGENET1K_V1, ResNet18_Weights.IMAGENET1K_V1.transforms()):
        found = format_of(knows)
        assert found is not None and found.rule is not None
        assert (found.input_size, (found.mean, found.std)) == ((3, 224, 224), IMAGENET)
        assert found.rule.resize_size == (256, 256)
    found = format_of(Inception_V3_Weights.DEFAULT)
    assert found is not None and found.input_size == (3, 299, 299)


def test_of_a_compose() -> None:
    from torchvision import transforms as T

    steps = [T.Resize(36), T.CenterCrop(32), T.ToTensor(), T.Normalize((0.5,) * 3, (0.2,) * 3)]
    found = format_of(T.Compose(steps))
    assert found is not None and (found.input_size, found.std) == ((3, 32, 32), (0.2,) * 3)
    found = format_of(T.Compose([T.Resize(36), T.Normalize((0.5,), (0.2,))]))
    assert found is not None and found.input_size is None, "a Resize of one number keeps the aspect ratio"
    with pytest.raises(ValueError, match="`preprocessing` must be weights of torchvision"):
        input_format(nn.Identity(), T.Compose([T.ToTensor()]))


class Processor:
    """The attributes of an image processor of Hugging Face."""

    def __init__(self, **values: Any) -> None:
        self.image_mean, self.image_std = [0.5, 0.4, 0.3], [0.2, 0.2, 0.1]
        self.do_normalize = self.do_rescale = True
        self.rescale_factor = 1 / 255
        vars(self).update(values)


def test_of_a_processor() -> None:
    found = format_of(Processor(size={"shortest_edge": 256}, crop_size={"height": 224, "width": 192}, resample=3))
    assert found is not None and found.rule is not None
    assert (found.input_size, found.mean, found.rule.interpolation) == ((3, 224, 192), (0.5, 0.4, 0.3), "bicubic")
    found = format_of(Processor(size={"height": 64, "width": 64}, do_normalize=False))
    assert found is not None and (found.input_size, found.mean, found.std) == ((3, 64, 64), (0.0,) * 3, (1.0,) * 3)


def test_a_processor_that_divides_by_its_std_twice() -> None:
    found = format_of(Processor(size={"height": 8, "width": 8}, include_top=True))
    assert found is not None and found.mean == (0.5, 0.4, 0.3)
    assert found.std == pytest.approx((0.04, 0.04, 0.01))


class SizeDict:
    """As of transformers 5: every name is an attribute, None where it is not set, and it is no mapping."""

    def __init__(self, **sides: int) -> None:
        self.height = self.width = self.shortest_edge = self.longest_edge = None
        vars(self).update(sides)


@pytest.mark.parametrize(("edge", "resized", "mode"), [(64, 73, "center"), (384, 384, "squash")])
def test_of_a_processor_that_crops_by_a_share(edge: int, resized: int, mode: str) -> None:
    """The rule of ConvNextImageProcessor, with its attributes in transformers 5 and 4."""
    new = {"size": SizeDict(shortest_edge=edge), "crop_size": None, "do_center_crop": None}
    for more in (new, {"size": {"shortest_edge": edge}}):
        found = format_of(Processor(**more, crop_pct=0.875, do_resize=True, resample=3))
        assert found is not None and found.input_size == (3, edge, edge)
        rule = found.rule
        assert rule is not None and (rule.resize_size, rule.crop_mode) == ((resized, resized), mode)
        assert rule.interpolation == "bicubic"


def test_of_a_processor_of_transformers_5() -> None:
    sizes = {"size": SizeDict(shortest_edge=256), "crop_size": SizeDict(height=224, width=224)}
    found = format_of(Processor(**sizes, do_center_crop=True, resample=2))
    assert found is not None and found.input_size == (3, 224, 224)
    assert found.rule is not None and found.rule.resize_size == (256, 256)
    for more in ({"do_resize": False}, {"size": SizeDict(longest_edge=64)}):
        found = format_of(Processor(**{"size": SizeDict(height=64, width=64), **more}, do_center_crop=None, resample=2))
        assert found is not None and (found.input_size, found.rule) == (None, None), "the size is that of the image"


def test_a_processor_of_another_scale() -> None:
    """Pixels in 0..255 by the processor's own formula, and by the mean and std for images in [0, 1]."""
    processor = Processor(size={"height": 8, "width": 8}, rescale_factor=1 / 127.5, rescale_offset=True)
    found = format_of(processor)
    assert found is not None and found.mean is not None and found.std is not None
    pixels = torch.arange(0.0, 256.0, 5.0)
    for channel in range(3):
        theirs = (pixels / 127.5 - 1 - processor.image_mean[channel]) / processor.image_std[channel]
        ours = (pixels / 255 - found.mean[channel]) / found.std[channel]
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_of_a_processor_that_resizes_to_more_than_it_states() -> None:
    """LeViT's resizes the shorter side to 256 / 224 of `size`, whatever else it states."""
    sizes = {"size": SizeDict(shortest_edge=224), "crop_size": SizeDict(height=224, width=224)}
    for name, resized in (("LevitImageProcessor", 256), ("LevitImageProcessorFast", 256), ("Processor", 224)):
        kind = type(name, (Processor,), {})
        found = format_of(kind(**sizes, do_center_crop=True, resample=3))
        assert found is not None and found.input_size == (3, 224, 224)
        assert found.rule is not None and found.rule.resize_size == (resized, resized)
