"""The search, the early stopping and whole sweeps on the bundled teacher: budgets, faults, resume, refusals."""

import csv
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from launch.sweep import main
from sweeps.cluster import check_shared, cluster, prepare_environment
from sweeps.leaderboard import LEADERBOARD_COLUMNS, TRIAL_COLUMNS
from sweeps.ledger import Ledger
from sweeps.progress import Progress
from sweeps.space import Dimension
from sweeps.spec import SweepSpec, spec_from_dict

TINY: dict[str, Any] = {
    "bits": ["W8A8", "W3A3"],
    "base": {
        "synthesis": {"num_images": 32, "shard_size": 16, "iterations": 5},
        "quant": {"calib_images": 32},
        "finetune": {"epochs": 2, "batch_size": 16},
        "evaluation": {"heldout_images": 16, "num_images": 64},
    },
}
LR = {"finetune.lr": {"type": "choice", "values": [0.005, 1e-8, 1e20]}}


def tiny(folder: Path, **keys: Any) -> SweepSpec:
    return spec_from_dict({**TINY, "name": "tiny", "output_dir": str(folder), **keys})


def write_spec(path: Path, epochs: int) -> Path:
    """The tiny spec as a file."""
    lines = [
        'name = "tiny"',
        'bits = ["W8A8", "W3A3"]',
        "num_trials = 2",
        'scheduler = "none"',
        "[base.finetune]",
        f"epochs = {epochs}",
    ]
    lines += [
        "batch_size = 16",
        "[base.synthesis]",
        "num_images = 32",
        "shard_size = 16",
        "iterations = 5",
        "[base.quant]",
    ]
    lines += [
        "calib_images = 32",
        "[base.evaluation]",
        "heldout_images = 16",
        "num_images = 64",
        '[space."finetune.lr"]',
    ]
    path.write_text("\n".join([*lines, 'type = "float"', "low = 1e-4", "high = 1e-2", "log = true", ""]))
    return path


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


# --- the search of one group ---------------------------------------------------------------------------------------------------


def group_search(**keys: Any) -> Any:
    from sweeps.group_search import GroupSearch

    dimensions = (Dimension(name="finetune.lr", type="float", low=1e-4, high=1e-1, log=True),)
    values = {"minimise": True, "sampler": "tpe", "seed": "s", "num_startup": 2, "study_name": "x", **keys}
    return GroupSearch(dimensions, **values)


def test_optuna_hears_how_each_trial_ended() -> None:
    search = group_search()
    for number, name in enumerate(("good", "stopped", "nan", "failed", "lost", "removed")):
        search.propose(f"p{number}", number)
        search.accept(f"p{number}", name, f"trial-{name}")
        search.on_trial_result(name, {"epoch": 1, "objective_value": 0.5})
    search.on_trial_complete("good", {"epoch": 2, "objective_value": 0.25, "status": "completed"})
    search.on_trial_complete("stopped", {"epoch": 2, "objective_value": 0.75})
    search.on_trial_complete("nan", {"epoch": 2, "objective_value": float("nan"), "status": "completed"})
    search.on_trial_complete("failed", {"epoch": 2, "objective_value": None, "status": "failed"})
    search.on_trial_complete("lost", {"epoch": 1, "objective_value": 0.5}, error=True)
    search.on_trial_complete("removed")
    trials = search.study.get_trials()
    assert [trial.state.name for trial in trials] == ["COMPLETE", "PRUNED", "FAIL", "FAIL", "FAIL", "FAIL"]
    assert trials[0].value == 0.25 and trials[1].intermediate_values == {1: 0.5, 2: 0.75}
    assert [trial.user_attrs["trial"] for trial in trials][:2] == ["trial-good", "trial-stopped"]
    search.on_trial_complete("good", {"objective_value": 9.0, "status": "completed"})  # told twice: heard once
    assert search.study.get_trials()[0].value == 0.25


def test_proposals_follow_from_number_and_history_not_from_the_process() -> None:
    first = [group_search().propose("p", number)[0]["finetune.lr"] for number in range(4)]
    assert first == [group_search().propose("p", number)[0]["finetune.lr"] for number in range(4)]
    assert len(set(first)) == 4, "a restarted driver would draw its first proposal again"
    assert first != [group_search(seed="other").propose("p", number)[0]["finetune.lr"] for number in range(4)]


def test_rungs_are_kept_apart_by_group_and_spare_last_epochs_and_reruns(tmp_path: Path) -> None:
    from sweeps.search import SweepScheduler

    spec = tiny(tmp_path, reduction_factor=2, base={**TINY["base"], "finetune": {"epochs": 4, "batch_size": 16}})
    scheduler = SweepScheduler(spec, Ledger(spec))

    def result(name: str, group: str, epoch: int, value: float | None, stage: str = "search", **more: Any) -> str:
        trial = SimpleNamespace(trial_id=name, config={"trial": name, "group": group, "stage": stage})
        if name not in seen:
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
    from sweeps.search import SweepSearcher
    from sweeps.tuner import SweepCallback

    ledgers: list[Ledger] = []

    def start(folder: Path = tmp_path / "sweep", **keys: Any) -> tuple[Any, Ledger, Any]:
        for ledger in ledgers:
            ledger.close()
        spec = tiny(folder, **{"bits": ["W3A3"], "num_trials": 3, **keys})
        ledgers.append(Ledger(spec))
        ledgers[-1].open()
        searcher = SweepSearcher(spec, ledgers[-1])
        return searcher, ledgers[-1], SweepCallback(ledgers[-1], Progress(searcher.num_total(), live=False))

    yield start
    for ledger in ledgers:
        ledger.close()


def test_a_completed_trial_whose_record_cannot_be_seen_is_failed_not_weak(opened: Any) -> None:
    searcher, ledger, callback = opened()
    config = searcher.suggest("x")
    last = {"status": "completed", "objective_value": 0.01, "epoch": 2, "epochs": 2}
    trial = SimpleNamespace(trial_id="x", config=config, last_result=last)
    callback.on_trial_start(0, [], trial)
    callback.on_trial_complete(0, [], trial)
    record = ledger.records[config["trial"]]
    assert record.status == "failed" and record.reason.startswith("its record is not visible here: output_dir must be")


def test_an_interrupted_trial_keeps_its_epochs_and_their_rungs(opened: Any) -> None:
    from sweeps.search import SweepScheduler

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
    import json

    first = opened()[0].suggest("x")
    (tmp_path / "sweep").rename(tmp_path / "moved")
    searcher, _, _ = opened(tmp_path / "moved")
    again = searcher.suggest("y")
    assert again["trial"] == first["trial"] and again["config"]["seed"] == first["config"]["seed"]
    assert again["config"]["finetune"] == first["config"]["finetune"]
    assert again["config"]["runtime"]["output_dir"] == str(tmp_path / "moved" / "runs")
    plan = tmp_path / "moved" / "plans" / f"{first['trial']}.json"
    content = json.loads(plan.read_text())
    content["config"]["seed"] += 1
    plan.write_text(json.dumps(content))
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
    ledger.know(config["group"], teacher, "other")  # a pruned trial's figures come from no labelled image
    with pytest.raises(ValueError, match="made with other weights of the same file name: put the old file back"):
        ledger.know(config["group"], {**teacher, "digest": "bb"}, "ee")
    ledger.records[config["trial"]] = replace(record, status="completed", eval_digest="ee")
    ledger.know(config["group"], teacher, "ee")
    with pytest.raises(ValueError, match="made with other labelled images of the same file name"):
        ledger.know(config["group"], teacher, "other")


def test_the_name_that_the_spec_gives_a_model_stands_in_its_records(monkeypatch: pytest.MonkeyPatch) -> None:
    import sweeps.trial as trial
    from synq.configs import RunConfig
    from synq.results import RunRecord

    monkeypatch.setattr(trial.pipeline, "run", lambda *_, **__: RunRecord(model="digits_resnet8"))
    assert trial._run(RunConfig(), "t000", {"name": "my_net", "digest": "aa"}).model == "my_net"


def test_a_cluster_reached_through_a_client_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import ray

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setenv("RAY_ADDRESS", "ray://somewhere:10001")
    with pytest.raises(ValueError, match="`ray job submit"), cluster(tiny(tmp_path).search):
        pass


def test_unused_gpus_are_remarked_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import ray

    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True, "Resources": {"CPU": 2.0, "GPU": 1.0}}])
    with cluster(tiny(tmp_path).search) as remark:
        assert "--gpus-per-trial 1" in remark
    with cluster(tiny(tmp_path, gpus_per_trial=0.5).search) as remark:
        assert remark == ""


def test_the_console_command_does_not_wait_for_threads_of_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    import synq.cli

    codes: list[int] = []
    monkeypatch.setattr(synq.cli, "run", lambda argv: 3)
    monkeypatch.setattr(synq.cli, "leave", lambda code: None)
    monkeypatch.setattr(os, "_exit", codes.append)
    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace())
    synq.cli.main()
    assert codes == [3]


# --- whole sweeps ----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def local_ray() -> Iterator[None]:
    """One Ray for the sweeps of this file."""
    prepare_environment()
    import ray

    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def sweep(local_ray: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished sweep: per group one plain, one failing and one hopeless setting, one trial at a time, best one on a second seed."""
    from sweeps.tuner import run_sweep

    folder = tmp_path_factory.mktemp("sweep")
    status = run_sweep(tiny(folder, space=LR, num_trials=3, max_concurrent=1, seeds=[0, 1], reduction_factor=2))
    assert status == 0
    return folder


def test_every_group_gets_its_full_number_of_trials(sweep: Path) -> None:
    trials = rows(sweep / "trials.csv")
    for bits in ("3", "8"):
        group = [row for row in trials if row["weight_bits"] == bits]
        assert sum("-s" not in row["trial"] for row in group) == 3
        assert sum(row["status"] == "completed" for row in group) >= 2  # the best one, and its second seed
        assert len({row["lr"] for row in group}) == 3, "a known setting was run again"
    assert tuple(trials[0]) == TRIAL_COLUMNS


def test_ended_trials_stand_with_reason_and_only_completed_ones_rank(sweep: Path) -> None:
    trials = rows(sweep / "trials.csv")
    ended = [row for row in trials if row["status"] != "completed"]
    assert {row["lr"] for row in ended} >= {"1e+20"} and all(row["reason"] for row in ended)
    assert {row["status"] for row in ended} <= {"failed", "pruned"}
    board = rows(sweep / "leaderboard.csv")
    assert tuple(board[0]) == LEADERBOARD_COLUMNS and "1e+20" not in {row["lr"] for row in board}
    for bits in ("3", "8"):
        ranked = [row for row in board if row["weight_bits"] == bits]
        assert [row["rank"] for row in ranked] == [str(i + 1) for i in range(len(ranked))]
        assert ranked[0]["num_seeds"] == "2" and ranked[0]["top1_std"] != ""
        assert {row["num_seeds"] for row in ranked[1:]} <= {"1"}


def test_each_set_is_made_once_and_shared_by_all_groups(sweep: Path) -> None:
    sets = [path for path in (sweep / "store").iterdir() if path.is_dir() and (path / "manifest.json").exists()]
    assert len(sets) == 3  # two training sets (seeds 0 and 1) and the held-out one
    trials = [row for row in rows(sweep / "trials.csv") if row["status"] == "completed"]
    assert {row["heldout_digest"] for row in trials} == {trials[0]["heldout_digest"]}
    assert len({(row["data_seed"], row["set_digest"]) for row in trials}) == 2


def test_a_trial_is_the_run_that_its_record_says(sweep: Path, tmp_path: Path) -> None:
    from synq.configs import RunConfig, config_from_dict, with_overrides
    from synq.pipeline import run
    from synq.results import read_record

    record = read_record(next((sweep / "records").glob("*W3A3-t000.json")))
    config = config_from_dict(RunConfig, record.config)
    alone = run(with_overrides(config, {"runtime.output_dir": str(tmp_path)}))
    assert alone.config_digest == record.config_digest and alone.set_digest == record.set_digest
    assert alone.objective_value == pytest.approx(record.objective_value, rel=1e-6) and alone.top1 == record.top1


def test_a_finished_sweep_runs_nothing_again_and_a_larger_one_only_the_rest(
    sweep: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sweeps.tuner as tuner

    before = {path: path.stat().st_mtime_ns for path in (sweep / "records").iterdir()}
    tables = {name: (sweep / name).read_bytes() for name in ("trials.csv", "leaderboard.csv")}
    keys = {"space": LR, "max_concurrent": 1, "seeds": [0, 1], "reduction_factor": 2}
    monkeypatch.setattr(tuner, "_make_sets", lambda *_: pytest.fail("a finished sweep made sets"))
    assert tuner.run_sweep(tiny(sweep, num_trials=3, **keys)) == 0
    assert {path: path.stat().st_mtime_ns for path in (sweep / "records").iterdir()} == before
    assert {name: (sweep / name).read_bytes() for name in tables} == tables


def test_the_search_is_rebuilt_from_the_folder(sweep: Path) -> None:
    from sweeps.search import SweepSearcher

    spec = tiny(sweep, space=LR, num_trials=3, seeds=[0, 1])
    ledger = Ledger(spec)
    ledger.open()
    try:
        searcher = SweepSearcher(spec, ledger)
        states = {"completed": "COMPLETE", "pruned": "PRUNED", "failed": "FAIL"}
        for key, search in searcher.searches.items():
            told = {trial.user_attrs["trial"]: trial.state.name for trial in search.study.get_trials()}
            plans = ledger.group_plans(key)
            assert told == {plan.trial: states[ledger.records[plan.trial].status] for plan in plans}
            assert [trial.params["finetune.lr"] for trial in search.study.get_trials()] == [
                plan.params["finetune.lr"] for plan in plans
            ]
        assert searcher.num_left() == 0 and searcher.suggest("next") == "FINISHED"
    finally:
        ledger.close()


def test_an_interrupted_trial_is_taken_up_first(sweep: Path, tmp_path: Path) -> None:
    import shutil

    from sweeps.search import SweepSearcher

    copy = tmp_path / "copy"
    shutil.copytree(sweep, copy)
    lost = sorted((copy / "records").glob("*W3A3-t001.json"))[0]
    lost.unlink()
    spec = tiny(copy, space=LR, num_trials=3, seeds=[0, 1])
    ledger = Ledger(spec)
    ledger.open()
    try:
        searcher = SweepSearcher(spec, ledger)
        assert searcher.num_left() == 1
        taken: Any = searcher.suggest("again")
        assert taken["trial"] == lost.stem and taken["config"] == ledger.plans[lost.stem].config
        searcher.on_trial_complete("again", {"objective_value": 1.0, "status": "completed", "epoch": 2})
        states = [trial.state.name for trial in searcher.searches[taken["group"]].study.get_trials()]
        assert "RUNNING" not in states and len(states) == 3
    finally:
        ledger.close()


def test_a_folder_in_use_or_of_another_sweep_is_refused(sweep: Path) -> None:
    first = Ledger(tiny(sweep, space=LR, num_trials=3))
    first.open()
    try:
        with pytest.raises(ValueError, match="another sweep runs in"):
            Ledger(tiny(sweep, space=LR, num_trials=3)).open()
    finally:
        first.close()
    changes = ({"space": {}}, {"space": LR, "bits": ["W8A8"]}, {"space": LR, "objective": "selection"})
    for change in changes:
        with pytest.raises(ValueError, match="`output_dir` must be new or hold the same sweep"):
            Ledger(tiny(sweep, **change)).open()
    again = Ledger(tiny(sweep, space=LR, num_trials=9, cpus_per_trial=2))
    again.open()
    again.close()


def test_what_cannot_work_is_said_before_any_image_is_made(local_ray: None, tmp_path: Path) -> None:
    from sweeps.tuner import run_sweep

    absent = {"spec": "bundled:digits_resnet8", "name": "b", "dataset": "npz:absent.npz"}
    with pytest.raises(ValueError, match=r"absent\.npz"):
        run_sweep(tiny(tmp_path, models=["bundled:digits_resnet8", absent]))
    assert not (tmp_path / "store").exists() and not list((tmp_path / "plans").iterdir())


def test_a_sweep_is_not_resumed_with_other_weights(local_ray: None, sweep: Path, tmp_path: Path) -> None:
    import json
    import shutil

    from sweeps.tuner import run_sweep

    shutil.copytree(sweep, tmp_path / "copy")
    record = next((tmp_path / "copy" / "records").glob("*W3A3-t000.json"))
    content = json.loads(record.read_text())
    content["teacher"]["digest"] = "0" * 64
    record.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"t000 in .* was made with other weights"):
        run_sweep(tiny(tmp_path / "copy", space=LR, num_trials=4, seeds=[0, 1]))
    assert len(list((tmp_path / "copy" / "records").iterdir())) == len(list((sweep / "records").iterdir()))


def test_a_folder_that_a_machine_does_not_see_is_refused(
    local_ray: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    import sweeps.cluster as module

    nodes = ray.nodes()
    monkeypatch.setattr(ray, "nodes", lambda: [*nodes, *nodes])
    check_shared(tmp_path)
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(
        module, "write_text_atomic", lambda *_: None
    )  # as a machine sees it that has another disk there
    with pytest.raises(ValueError, match="`output_dir` must be on a file system that all machines share"):
        check_shared(tmp_path)


def test_too_large_a_trial_is_refused_at_once(local_ray: None, tmp_path: Path) -> None:
    from sweeps.tuner import run_sweep

    for keys, words in (
        ({"cpus_per_trial": 64.0}, "`cpus_per_trial` must be at most 2"),
        ({"gpus_per_trial": 1.0}, "`gpus_per_trial` must be"),
    ):
        with pytest.raises(ValueError, match=words):
            run_sweep(tiny(tmp_path / "large", **keys))


def test_a_teacher_that_cannot_be_loaded_is_one_clear_line(
    local_ray: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = tmp_path / "absent.toml"
    spec.write_text(
        'models = [{spec = "absent_nets.py:net", weights = "absent.safetensors", input_size = [1, 8, 8], mean = [0.0], std = [1.0]}]\n'
    )
    assert main([str(spec), "--output-dir", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("synq: error: ") and error.count("\n") == 1 and "absent" in error
    assert not list((tmp_path / "out" / "records").iterdir())


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("num_trails = 3", "did you mean `num_trials`?"),
        ('bits = ["W1A1"]', "`bits` must read W<2..8>A<2..8>"),
        ("num_trials = ", "must be valid TOML"),
        ('models = ["bundled:digits_resnet9000"]\n[base.finetune]\nepochs = -1', "`finetune.epochs` must be"),
    ],
)
def test_bad_specs_end_with_one_line_and_code_2(
    text: str, words: str, in_tmp: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (in_tmp / "bad.toml").write_text(text)
    assert main(["bad.toml"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("synq: error: ") and words in error and error.count("\n") == 1
    assert [path.name for path in in_tmp.iterdir()] == ["bad.toml"]
    assert main(["absent.toml"]) == 2 and "absent.toml" in capsys.readouterr().err


def test_an_unwritable_folder_is_one_line(in_tmp: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (in_tmp / "file").write_text("mine")
    assert main(["--output-dir", "file/out"]) == 2
    assert capsys.readouterr().err.startswith("synq: error: ") and (in_tmp / "file").read_text() == "mine"


# --- faults, from outside --------------------------------------------------------------------------------------------------------


@pytest.fixture
def start(root: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Start the door as a user would, in a process group of its own that ends with the test."""
    started: list[subprocess.Popen[str]] = []

    def run(*words: str) -> subprocess.Popen[str]:
        command = [sys.executable, str(root / "launch" / "sweep.py"), *words]
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
        )
        started.append(process)
        return process

    yield run
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def until(holds: Callable[[], bool], process: subprocess.Popen[str], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.1)


@pytest.mark.slow
def test_a_killed_driver_goes_on_and_repeats_nothing(
    start: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    words = (str(write_spec(tmp_path / "tiny.toml", epochs=60)), "--output-dir", str(tmp_path / "out"))
    records = tmp_path / "out" / "records"
    process = start(*words)
    until(lambda: records.is_dir() and len(list(records.glob("*.json"))) >= 1, process)
    process.kill()
    process.wait()
    before = {path: path.stat().st_mtime_ns for path in records.glob("*.json")}
    again = start(*words)
    out, _ = again.communicate(timeout=200)
    assert again.returncode == 0, out
    assert f"{len(before)} trials are there already" in out
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in before.items())
    trials = rows(tmp_path / "out" / "trials.csv")
    assert len(trials) == 4 and {row["status"] for row in trials} == {"completed"}
    assert len({row["config_digest"] for row in trials}) == 4


@pytest.mark.slow
def test_ctrl_c_writes_the_tables_and_a_lost_worker_is_replaced(
    start: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    words = (str(write_spec(tmp_path / "tiny.toml", epochs=150)), "--output-dir", str(tmp_path / "out"))
    process = start(*words)
    runs = tmp_path / "out" / "runs"
    until(lambda: runs.is_dir() and len(list(runs.glob("*/checkpoint.pt"))) >= 1, process)
    found = subprocess.run(
        ["pgrep", "-f", "^ray::ImplicitFunc"], capture_output=True, text=True, check=False
    ).stdout.split()
    own = [pid for pid in map(int, found) if _is_below(pid, process.pid)]
    assert own, "no worker of this sweep was found"
    os.kill(own[0], signal.SIGKILL)
    until(lambda: len(list((tmp_path / "out" / "records").glob("*.json"))) >= 1, process)
    refused = start(*words)
    out, _ = refused.communicate(timeout=60)
    assert refused.returncode == 2 and "another sweep runs in" in out
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 130 and "the same command goes on" in out
    trials = rows(tmp_path / "out" / "trials.csv")
    assert trials and {row["status"] for row in trials} == {"completed"}, "a killed worker's trial was lost"


def _is_below(pid: int, ancestor: int) -> bool:
    """Whether a process descends from another one."""
    while pid > 1 and pid != ancestor:
        try:
            pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()[1])
        except OSError:
            return False
    return pid == ancestor


def test_a_wrong_word_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    from launch.sweep import main

    with pytest.raises(SystemExit) as stop:
        main(["spec.toml", "--seeds", "3"])
    assert stop.value.code == 2
    assert capsys.readouterr().err.strip().splitlines() == [
        "synq: error: unrecognized arguments: --seeds 3; everything else stands in the spec (--help, README)"
    ]
