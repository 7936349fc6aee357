"""Whole sets: the same for any number of processes, resumed after a kill, balanced, described by their manifest.

Run as a script (STORE [torchrun]) it makes the tests' set: this is what the tests start as real processes.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from synq.config.run import SynthesisConfig
from synq.synthesis import generate as synthesis
from synq.synthesis.generate import balanced_labels, ensure_set
from synq.synthesis.store import SetStore
from synq.teacher.pixel_range import PixelRange
from synq.teacher.teacher import Teacher

ROOT = Path(__file__).resolve().parents[2]
PIXELS = PixelRange(torch.full((1, 1, 1, 1), -2.0), torch.full((1, 1, 1, 1), 2.0))
CONFIG = SynthesisConfig(num_images=14, shard_size=4, iterations=6, calib_centers=True, center_iterations=4)


def tiny_teacher() -> Teacher:
    """A convolutional network of 3 classes with plausible running statistics; synthesis reads only these fields."""
    generator = torch.Generator().manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 8, 3, stride=2),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 3),
    )
    for tensor in net.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(torch.rand(tensor.shape, generator=generator) - 0.3 * (tensor.dim() > 1))
    net.eval().requires_grad_(False)
    facts = {"num_classes": 3, "input_size": (1, 9, 8), "digest": "7e" * 32, "pixel_range": lambda: PIXELS}
    return cast(Teacher, SimpleNamespace(name="tiny", module=net, **facts))


def _bytes(root: Path) -> dict[str, bytes]:
    """The finished sets' image files, by key."""
    return {path.parent.name: path.read_bytes() for path in sorted(root.glob("*/images.safetensors"))}


@contextmanager
def _started(arguments: list[str], **extra: Any) -> Iterator[subprocess.Popen]:
    """A separate process group, ended for certain at the end of the block."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    process = subprocess.Popen([sys.executable, *arguments], env=environment, start_new_session=True, **extra)
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def test_made_once_then_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher, store = tiny_teacher(), SetStore(tmp_path)
    before = {name: value.clone() for name, value in teacher.module.state_dict().items()}
    made = ensure_set(teacher, CONFIG, 3, store, progress=False)
    assert made.images.shape == (14, 1, 9, 8) and torch.bincount(made.labels).tolist() in (
        [5, 5, 4],
        [5, 4, 5],
        [4, 5, 5],
    )
    assert all(torch.equal(value, before[name]) for name, value in teacher.module.state_dict().items())
    assert not any(part._forward_pre_hooks for part in teacher.module.modules())
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([made.path.name, "locks"])
    monkeypatch.setattr(synthesis, "invert", None)  # a second making would call it
    found = ensure_set(teacher, CONFIG, 3, store)
    assert found.digest == made.digest and torch.equal(found.images, made.images)


def test_manifest_describes_the_synthesis(tmp_path: Path) -> None:
    teacher = tiny_teacher()
    made = ensure_set(teacher, CONFIG, 3, SetStore(tmp_path), purpose="heldout", progress=False)
    manifest = made.manifest
    assert manifest["format_version"] == 2 and manifest["teacher_digest"] == teacher.digest
    assert (manifest["teacher_name"], manifest["seed"], manifest["purpose"]) == ("tiny", 3, "heldout")
    assert manifest["synthesis"]["iterations"] == 6 and manifest["num_images"] == 14
    assert [shard["stop"] for shard in manifest["shards"]] == [3, 7, 10, 14]
    assert all(len(shard["digest"]) == 64 and shard["seconds"] > 0 for shard in manifest["shards"])
    agreement = (teacher.module(made.images).argmax(1) == made.labels).double().mean().item()
    assert manifest["agreement"] == pytest.approx(agreement)
    weighted = sum((shard["stop"] - shard["start"]) * shard["terms"]["bns"] for shard in manifest["shards"]) / 14
    assert manifest["terms"]["bns"] == pytest.approx(weighted) and manifest["terms"]["centers"] > 0
    json.dumps(manifest, allow_nan=False)


def test_seed_purpose_and_config_make_other_images(tmp_path: Path) -> None:
    teacher, store = tiny_teacher(), SetStore(tmp_path)
    config = SynthesisConfig(num_images=4, shard_size=4, iterations=1)
    sets = [
        ensure_set(teacher, config, 0, store, progress=False),
        ensure_set(teacher, config, 1, store, progress=False),
        ensure_set(teacher, config, 0, store, purpose="heldout", progress=False),
    ]
    assert len({made.digest for made in sets}) == 3
    shards = ensure_set(teacher, SynthesisConfig(num_images=8, shard_size=4, iterations=1), 0, store, progress=False)
    assert not torch.equal(shards.images[:4], shards.images[4:])


@given(st.integers(1, 300), st.integers(1, 40))
def test_labels_are_balanced(num_images: int, num_classes: int) -> None:
    labels = balanced_labels(num_images, num_classes, torch.Generator().manual_seed(0))
    counts = torch.bincount(labels, minlength=num_classes)
    assert len(labels) == num_images and counts.max() - counts.min() <= 1
    for start in range(0, num_images - num_classes + 1, num_classes):
        assert sorted(labels[start : start + num_classes].tolist()) == list(range(num_classes))


@pytest.mark.slow
def test_two_processes_make_the_same_set(tmp_path: Path) -> None:
    alone = ensure_set(tiny_teacher(), CONFIG, 3, SetStore(tmp_path / "one"), progress=False)
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    with _started([*launch, __file__, str(tmp_path / "two"), "torchrun"], stderr=subprocess.PIPE) as process:
        _, err = process.communicate(timeout=120)
    # Judged by the artifacts: gloo aborts now and then at exit, after all work is done.
    reports = sorted((tmp_path / "two").glob("report-*.json"))
    assert len(reports) == 2, err.decode()[-2000:]
    reported = [json.loads(report.read_text()) for report in reports]
    assert [one["num_processes"] for one in reported] == [2, 2]
    assert [one["digest"] for one in reported] == [alone.digest] * 2
    assert sum(one["num_made"] for one in reported) == 5 and min(one["num_made"] for one in reported) >= 1
    assert _bytes(tmp_path / "two") == _bytes(tmp_path / "one")


def test_stopped_and_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C in the third image shard; a kill, which cannot be handled, is the next test."""
    whole = ensure_set(tiny_teacher(), CONFIG, 3, SetStore(tmp_path / "whole"), progress=False)
    store, made, original = SetStore(tmp_path / "stopped"), [], synthesis.invert

    def stop(*args: Any, **kwargs: Any) -> Any:
        if len(made) == 3:  # one batch of centers, two shards
            raise KeyboardInterrupt
        made.append(len(args[1]))
        return original(*args, **kwargs)

    monkeypatch.setattr(synthesis, "invert", stop)
    with pytest.raises(KeyboardInterrupt):
        ensure_set(tiny_teacher(), CONFIG, 3, store, progress=False)
    assert not store.is_complete(whole.path.name)
    again: list[int] = []
    monkeypatch.setattr(synthesis, "invert", lambda *a, **k: again.append(len(a[1])) or original(*a, **k))
    resumed = ensure_set(tiny_teacher(), CONFIG, 3, store, progress=False)
    assert again == [3, 4]  # only the two shards that were missing
    assert resumed.digest == whole.digest and _bytes(store.root) == _bytes(tmp_path / "whole")


@pytest.mark.slow
def test_killed_and_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = ensure_set(tiny_teacher(), CONFIG, 3, SetStore(tmp_path / "whole"), progress=False)
    store = SetStore(tmp_path / "killed")
    partial = store.partial(whole.path.name)
    with _started([__file__, str(store.root), "stall"]) as process:  # stops for ever within its third image shard
        deadline = time.monotonic() + 60
        while not (partial / "stalled").exists():
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.wait()
    finished = [path.name for path in partial.glob("*.safetensors")]
    assert sorted(finished) == ["centers-00000.safetensors", "shard-00000.safetensors", "shard-00001.safetensors"]
    assert not store.is_complete(whole.path.name)
    made = []
    original = synthesis.invert
    monkeypatch.setattr(synthesis, "invert", lambda *a, **k: made.append(len(a[1])) or original(*a, **k))
    resumed = ensure_set(tiny_teacher(), CONFIG, 3, store, progress=False)
    assert made == [3, 4]  # only the two shards that were missing
    assert resumed.digest == whole.digest and _bytes(store.root) == _bytes(tmp_path / "whole")
    assert sorted(path.name for path in store.root.iterdir()) == sorted([whole.path.name, "locks"])


def test_another_process_finishes_while_this_one_reads_the_centers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = ensure_set(tiny_teacher(), CONFIG, 3, SetStore(tmp_path / "whole"), progress=False)
    read, done = SetStore.read_part, []

    def late(store: SetStore, path: Path) -> Any:
        if not done and path.name.startswith("centers"):
            done.append(path)
            ensure_set(tiny_teacher(), CONFIG, 3, SetStore(tmp_path / "race"), progress=False)  # the other process
        return read(store, path)

    monkeypatch.setattr(SetStore, "read_part", late)
    made = ensure_set(tiny_teacher(), CONFIG, 3, SetStore(tmp_path / "race"), progress=False)
    assert done and made.digest == whole.digest


def test_parts_that_outlived_their_set_are_removed(tmp_path: Path) -> None:
    store = SetStore(tmp_path)
    made = ensure_set(tiny_teacher(), CONFIG, 3, store, progress=False)
    left = store.partial(made.path.name)
    left.mkdir()
    (left / "shard-00000.safetensors").write_bytes(b"of a kill right after the set appeared")
    with store.lock(made.path.name, "set"):  # the process that assembles the set removes them
        ensure_set(tiny_teacher(), CONFIG, 3, store, progress=False)
        assert left.exists()
    assert ensure_set(tiny_teacher(), CONFIG, 3, store, progress=False).digest == made.digest
    assert not left.exists()


def test_a_kill_while_putting_together(tmp_path: Path) -> None:
    store = SetStore(tmp_path)
    key = store.key("7e" * 32, CONFIG, 3, input_size=(1, 9, 8), pixel_range=PIXELS)
    left = tmp_path / f"{key}.assembling"
    left.mkdir()
    (left / "images.safetensors").write_bytes(b"half a file")
    made = ensure_set(tiny_teacher(), CONFIG, 3, store, progress=False)
    assert len(made) == 14 and not left.exists()


def test_a_damaged_shard_is_named_and_made_again_on_resume(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = SetStore(tmp_path)
    config = SynthesisConfig(num_images=4, shard_size=4, iterations=1)
    key = store.key("7e" * 32, config, 0, input_size=(1, 9, 8), pixel_range=PIXELS)
    store.partial(key).mkdir(parents=True)
    file = store.partial(key) / "shard-00000.safetensors"
    file.write_bytes(b"not a shard")
    made = ensure_set(tiny_teacher(), config, 0, store, progress=False)
    assert f"{file} differs from its digest; this part of the set is made again" in capsys.readouterr().err
    undisturbed = ensure_set(tiny_teacher(), config, 0, SetStore(tmp_path / "other"), progress=False)
    assert len(made) == 4 and made.digest == undisturbed.digest


def test_a_damaged_set_is_set_aside_and_made_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from support.sealed import flip  # not at the top: this file is also run as a script, without tests/ in its path

    store, config = SetStore(tmp_path), SynthesisConfig(num_images=4, shard_size=2, iterations=1)
    made = ensure_set(tiny_teacher(), config, 0, store, progress=False)
    flip(made.path / "images.safetensors", -200)
    again = ensure_set(tiny_teacher(), config, 0, store, progress=False)
    assert again.digest == made.digest and (tmp_path / f"{made.path.name}.damaged").is_dir()
    (line,) = capsys.readouterr().err.splitlines()
    assert str(made.path) in line and "shard 1" in line and "made again" in line
    flip(made.path / "manifest.json", 30)
    assert ensure_set(tiny_teacher(), config, 0, store, progress=False).digest == made.digest
    assert "made again" in capsys.readouterr().err


def test_unwritable_store_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=str(tmp_path / "file")):
        ensure_set(tiny_teacher(), CONFIG, 0, SetStore(tmp_path / "file"), progress=False)


def test_divergence_and_memory_leave_no_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = SetStore(tmp_path)

    def too_large(*args: object, **kwargs: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(synthesis, "invert", too_large)
    with pytest.raises(
        ValueError, match=r"`synthesis\.shard_size` must fit into the memory of cpu, but got 4; lower it"
    ):
        ensure_set(tiny_teacher(), CONFIG, 0, store, progress=False)
    assert not list(tmp_path.glob("*/*.safetensors"))


def test_progress_is_silent_without_a_terminal(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    ensure_set(tiny_teacher(), CONFIG, 0, SetStore(tmp_path), progress=True)
    assert capfd.readouterr() == ("", "")


def test_progress_shows_loss_and_speed(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    maker_bar = synthesis.Bar
    quick = lambda **kwargs: maker_bar(**{**kwargs, "mininterval": 0.0})  # noqa: E731
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(synthesis, "Bar", quick)
        patch.setattr(sys.stderr, "isatty", lambda: True)
        ensure_set(tiny_teacher(), CONFIG, 0, SetStore(tmp_path), progress=True)
    shown = capfd.readouterr().err.split("\r")[-1]
    assert "train images: 100%" in shown and "14/14" in shown and "loss=" in shown and "image/s" in shown


def _main(root: Path, mode: str) -> None:
    from accelerate import Accelerator

    num_made = 0
    original = synthesis.invert

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal num_made
        num_made += 1
        if mode == "stall" and num_made == 4:  # one batch of centers, two shards, then this
            (next(root.glob("*.partial")) / "stalled").touch()
            time.sleep(600)
        if mode == "torchrun":
            time.sleep(0.3)  # so that neither process makes everything before the other has begun
        return original(*args, **kwargs)

    synthesis.invert = counted
    accelerator = Accelerator(cpu=True) if mode == "torchrun" else None
    if accelerator is not None:
        accelerator.wait_for_everyone()
    made = ensure_set(tiny_teacher(), CONFIG, 3, SetStore(root), accelerator=accelerator, progress=False)
    if accelerator is not None:
        labels: Tensor = made.labels
        reported = {
            "num_processes": accelerator.num_processes,
            "digest": made.digest,
            "num_made": num_made,
            "labels": labels.tolist(),
        }
        (root / f"report-{accelerator.process_index}.json").write_text(json.dumps(reported))
        accelerator.wait_for_everyone()
        accelerator.end_training()
        os._exit(0)


if __name__ == "__main__":
    _main(Path(sys.argv[1]), sys.argv[2])
