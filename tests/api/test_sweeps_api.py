"""`synq.sweeps.run`: two settings of the user, in both tables; in a thread with an event loop; and what it leaves."""

import asyncio
import os
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

import synq
from support.sweep_tools import TINY
from synq.config import plugins

SPEC: dict[str, Any] = {
    **TINY,
    "name": "mine",
    "bits": ["W4A4"],
    "sampler": "grid",
    "scheduler": "none",
    "max_concurrent": 2,
    "space": {"finetune.momentum": [0.0, 0.9], "quant.mse_norm": [2.0]},
}
PARAMS = ["params.finetune.momentum", "params.quant.mse_norm"]


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> tuple[synq.sweeps.SweepResult, list[str]]:
    folder, ended, results = tmp_path_factory.mktemp("api") / "mine", [], []
    before = dict(os.environ)

    async def cell() -> None:
        await asyncio.sleep(0)
        results.append(
            synq.sweeps.run(SPEC, output_dir=folder, progress=False, on_trial=lambda record: ended.append(record.name))
        )

    thread = threading.Thread(target=lambda: asyncio.run(cell()))
    thread.start()
    thread.join()
    assert dict(os.environ) == before
    return results[0], ended


@pytest.mark.slow
def test_settings_that_were_searched_are_columns(swept: tuple[synq.sweeps.SweepResult, list[str]]) -> None:
    result, ended = swept
    assert len(ended) == len(result.trials) == len(result.leaderboard) == 2
    for table in (result.trials, result.leaderboard, synq.sweeps.leaderboard(result.path)):
        assert [name for name in table.columns if name.startswith("params.")] == PARAMS
        assert sorted(table[PARAMS[0]]) == [0.0, 0.9] and set(table[PARAMS[1]]) == {2.0}
    assert list(result.leaderboard["rank"]) == [1, 2]
    best = result.best()
    assert best.config.finetune.momentum == result.leaderboard[PARAMS[0]][0]
    assert best.metrics["objective_value"] == result.leaderboard["objective_value"][0]
    assert best.student(torch.zeros(1, 1, 8, 8)).shape == (1, 10)
    header = (result.path / "leaderboard.csv").read_text().splitlines()[0].split(",")
    assert header[-1] == PARAMS[0] and PARAMS[1] not in header, "a file has what varies"
    assert "params.finetune.momentum" in result._repr_html_() and "2 of 2 trials" in str(result)


@pytest.mark.slow
def test_the_same_call_returns_at_once(
    swept: tuple[synq.sweeps.SweepResult, list[str]], capfd: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    result, _ = swept
    monkeypatch.setattr("synq.sweeps.driver.tuner.cluster", None)  # Ray is not started again
    again = synq.sweeps.run(SPEC, output_dir=result.path, progress=False)
    assert capfd.readouterr() == ("", "")
    assert again.leaderboard.equals(result.leaderboard)
    opened = synq.sweeps.open(result.path)
    assert opened.trials.equals(result.trials) and opened.groups == ["digits_resnet8-W4A4"]
    synq.sweeps.run(SPEC, output_dir=result.path)
    assert "the sweep is finished" in capfd.readouterr().out
    with pytest.raises(ValueError, match="`group` must be one of digits_resnet8-W4A4, but got 'x'"):
        result.best("x")


@pytest.mark.slow
def test_the_page_is_made_as_the_spec_says_unless_the_call_says_otherwise(
    swept: tuple[synq.sweeps.SweepResult, list[str]],
) -> None:
    result, _ = swept
    page = result.path / "report.html"
    page.unlink(missing_ok=True)
    synq.sweeps.run({**SPEC, "report": True}, output_dir=result.path, progress=False, report=False)
    synq.sweeps.run(SPEC, output_dir=result.path, progress=False)
    assert not page.exists()
    synq.sweeps.run({**SPEC, "report": True}, output_dir=result.path, progress=False)
    assert "params.finetune.momentum" in page.read_text(encoding="utf-8")
    page.unlink()


def test_a_network_in_memory_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"`models` must be specs or tables of settings, .* but got a network in memory$"
    ):
        synq.sweeps.run({"models": [torch.nn.Identity()]}, output_dir=tmp_path)
    for models in ([{"spec": torch.nn.ReLU()}], {"spec": torch.nn.ReLU()}):
        with pytest.raises(ValueError, match=r"but got a network in memory$"):
            synq.sweeps.run({"models": models}, output_dir=tmp_path)
    with pytest.raises(ValueError, match=r"finetune\.momentun"):
        synq.sweeps.run({**SPEC, "space": {"finetune.momentun": [0.0]}}, output_dir=tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_loss_term_of_this_process_is_rejected_before_any_trial(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(plugins, "REGISTERED", {})
    synq.loss_term("deco", version="1")(lambda inputs: inputs.student_logits.mean(1))
    for term in ("deco", "deco@1"):
        base = {**TINY["base"], "finetune.own_term": term, "finetune.own_weight": 1.0}
        with pytest.raises(ValueError, match=r"`finetune\.own_term` must be FILE\.py:FUNCTION.* but got 'deco'"):
            synq.sweeps.run({**SPEC, "base": base}, output_dir=tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_base_of_a_sweep_may_have_dotted_keys() -> None:
    from synq.sweeps.spec_file import spec_from_dict

    dotted = {"base": {"finetune.epochs": 7, "finetune": {"lr": 0.5}}, "sampler": "random"}
    models = [{"spec": "bundled:digits_resnet8", "base": {"synthesis.iterations": 3}}]
    (group,) = spec_from_dict({**dotted, "models": models}).groups
    assert (group.base.finetune.epochs, group.base.finetune.lr, group.base.synthesis.iterations) == (7, 0.5, 3)
    with pytest.raises(ValueError, match=r"`base\.quant\.weight_bits` must be left out"):
        spec_from_dict({"base": {"quant.weight_bits": 3}})
    with pytest.raises(ValueError, match=r"base: `finetune` must be a table of keys next to `finetune\.lr`, but got 3"):
        spec_from_dict({"base": {"finetune": 3, "finetune.lr": 0.5}})


def test_tables_of_a_finished_sweep(folder: Path) -> None:
    """The made sweep of two groups: every searched setting is a column, also with the sweep read by its path only."""
    result = synq.sweeps.open(folder)
    searched = {f"params.{one['name']}" for one in result._view.about["space"]}
    assert searched and searched <= set(result.trials.columns) & set(result.leaderboard.columns)
    records = result._view.records
    for _, row in result.trials.iterrows():
        config = records[row["trial"]].config
        for name in searched:
            part, key = name.removeprefix("params.").split(".")
            value = config[part][key]
            assert row[name] == value or (value is None and row[name] != row[name])
    assert list(synq.sweeps.leaderboard(folder)["rank"]) == list(result.leaderboard["rank"])
    with pytest.raises(ValueError, match="`group` must be one of"):
        result.best()
    with pytest.raises(ValueError, match="`paths` must name"):
        synq.sweeps.leaderboard()


def test_the_public_names_of_sweeps() -> None:
    assert set(synq.sweeps.__all__) == {"run", "open", "leaderboard", "SweepResult", "SweepFailedError"}
    from synq.sweeps.leaderboard import records

    assert callable(synq.sweeps.leaderboard) and records.read_tables
    assert not hasattr(synq.sweeps, "quantize")
