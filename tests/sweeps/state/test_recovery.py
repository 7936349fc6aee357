"""A sweep's driver reads its folder: what is damaged is named and made again, and a name is given to one trial only."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from support.sealed import edit, unsealed
from support.sweep_tools import TINY, tiny
from synq.common.files import DamagedFileError
from synq.config.run import RunConfig, config_digest, config_to_dict
from synq.runs.record import RunRecord, read_record, write_record
from synq.sweeps.driver.searcher import SweepSearcher
from synq.sweeps.spec import SweepSpec
from synq.sweeps.state.ledger import Ledger
from synq.sweeps.state.plans import read_plan, read_sweep_file

SPACE = {"finetune.lr": {"type": "float", "low": 1e-4, "high": 1e-2, "log": True}}
KEYS: dict[str, Any] = {"space": SPACE, "num_trials": 3, "sampler": "random", "bits": ["W8A8"]}


def completed(trial: str, config: RunConfig, value: float) -> RunRecord:
    quant = config.quant
    return RunRecord(
        name=trial,
        config=config_to_dict(config),
        config_digest=config_digest(config),
        teacher={"digest": "aa"},
        weight_bits=quant.weight_bits,
        act_bits=quant.act_bits,
        protocol=config.protocol,
        act_points=quant.points,
        objective="synthetic",
        objective_value=value,
        loss_history=[{"epoch": 1.0, "objective_value": 2 * value}, {"epoch": 2.0, "objective_value": value}],
    )


def opened(spec: SweepSpec) -> Ledger:
    ledger = Ledger(spec)
    ledger.open()
    return ledger


@pytest.fixture
def spec(tmp_path: Path) -> SweepSpec:
    """A finished sweep of three trials, without the runs themselves."""
    spec = tiny(tmp_path / "sweep", **KEYS)
    ledger = opened(spec)
    searcher = SweepSearcher(ledger.spec, ledger)
    for number in range(3):
        assert isinstance(searcher.suggest(str(number)), dict)
    for number, plan in enumerate(list(ledger.plans.values())):
        write_record(ledger.record_path(plan.trial), completed(plan.trial, plan.config, 0.1 + number))
    ledger.close()
    return spec


def states(spec: SweepSpec) -> tuple[dict[str, Any], dict[str, float | None]]:
    ledger = opened(spec)
    ledger.close()
    plans = {trial: (plan.config_digest, plan.index, plan.stage) for trial, plan in ledger.plans.items()}
    return plans, {trial: record.objective_value for trial, record in ledger.records.items()}


@pytest.mark.parametrize("damage", ["empty", "removed", "flipped"])
def test_r5_a_plan_is_made_again_from_its_record(
    damage: str, spec: SweepSpec, capsys: pytest.CaptureFixture[str]
) -> None:
    before = states(spec)
    for trial in before[0]:
        path = spec.output_dir / "plans" / f"{trial}.json"
        if damage == "removed":
            path.unlink()
        else:
            path.write_bytes(b"" if damage == "empty" else path.read_bytes().replace(b"e", b"d", 1))
    assert states(spec) == before
    err = capsys.readouterr().err
    if damage != "removed":
        assert all(f"`{spec.output_dir / 'plans' / f'{trial}.json'}`" in err for trial in before[0])
    trial = next(iter(before[0]))
    assert read_plan(spec.output_dir / "plans" / f"{trial}.json").history == [(1, 0.2), (2, 0.1)]


def test_r5_the_name_of_a_record_is_never_given_again(spec: SweepSpec, tmp_path: Path) -> None:
    records = {path: path.read_bytes() for path in (spec.output_dir / "records").iterdir()}
    for path in (spec.output_dir / "plans").iterdir():
        path.unlink()
    more = tiny(tmp_path / "sweep", **{**KEYS, "num_trials": 5})
    ledger = opened(more)
    searcher = SweepSearcher(ledger.spec, ledger)
    names = [searcher.suggest(str(number))["trial"] for number in range(2)]
    ledger.close()
    assert not {path.stem for path in records} & set(names)
    assert {path: path.read_bytes() for path in records} == records


@pytest.mark.parametrize("damage", ["empty", "removed", "flipped"])
def test_r5_sweep_json_is_made_again_where_all_files_fit(
    damage: str, spec: SweepSpec, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, before = spec.output_dir / "sweep.json", states(spec)
    content = read_sweep_file(path)
    if damage == "removed":
        path.unlink()
    else:
        path.write_bytes(b"" if damage == "empty" else path.read_bytes().replace(b"random", b"randon"))
    assert states(spec) == before and read_sweep_file(path) == {**content, "finished": 3}
    assert f"`{path}`" in capsys.readouterr().err
    more = tiny(tmp_path / "sweep", **{**KEYS, "num_trials": None, "more_trials": 2})
    ledger = opened(more)
    ledger.close()
    assert ledger.spec.search.trials == 5


def test_r5_sweep_json_is_not_made_again_for_another_spec(spec: SweepSpec, tmp_path: Path) -> None:
    (spec.output_dir / "sweep.json").unlink()
    base = {**TINY["base"], "finetune": {"epochs": 3, "batch_size": 16}}
    for _ in range(2):
        with pytest.raises(ValueError, match=r"new or hold the same sweep.*t000.*are none of this sweep"):
            states(tiny(tmp_path / "sweep", **{**KEYS, "base": base}))
        assert not (spec.output_dir / "sweep.json").exists()
        for path in (spec.output_dir / "records").iterdir():  # also where no trial has ended
            path.unlink()


@pytest.mark.parametrize("advice", ["start the spec that they are of", "move them out", "another `--output-dir`"])
def test_r5_the_advice_about_files_of_another_spec_helps(advice: str, spec: SweepSpec, tmp_path: Path) -> None:
    before = states(spec)
    (spec.output_dir / "sweep.json").unlink()
    keys = {**KEYS, "base": {**TINY["base"], "finetune": {"epochs": 3, "batch_size": 16}}}
    with pytest.raises(ValueError, match=advice):
        states(tiny(tmp_path / "sweep", **keys))
    if advice.startswith("start"):
        assert states(spec) == before
        return
    if advice.startswith("move"):
        for name in ("plans", "records"):
            shutil.move(spec.output_dir / name, tmp_path / name)
    folder = tmp_path / ("sweep" if advice.startswith("move") else "other")
    assert states(tiny(folder, **keys)) == ({}, {})


def test_r5_the_advice_about_a_record_of_other_settings_helps(spec: SweepSpec, tmp_path: Path) -> None:
    (trial, *others), _ = states(spec)
    config = read_plan(spec.output_dir / "plans" / f"{trial}.json").config
    (spec.output_dir / "plans" / f"{trial}.json").unlink()
    path = spec.output_dir / "records" / f"{trial}.json"
    write_record(path, completed(trial, replace(config, finetune=replace(config.finetune, epochs=7)), 0.1))
    with pytest.raises(ValueError, match=f"{trial} in .* has no plan, .*: move the record out of the sweep"):
        states(spec)
    shutil.move(path, tmp_path)
    ledger = opened(spec)
    searcher = SweepSearcher(ledger.spec, ledger)
    assert sorted(ledger.plans) == sorted(others) and searcher.num_left() == 1
    assert searcher.suggest("again")["trial"] not in others
    ledger.close()


def test_r5_the_advice_about_a_plan_of_another_trial_helps(spec: SweepSpec) -> None:
    before = states(spec)
    first, second, _ = sorted((spec.output_dir / "plans").glob("*.json"))
    shutil.copy(first, second)
    with pytest.raises(ValueError, match=f"{second.name}` must hold the plan of its name, .*remove it"):
        states(spec)
    second.unlink()
    assert states(spec) == before
    unsealed(second, lambda content: content.update(config_digest="0" * 16))
    with pytest.raises(ValueError, match=f"{second.name}` must have the configuration of its digest.*remove it"):
        states(spec)
    second.unlink()
    assert states(spec) == before


def test_r5_the_advice_about_a_record_of_another_trial_helps(spec: SweepSpec) -> None:
    first, second, _ = sorted((spec.output_dir / "records").glob("*.json"))
    shutil.copy(first, second)
    with pytest.raises(ValueError, match=f"{second.name}` must hold the record of its name, .*move it out"):
        states(spec)
    second.unlink()
    plans, records = states(spec)
    assert len(plans) == 3 and len(records) == 2, "its trial is run again"


def test_a_damaged_record_is_set_aside_and_its_trial_run_again(
    spec: SweepSpec, capsys: pytest.CaptureFixture[str]
) -> None:
    path = sorted((spec.output_dir / "records").glob("*.json"))[1]
    path.write_bytes(path.read_bytes().replace(b'"objective_value": 1.1', b'"objective_value": 0.1'))
    ledger = opened(spec)
    searcher = SweepSearcher(ledger.spec, ledger)
    assert searcher.num_left() == 1 and searcher.suggest("again")["trial"] == path.stem
    ledger.close()
    assert f"`{path}`" in capsys.readouterr().err and path.with_name(f"{path.name}.damaged").is_file()


def test_a_damaged_plan_without_a_record_is_forgotten_with_its_request_to_stop(spec: SweepSpec) -> None:
    trial = sorted((spec.output_dir / "records").glob("*.json"))[2].stem
    (spec.output_dir / "records" / f"{trial}.json").unlink()
    (spec.output_dir / "plans" / f"{trial}.json").write_text("")
    (spec.output_dir / "plans" / f"{trial}.stop").write_text("{}")
    ledger = opened(spec)
    assert len(ledger.plans) == 2 and not list((spec.output_dir / "plans").glob("*.stop"))
    assert isinstance(SweepSearcher(ledger.spec, ledger).suggest("x"), dict)
    ledger.close()


@pytest.mark.parametrize(
    ("key", "value"),
    [("index", "a"), ("config", None), ("history", [[1, 10**400]]), ("history", [1]), ("params", 3), ("trial", "../x")],
)
def test_r8_a_plan_that_no_reader_expects_is_one_line(key: str, value: Any, spec: SweepSpec) -> None:
    path = sorted((spec.output_dir / "plans").glob("*.json"))[0]
    edit(path, lambda content: content.update({key: value}))
    with pytest.raises(ValueError, match=rf"^`{path}` must .*: remove it") as caught:
        read_plan(path)
    assert "\n" not in str(caught.value)
    path.unlink()  # as the message advises
    assert len(states(spec)[0]) == 3


@pytest.mark.parametrize(
    "change", [{"search": None}, {"groups": [1]}, {"search": {"num_trials": "9"}}, {"finished": "x"}, {"space": 3}]
)
def test_r8_a_sweep_json_that_no_reader_expects_is_one_line(change: dict[str, Any], spec: SweepSpec) -> None:
    path = edit(spec.output_dir / "sweep.json", lambda content: content.update(change))
    with pytest.raises(ValueError, match=rf"^`{path}` must hold a sweep, but got .*: remove it"):
        states(spec)
    path.unlink()  # as the message advises
    assert len(states(spec)[0]) == 3


def test_r8_json_nested_too_deeply_is_one_line(tmp_path: Path) -> None:
    for name, read in (("record.json", read_record), ("plan.json", read_plan), ("sweep.json", read_sweep_file)):
        (tmp_path / name).write_text("[" * 100_000 + "]" * 100_000)
        with pytest.raises(DamagedFileError, match=f"{name}` must hold JSON, but is nested too deeply"):
            read(tmp_path / name)
