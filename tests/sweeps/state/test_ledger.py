"""Plans and records of a sweep in memory: what is counted, chosen, settled and written."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from support.sweep_tools import TINY, rows, tiny
from synq.config.run import config_digest, config_to_dict, with_overrides
from synq.runs.record import RunRecord, read_record, write_record
from synq.sweeps.leaderboard.records import Tables
from synq.sweeps.spec import SweepSpec
from synq.sweeps.spec_file import spec_from_dict
from synq.sweeps.state.ledger import Ledger
from synq.sweeps.state.plans import Plan, read_plan, read_sweep_file
from synq.sweeps.storage.lease import Lease

SPACE = {"finetune.lr": {"type": "float", "low": 1e-4, "high": 1e-2, "log": True}}
KEYS: dict[str, Any] = {"space": SPACE, "num_trials": 3, "sampler": "random", "bits": ["W8A8"]}
FACTS = {"name": "net", "digest": "aa", "input_size": [1, 8, 8]}


def opened(folder: Path, **keys: Any) -> Ledger:
    ledger = Ledger(tiny(folder, **{**KEYS, **keys}))
    ledger.open()
    return ledger


@pytest.fixture
def ledger(tmp_path: Path) -> Any:
    ledger = opened(tmp_path / "sweep")
    yield ledger
    ledger.close()


def group_of(ledger: Ledger) -> str:
    return next(iter(ledger.spec.groups)).key


def planned(ledger: Ledger, index: int, *, stage: Any = "search", bits: int = 8, lr: float = 0.001) -> Plan:
    group = next(iter(ledger.spec.groups))
    overrides = {"finetune.lr": lr * (1 + index), "quant.weight_bits": bits, "name": f"{group.key}-{stage}{index}"}
    config = with_overrides(group.base, overrides)
    plan = Plan(
        trial=config.name, group=group.key, stage=stage, index=index, params={"finetune.lr": lr}, config=config,
        config_digest=config_digest(config),
    )  # fmt: skip
    ledger.add_plan(plan)
    return plan


def recorded(ledger: Ledger, plan: Plan, value: float | None, **fields: Any) -> RunRecord:
    """Write the record of a trial, as its worker does, and settle it."""
    quant = plan.config.quant
    record = RunRecord(
        **{
            "name": plan.trial, "config": config_to_dict(plan.config), "config_digest": plan.config_digest,
            "teacher": dict(FACTS), "weight_bits": quant.weight_bits, "act_bits": quant.act_bits,
            "protocol": plan.config.protocol, "act_points": quant.points, "objective": "synthetic",
            "objective_value": value, **fields,
        }
    )  # fmt: skip
    write_record(ledger.record_path(plan.trial), record)
    return ledger.settle(plan.trial, status="failed", reason="no record", history=[(1, 0.5)], seconds=9.0)


def test_search_trials_are_counted_and_reruns_are_not(ledger: Ledger) -> None:
    group = group_of(ledger)
    assert (ledger.num_plans(group), ledger.num_open(group), ledger.next_index(group)) == (0, 0, 0)
    first, third = planned(ledger, 0), planned(ledger, 2)
    planned(ledger, 0, stage="final")
    assert ledger.group_plans(group) == [first, third] and len(ledger.group_plans(group, "final")) == 1
    assert (ledger.num_plans(group), ledger.num_open(group), ledger.next_index(group)) == (2, 2, 3)
    recorded(ledger, first, 0.1)
    assert (ledger.num_plans(group), ledger.num_open(group), ledger.next_index(group)) == (2, 1, 3)
    assert ledger.group_plans("another") == [] and ledger.num_open("another") == 0


def test_the_best_trials_are_completed_finite_and_of_each_bit_width(ledger: Ledger) -> None:
    group = group_of(ledger)
    values = {0: 0.3, 1: 0.1, 2: float("inf"), 3: 0.1, 4: None}
    plans = {index: planned(ledger, index) for index in range(7)}
    for index, value in values.items():
        recorded(ledger, plans[index], value)
    recorded(ledger, plans[5], 0.01, status="pruned", reason="stopped")
    assert ledger.best(group) == [ledger.plans[plans[1].trial]], "of equal ones the first"
    found = [plan.index for plan in ledger.best(group, 3)]
    assert found == [1, 3, 0]
    other = planned(ledger, 7, bits=4)
    recorded(ledger, other, 0.9)
    assert [plan.index for plan in ledger.best(group)] == [1, 7]


def test_where_a_higher_objective_is_better_the_highest_is_the_best(tmp_path: Path) -> None:
    ledger = opened(tmp_path / "sweep", objective="selection")
    for index, value in enumerate((80.0, 90.0)):
        recorded(ledger, planned(ledger, index), value, objective="selection")
    assert [plan.index for plan in ledger.best(group_of(ledger))] == [1]
    ledger.close()


def test_a_trial_that_wrote_a_record_has_it_and_another_gets_one(ledger: Ledger) -> None:
    plan = planned(ledger, 0)
    ledger.ask_to_stop(plan.trial)
    stop = ledger.root / "plans" / f"{plan.trial}.stop"
    assert json.loads(stop.read_text())["stop"] is True
    record = recorded(ledger, plan, 0.25)
    assert record.objective_value == 0.25 and record.status == "completed" and not stop.exists()
    assert ledger.plans[plan.trial].history == [(1, 0.5)] == read_plan(stop.with_suffix(".json")).history
    ledger.know(group_of(ledger), FACTS, "")
    lost = planned(ledger, 1)
    ledger.note(lost.trial, {2: 0.5, 1: 0.75})
    assert ledger.plans[lost.trial].history == [(1, 0.75), (2, 0.5)]
    record = ledger.settle(
        lost.trial, status="pruned", reason="below the others", history=[(1, 0.75), (2, 0.5)], seconds=3.0,
        began=0.0, host="machine",
    )  # fmt: skip
    assert record == ledger.records[lost.trial] == read_record(ledger.record_path(lost.trial))
    assert (record.status, record.reason, record.objective_value) == ("pruned", "below the others", 0.5)
    assert (record.total_seconds, record.host, record.started) == (3.0, "machine", "1970-01-01T00:00:00+00:00")
    assert record.teacher["digest"] == "aa"
    silent = ledger.settle(planned(ledger, 2).trial, status="failed", reason="it died", history=[], seconds=1.0)
    assert (silent.objective_value, silent.started, silent.host) == (None, "", "")
    ledger.write_tables()
    assert {row["trial"] for row in rows(ledger.root / "trials.csv")} == set(ledger.records)


def test_a_trial_that_ended_while_the_driver_was_stopped_is_in_the_tables(ledger: Ledger) -> None:
    ended, damaged, running = (planned(ledger, index) for index in range(3))
    for plan in (ended, damaged):
        recorded(ledger, plan, 0.25)
        del ledger.records[plan.trial]
    ledger.tables = Tables()  # as it is before the driver hears of either
    path = ledger.record_path(damaged.trial)
    path.write_text(path.read_text().replace("0.25", "0.75"))
    ledger.end_early()
    assert [row["trial"] for row in rows(ledger.root / "trials.csv")] == [ended.trial]
    assert not path.exists() and running.trial not in ledger.records


def test_tables_are_written_at_once_and_then_seldom(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("synq.sweeps.state.ledger.time.monotonic", lambda: now[0])
    write = ledger.tables.write

    def slow(folder: Path) -> None:
        write(folder)
        now[0] += 2.0

    monkeypatch.setattr(ledger.tables, "write", slow)
    written = []
    for index, wait in enumerate((0.0, 19.0, 1.5)):
        now[0] += wait
        recorded(ledger, planned(ledger, index), 0.1)
        written.append(len(rows(ledger.root / "trials.csv")))
    assert written == [1, 1, 3], "2 s of writing are a tenth of the time: the next one is due after 20 s"


def test_the_task_of_a_plan_has_what_the_sweep_knows(tmp_path: Path) -> None:
    ledger = opened(tmp_path / "sweep", gpus_per_worker=1.0, cpus_per_worker=3, workers_per_trial=2, max_failures=4)
    plan = planned(ledger, 0)
    assert ledger.task(plan).teacher == {} and ledger.task(plan).sets == ()
    ledger.know(plan.group, FACTS, "")
    task = ledger.task(plan)
    assert (task.trial, task.group, task.stage, task.config) == (plan.trial, plan.group, "search", plan.config)
    assert (task.config_digest, task.teacher, task.folder) == (plan.config_digest, FACTS, str(ledger.root))
    assert (task.gpus, task.cpus, task.workers, task.max_failures) == (1.0, 3, 2, 4)
    ledger.close()


def test_records_of_other_weights_or_images_are_rejected(ledger: Ledger) -> None:
    plan = planned(ledger, 0)
    recorded(ledger, plan, 0.1, eval_digest="images")
    ledger.know(plan.group, FACTS, "images")
    ledger.know(plan.group, FACTS, "new", "images")
    ledger.know("another group", {**FACTS, "digest": "bb"}, "others")
    for facts, labels, what in (({**FACTS, "digest": "bb"}, "images", "weights"), (FACTS, "others", "labeled images")):
        with pytest.raises(ValueError, match=f"made with other {what} of the same file name"):
            ledger.know(plan.group, facts, labels)


def test_a_failed_trial_is_run_again_only_where_it_is_asked_for(tmp_path: Path) -> None:
    ledger = opened(tmp_path / "sweep")
    failed, done = planned(ledger, 0), planned(ledger, 1)
    recorded(ledger, failed, None, status="failed", reason="it died")
    recorded(ledger, done, 0.1)
    ledger.close()
    again = opened(tmp_path / "sweep")
    assert set(again.records) == {failed.trial, done.trial} and again.plans.keys() == ledger.plans.keys()
    assert len(again.tables) == 2
    again.close()
    other = opened(tmp_path / "sweep", retry=["lost", "pre-empted"])
    assert set(other.records) == {failed.trial, done.trial}
    other.close()
    retried = opened(tmp_path / "sweep", retry=["diverged", "failed"])
    assert set(retried.records) == {done.trial} and not retried.record_path(failed.trial).exists()
    retried.close()


def test_a_finished_sweep_knows_its_number_of_trials(tmp_path: Path) -> None:
    ledger = opened(tmp_path / "sweep")
    path = ledger.root / "sweep.json"
    assert "finished" not in read_sweep_file(path) and read_sweep_file(path)["search"]["num_trials"] == 3
    ledger.finish()
    ledger.close()
    assert read_sweep_file(path)["finished"] == 3
    spec: SweepSpec = tiny(tmp_path / "sweep", **{**KEYS, "num_trials": 2})
    smaller = Ledger(replace(spec))
    smaller.open()
    smaller.finish()
    smaller.close()
    assert read_sweep_file(path)["finished"] == 3, "the larger number stays"
    assert read_sweep_file(path)["search"]["num_trials"] == 3


def test_every_file_of_a_sweep_at_an_address_is_sent_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SYNQ_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setitem(Lease.__init__.__kwdefaults__, "settle", 0.0)
    far = tmp_path / "far"
    ledger = Ledger(spec_from_dict({**TINY, **KEYS, "name": "tiny", "output_dir": far.as_uri()}))
    ledger.open()
    assert (far / "sweep.json").read_bytes() == (ledger.root / "sweep.json").read_bytes()
    ledger.settle(planned(ledger, 0).trial, status="failed", reason="it died", history=[], seconds=1.0)
    ledger.finish()
    files = {path.relative_to(ledger.root): path.read_bytes() for path in ledger.root.rglob("*.json")}
    files |= {Path(name): (ledger.root / name).read_bytes() for name in ("trials.csv", "leaderboard.csv")}
    assert len(files) == 5 and all((far / name).read_bytes() == content for name, content in files.items())
    ledger.close()
