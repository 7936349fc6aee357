"""A whole sweep with constraints on the bundled teacher: what is best, what is said, what a resume may change."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support.sweep_tools import rows, tiny
from synq.sweeps.driver.cluster import prepare_environment

pytestmark = pytest.mark.slow

TWO: dict[str, Any] = {
    "bits": ["W8A8", "W4A4", "W3A3"],
    "second_objective": "size_bytes",
    "scheduler": "none",
    "num_trials": 6,
    "max_concurrent": 1,
    "space": {"finetune.lr": {"type": "choice", "values": [0.005, 1e-8]}},
}


@pytest.fixture(scope="module")
def local_ray() -> Iterator[None]:
    """One Ray for the sweeps of this file."""
    prepare_environment()
    import ray

    ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()


def test_the_best_row_satisfies_the_bound_and_a_resume_may_change_it(
    local_ray: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from synq.sweeps.driver.tuner import run_sweep

    assert run_sweep(tiny(tmp_path, **TWO)) == 0
    sizes = {row["weight_bits"]: float(row["size_bytes"]) for row in rows(tmp_path / "leaderboard.csv")}
    assert sizes["8"] > sizes["4"] > sizes["3"]
    front = {row["weight_bits"] for row in rows(tmp_path / "leaderboard.csv") if row["pareto_size"] == "1"}
    assert "8" in front
    before = rows(tmp_path / "trials.csv")
    capsys.readouterr()

    bound = sizes["4"]
    assert run_sweep(tiny(tmp_path, **TWO, constraints={"size_bytes": bound})) == 0
    printed = capsys.readouterr().out
    assert f"constraints: size_bytes <= {bound:g}" in printed and "violates" in printed
    board = rows(tmp_path / "leaderboard.csv")
    best = [row for row in board if row["best"] == "1"]
    assert {row["weight_bits"] for row in best} == {"4", "3"} and all(float(row["size_bytes"]) <= bound for row in best)
    wide = [row for row in board if row["weight_bits"] == "8"]
    assert {row["violates"] for row in wide} == {f"size_bytes {sizes['8']:g} > {bound:g}"}
    assert {row["pareto_size"] for row in wide} == {"0"} and {row["best"] for row in wide} == {"0"}
    assert [row["trial"] for row in rows(tmp_path / "trials.csv")] == [row["trial"] for row in before], "nothing is run"

    import synq

    assert synq.sweeps.open(tmp_path).best().record.weight_bits == 4, "8 bits come first, but violate the bound"
    assert run_sweep(tiny(tmp_path, **TWO, constraints={"size_bytes": 1})) == 1
    with pytest.raises(
        ValueError, match=r"`constraints` must be satisfied by a trial of digits_resnet8, but the first"
    ):
        synq.sweeps.open(tmp_path).best()
    assert "satisfies the constraints size_bytes <= 1" in capsys.readouterr().out


def test_a_bound_on_drop_needs_labels(local_ray: None, tmp_path: Path) -> None:
    from synq.sweeps.driver.tuner import run_sweep

    model = {"spec": "bundled:digits_resnet8", "dataset": "none"}
    with pytest.raises(ValueError, match=r"`constraints.drop` must be left out without labeled images"):
        run_sweep(tiny(tmp_path, **TWO, models=[model], constraints={"drop": 2}))


def test_a_sweep_with_a_setting_that_exists_only_sometimes(local_ray: None, tmp_path: Path) -> None:
    from synq.sweeps.driver.tuner import run_sweep
    from synq.sweeps.reports.make import make_report

    space = {
        "finetune.perturb_weight": {"type": "choice", "values": [0.0, 1.0]},
        "finetune.perturb_size": {"type": "float", "low": 0.01, "high": 0.1, "when": {"finetune.perturb_weight": 1.0}},
    }
    keys = {"bits": ["W3A3"], "scheduler": "none", "max_concurrent": 1, "space": space}
    assert run_sweep(tiny(tmp_path, **keys, num_trials=5)) == 0
    assert run_sweep(tiny(tmp_path, **keys, num_trials=9)) == 0, "a resume replays what exists"
    trials = rows(tmp_path / "trials.csv")
    sizes = {row["params.finetune.perturb_weight"]: set() for row in trials}  # type: dict[str, set[str]]
    for row in trials:
        sizes[row["params.finetune.perturb_weight"]].add(row["params.finetune.perturb_size"])
    assert sizes["0"] == {"0.02"}, "that of the base, run once"
    assert len(sizes["1"]) == 8
    make_report([tmp_path], runs=0)
    assert "Measured where they exist" in (tmp_path / "report.html").read_text()
