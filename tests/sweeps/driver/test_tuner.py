"""Whole sweeps on the bundled teacher: budgets, tables, resume, refusals."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support.sealed import edit
from support.sweep_tools import LR, rows, tiny
from synq.commands.sweep import main
from synq.sweeps.driver.cluster import check_shared, prepare_environment
from synq.sweeps.leaderboard.columns import LEADERBOARD_COLUMNS, TRIAL_COLUMNS
from synq.sweeps.state.ledger import Ledger


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
    """A finished sweep: per group one plain, one failing and one hopeless setting, one trial at a time, best one on
    a second seed.
    """
    from synq.sweeps.driver.tuner import run_sweep

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
    assert tuple(trials[0])[: len(TRIAL_COLUMNS)] == TRIAL_COLUMNS and "params.finetune.lr" in trials[0]


def test_ended_trials_stand_with_reason_and_only_completed_ones_rank(sweep: Path) -> None:
    trials = rows(sweep / "trials.csv")
    ended = [row for row in trials if row["status"] != "completed"]
    assert {row["lr"] for row in ended} >= {"1e+20"} and all(row["reason"] for row in ended)
    assert {row["status"] for row in ended} <= {"diverged", "pruned"}
    logs = {row["status"]: (sweep / row["log"]).read_text() for row in trials}
    assert "epoch 2/2: objective " in logs["completed"] and "NonFiniteLossError" in logs["diverged"]
    board = rows(sweep / "leaderboard.csv")
    assert tuple(board[0])[: len(LEADERBOARD_COLUMNS)] == LEADERBOARD_COLUMNS and "1e+20" not in {
        row["lr"] for row in board
    }
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
    from synq.config.run import RunConfig, config_from_dict, with_overrides
    from synq.pipeline import run
    from synq.runs.record import read_record

    record = read_record(next((sweep / "records").glob("*W3A3-t000.json")))
    config = config_from_dict(RunConfig, record.config)
    alone = run(with_overrides(config, {"runtime.output_dir": str(tmp_path)}))
    assert alone.config_digest == record.config_digest and alone.set_digest == record.set_digest
    assert alone.objective_value == pytest.approx(record.objective_value, rel=1e-6) and alone.top1 == record.top1


def test_a_finished_sweep_runs_nothing_again_and_a_larger_one_only_the_rest(
    sweep: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import synq.sweeps.driver.tuner as tuner

    before = {path: path.stat().st_mtime_ns for path in (sweep / "records").iterdir()}
    tables = {name: (sweep / name).read_bytes() for name in ("trials.csv", "leaderboard.csv")}
    keys = {"space": LR, "max_concurrent": 1, "seeds": [0, 1], "reduction_factor": 2}
    monkeypatch.setattr(tuner, "make_all_sets", lambda *_: pytest.fail("a finished sweep made sets"))
    assert tuner.run_sweep(tiny(sweep, num_trials=3, **keys)) == 0
    assert {path: path.stat().st_mtime_ns for path in (sweep / "records").iterdir()} == before
    assert {name: (sweep / name).read_bytes() for name in tables} == tables


def test_a_long_wait_is_not_silent(local_ray: None, monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    import synq.sweeps.driver.synthetic_sets as synthetic_sets

    def slow() -> dict[str, str]:
        time.sleep(1)
        return {"sets": "made"}

    monkeypatch.setattr(synthetic_sets, "REPORT_SECONDS", 0.1)
    minutes: list[float] = []
    task = ray.remote(num_cpus=1)(slow).remote()
    assert list(synthetic_sets.replies([task], lambda: minutes.append(time.monotonic()))) == [(task, {"sets": "made"})]
    assert len(minutes) >= 5


def test_the_search_is_rebuilt_from_the_folder(sweep: Path) -> None:
    from synq.sweeps.driver.searcher import SweepSearcher

    spec = tiny(sweep, space=LR, num_trials=3, seeds=[0, 1])
    ledger = Ledger(spec)
    ledger.open()
    try:
        searcher = SweepSearcher(spec, ledger)
        states = {"completed": "COMPLETE", "pruned": "PRUNED", "diverged": "FAIL"}
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

    from synq.sweeps.driver.searcher import SweepSearcher

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
        assert taken == ledger.task(ledger.plans[lost.stem]).to_dict() and taken["trial"] == lost.stem
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
    again = Ledger(tiny(sweep, space=LR, num_trials=9, cpus_per_worker=2))
    again.open()
    again.close()


def test_what_cannot_work_is_said_before_any_image_is_made(local_ray: None, tmp_path: Path) -> None:
    from synq.sweeps.driver.tuner import run_sweep

    absent = {"spec": "bundled:digits_resnet8", "name": "b", "dataset": "npz:absent.npz"}
    with pytest.raises(ValueError, match=r"absent\.npz"):
        run_sweep(tiny(tmp_path, models=["bundled:digits_resnet8", absent]))
    assert not (tmp_path / "store").exists() and not list((tmp_path / "plans").iterdir())


def test_records_of_other_weights_or_images_are_refused(sweep: Path) -> None:
    ledger = Ledger(tiny(sweep, space=LR, num_trials=4, seeds=[0, 1]))
    ledger.open()
    try:
        trial, record = next((t, r) for t, r in ledger.records.items() if r.status == "completed")
        group, facts = ledger.plans[trial].group, dict(record.teacher)
        ledger.know(group, facts, record.eval_digest)
        with pytest.raises(ValueError, match=r"was made with other weights of the same"):
            ledger.know(group, {**facts, "digest": "0" * 64}, record.eval_digest)
        with pytest.raises(ValueError, match=r"was made with other labeled images"):
            ledger.know(group, facts, "0" * 64)
    finally:
        ledger.close()


@pytest.mark.slow
def test_a_sweep_is_not_resumed_with_other_weights(local_ray: None, sweep: Path, tmp_path: Path) -> None:
    import shutil

    from synq.sweeps.driver.tuner import run_sweep

    shutil.copytree(sweep, tmp_path / "copy")
    record = next((tmp_path / "copy" / "records").glob("*W3A3-t000.json"))
    edit(record, lambda content: content["teacher"].update(digest="0" * 64))
    with pytest.raises(ValueError, match=r"t000 in .* was made with other weights"):
        run_sweep(tiny(tmp_path / "copy", space=LR, num_trials=4, seeds=[0, 1]))
    assert len(list((tmp_path / "copy" / "records").iterdir())) == len(list((sweep / "records").iterdir()))


def test_a_folder_that_a_machine_does_not_see_is_refused(
    local_ray: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    import synq.sweeps.driver.cluster as module

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
    from synq.sweeps.driver.tuner import run_sweep

    for keys, words in (
        ({"cpus_per_worker": 64.0}, "`cpus_per_worker` must be at most 2"),
        ({"gpus_per_worker": 1.0}, "`gpus_per_worker` must be left out or 0"),
        ({"workers_per_trial": 3}, "`workers_per_trial` must be at most 2"),
    ):
        with pytest.raises(ValueError, match=words):
            run_sweep(tiny(tmp_path / "large", **keys))


def test_a_teacher_that_cannot_be_loaded_is_one_clear_line(
    local_ray: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = tmp_path / "absent.toml"
    spec.write_text(
        'models = [{spec = "absent_nets.py:net", weights = "absent.safetensors", input_size = [1, 8, 8], '
        "mean = [0.0], std = [1.0]}]\n"
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


def test_a_wrong_word_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    from synq.commands.sweep import main

    assert main(["spec.toml", "--seeds", "3"]) == 2
    assert capsys.readouterr().err.strip().splitlines() == [
        "synq: error: `--seeds` must be an option of this command, but is not; did you mean `--serve`? Everything else "
        "is set in the spec (see --help and docs/how-to/sweep.md)"
    ]
