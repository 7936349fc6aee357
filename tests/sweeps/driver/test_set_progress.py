"""The line that a sweep prints while its trials wait for synthetic images."""

import os
import time
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from synq.sweeps.driver.synthetic_sets import images_since, waiting_line


def test_a_long_wait_reads_as_progress_and_not_as_an_error() -> None:
    first = waiting_line(0, 2, 0, 768, 61.3)
    assert first.endswith("(this is normal; they are kept): 0 of 2 sets, after 61 s")
    later = waiting_line(1, 2, 512, 768, 90.0)
    assert later.endswith("1 of 2 sets, 512 of about 768 images, after 90 s, about 45 s left")
    assert waiting_line(1, 2, 999, 768, 90.0).endswith("768 of about 768 images, after 90 s, about 0 s left")
    assert not any(word in line for word in ("not ready", "error", "failed") for line in (first, later))


def test_images_of_this_start_count_finished_or_not(tmp_path: Path) -> None:
    files = {"a.partial/shard-00000": 100, "a.partial/shard-00001": 0, "b.partial/centers-00000": 0, "c/images": 0}
    for number, (name, age) in enumerate(files.items(), start=1):
        file = tmp_path / f"{name}.safetensors"
        file.parent.mkdir(exist_ok=True)
        save_file({"labels": np.zeros(number)}, file)
        os.utime(file, (time.time() - age,) * 2)
    begun = time.time() - 50
    assert images_since(tmp_path, begun) == 2 + 4
    assert images_since(tmp_path / "absent", begun) == 0


def test_a_set_that_is_finished_meanwhile_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "a.partial").mkdir()
    (tmp_path / "a.partial" / "shard-00000.safetensors").symlink_to(tmp_path / "gone")
    (tmp_path / "a.partial" / "shard-00001.safetensors").write_bytes(b"half")
    assert images_since(tmp_path, 0) == 0
