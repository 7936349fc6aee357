"""Image files of every kind: read exactly, or rejected in one line that names the file."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, TiffImagePlugin

import synq.evaluation.labeled_images as labeled_images
import synq.evaluation.labeled_sources as labeled_sources
from synq.evaluation.labeled import load_labeled
from synq.evaluation.labeled_images import read_image
from synq.teacher.preprocessing import Preprocessing

SIZE = 8
AS_IT_IS = Preprocessing(resize_size=(SIZE, SIZE), interpolation="bilinear")
RAMP = np.arange(64).reshape(SIZE, SIZE)
COLORS = np.random.default_rng(0).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)


def pixels(file: Path, channels: int = 3) -> np.ndarray:
    """An image of the teacher's size as it is read, (C, H, W)."""
    return read_image(file, (channels, SIZE, SIZE), AS_IT_IS).numpy()


def saved(folder: Path, image: Image.Image, name: str, **options: object) -> Path:
    image.save(folder / name, **options)  # type: ignore[arg-type]
    return folder / name


def assert_rejected(file: Path, *words: str, channels: int = 3) -> None:
    """Rejected when it is read and, before the run, when its folder is opened."""
    folder = file.parent.parent / "folder" / "0"
    folder.mkdir(parents=True, exist_ok=True)
    copy = folder / file.name
    copy.write_bytes(file.read_bytes())
    mean, std = (0.0,) * channels, (1.0,) * channels
    spec = f"imagefolder:{folder.parent}"
    for read in (
        lambda: pixels(file, channels),
        lambda: load_labeled(spec, (channels, SIZE, SIZE), mean, std, num_classes=3).fingerprint(),
    ):
        with pytest.raises((ValueError, OSError)) as caught:
            read()
        text = str(caught.value)
        assert "\n" not in text and file.name in text and len(text) < 500, text
        assert all(word in text for word in words), text
    copy.unlink()


# --- 16 bits ---


@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.pgm"])
@pytest.mark.parametrize("channels", [1, 3])
def test_bugs_11_gray_of_16_bits_is_scaled(tmp_path: Path, name: str, channels: int) -> None:
    values = np.linspace(0, 65535, SIZE * SIZE).round().astype(np.uint16).reshape(SIZE, SIZE)
    found = pixels(saved(tmp_path, Image.fromarray(values), name), channels)
    assert found.shape == (channels, SIZE, SIZE)
    assert np.array_equal(found[0], np.rint(values / 257)) and abs(found.mean() / 255 - 0.5) < 1e-3


@pytest.mark.parametrize("largest", [1000, 4095, 65535])
def test_bugs_11_pgm_of_any_largest_value(tmp_path: Path, largest: int) -> None:
    values = (RAMP * largest // 63).astype(">u2")
    (tmp_path / "a.pgm").write_bytes(f"P5 {SIZE} {SIZE} {largest}\n".encode() + values.tobytes())
    assert np.abs(pixels(tmp_path / "a.pgm", 1)[0] - RAMP * 255 / 63).max() <= 1


def tiff(values: np.ndarray, *, bits: int, photometric: int = 1, kind: int = 1) -> bytes:
    """A TIFF of one strip, written by hand: Pillow writes no odd ones."""
    raw = values.tobytes()
    entries = [
        (256, 3, SIZE),
        (257, 3, SIZE),
        (258, 3, bits),
        (259, 3, 1),
        (262, 3, photometric),
        (273, 4, 8),
        (277, 3, 1),
        (278, 3, SIZE),
        (279, 4, len(raw)),
        (339, 3, kind),
    ]
    fields = b"".join(struct.pack("<HHII", tag, kind_, 1, value) for tag, kind_, value in entries)
    return b"II*\0" + struct.pack("<I", 8 + len(raw)) + raw + struct.pack("<H", len(entries)) + fields + b"\0\0\0\0"


def test_bugs_11_tiffs_that_mean_something_else(tmp_path: Path) -> None:
    file = tmp_path / "a.tif"
    file.write_bytes(tiff(RAMP.astype("<u2") * 1040, bits=16))
    assert np.array_equal(pixels(file, 1)[0], np.rint(RAMP * 1040 / 257))
    file.write_bytes(tiff(255 - RAMP.astype(np.uint8), bits=8, photometric=0))
    assert np.array_equal(pixels(file, 1)[0], RAMP), "white is 0 here"
    file.write_bytes(tiff(RAMP.astype("<u2"), bits=16, photometric=0))
    assert_rejected(file, "runs from white to black")
    file.write_bytes(tiff(RAMP.astype("<i2"), bits=16, kind=2))
    assert_rejected(file)
    file.write_bytes(tiff(RAMP.astype("<i1"), bits=8, kind=2))
    assert_rejected(file)
    file.write_bytes(tiff(np.zeros(SIZE * SIZE * 3 // 2, np.uint8), bits=12))
    assert_rejected(file, "12 bits")
    file.write_bytes(tiff(RAMP.astype("<u4"), bits=32))
    assert_rejected(file)
    file.write_bytes(tiff(RAMP.astype("<f8"), bits=64, kind=3))
    assert_rejected(file)


def test_bugs_11_float_and_lab_files_are_rejected(tmp_path: Path) -> None:
    ramp = np.linspace(0, 1, SIZE * SIZE, dtype=np.float32).reshape(SIZE, SIZE)
    assert_rejected(saved(tmp_path, Image.fromarray(ramp), "f.tif"), "mode F")
    assert_rejected(saved(tmp_path, Image.fromarray(RAMP.astype(np.int32)), "i.tif"), "mode I")
    assert_rejected(saved(tmp_path, Image.new("LAB", (SIZE, SIZE)), "lab.tif"), "mode LAB")
    (tmp_path / "pfm.pgm").write_bytes(f"Pf {SIZE} {SIZE} -1.0\n".encode() + ramp.tobytes())
    assert_rejected(tmp_path / "pfm.pgm", "mode F")
    for channels in (1, 3):
        assert_rejected(tmp_path / "f.tif", channels=channels)


# --- palettes, transparency, color spaces ---


@pytest.mark.parametrize("mode", ["LA", "RGBA", "P", "L", "RGB"])
def test_bugs_11_transparency(tmp_path: Path, mode: str) -> None:
    image = Image.fromarray(COLORS).convert(mode)
    opaque = np.array(image.convert("RGB")).transpose(2, 0, 1)
    if mode in ("LA", "RGBA"):
        assert np.array_equal(pixels(saved(tmp_path, image, "opaque.png")), opaque)
        alpha = Image.new("L", (SIZE, SIZE), 255)
        alpha.putpixel((3, 3), 254)
        image.putalpha(alpha)
        assert_rejected(saved(tmp_path, image, "a.png"), "must be opaque")
        return
    absent = {"P": bytes([255] * 256), "L": 0, "RGB": (1, 2, 3)}[mode]
    if mode == "L":
        image = image.point(lambda value: max(value, 1))
        opaque = np.array(image.convert("RGB")).transpose(2, 0, 1)
    assert np.array_equal(pixels(saved(tmp_path, image, "opaque.png", transparency=absent)), opaque)
    there = image.getpixel((0, 0))
    assert_rejected(saved(tmp_path, image, "a.png", transparency=there), "must be opaque")


def test_bugs_11_gray_with_alpha_for_one_channel(tmp_path: Path) -> None:
    image = Image.fromarray(RAMP.astype(np.uint8)).convert("LA")
    assert np.array_equal(pixels(saved(tmp_path, image, "a.png"), 1)[0], RAMP)
    image.putalpha(Image.new("L", (SIZE, SIZE), 128))
    assert_rejected(saved(tmp_path, image, "b.png"), "must be opaque", channels=1)


def test_bugs_11_bilevel_and_palettes_of_gray(tmp_path: Path) -> None:
    bilevel = Image.fromarray(RAMP > 30)
    assert bilevel.mode == "1"
    for name in ("a.png", "a.tif", "a.pbm", "a.bmp", "a.gif"):
        file = saved(tmp_path, bilevel, name)
        assert np.array_equal(pixels(file, 1)[0], 255 * (RAMP > 30)), name
        assert np.array_equal(pixels(file)[2], 255 * (RAMP > 30)), name
    gray = Image.new("P", (SIZE, SIZE))
    gray.putdata(RAMP.flatten().tolist())
    gray.putpalette([value for index in range(256) for value in [255 - index] * 3])
    assert np.array_equal(pixels(saved(tmp_path, gray, "p.png"), 1)[0], 255 - RAMP)
    gray.putpalette([value for index in range(256) for value in (index, 0, 0)])
    assert_rejected(saved(tmp_path, gray, "q.png"), "color palette", channels=1)
    assert np.array_equal(pixels(tmp_path / "q.png")[0], RAMP)


def test_bugs_11_cmyk_and_ycbcr(tmp_path: Path) -> None:
    inks = np.random.default_rng(1).integers(0, 256, (SIZE, SIZE, 4), dtype=np.uint8)
    file = saved(tmp_path, Image.frombytes("CMYK", (SIZE, SIZE), inks.tobytes()), "a.tif")
    cyan, black = inks[..., 0].astype(float), inks[..., 3].astype(float)
    assert np.abs(pixels(file)[0] - (255 - cyan) * (255 - black) / 255).max() <= 1
    assert_rejected(file, "mode CMYK", channels=1)
    flat = Image.new("RGB", (SIZE, SIZE), (200, 30, 90))
    assert np.abs(pixels(saved(tmp_path, flat, "a.jpg", quality=95)).mean((1, 2)) - (200, 30, 90)).max() < 2


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp", "a.tif"])
def test_bugs_11_exif_orientation_is_applied(tmp_path: Path, orientation: int, name: str) -> None:
    """The stored image is turned so that every viewer shows the same one."""
    shown = np.zeros((SIZE, SIZE), np.uint8)
    shown[:4, :4], shown[:4, 4:], shown[4:, :4] = 255, 160, 80
    undo = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.T,
        6: lambda a: np.rot90(a, 1),
        7: lambda a: a[::-1, ::-1].T,
        8: lambda a: np.rot90(a, -1),
    }[orientation]
    exif = Image.Exif()
    exif[274] = orientation
    stored = Image.fromarray(np.ascontiguousarray(undo(shown)))
    options: dict[str, object] = {"exif": exif} if name != "a.tif" else {"tiffinfo": {274: orientation}}
    if name != "a.tif":
        stored = stored.convert("RGB")
    found = pixels(saved(tmp_path, stored, name, **options))
    assert np.abs(found[0].astype(int) - shown).max() < 60
    assert {int(found[0][2, 2]) > 200, int(found[0][2, 6]) > 120, int(found[0][6, 6]) < 40} == {True}


@pytest.mark.parametrize("name", ["a.gif", "a.png", "a.webp", "a.tif"])
def test_bugs_11_animations_and_pages_are_rejected(tmp_path: Path, name: str) -> None:
    first = Image.fromarray(COLORS)
    others = [Image.fromarray(255 - COLORS)]
    file = saved(tmp_path, first, name, save_all=True, append_images=others)
    assert_rejected(file, "2 frames or pages")
    assert pixels(saved(tmp_path, first, name)).shape == (3, SIZE, SIZE)


def test_bugs_11_multi_picture_jpegs_are_their_first(tmp_path: Path) -> None:
    flat, other = Image.new("RGB", (SIZE, SIZE), (90, 90, 90)), Image.new("RGB", (SIZE, SIZE))
    flat.save(tmp_path / "a.jpg", format="MPO", save_all=True, append_images=[other])
    assert np.abs(pixels(tmp_path / "a.jpg").astype(int) - 90).max() <= 1


# --- damage and limits ---


def encoded(name: str) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.kron(COLORS, np.ones((8, 8, 1), np.uint8))).save(buffer, format=name)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "PPM", "BMP", "GIF", "WEBP", "TIFF"])
@pytest.mark.parametrize("share", [0.0, 0.05, 0.5, 0.9])
def test_bugs_11_truncated_files_are_named(
    tmp_path: Path, kind: str, share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = encoded(kind)
    suffix = {"JPEG": "jpg", "TIFF": "tif"}.get(kind, kind.lower())
    file = tmp_path / f"cut.{suffix}"
    file.write_bytes(raw[: int(len(raw) * share)])
    assert_rejected(file, "must be readable")
    if kind in ("PNG", "JPEG") and share > 0.1:  # of a large set only images that look damaged are decoded first
        monkeypatch.setattr(labeled_sources, "DECODED_FIRST", 0)
        assert_rejected(file, "must be readable")


@pytest.mark.parametrize(
    "content",
    [
        b"P6\n",
        b"P6 8 8",
        b"P6 0 8 255\n",
        b"P6 8 8 0\n",
        b"P6 8 8 99999\n" + bytes(400),
        b"P3 2 2 255\n1 2 x",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\n",
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n",
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        b"\x89PNG\r\n\x1a\n" + b"\0\0\0\x0dIHDR",
        b"GIF89a" + bytes(7),
        b"BM" + bytes(60),
        b"\xff\xd8\xff\xe1\x00\x10Exif\0\0II*\0\xff\xff\xff\xff",
    ],
)
def test_bugs_11_damaged_headers_are_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "bad.ppm").write_bytes(content)
    assert_rejected(tmp_path / "bad.ppm", "bad.ppm must")


def png_of(width: int, height: int) -> bytes:
    """A PNG that declares a size and holds no row of it."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def test_bugs_r_8_headers_that_declare_too_much(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for size in ((20_000, 20_000), (2**31 - 1, 2**31 - 1), (0, 8), (8, 0)):
        (tmp_path / "bomb.png").write_bytes(png_of(*size))
        assert_rejected(tmp_path / "bomb.png", "bomb.png must")
    (tmp_path / "short.png").write_bytes(png_of(SIZE, SIZE))
    assert_rejected(tmp_path / "short.png", "damaged")
    monkeypatch.setattr(labeled_images, "MAX_PIXELS", SIZE * SIZE - 1)
    assert_rejected(saved(tmp_path, Image.fromarray(COLORS), "a.png"), "million pixels", "8 x 8")
    monkeypatch.setattr(labeled_images, "MAX_PIXELS", SIZE * 4000)
    with pytest.raises(ValueError, match=r"b\.png must have a usual aspect ratio"):
        pixels(saved(tmp_path, Image.new("L", (4001, 1)), "b.png"))


# --- folders ---


def test_bugs_11_files_that_are_not_read_are_not_skipped_silently(tmp_path: Path) -> None:
    for name in ("0", "1"):
        (tmp_path / name).mkdir()
        Image.fromarray(COLORS).save(tmp_path / name / "a.png")
        (tmp_path / name / "._a.png").write_bytes(b"metadata of a desktop")
        (tmp_path / name / "notes.txt").write_text("no image")
        (tmp_path / name / "folder.png").mkdir()
    spec = f"imagefolder:{tmp_path}"

    def load() -> int:
        return len(load_labeled(spec, (3, SIZE, SIZE), (0.0,) * 3, (1.0,) * 3, num_classes=2))

    assert load() == 2
    (tmp_path / "1" / "b.heic").write_bytes(b"another kind")
    with pytest.raises(ValueError, match=r"must hold images as \.jpg, .* but has .*b\.heic: convert it"):
        load()
    (tmp_path / "1" / "b.heic").unlink()
    (tmp_path / "1" / "gone.jpg").symlink_to(tmp_path / "nowhere.jpg")
    with pytest.raises(FileNotFoundError, match=r"gone\.jpg"):
        load_labeled(spec, (3, SIZE, SIZE), (0.0,) * 3, (1.0,) * 3, num_classes=2).fingerprint()
    (tmp_path / "01").mkdir()
    with pytest.raises(ValueError, match=r"one folder per class, but has 01 and 1"):
        load()
    with pytest.raises(NotADirectoryError, match=r"must name a folder after imagefolder:"):
        load_labeled(f"imagefolder:{tmp_path}/0/a.png", (3, 8, 8), (0.0,) * 3, (1.0,) * 3, num_classes=2)
    with pytest.raises(ValueError, match=r"teacher of 1 or 3 channels, but it has 4"):
        load_labeled(spec, (4, 8, 8), (0.0,) * 4, (1.0,) * 4, num_classes=2)


def test_pillow_keeps_the_constants_that_are_relied_on() -> None:
    assert 2 * (Image.MAX_IMAGE_PIXELS or 0) == labeled_images.MAX_PIXELS
    assert TiffImagePlugin.SAMPLEFORMAT == 339 and TiffImagePlugin.BITSPERSAMPLE == 258
