"""What is measured: the rule of resizing, the subset, the digest of all images, arrays of other sizes, damaged ones."""

import io
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from support.labeled_files import a_teacher, image_folder, npz
from synq.cli import run as command
from synq.common.notices import forget_notices
from synq.config.run import EvaluationConfig, RunConfig, TeacherConfig, with_overrides
from synq.evaluation.labeled import LabeledSet, load_labeled, open_labeled
from synq.evaluation.labeled_arrays import read_npz
from synq.pipeline import run
from synq.runs.record import read_record, run_folder, write_record
from synq.teacher.preprocessing import Preprocessing
from synq.teacher.teacher import load_teacher


@pytest.fixture(autouse=True)
def _notes_are_new() -> None:
    forget_notices()


def load(spec: str, size: tuple[int, int, int] = (1, 8, 8), **fields: Any) -> LabeledSet:
    return load_labeled(spec, size, (0.0,) * size[0], (1.0,) * size[0], **{"num_classes": 3, **fields})


# --- the digest ---


@pytest.mark.parametrize("row", [0, 63, 64, 99])
def test_bugs_r_3_every_image_counts(tmp_path: Path, row: int) -> None:
    arrays = npz(tmp_path / "a.npz")
    before = load(f"npz:{tmp_path}/a.npz").fingerprint()
    assert before == load(f"npz:{tmp_path}/a.npz").fingerprint() and before[0].isalpha()
    arrays["x"][row, 7, 7] ^= 1
    np.savez(tmp_path / "a.npz", **arrays)  # type: ignore[arg-type]
    assert load(f"npz:{tmp_path}/a.npz").fingerprint() != before


def test_bugs_r_3_only_what_is_measured_counts(tmp_path: Path) -> None:
    arrays = npz(tmp_path / "a.npz")
    few = load(f"npz:{tmp_path}/a.npz", limit=30)
    outside = next(row for row in range(100) if row not in few.indices.tolist())
    arrays["x"][outside] = 0
    np.savez(tmp_path / "a.npz", **arrays)  # type: ignore[arg-type]
    assert load(f"npz:{tmp_path}/a.npz", limit=30).fingerprint() == few.fingerprint()
    assert load(f"npz:{tmp_path}/a.npz", limit=31).fingerprint() != few.fingerprint()


def test_bugs_r_3_every_file_of_a_folder_counts_and_is_checked(tmp_path: Path) -> None:
    files = image_folder(tmp_path / "set")
    spec = f"imagefolder:{tmp_path}/set"
    before = load(spec).fingerprint()
    wide = Preprocessing(resize_size=(8, 8), interpolation="bicubic")
    assert load(spec, preprocessing=wide).fingerprint() != before, "another rule measures other images"
    content = files[-1].read_bytes()
    Image.new("L", (9, 12), 7).save(files[-1])
    assert load(spec).fingerprint() != before
    files[-1].write_bytes(content)
    assert load(spec).fingerprint() == before
    files[-1].write_bytes(content[:60])
    with pytest.raises(ValueError, match=rf"image .*{files[-1].name} must be readable, but is damaged"):
        load(spec).fingerprint()


def test_bugs_r_3_a_finished_run_on_changed_images_is_rejected(config: RunConfig, tmp_path: Path) -> None:
    arrays = npz(tmp_path / "lab.npz", size=(16, 16))
    settings = {"evaluation.dataset": f"npz:{tmp_path}/lab.npz", "evaluation.num_images": None}
    config = with_overrides(config, settings)
    record = run(config)
    assert record.evaluation["preprocessing"] == "none: the images have the teacher's size"
    assert record.evaluation["subset"] == "all images" and record.evaluation["num_images"] == 100
    # A record of an earlier version: its digest saw the first 64 images, and still stands for the same ones.
    path = run_folder(config) / "record.json"
    teacher = load_teacher(config.teacher)
    labeled = open_labeled(config.evaluation, teacher)
    assert labeled is not None
    earlier = labeled.earlier_fingerprint()
    content = read_record(path)
    write_record(path, type(content)(**{**_fields(content), "eval_digest": earlier, "evaluation": {}}))
    assert run(config).eval_digest == earlier
    write_record(path, content)
    arrays["x"][64:] = 0
    np.savez(tmp_path / "lab.npz", **arrays)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="must not mix labeled sets"):
        run(config)


def _fields(record: Any) -> dict[str, Any]:
    return {name: getattr(record, name) for name in type(record).__dataclass_fields__}


# --- the subset ---


def test_m_4_help_and_record_say_that_the_subset_is_by_hash(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(["train", "--help=evaluation"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "to use, from its start" not in text and "selected by a hash of each image's index" in text
    npz(tmp_path / "a.npz")
    few = load(f"npz:{tmp_path}/a.npz", limit=30)
    described = few.describe()
    assert "SHA-256" in str(described["subset"]) and (described["num_images"], described["num_total"]) == (30, 100)
    assert few.indices.tolist() != list(range(30))


# --- arrays of other sizes ---


@pytest.mark.parametrize(
    ("size", "teacher", "words"),
    [
        ((8, 8), (1, 16, 16), "resize whole images from 8 x 8 to 16 x 16 (bilinear, antialiased), no crop"),
        ((256, 256, 3), (3, 224, 224), "from 256 x 256 to 224 x 224"),
        ((32, 32, 3), (3, 224, 224), "from 32 x 32 to 224 x 224"),
        ((28, 28), (1, 224, 224), "from 28 x 28 to 224 x 224"),
        ((24, 32), (1, 48, 64), "from 24 x 32 to 48 x 64"),
    ],
)
def test_m_6_resizing_of_arrays_is_said_once(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    size: tuple[int, ...],
    teacher: tuple[int, int, int],
    words: str,
) -> None:
    npz(tmp_path / "a.npz", num=4, size=size)
    settings = EvaluationConfig(dataset=f"npz:{tmp_path}/a.npz")
    for _ in range(2):
        labeled = open_labeled(settings, a_teacher(teacher))
        assert labeled is not None and words in str(labeled.describe()["preprocessing"])
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and words in err and "a.npz" in err
    npz(tmp_path / "b.npz", num=4, size=(*teacher[1:], *([3] if teacher[0] == 3 else [])))
    open_labeled(EvaluationConfig(dataset=f"npz:{tmp_path}/b.npz"), a_teacher(teacher))
    open_labeled(settings, a_teacher(teacher, default_dataset=settings.dataset))
    assert not capsys.readouterr().err


@pytest.mark.parametrize(
    ("size", "teacher", "words"),
    [
        ((32, 64), (1, 32, 32), "aspect ratio"),
        ((480, 640), (1, 224, 224), "aspect ratio"),
        ((33, 32), (1, 32, 32), "aspect ratio"),
        ((8, 8), (1, 224, 224), "within 8 times"),
        ((1, 1), (1, 32, 32), "within 8 times"),
        ((300, 300), (1, 32, 32), "within 8 times"),
        ((0, 8), (1, 8, 8), "at least one pixel"),
        ((8, 0), (1, 8, 8), "at least one pixel"),
    ],
)
def test_m_6_arrays_of_sizes_that_cannot_be_meant(
    tmp_path: Path, size: tuple[int, int], teacher: tuple[int, int, int], words: str
) -> None:
    npz(tmp_path / "a.npz", num=4, size=size)
    with pytest.raises(ValueError, match=words) as caught:
        load(f"npz:{tmp_path}/a.npz", teacher)
    assert "a.npz" in str(caught.value) and "\n" not in str(caught.value)


# --- damaged arrays, sizes ---


def header(shape: tuple[int, ...], dtype: str = "|u1", *, version: tuple[int, int] = (1, 0)) -> bytes:
    text = f"{{'descr': {dtype!r}, 'fortran_order': False, 'shape': {shape!r}, }}\n".encode()
    return b"\x93NUMPY" + bytes(version) + len(text).to_bytes(2 if version == (1, 0) else 4, "little") + text


def archive(path: Path, x: bytes, *, compress: int = zipfile.ZIP_STORED) -> Path:
    labels = io.BytesIO()
    np.save(labels, np.zeros(2, np.int64))
    with zipfile.ZipFile(path, "w", compress) as file:
        file.writestr("x.npy", x)
        file.writestr("y.npy", labels.getvalue())
    return path


@pytest.mark.parametrize(
    "x",
    [
        header((10**6, 1000, 1000, 3)) + bytes(10),
        header((2, 8, 8)) + bytes(127),
        header((2, 8, 8)) + bytes(129),
        header((2**62, 8)),
        header((-1, 8, 8)),
        header((2, 8, 8), "|O"),
        header((2, 8, 8), "<f9"),
        header((2, 8, 8), version=(3, 0)) + bytes(128),
        header((2, 8, 8), version=(9, 9)) + bytes(128),
        b"\x93NUMPY\x01\x00\xff\xff{",
        b"\x93NUMPY\x01\x00\x04\x00{[(\n",
        b"no array",
        b"",
    ],
)
def test_bugs_r_8_npz_headers_are_checked_before_memory_is_taken(tmp_path: Path, x: bytes) -> None:
    path = archive(tmp_path / "a.npz", x)
    with pytest.raises(ValueError, match=r"npz file .*a\.npz cannot be used: ") as caught:
        load(f"npz:{path}")
    assert "\n" not in str(caught.value)


def test_bugs_r_8_arrays_beyond_the_memory_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    npz(tmp_path / "a.npz")
    assert read_npz(tmp_path / "a.npz")[0].shape == (100, 8, 8)
    sizes = {"SC_PAGE_SIZE": 64, "SC_PHYS_PAGES": 64}  # a machine of 4 KiB
    monkeypatch.setattr("os.sysconf", sizes.__getitem__)
    with pytest.raises(ValueError, match=r"must fit the memory of this machine"):
        read_npz(tmp_path / "a.npz")


def test_bugs_r_8_other_kinds_of_npz(tmp_path: Path) -> None:
    for content in (b"version https://git-lfs.github.com/spec/v1\noid", b"", b"PK\x03\x04" + bytes(30), b"\x93NUMPY"):
        (tmp_path / "a.npz").write_bytes(content)
        with pytest.raises(ValueError, match=r"npz file .*a\.npz cannot be used: "):
            load(f"npz:{tmp_path}/a.npz")
    with pytest.raises(IsADirectoryError):
        load(f"npz:{tmp_path}")


@pytest.mark.parametrize("size", [(1, 100_000, 100_000), (3, 20_000, 20_000), (10**9, 1, 1), (1, 10**400, 1)])
def test_bugs_r_8_input_sizes_beyond_any_image(size: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match=r"`teacher.input_size` must have at most 16,777,216 values"):
        TeacherConfig(input_size=size)
    assert TeacherConfig(input_size=(3, 2048, 2048)).input_size == (3, 2048, 2048)
    text = ",".join(map(str, size))
    assert (
        command(["inspect", "torchvision:resnet18", "--teacher.weights", "random", "--teacher.input_size", text]) == 2
    )
