"""R8: files whose headers declare what they do not hold, or more than can be held, are one line with their name."""

import io
import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

from synq import train
from synq.evaluation.labeled import load_labeled
from synq.teacher.weight_files import read_weights


def rejected(spec: str, path: Path) -> None:
    with pytest.raises(ValueError, match=path.name) as caught:
        load_labeled(spec, (1, 8, 8), (0.5,), (0.5,), num_classes=10).fingerprint()
    assert "\n" not in str(caught.value)


def test_r8_an_array_of_another_size_than_its_header_says(tmp_path: Path) -> None:
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": "|u1", "fortran_order": False, "shape": (10**6, 1000, 1000, 3)}
    )
    labels = io.BytesIO()
    np.save(labels, np.zeros(3, np.int64))
    path = tmp_path / "huge.npz"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x.npy", header.getvalue() + b"\0" * 100)
        archive.writestr("y.npy", labels.getvalue())
    rejected(f"npz:{path}", path)
    flat = tmp_path / "flat.npz"
    np.savez(flat, x=np.zeros((4, 0, 8), np.uint8), y=np.zeros(4, np.int64))
    rejected(f"npz:{flat}", flat)


def test_r8_an_image_of_more_pixels_than_are_read(tmp_path: Path) -> None:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    path = tmp_path / "0" / "vast.png"
    path.parent.mkdir()
    size = struct.pack(">IIBBBBB", 10**5, 10**5, 8, 0, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size) + chunk(b"IDAT", b"x") + chunk(b"IEND", b""))
    rejected(f"imagefolder:{tmp_path}", path)


def test_r8_weights_that_were_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    torch.save({"w": torch.zeros(1000)}, path)
    path.write_bytes(path.read_bytes()[:-300])
    with pytest.raises(ValueError, match=r"weights\.pth"):
        read_weights(path)


def test_r8_an_input_size_that_fits_no_memory(capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main(["--teacher.input_size", "1,100000,100000"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "`teacher.input_size` must have at most" in line
