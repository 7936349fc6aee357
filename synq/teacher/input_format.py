"""Input size and normalization as an object of another library has them: weights, processors, configurations.

Known are a weights entry of torchvision and its transforms, an image processor of Hugging Face, `pretrained_cfg` of
timm (or the result of `timm.data.resolve_data_config`), and a `Compose` with `Normalize`. They are recognized by their
attributes, so none of these libraries is imported.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from synq.teacher.preprocessing import Preprocessing, timm_rule, torchvision_rule

PILLOW_FILTERS = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")
"""Filters of Pillow by their number, as in `resample` of a processor."""
WARPED_FROM = 384
"""Size from which a processor with `crop_pct` and without `crop_size` (ConvNeXT) resizes to the size and crops nothing;
below it, it resizes to size / crop_pct and cuts out the center."""
ENLARGED = {"LevitImageProcessor": (256, 224)}
"""Processors whose code resizes the shorter side to more than they state, by the start of their name: the ratio."""
ATTRIBUTES = ("pretrained_cfg", "image_processor", "processor", "feature_extractor", "default_cfg")
"""Attributes of a network (timm) or of a pipeline (Hugging Face) that know its input."""


@dataclass(frozen=True, kw_only=True, slots=True)
class InputFormat:
    """What an object states about the input of a network; None for unknown values."""

    input_size: tuple[int, int, int] | None = None
    """(C, H, W)."""
    mean: tuple[float, ...] | None = None
    """Mean per channel, for images in [0, 1]."""
    std: tuple[float, ...] | None = None
    """Standard deviation per channel, for images in [0, 1]."""
    rule: Preprocessing | None = None
    """How image files are resized and cropped, at the chosen input size."""
    source: str = ""
    """The object, for messages."""

    def filled(self, other: "InputFormat") -> "InputFormat":
        """Return a copy whose unknown values are those of another."""
        names = ("input_size", "mean", "std", "rule")
        values = {name: getattr(other, name) for name in names if getattr(self, name) is None}
        return replace(self, **values, source=self.source or other.source)


def input_format(
    holder: object, preprocessing: object = None, input_size: tuple[int, int, int] | None = None
) -> InputFormat:
    """Return what is known about the input of a network.

    Args:
        holder: The network, or the pipeline that holds it, whose attributes are read.
        preprocessing: An object that knows, which goes before the attributes; None without.
        input_size: (C, H, W) that the user gave, at which the rule for image files is needed; None uses the known one.

    Raises:
        ValueError: `preprocessing` is none of the known kinds.
    """
    given = InputFormat()
    if preprocessing is not None:
        found = format_of(preprocessing, input_size)
        if found is None:
            raise ValueError(
                "`preprocessing` must be weights of torchvision or their transforms, an image processor of Hugging "
                f"Face, timm's pretrained_cfg, or a Compose with Normalize, but got {type(preprocessing).__name__}"
            )
        given = found
    for name in ATTRIBUTES:
        found = format_of(getattr(holder, name, None), input_size)
        if found is not None and _fits(found, holder):
            given = given.filled(found)
    return given.filled(InputFormat(input_size=_size_of(holder)))


def format_of(knows: object, input_size: tuple[int, int, int] | None = None) -> InputFormat | None:
    """Return what an object states about the input of a network; None if it is none of the known kinds.

    Args:
        knows: The object.
        input_size: As for `input_format`.
    """
    if knows is None or isinstance(knows, str):
        return None
    transforms: Any = getattr(knows, "transforms", None)
    if callable(transforms) and hasattr(knows, "meta"):  # an entry of torchvision's weights
        return _torchvision(transforms(), str(knows), input_size)
    if hasattr(knows, "crop_size") and hasattr(knows, "mean") and hasattr(knows, "resize_size"):
        return _torchvision(knows, type(knows).__name__, input_size)
    if hasattr(knows, "image_mean") and hasattr(knows, "image_std"):
        return _processor(knows)
    if isinstance(transforms, Sequence):
        return _composed(knows)
    values = knows if isinstance(knows, Mapping) else knows.to_dict() if hasattr(knows, "to_dict") else None
    if isinstance(values, Mapping) and {"mean", "std"} <= values.keys():
        size = _triple(values.get("input_size"))
        rule = timm_rule(values, input_size or size) if size and "interpolation" in values else None
        return InputFormat(
            input_size=size,
            mean=_numbers(values["mean"]),
            std=_numbers(values["std"]),
            rule=rule,
            source="timm's pretrained_cfg",
        )
    return None


def _torchvision(preset: Any, name: str, input_size: tuple[int, int, int] | None) -> InputFormat:
    mean, std = _numbers(preset.mean), _numbers(preset.std)
    size = (len(mean), int(preset.crop_size[0]), int(preset.crop_size[-1]))
    rule = torchvision_rule(preset, name, input_size or size)
    return InputFormat(input_size=size, mean=mean, std=std, rule=rule, source=f"torchvision's {name}")


def _processor(processor: Any) -> InputFormat:
    """Return the input of an image processor: value = (pixel * factor - offset - mean) / std, for pixels in 0..255."""
    name = type(processor).__name__
    height, width = _processed_sides(processor) or (0, 0)
    has_norm = getattr(processor, "do_normalize", True)
    channels = len(processor.image_mean or (0, 0, 0))
    mean = _numbers(processor.image_mean) if has_norm else (0.0,) * channels
    std = _numbers(processor.image_std) if has_norm else (1.0,) * channels
    if getattr(processor, "include_top", False):  # that of EfficientNet divides by its std once more
        std = tuple(value * again for value, again in zip(std, _numbers(processor.image_std), strict=True))
    factor = 255 * float(getattr(processor, "rescale_factor", 1 / 255))
    if not getattr(processor, "do_rescale", True):
        factor = 255.0
    offset = 1.0 if getattr(processor, "rescale_offset", False) else 0.0
    whole = math.isclose(factor, 1.0)
    return InputFormat(
        input_size=(channels, height, width) if height else None,
        mean=mean if whole and not offset else tuple((value + offset) / factor for value in mean),
        std=std if whole else tuple(value / factor for value in std),
        rule=_processor_rule(processor, name, height, width),
        source=f"the {name}",
    )


def _processed_sides(processor: Any) -> tuple[int, int] | None:
    """Return height and width of what a processor returns; None if they are not known."""
    crop = _as_mapping(getattr(processor, "crop_size", None))
    sides = _sides(crop) if getattr(processor, "do_center_crop", True) else None
    if sides is not None or not getattr(processor, "do_resize", True):
        return sides
    return _sides(_as_mapping(getattr(processor, "size", None)))


def _processor_rule(processor: Any, name: str, height: int, width: int) -> Preprocessing | None:
    size = _as_mapping(getattr(processor, "size", None))
    interpolation = _filter_name(getattr(processor, "resample", None))
    resizes = height and getattr(processor, "do_resize", True)
    if not resizes or not isinstance(size, Mapping) or interpolation is None:
        return None
    shorter, share = size.get("shortest_edge"), getattr(processor, "crop_pct", None)
    if not shorter and not {"height", "width"} <= size.keys():
        return None
    crops = getattr(processor, "do_center_crop", True) and getattr(processor, "crop_size", None) is not None
    warps = bool(shorter and share and not crops and shorter >= WARPED_FROM)
    for start, (enlarged, stated) in ENLARGED.items():
        if shorter and name.startswith(start):
            shorter = int(enlarged / stated * shorter)
    if shorter:
        sides = (int(shorter if warps else shorter / (share or 1)),) * 2
    else:
        sides = (int(size["height"]), int(size["width"]))
    if min(sides[0] - height, sides[1] - width) < 0:
        return None
    return Preprocessing(
        resize_size=(sides[0], sides[1]),
        interpolation=interpolation,
        crop_mode="center" if shorter and not warps else "squash",
        source=name,
    )


def _filter_name(resample: Any) -> str | None:
    """Return the filter that a number of Pillow or an interpolation mode of torchvision means; None if unknown."""
    value = getattr(resample, "value", resample)
    if isinstance(value, int) and 0 <= value < len(PILLOW_FILTERS):
        return PILLOW_FILTERS[value]
    return value if isinstance(value, str) and value in PILLOW_FILTERS else None


def _as_mapping(size: Any) -> Any:
    """Return the `SizeDict` of transformers, which has an item for every name but is no mapping, as one."""
    names = ("height", "width", "shortest_edge")
    if isinstance(size, Mapping) or not any(hasattr(size, name) for name in names):
        return size
    return {name: side for name in names if (side := getattr(size, name, None)) is not None}


def _composed(compose: Any) -> InputFormat | None:
    """Return the input of a torchvision Compose: its Normalize, and the last step of a known size."""
    mean = std = sides = None
    for step in compose.transforms:
        kind = type(step).__name__
        if kind == "Normalize":
            mean, std = _numbers(step.mean), _numbers(step.std)
        elif kind in ("CenterCrop", "Resize", "RandomResizedCrop", "RandomCrop"):
            square = kind != "Resize"  # a Resize of one number keeps the aspect ratio, so its size is not known
            sides = _sides(step.size, square=square) or sides
    if mean is None:
        return None
    size = None if sides is None else (len(mean), *sides)
    return InputFormat(input_size=size, mean=mean, std=std, source="the Compose")


def _sides(size: Any, *, square: bool = True) -> tuple[int, int] | None:
    """Return height and width of a size as libraries write it; None if it does not determine both."""
    if isinstance(size, int):
        return (size, size) if square else None
    if isinstance(size, Mapping):
        if "height" in size and "width" in size:
            return int(size["height"]), int(size["width"])
        edge = size.get("shortest_edge")
        return (int(edge), int(edge)) if edge else None
    if isinstance(size, Sequence) and len(size) in (1, 2):
        return (int(size[0]), int(size[-1])) if len(size) == 2 or square else None
    return None


def _size_of(holder: object) -> tuple[int, int, int] | None:
    """Return the input size that a network of pytorchcv or Hugging Face states in its attributes."""
    sides = _sides(getattr(holder, "in_size", None))
    if sides is not None and isinstance(channels := getattr(holder, "in_channels", None), int):
        return channels, *sides
    config = getattr(holder, "config", None)
    sides = _sides(getattr(config, "image_size", None))
    channels = getattr(config, "num_channels", None)
    return (channels, *sides) if sides is not None and isinstance(channels, int) else None


def _fits(found: InputFormat, holder: object) -> bool:
    """Return whether a network reads images of as many channels; its library may have built it for others."""
    first = (
        next((part for part in holder.modules() if isinstance(part, nn.Conv2d)), None)
        if isinstance(holder, nn.Module)
        else None
    )
    return first is None or found.mean is None or len(found.mean) == first.in_channels


def _triple(size: Any) -> tuple[int, int, int] | None:
    return (int(size[0]), int(size[1]), int(size[2])) if size is not None and len(size) == 3 else None


def _numbers(values: Any) -> tuple[float, ...]:
    return (float(values),) if isinstance(values, int | float) else tuple(float(value) for value in values)
