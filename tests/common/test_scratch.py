"""Tensors on disk: they keep what is written, leave no file, and reject a disk that is too small before the work."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from synq.common.scratch import scratch_tensor
from synq.synthesis.lowpass import gaussian_lowpass


def test_holds_what_is_written_and_has_no_name(tmp_path: Path) -> None:
    tensor = scratch_tensor((3, 5, 7), torch.float32, tmp_path)
    assert list(tmp_path.iterdir()) == []
    values = torch.randn(3, 5, 7)
    tensor.copy_(values)
    assert torch.equal(tensor, values) and tensor.is_contiguous() and tensor.dtype == torch.float32


def test_filtering_into_it_is_filtering(tmp_path: Path) -> None:
    images = torch.randn(5, 3, 8, 8)
    out = scratch_tensor((5, 3, 8, 8), torch.float32, tmp_path)
    assert gaussian_lowpass(images, 3.0, 2, out) is out
    assert torch.equal(out, gaussian_lowpass(images, 3.0))


def test_a_disk_that_is_too_small_is_named(tmp_path: Path) -> None:
    stat = os.statvfs(tmp_path)
    too_many = stat.f_bavail * stat.f_frsize // 4 + 2**28
    with pytest.raises(OSError, match=r"while reserving \d+ MiB for the filtered images.*" + tmp_path.name) as caught:
        scratch_tensor((too_many,), torch.float32, tmp_path)
    assert caught.value.errno is not None and list(tmp_path.iterdir()) == []


def test_without_nameless_files_one_is_made_and_taken_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("os.O_TMPFILE", raising=False)
    tensor = scratch_tensor((3, 4), torch.float32, tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert torch.equal(tensor.fill_(2.0), torch.full((3, 4), 2.0))


def test_a_file_that_cannot_be_mapped_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail_to_map(*_: object, **__: object) -> torch.Tensor:
        raise RuntimeError("unable to mmap 48 bytes")

    monkeypatch.setattr("torch.from_file", fail_to_map)
    with pytest.raises(OSError, match=r"unable to mmap.*while reserving"):
        scratch_tensor((3, 4), torch.float32, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="missing"):
        scratch_tensor((4,), torch.float32, tmp_path / "missing")


@pytest.mark.slow
def test_its_bytes_are_not_the_process_own(tmp_path: Path) -> None:
    """A process that may have no more than 64 MiB of private memory writes 256 MiB."""
    code = f"""
import resource, torch
from pathlib import Path
from synq.common.scratch import scratch_tensor
torch.set_num_threads(1)
used = int(next(line for line in open("/proc/self/status") if line.startswith("VmData")).split()[1]) * 1024
resource.setrlimit(resource.RLIMIT_DATA, (used + 2**26, used + 2**26))
try:
    torch.empty(2**26)
except RuntimeError:
    print("rejected in memory")
tensor = scratch_tensor((2**26,), torch.float32, Path({str(tmp_path)!r}))
for part in tensor.split(2**20):
    part.fill_(1.0)
print(int(tensor[:: 2**20].sum()))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.split("\n")[:2] == ["rejected in memory", "64"], done.stderr
