"""Several runs of one command: in this process, or side by side in others."""

from pathlib import Path
from typing import Any

import pytest

from synq.config.run import RunConfig, with_overrides
from synq.pipeline import run
from synq.runs.record import RunRecord, run_folder
from synq.sweeps.studies.pool import run_all


@pytest.fixture
def runs(tiny_settings: dict[str, Any], tmp_path: Path) -> dict[str, RunConfig]:
    settings = {**tiny_settings, "runtime.output_dir": str(tmp_path), "runtime.num_threads": 1}
    base = with_overrides(RunConfig(), {**settings, "quant.weight_bits": 3, "quant.act_bits": 3})
    return {"a": base, "b": with_overrides(base, {"seed": 1})}


def test_one_after_the_other_and_what_is_finished_is_only_read(runs: dict[str, RunConfig]) -> None:
    first = run(runs["a"])
    written = (run_folder(runs["a"]) / "record.json").stat().st_mtime_ns
    seen: dict[str, RunRecord] = {}
    done = run_all(runs, 1, seen.__setitem__)
    assert done == seen and list(done) == ["a", "b"] and done["a"] == first != done["b"]
    assert (run_folder(runs["a"]) / "record.json").stat().st_mtime_ns == written


@pytest.mark.slow
def test_side_by_side_is_the_same_as_one_after_the_other(runs: dict[str, RunConfig], tmp_path: Path) -> None:
    first = run(runs["a"])
    written = (run_folder(runs["a"]) / "record.json").stat().st_mtime_ns
    seen: dict[str, RunRecord] = {}
    done = run_all(runs, 2, seen.__setitem__)
    assert done == seen and set(done) == {"a", "b"} and done["a"] == first, "what is finished is only read"
    assert (run_folder(runs["a"]) / "record.json").stat().st_mtime_ns == written
    alone = {"b": with_overrides(runs["b"], {"runtime.output_dir": str(tmp_path / "alone")})}
    (again,) = run_all(alone, 1, seen.__setitem__).values()
    assert (again.fidelity, again.top1, again.lost) == (done["b"].fidelity, done["b"].top1, done["b"].lost)
    assert seen["b"] == again


def test_no_jobs_are_refused_before_any_work(runs: dict[str, RunConfig], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="`jobs` must be >= 1, but got 0"):
        run_all(runs, 0, lambda *_: None)
    assert not list(tmp_path.iterdir())
