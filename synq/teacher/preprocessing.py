"""How weights expect image files to be resized and cropped: the rule of their source, which their accuracy is of."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

CROP_RATIO = 256 / 224
"""Shorter side by input size where a source states no rule: that of ImageNet's usual evaluation."""
INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "lanczos", "box", "hamming")


@dataclass(frozen=True, kw_only=True, slots=True)
class Preprocessing:
    """Resizing of an image file before its center is cut out at the network's input size.

    Attributes:
        resize_size: Height and width in pixels that the image is resized to; see `crop_mode`.
        interpolation: Filter, one of INTERPOLATIONS, antialiased (as Pillow does it).
        crop_mode: center: both sides of the image are at least `resize_size`, aspect ratio kept. squash: exactly
            `resize_size`. border: both sides at most `resize_size`, aspect ratio kept, filled up with `fill`.
        fill: Color around the image under border, per channel, on the scale 0..1.
        source: Who states this rule, for records.
    """

    resize_size: tuple[int, int]
    interpolation: str
    crop_mode: Literal["center", "squash", "border"] = "center"
    fill: tuple[float, ...] = ()
    source: str = "default"

    def scaled(self, height: int, width: int) -> tuple[int, int]:
        """Return the height and width that an image of `height` x `width` pixels is resized to."""
        to_height, to_width = self.resize_size
        if self.crop_mode == "squash":
            return to_height, to_width
        if self.crop_mode == "center" and to_height == to_width:
            # The rule of torchvision's Resize: the longer side is rounded down.
            longer = int(to_height * max(height, width) / min(height, width))
            return (to_height, longer) if height <= width else (longer, to_width)
        ratios = (height / to_height, width / to_width)
        ratio = max(ratios) if self.crop_mode == "border" else min(ratios)
        return max(round(height / ratio), 1), max(round(width / ratio), 1)

    def describe(self) -> str:
        """Return the rule as a text."""
        height, width = self.resize_size
        sides = str(height) if height == width else f"{height} x {width}"
        how = {
            "center": f"shorter side to {sides}" if height == width else f"to at least {sides}, aspect ratio kept",
            "squash": f"to {height} x {width}, aspect ratio not kept",
            "border": f"into {height} x {width}, aspect ratio kept, filled up with the mean color",
        }
        return f"resize {how[self.crop_mode]} ({self.interpolation}, antialiased), center crop; rule of {self.source}"


def stored_rule(values: Mapping[str, Any] | None) -> Preprocessing | None:
    """Return the rule that a record has as plain values; None without one.

    Args:
        values: The fields of a `Preprocessing`, as `dataclasses.asdict` and JSON give them.

    Raises:
        ValueError: They are no rule.
    """
    if values is None:
        return None
    try:
        height, width = values["resize_size"]
        return Preprocessing(**{**values, "resize_size": (int(height), int(width)), "fill": tuple(values["fill"])})
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"`teacher.preprocessing` of a record must be a rule of resizing, but got {values}") from error


def default_rule(input_size: Sequence[int]) -> Preprocessing:
    """Return the rule where none is known: shorter side to size x 256 / 224, bilinear, center crop."""
    _, height, width = input_size
    size = (round(height * CROP_RATIO), round(width * CROP_RATIO))
    return Preprocessing(resize_size=size, interpolation="bilinear", source="ImageNet's usual evaluation (default)")


def torchvision_rule(transforms: Any, name: str, input_size: Sequence[int]) -> Preprocessing:
    """Return the rule of torchvision's weights.

    Args:
        transforms: Result of `Weights.transforms()`.
        name: Name of the weights, for records.
        input_size: (C, H, W) of the teacher; at another size than the weights' own the ratio is kept.
    """
    resize, crop = int(transforms.resize_size[0]), int(transforms.crop_size[0])
    _, height, width = input_size
    size = (round(height * resize / crop), round(width * resize / crop))
    return Preprocessing(resize_size=size, interpolation=transforms.interpolation.value, source=f"torchvision's {name}")


def timm_rule(metadata: Any, input_size: Sequence[int]) -> Preprocessing:
    """Return the rule of timm's weights: that of `timm.data.create_transform` for evaluation.

    Args:
        metadata: The model's `pretrained_cfg`.
        input_size: (C, H, W) of the teacher; at the weights' test size their test_crop_pct applies.
    """
    _, height, width = input_size
    fraction = metadata.get("crop_pct") or 0.875
    if metadata.get("test_crop_pct") and tuple(metadata.get("test_input_size") or ()) == tuple(input_size):
        fraction = metadata["test_crop_pct"]
    mode = metadata.get("crop_mode") or "center"
    interpolation = metadata.get("interpolation") or "bicubic"
    return Preprocessing(
        resize_size=(math.floor(height / fraction), math.floor(width / fraction)),
        interpolation=interpolation if interpolation in INTERPOLATIONS else "bilinear",
        crop_mode="squash" if mode == "squash" else "border" if mode == "border" else "center",
        fill=tuple(metadata.get("mean") or ()),
        source=f"timm's pretrained_cfg (crop_pct {fraction:g})",
    )


def overridden(
    rule: Preprocessing, input_size: Sequence[int], resize_size: int | None, interpolation: str | None
) -> Preprocessing:
    """Return a rule with the user's settings `evaluation.resize_size` and `evaluation.interpolation`.

    Args:
        rule: The rule of the weights.
        input_size: (C, H, W) of the teacher.
        resize_size: Shorter side in pixels, with a center crop; None keeps the rule's.
        interpolation: Filter; None keeps the rule's.

    Raises:
        ValueError: If the shorter side is smaller than the teacher's input.
    """
    _, height, width = input_size
    shorter = min(height, width)
    if resize_size is not None:
        if resize_size < shorter:
            raise ValueError(
                f"`evaluation.resize_size` must be at least the teacher's input size, {shorter}, but got {resize_size}"
            )
        size = (round(height * resize_size / shorter), round(width * resize_size / shorter))
        rule = replace(rule, resize_size=size, crop_mode="center", source="evaluation.resize_size")
    if interpolation is not None:
        source = rule.source if resize_size is not None else f"{rule.source}, evaluation.interpolation"
        rule = replace(rule, interpolation=interpolation, source=source)
    return rule
