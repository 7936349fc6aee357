"""Image files: strict decoding into gray or RGB pixels of 8 bits, resizing and cropping by a rule.

What a file holds is either read exactly by the rule below or rejected in one line that names the file:

    gray, palette or color of 8 bits   read; bilevel as black and white, CMYK and YCbCr by Pillow's conversion to RGB
    gray of 16 bits (PNG, PGM, TIFF)   value / 65535, rounded to 8 bits; color of 16 bits: its upper 8 bits
    transparency                       rejected unless every pixel is opaque: the background is not defined
    EXIF orientation                   applied: pixels are taken as the image is shown
    several frames or pages            rejected; of a multi-picture JPEG the first is the photograph
    float, 32-bit, CIELAB, ...         rejected: no file states the range or the conversion
"""

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from synq.teacher.preprocessing import Preprocessing
from synq.teacher.weight_readers import LFS_POINTER

IMAGE_SUFFIXES = (
    *(".jpg", ".jpeg", ".jfif", ".png", ".apng", ".bmp", ".gif", ".webp", ".ppm", ".pgm", ".pbm", ".pnm"),
    *(".tif", ".tiff"),
)
OTHER_SUFFIXES = (
    *(".avif", ".dng", ".exr", ".hdr", ".heic", ".heif", ".j2k", ".jp2", ".jpx", ".jxl", ".npy", ".pfm", ".psd"),
    *(".svg", ".tga"),
)
"""Image files that are not read: a folder that has some is rejected, or they would be missing silently."""
MAX_PIXELS = 178_956_970
"""Pixels from which on Pillow takes an image for an attack on memory; also the limit of a resized image."""
_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
"""The only formats that are tried, whatever the suffix: Pillow would run Ghostscript for a file that holds EPS."""
_GRAY = ("1", "L", "LA", "La")
_COLOR = ("P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr")
_GRAY_16 = ("I;16", "I;16B", "I;16L", "I;16N")
_ENDS = {"JPEG": b"\xff\xd9", "MPO": b"\xff\xd9", "PNG": b"IEND"}
"""Last bytes of a complete file; cameras append a few more."""
_TAIL = 64


def check_image(file: Path, data: bytes, channels: int, *, whole: bool) -> None:
    """Raise ValueError if an image cannot be read for a teacher of `channels` channels.

    Args:
        file: Its name, for the message.
        data: Its content.
        channels: 1 or 3.
        whole: Whether to decode all pixels; otherwise only those of images that look truncated or have transparency.
    """
    with _opened(file, data, channels) as image:
        end = _ENDS.get(image.format or "")
        if whole or image.has_transparency_data or (end is not None and end not in data[-_TAIL:]):
            _pixels(image, file, channels)


def read_image(file: Path, size: tuple[int, int, int], rule: Preprocessing) -> Tensor:
    """Read an image as (C, H, W) uint8, resized and cropped by a rule.

    Args:
        file: The image.
        size: (C, H, W) of the teacher, C = 1 or 3.
        rule: Resizing and cropping.

    Raises:
        OSError: If the file cannot be opened.
        ValueError: If it is damaged, or holds what the module's rules reject; one line that names the file.
    """
    with _opened(file, file.read_bytes(), size[0]) as image:
        pixels = _pixels(image, file, size[0])
    return _fitted(pixels, size, rule, file)


def check_object(picture: Image.Image, name: str) -> Tensor:
    """Return the pixels of a Pillow image, (C, H, W) uint8, C = 1 for gray and 3 for color.

    Args:
        picture: The image.
        name: Where it is from, for messages.

    Raises:
        ValueError: If it is damaged, or holds what the module's rules reject.
    """
    file, gray = Path(f"in `{name}`"), picture.mode in _GRAY or picture.mode in _GRAY_16
    try:
        _check_header(picture, file, 3)
        pixels = _pixels(picture.copy(), file, 1 if gray else 3)
    except _RejectedError as error:
        raise ValueError(str(error)) from None
    values = np.array(pixels)
    return torch.from_numpy(values.reshape(pixels.height, pixels.width, -1)).permute(2, 0, 1)


def fit_object(pixels: Tensor, size: tuple[int, int, int], rule: Preprocessing, name: str) -> Tensor:
    """Return an image (C, H, W) uint8, resized and cropped by a rule as an image file is.

    Args:
        pixels: (C, H, W) uint8, C = 1 or 3.
        size: (C, H, W) of the teacher.
        rule: Resizing and cropping.
        name: Where it is from, for messages.
    """
    values = pixels.permute(1, 2, 0).contiguous().numpy()
    if values.shape[2] not in (1, 3):
        raise ValueError(f"images in `{name}` must be of the teacher's size, or have 1 or 3 channels to be resized")
    image = Image.fromarray(values[:, :, 0] if values.shape[2] == 1 else values)
    return _fitted(image, size, rule, Path(f"in `{name}`"))


def _fitted(pixels: Image.Image, size: tuple[int, int, int], rule: Preprocessing, file: Path) -> Tensor:
    """Return pixels in mode L or RGB as (C, H, W) uint8, resized and cropped by a rule."""
    _, height, width = size
    to_height, to_width = rule.scaled(pixels.height, pixels.width)
    if to_height * to_width > MAX_PIXELS:
        raise ValueError(
            f"image {file} must have a usual aspect ratio, but has {pixels.width} x {pixels.height} pixels, which the "
            f"rule of this teacher resizes to {to_width} x {to_height}"
        )
    resized = pixels.resize((to_width, to_height), Image.Resampling[rule.interpolation.upper()])
    cut = _center(resized, height, width, rule.fill)
    values = np.array(cut)
    return torch.from_numpy(values.reshape(height, width, -1)).permute(2, 0, 1)


@contextmanager
def _opened(file: Path, data: bytes, channels: int) -> Iterator[Image.Image]:
    """Open an image without decoding its pixels, and check its header.

    Raises:
        ValueError: Any error of decoding, inside the block too, becomes one line that names the file.
    """
    if not data or data.startswith(LFS_POINTER):
        reason = "a pointer of Git LFS: run `git lfs pull` in its checkout" if data else "empty"
        raise ValueError(f"image {file} must be readable, but is {reason}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of damaged metadata; sizes are checked here
            with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
                _check_header(image, file, channels)
                yield image
    except _RejectedError as error:
        raise ValueError(str(error)) from None
    except Exception as error:  # Pillow's decoders raise any kind for damaged files, from struct.error to SyntaxError
        text = " ".join(str(error).split()).replace("<_io.BytesIO object", "its content <")
        reason = text.split(" <")[0] or type(error).__name__
        raise ValueError(f"image {file} must be readable, but is damaged: {reason}") from error


class _RejectedError(Exception):
    """An image that is in order but not usable; the text is the whole message."""


def _check_header(image: Image.Image, file: Path, channels: int) -> None:
    mode, width, height = image.mode, image.width, image.height
    if width < 1 or height < 1 or width * height > MAX_PIXELS:
        raise _RejectedError(
            f"image {file} must have 1 to {MAX_PIXELS / 1e6:.0f} million pixels, but has {width} x {height}"
        )
    frames = getattr(image, "n_frames", 1)
    if frames > 1 and image.format != "MPO":
        raise _RejectedError(f"image {file} must be a single image, but has {frames} frames or pages")
    is_gray = mode in _GRAY or _is_16_bit(image)
    if not is_gray and mode not in _COLOR:
        raise _RejectedError(
            f"image {file} must have 8 bits per channel, or 16 bits of gray, but has mode {mode}, "
            "whose values have no range or conversion that the file states"
        )
    reason = _odd_tiff(image)
    if reason:
        raise _RejectedError(f"image {file} must have unsigned values from black to white, but {reason}")
    if channels == 1 and not is_gray and mode != "P":
        raise _RejectedError(f"images must be grayscale for a teacher of 1 channel, but {file} has mode {mode}")


def _is_16_bit(image: Image.Image) -> bool:
    # Pillow scales PGM of more than 8 bits to 0..65535 in its 32-bit mode, whatever their largest value.
    return image.mode in _GRAY_16 or (image.mode == "I" and image.format == "PPM")


def _odd_tiff(image: Image.Image) -> str:
    """Return why the values of a TIFF differ from its mode, "" if they do not (TIFF 6.0, sections 8 and 19)."""
    tags = getattr(image, "tag_v2", None)
    if tags is None:
        return ""
    bits, photometric, kinds = tags.get(258, (1,)), tags.get(262), tags.get(339, (1,))
    if any(kind not in (1, 4) for kind in kinds):
        return "are signed or float (SampleFormat)"
    if image.mode in _GRAY_16 and (set(bits) != {16} or photometric == 0):
        return f"has {bits[0]} bits" if set(bits) != {16} else "runs from white to black in 16 bits"
    return ""


def _pixels(image: Image.Image, file: Path, channels: int) -> Image.Image:
    """Return the pixels in mode L or RGB, upright."""
    image.load()
    if image.has_transparency_data and not _is_opaque(image):
        raise _RejectedError(
            f"image {file} must be opaque, but has transparent pixels over an undefined background: "
            "flatten it onto the background that the teacher was trained with"
        )
    upright = ImageOps.exif_transpose(image)
    if _is_16_bit(upright) or _is_16_bit(image):
        values = np.asarray(upright).astype(np.uint32)
        upright = Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8))
    upright.info.pop("transparency", None)  # all opaque; Pillow would carry or warn about it
    if upright.mode in ("La", "RGBa", "PA"):
        upright = upright.convert("LA" if upright.mode == "La" else "RGBA")
    if channels == 1 and upright.mode == "P":
        colors = upright.convert("RGB")
        red, green, blue = colors.split()
        if red.tobytes() != green.tobytes() or green.tobytes() != blue.tobytes():
            raise _RejectedError(f"images must be grayscale for a teacher of 1 channel, but {file} has a color palette")
        return red
    return upright.convert("L" if channels == 1 else "RGB")


def _is_opaque(image: Image.Image) -> bool:
    transparent = image.info.get("transparency")
    if _is_16_bit(image):
        return transparent is None or not bool((np.asarray(image) == transparent).any())
    if image.mode == "RGB" and isinstance(transparent, tuple) and max(transparent) > 255:
        return False  # of a PNG of 16 bits, of which Pillow keeps 8: equality can no longer be seen
    lowest, _ = image.convert("RGBA").getchannel("A").getextrema()
    return lowest == 255


def _center(image: Image.Image, height: int, width: int, fill: tuple[float, ...]) -> Image.Image:
    """Return the center of an image; what lies outside has the color `fill`."""
    left, top = _offset(image.width, width), _offset(image.height, height)
    if left >= 0 and top >= 0:
        return image.crop((left, top, left + width, top + height))
    colors = [round(255 * value) for value in fill] or [0]
    color = colors[0] if image.mode == "L" else tuple((colors * 3)[:3])
    canvas = Image.new(image.mode, (width, height), color)
    canvas.paste(image, (-left, -top))
    return canvas


def _offset(size: int, cut: int) -> int:
    """Return where the center begins, as torchvision's CenterCrop rounds it; < 0 if the image is smaller."""
    return round((size - cut) / 2) if size >= cut else -((cut - size) // 2)
