"""The rungs, and the driver's account of its trials, without a Ray."""

import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from support.sealed import edit
from support.sweep_tools import TINY, tiny
from synq.config.run import RunConfig
from synq.sweeps.driver.progress import Progress
from synq.sweeps.driver.stop_reason import StopReason
from synq.sweeps.state.ledger import Ledger
from synq.sweeps.state.plans import Plan
from synq.sweeps.state.trial_log import TrialLog
from synq.sweeps.state.trial_task import TrialTask


def make_task(**fields: Any) -> TrialTask:
    values: dict[str, Any] = {
        "trial": "net-W4A4-t000",
        "group": "net-W4A4",
        "stage": "search",
        "config": RunConfig(),
        "config_digest": "aa",
        "teacher": {},
        "sets": (),
        "folder": "folder",
        "address": "",
        "workers": 1,
        "cpus": 1.0,
        "gpus": 0.0,
        "max_failures": 3,
    }
    return TrialTask(**{**values, **fields})


def test_a_task_travels_as_plain_values_and_is_read_strictly() -> None:
    import json

    task = make_task(sets=("a", "b"), teacher={"name": "net", "input_size": [1, 8, 8]})
    values = json.loads(json.dumps(task.to_dict()))
    assert TrialTask.from_dict(values) == task and TrialTask.from_dict(task.to_dict()) == task
    assert values["config"]["finetune"]["lr"] == task.config.finetune.lr
    for changed, message in (
        ({"folder": 3}, "a trial's task: `folder` must be a text, but got 3"),
        ({"workers": 1.5}, "`workers` must be a whole number, but got 1.5"),
        ({"stage": "serach"}, "`stage` must be one of search, final, but got 'serach'; did you mean `search`?"),
        ({"sest": []}, "`sest` must be a known key, but got an unknown one; did you mean `sets`?"),
        ({"config": {"finetune": {"lrr": 1.0}}}, "`config.finetune.lrr` must be a known key"),
    ):
        with pytest.raises(ValueError) as error:
            TrialTask.from_dict({**values, **changed})
        assert message in str(error.value)
    del values["address"], values["gpus"]
    with pytest.raises(ValueError, match="must have every key of TrialTask, but address, gpus is missing"):
        TrialTask.from_dict(values)


def test_rungs_are_kept_apart_by_group_and_spare_last_epochs_and_reruns(tmp_path: Path) -> None:
    from synq.sweeps.driver.asha import SweepScheduler

    spec = tiny(tmp_path, reduction_factor=2, base={**TINY["base"], "finetune": {"epochs": 4, "batch_size": 16}})
    ledger = Ledger(spec)
    reason = StopReason()
    scheduler = SweepScheduler(spec, ledger, reason)
    assert scheduler.stop_reason is reason, "a disk that fails when the scheduler writes must end the sweep"

    def result(name: str, group: str, epoch: int, value: float | None, stage: Any = "search", **more: Any) -> str:
        trial = SimpleNamespace(trial_id=name, config={"trial": name})
        if name not in seen:
            ledger.plans[name] = Plan(
                trial=name, group=group, stage=stage, index=0, params={}, config=RunConfig(), config_digest=""
            )
            scheduler.on_trial_add(None, trial)
            seen.add(name)
        return scheduler.on_trial_result(None, trial, {"epoch": epoch, "epochs": 4, "objective_value": value, **more})

    seen: set[str] = set()
    wide, narrow = "digits_resnet8-W8A8", "digits_resnet8-W3A3"
    assert result("a", wide, 1, 0.001) == "CONTINUE"
    assert result("b", narrow, 1, 0.9) == "CONTINUE", "a 3-bit trial was compared with an 8-bit one"
    assert result("c", narrow, 1, 0.99) == "STOP"
    assert result("d", narrow, 1, 0.8) == "CONTINUE"
    assert result("e", narrow, 1, 5.0, stage="final") == "CONTINUE"
    assert result("f", narrow, 1, float("nan")) == "CONTINUE" and result("f", narrow, 1, None) == "CONTINUE"
    assert result("g", narrow, 4, 99.0) == "CONTINUE", "stopped in its last epoch: all the work, no result"
    assert result("h", narrow, 1, 99.0, status="completed") == "CONTINUE"


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Callable[..., tuple[Any, Ledger, Any]]]:
    """Open a sweep's folder as a driver that starts does: `(searcher, ledger, callback)`; ends the one before."""
    from synq.sweeps.driver.callback import SweepCallback
    from synq.sweeps.driver.searcher import SweepSearcher

    ledgers: list[Ledger] = []

    def start(folder: Path = tmp_path / "sweep", **keys: Any) -> tuple[Any, Ledger, Any]:
        for ledger in ledgers:
            ledger.close()
        spec = tiny(folder, **{"bits": ["W3A3"], "num_trials": 3, **keys})
        ledgers.append(Ledger(spec))
        ledgers[-1].open()
        searcher = SweepSearcher(ledgers[-1].spec, ledgers[-1])
        return (
            searcher,
            ledgers[-1],
            SweepCallback(ledgers[-1], Progress(searcher.num_total(), live=False), StopReason()),
        )

    yield start
    for ledger in ledgers:
        ledger.close()


def test_a_completed_trial_whose_record_cannot_be_seen_is_lost_not_weak(opened: Any) -> None:
    searcher, ledger, callback = opened()
    config = searcher.suggest("x")
    last = {"status": "completed", "objective_value": 0.01, "epoch": 2, "epochs": 2}
    trial = SimpleNamespace(trial_id="x", config=config, last_result=last)
    callback.on_trial_start(0, [], trial)
    callback.on_trial_complete(0, [], trial)
    record = ledger.records[config["trial"]]
    assert record.status == "lost" and record.reason.startswith("its record is not visible here: output_dir must be")


def test_an_interrupted_trial_keeps_its_epochs_and_their_rungs(opened: Any) -> None:
    from synq.sweeps.driver.asha import SweepScheduler

    keys = {
        "base": {**TINY["base"], "finetune": {"epochs": 8, "batch_size": 16}},
        "grace_epochs": 2,
        "reduction_factor": 2,
    }
    searcher, _, callback = opened(**keys)
    config = searcher.suggest("x")
    trial = SimpleNamespace(trial_id="x", config=config)
    callback.on_trial_start(0, [], trial)
    for epoch in (1, 2, 3):
        callback.on_trial_result(0, [], trial, {"epoch": epoch, "epochs": 8, "objective_value": 1.0 - 0.1 * epoch})
    searcher, ledger, _ = opened(**keys)  # the driver was killed and started again
    again = SimpleNamespace(trial_id="y", config=searcher.suggest("y"))
    assert again.config["trial"] == config["trial"]
    study = searcher.searches[config["group"]].study
    assert study.get_trials()[0].intermediate_values == {1: 0.9, 2: 0.8, 3: pytest.approx(0.7)}
    scheduler = SweepScheduler(ledger.spec, ledger)
    scheduler.on_trial_add(None, again)
    scheduler.on_trial_result(None, again, {"epoch": 4, "epochs": 8, "objective_value": 0.1})
    rungs = dict(scheduler.inner[config["group"]]._brackets[0]._rungs)
    assert rungs[2] == {"y": -0.8} and rungs[4] == {"y": -0.1}, "a later epoch's value stands in an earlier rung"


def test_an_interrupted_trial_uses_the_folders_of_today(opened: Any, tmp_path: Path) -> None:
    first = opened()[0].suggest("x")
    (tmp_path / "sweep").rename(tmp_path / "moved")
    searcher, _, _ = opened(tmp_path / "moved")
    again = searcher.suggest("y")
    assert again["trial"] == first["trial"] and again["config"]["seed"] == first["config"]["seed"]
    assert again["config"]["finetune"] == first["config"]["finetune"]
    assert again["config"]["runtime"]["output_dir"] == str(tmp_path / "moved" / "runs")
    plan = tmp_path / "moved" / "plans" / f"{first['trial']}.json"
    edit(plan, lambda content: content["config"].update(seed=content["config"]["seed"] + 1))
    with pytest.raises(ValueError, match=f"{first['trial']}.json. must be a plan of this sweep"):
        opened(tmp_path / "moved")


def test_settings_that_are_not_allowed_together_are_passed_over(opened: Any) -> None:
    space = {
        "finetune.epochs": {"type": "int", "low": 2, "high": 20},
        "finetune.warmup_epochs": {"type": "float", "low": 0, "high": 12},
    }
    searcher, _, _ = opened(
        space=space, num_trials=12, base={**TINY["base"], "finetune": {"epochs": 12, "batch_size": 16}}
    )
    found = [searcher.suggest(f"t{number}")["config"]["finetune"] for number in range(12)]
    assert all(part["warmup_epochs"] <= part["epochs"] for part in found) and searcher.invalid
    states = [trial.state.name for trial in next(iter(searcher.searches.values())).study.get_trials()]
    assert states.count("RUNNING") == 12 and states.count("FAIL") == len(states) - 12 > 0


def test_a_space_without_any_allowed_point_ends(opened: Any) -> None:
    space = {
        "finetune.epochs": {"type": "choice", "values": [2, 3]},
        "finetune.warmup_epochs": {"type": "choice", "values": [4.0, 5.0]},
    }
    base = {**TINY["base"], "finetune": {"epochs": 9, "batch_size": 16}}
    searcher, ledger, _ = opened(space=space, base=base)
    assert searcher.suggest("x") == "FINISHED" and searcher.exhausted and not ledger.plans
    assert "warmup_epochs" in next(iter(searcher.invalid.values()))


def test_other_files_of_the_same_name_are_refused(opened: Any) -> None:
    from dataclasses import replace

    searcher, ledger, _ = opened()
    config = searcher.suggest("x")
    teacher = {"name": "net", "digest": "aa", "input_size": [1, 8, 8]}
    ledger.know(config["group"], teacher, "ee")
    record = ledger.settle(config["trial"], status="pruned", reason="weak", history=[], seconds=1.0)
    ledger.know(config["group"], teacher, "other")  # a pruned trial's figures come from no labeled image
    with pytest.raises(ValueError, match="made with other weights of the same file name: put the old file back"):
        ledger.know(config["group"], {**teacher, "digest": "bb"}, "ee")
    ledger.records[config["trial"]] = replace(record, status="completed", eval_digest="ee")
    ledger.know(config["group"], teacher, "ee")
    ledger.know(
        config["group"], teacher, "v2-0", "ee"
    )  # the record of an earlier version, which saw the first 64 images
    with pytest.raises(ValueError, match="made with other labeled images of the same file name"):
        ledger.know(config["group"], teacher, "other")


def test_the_name_that_the_spec_gives_a_model_stands_in_its_records(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import synq.sweeps.workers.trial as trial
    from synq.runs.record import RunRecord

    monkeypatch.setattr(trial.pipeline, "run", lambda *_, **__: RunRecord(model="digits_resnet8"))
    task = make_task(folder=str(tmp_path), teacher={"name": "my_net", "digest": "aa"})
    workspace = trial.Workspace(task.folder)
    with TrialLog(workspace.log(task.trial)) as log:
        record = trial._run(task.config, task, workspace, print, log)
    assert (record.model, record.log) == ("my_net", f"logs/{task.trial}.log")


def test_the_console_command_does_not_wait_for_threads_of_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    import synq.cli

    codes: list[int] = []
    monkeypatch.setattr(synq.cli, "run", lambda argv: 3)
    monkeypatch.setattr(os, "_exit", codes.append)
    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace())
    with pytest.raises(SystemExit):  # only here, where os._exit returns
        synq.cli.main()
    assert codes == [3]


def test_an_extension_adds_to_a_finished_sweep_and_finishes_an_interrupted_one(opened: Any) -> None:
    _, ledger, _ = opened(num_trials=2)
    ledger.finish()
    assert opened(num_trials=2, more_trials=3)[1].spec.search.num_trials == 5
    assert opened(num_trials=2, more_trials=3)[1].spec.search.num_trials == 5, (
        "the first extension has not come to its end"
    )
    _, ledger, _ = opened(num_trials=2, more_trials=3)
    ledger.finish()
    assert opened(num_trials=2, more_trials=1)[0].num_left() == 6
    assert opened(num_trials=4)[0].num_left() == 4
    ledger = opened(num_trials=2)[1]
    ledger.finish()  # the plain command in between takes nothing back
    assert opened(num_trials=2, more_trials=1)[1].spec.search.num_trials == 6


def test_an_extension_of_nothing_is_refused(opened: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"`num_trials` must be a whole number for a new sweep, but got \+3"):
        opened(tmp_path / "new", more_trials=3)


def test_listed_points_come_in_order_and_each_once(opened: Any) -> None:
    points = [{"finetune.lr": lr} for lr in (0.01, 0.02, 0.01, 0.03)]
    searcher, _, _ = opened(points=points, sampler="points", num_trials=None, bits=["W3A3"])
    found = [searcher.suggest(f"t{number}") for number in range(4)]
    assert [task["config"]["finetune"]["lr"] for task in found[:3]] == [0.01, 0.02, 0.03] and found[3] == "FINISHED"
    assert searcher.exhausted
    again, _, _ = opened(points=points, sampler="points", num_trials=None, bits=["W3A3"])
    assert again.num_left() == 4 and again.suggest("x")["trial"] == found[0]["trial"]


@pytest.mark.slow
def test_a_sweep_of_ten_thousand_points_starts_and_goes_on_without_stalling(opened: Any) -> None:
    points = [{"finetune.lr": 1e-4 + 1e-6 * number} for number in range(10_000)]
    clock = time.process_time()
    searcher, ledger, _ = opened(points=points, sampler="points", num_trials=None)
    assert searcher.suggest("first")["config"]["finetune"]["lr"] == 1e-4 and searcher.num_left() == 10_000
    started = time.process_time() - clock
    clock = time.process_time()
    for number in range(200):
        searcher.suggest(f"t{number}")
    assert started < 5 and (time.process_time() - clock) / 200 < 0.05
    assert ledger.num_plans("digits_resnet8-W3A3") == 201


def test_a_diverged_epoch_does_not_keep_a_sweep_from_going_on(opened: Any) -> None:
    searcher, ledger, callback = opened()
    config = searcher.suggest("x")
    trial = SimpleNamespace(trial_id="x", config=config)
    callback.on_trial_start(0, [], trial)
    for epoch, value in ((1, 0.5), (2, float("nan")), (3, None)):
        callback.on_trial_result(0, [], trial, {"epoch": epoch, "epochs": 9, "objective_value": value})
    assert ledger.plans[config["trial"]].history == [(1, 0.5)]
    assert opened()[0].suggest("y")["trial"] == config["trial"]


def test_a_record_of_another_run_is_no_record(opened: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine may keep its copy of what was at an address before; trials of other sweeps have the same names."""
    from synq.sweeps.state.plans import unfinished_record
    from synq.sweeps.workers.workspace import Workspace

    monkeypatch.setenv("SYNQ_CACHE_DIR", str(tmp_path / "cache"))
    searcher, _, _ = opened()
    task = TrialTask.from_dict(searcher.suggest("x"))
    known = (task.trial, task.config_digest)
    record = unfinished_record(task.config, task.trial, status="failed", reason="then", teacher={})
    here = Workspace(task.folder)
    here.finish(record)
    assert here.record(*known) == record
    assert here.record(task.trial, "other") is None
    (tmp_path / "bucket").mkdir()
    there = Workspace(task.folder, f"file://{tmp_path}/bucket")
    there.finish(record)
    assert there.record(*known) == record
    (tmp_path / "bucket" / "records" / f"{task.trial}.json").unlink()
    assert there.record(*known) is None, "what the address no longer has is no record"


def test_a_password_stays_out_of_files_and_messages(opened: Any, tmp_path: Path) -> None:
    from synq.sweeps.storage.databases import database_error, database_text

    address = "postgresql://me:secret@host/db"
    ledger = opened(tmp_path / "other", study_storage=address)[1]
    assert "secret" not in (ledger.root / "sweep.json").read_text()
    for text, shown in {
        address: "postgresql://me:...@host/db",
        "postgresql://me:a:b/secret@host/db?password=secret": "postgresql://me:...@host/db",
        "postgresql://host/db?user=me&password=secret": "postgresql://host/db",
        "sqlite:////tmp/a.db": "sqlite:////tmp/a.db",
    }.items():
        assert database_text(text) == shown
        assert "secret" not in database_error(ValueError(f"cannot parse {text}"), text), text
