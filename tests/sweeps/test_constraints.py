"""Constraints of a sweep: how they are read, what they do to ranks and fronts, what Optuna is told."""

import json
from pathlib import Path
from typing import Any

import pytest

from support.records import bits, folder_of, record
from support.sweep_tools import tiny
from synq.common.digests import write_sealed_json
from synq.sweeps.constraints import Constraint, constraint_values, constraints_of, read_constraints
from synq.sweeps.leaderboard.records import Tables, read_tables, write_tables
from synq.sweeps.leaderboard.views import compare
from synq.sweeps.state.plans import FORMAT

SMALL = (Constraint(name="size_bytes", max=4096),)


def lr(value: float) -> dict[str, Any]:
    return {"finetune.lr": value}


def test_a_bound_is_a_number_or_a_table_and_reads_back() -> None:
    found = read_constraints({"size_bytes": 4096, "drop": {"max": 2, "min": -1.5}, "latency_ms": {"max": 0.25}})
    assert [str(one) for one in found] == ["size_bytes <= 4096", "drop <= 2 and >= -1.5", "latency_ms <= 0.25"]
    assert read_constraints(json.loads(json.dumps(constraint_values(found)))) == found


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"size_byte": 1}, "did you mean `constraints.size_bytes`|size_bytes"),
        ({"size_bytes": {"most": 1}}, "constraints.size_bytes.most"),
        ({"size_bytes": "4 KB"}, "`constraints.size_bytes` must be a finite number, but got '4 KB'"),
        ({"size_bytes": True}, "must be a finite number"),
        ({"drop": {"max": float("nan")}}, "`constraints.drop.max` must be a finite number"),
        ({"drop": {"max": 1, "min": 2}}, "`constraints.drop.min` must be at most max"),
        ({"drop": {}}, "`constraints.drop` must be a number"),
        (3, "`constraints` must be a table"),
    ],
)
def test_a_wrong_bound_is_rejected_with_its_key(table: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        read_constraints(table)


def test_excess_is_above_zero_exactly_where_the_text_says_violated() -> None:
    both = Constraint(name="drop", max=2.0, min=-1.0)
    for value in (-2.0, -1.0, 0.0, 2.0, 2.0000001, 9.0, None):
        assert (both.excess(value) > 0) == bool(both.violation(value)), value
    assert both.violation(2.0000001) == "drop 2.0000001 > 2", "a rounded value would look like its bound"
    assert Constraint(name="size_bytes", max=4096).excess(6144) == 0.5, "relative: they are summed"


def test_rows_that_violate_come_last_and_none_of_them_is_best() -> None:
    records = [
        record(0.10, overrides=lr(1e-3), size_bytes=5000.0),
        record(0.30, overrides=lr(2e-3), size_bytes=4096.0),
        record(0.20, overrides=lr(3e-3), size_bytes=4097.0),
        record(0.40, overrides=lr(4e-3)),
    ]
    rows = Tables(records, SMALL).leaderboard_rows()
    assert [(row["objective_value"], row["rank"], row["best"]) for row in rows] == [
        (0.30, 1, 1), (0.40, 2, 0), (0.10, 3, 0), (0.20, 4, 0),
    ]  # fmt: skip
    assert [row["violates"] for row in rows] == [None, None, "size_bytes 5000 > 4096", "size_bytes 4097 > 4096"]
    assert {row["lr"]: row["violates"] for row in Tables(records, SMALL).trial_rows()}[1e-3] == "size_bytes 5000 > 4096"
    assert Tables(records).leaderboard_rows()[0]["objective_value"] == 0.10, "without constraints the lowest is first"
    alone = Tables(records[:1], SMALL).leaderboard_rows()
    assert [(row["rank"], row["best"]) for row in alone] == [(1, 0)], "a ranking of violations only has no best row"


def test_a_row_is_bounded_by_its_mean_over_seeds_and_two_violations_are_both_named() -> None:
    records = [record(0.1, seed=seed, top1=top1, size_bytes=5000.0) for seed, top1 in ((0, 91.0), (1, 87.0))]
    bounds = (*SMALL, Constraint(name="drop", max=2.5))
    tables = Tables(records, bounds)
    assert [row["violates"] for row in tables.leaderboard_rows()] == ["size_bytes 5000 > 4096; drop 3 > 2.5"]
    assert {row["seed"]: row["violates"] for row in tables.trial_rows()} == {
        0: "size_bytes 5000 > 4096", 1: "size_bytes 5000 > 4096; drop 5 > 2.5",
    }  # fmt: skip


def test_the_front_is_that_of_the_rows_that_satisfy_the_constraints() -> None:
    records = [
        record(0.1, overrides=bits(8), size_bytes=8000.0),
        record(0.2, overrides=bits(4), size_bytes=4000.0),
        record(0.3, overrides=bits(3), size_bytes=3000.0),
    ]
    front = {row["weight_bits"]: row["pareto_size"] for row in Tables(records, SMALL).leaderboard_rows()}
    assert front == {8: 0, 4: 1, 3: 1}
    dear = (Constraint(name="size_bytes", min=3500.0),)
    front = {row["weight_bits"]: row["pareto_size"] for row in Tables(records, dear).leaderboard_rows()}
    assert front == {8: 1, 4: 1, 3: 0}, "a cheaper row that violates a bound dominates none"


def sweep_folder(folder: Path, constraints: dict[str, Any]) -> str:
    records = [record(0.1, overrides=lr(1e-3), size_bytes=5000.0), record(0.3, overrides=lr(2e-3), size_bytes=4000.0)]
    path = folder_of(folder, records)
    content = {"format": FORMAT, "search": {}, "groups": {}, "constraints": constraints}
    write_sealed_json(folder / "sweep.json", content)
    return path


def test_every_reader_of_a_sweep_ranks_by_its_constraints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import synq
    from synq.commands.leaderboard import main
    from synq.sweeps.reports.sweep_view import read_sweep
    from synq.sweeps.reports.terminal import show

    path = sweep_folder(tmp_path / "a", {"size_bytes": {"max": 4096.0}})
    assert read_tables([path])[0].leaderboard_rows()[0]["objective_value"] == 0.3
    assert synq.sweeps.leaderboard(path)["violates"].fillna("").tolist() == ["", "size_bytes 5000 > 4096"]
    assert read_sweep(path).standings()[0].row["best"] == 1
    assert main([path, "--print"]) == 0
    assert "size_bytes 5000 > 4096" in capsys.readouterr().out
    show([path])
    shown = capsys.readouterr().out
    assert "size_bytes <= 4096" in shown and "size_bytes 5000 > 4096" in shown and "1 of 2 settings" in shown
    write_tables([record(0.1)], tmp_path)
    assert "violates" not in [*_printed(tmp_path, capsys)], "an empty column is not printed"


def _printed(folder: Path, capsys: pytest.CaptureFixture[str]) -> list[str]:
    from synq.commands.leaderboard import main

    assert main([folder_of(folder, [record(0.1)]), "--print"]) == 0
    return capsys.readouterr().out.splitlines()[-2].split()


def test_sweeps_with_different_bounds_are_ranked_without_any(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = sweep_folder(tmp_path / "a", {"size_bytes": {"max": 4096.0}})
    other = sweep_folder(tmp_path / "b", {"size_bytes": {"max": 4097.0}})
    assert constraints_of([one]) == SMALL
    assert constraints_of([one, other]) == ()
    assert "different constraints" in capsys.readouterr().err
    (tmp_path / "b" / "sweep.json").write_text("{")
    assert constraints_of([tmp_path / "b"]) == ()
    assert "ranked without constraints" in capsys.readouterr().err


def test_compare_takes_the_best_row_that_satisfies_the_bounds() -> None:
    records = [record(0.1, overrides=lr(1e-3), size_bytes=5000.0), record(0.3, overrides=lr(2e-3), size_bytes=4000.0)]
    lines = compare({"a": Tables(records, SMALL).standings(), "b": Tables(records).standings()})
    assert [line["objective_value"] for line in lines] == [0.3, 0.1]


def test_bounds_may_change_at_a_resume_and_the_folder_keeps_the_last(tmp_path: Path) -> None:
    from synq.sweeps.state.ledger import Ledger

    for bounds in ({"size_bytes": 4096}, {"drop": 1}, {}):
        spec = tiny(tmp_path, constraints=bounds)
        ledger = Ledger(spec)
        ledger.open()
        ledger.close()
        assert constraints_of([tmp_path]) == spec.constraints
    assert "constraints" not in json.loads((tmp_path / "sweep.json").read_text())
