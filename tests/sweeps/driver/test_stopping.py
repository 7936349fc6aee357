"""The end of a search before its budget: when, why, and what a resume makes of it."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest

from support.sweep_tools import tiny
from synq.runs.record import RunRecord, write_record
from synq.sweeps.driver.outcome import group_lines
from synq.sweeps.driver.stopping import why_stop
from synq.sweeps.search_config import SearchConfig
from synq.sweeps.spec_file import spec_from_dict
from synq.sweeps.state.ledger import Ledger

GROUP = "digits_resnet8-W3A3"


def study_of(values: list[float], violated: Callable[[int], bool] = lambda number: False) -> optuna.Study:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    for number, value in enumerate(values):
        trial = study.ask()
        trial.suggest_float("x", 0, 1)
        trial.set_constraint("size", 1.0 if violated(number) else 0.0)
        study.tell(trial, value)
    return study


def test_a_search_without_a_better_trial_ends_after_its_patience() -> None:
    search = SearchConfig(stop_when="stagnation", patience=3)
    assert why_stop(study_of([]), search) == ""
    assert why_stop(study_of([0.3, 0.2, 0.25, 0.3]), search) == "", "two since the best"
    assert why_stop(study_of([0.3, 0.2, 0.25, 0.3, 0.2]), search) == "no better trial among the last 3 completed ones"
    assert why_stop(study_of([0.3, 0.2, 0.25, 0.3, 0.1]), search) == "", "the last one is better"
    assert why_stop(study_of([0.3, 0.2, 0.25, 0.3, 0.2]), SearchConfig()) == "", "the budget decides"
    falling = study_of([0.3, 0.1, 0.29, 0.28, 0.27, 0.26], lambda number: number == 1)
    assert why_stop(falling, search) == "", "a trial that violates a constraint is not the best one"


def test_nothing_is_left_to_gain_where_the_bound_is_below_a_share_of_the_best() -> None:
    draw = optuna.samplers.RandomSampler(seed=0)
    study = optuna.create_study(sampler=draw)
    wanted = SearchConfig(stop_when="no_gain", min_gain=0.05)
    reasons = []
    for number in range(24):
        trial = study.ask()
        study.tell(trial, 1 + 0.3 * (trial.suggest_float("x", 0, 1) - 0.5) ** 2)
        if number in (18, 23):
            reasons.append(why_stop(study, wanted))
    assert reasons[0] == "" and reasons[1].startswith("nothing left to gain: at most ")
    assert why_stop(study, SearchConfig(stop_when="no_gain", min_gain=1e-9)) == ""


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"stop_when": "never"}, "`stop_when` must be one of budget, no_gain, stagnation"),
        ({"stop_when": "no_gain", "min_gain": 0}, "`min_gain` must be"),
        ({"stop_when": "stagnation", "patience": 0}, "`patience` must be"),
        ({"stop_when": "no_gain", "second_objective": "bitops", "scheduler": "none"}, "with a `second_objective`"),
        ({"stop_when": "no_gain", "sampler": "points", "points": [{"finetune.lr": 0.01}]}, "whose trials are known"),
    ],
)
def test_an_end_that_cannot_be_decided_is_rejected(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        spec_from_dict(keys)


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Callable[..., tuple[Any, Ledger]]]:
    """Open a sweep's folder as a driver that starts does."""
    from synq.sweeps.driver.searcher import SweepSearcher

    ledgers: list[Ledger] = []

    def start(**keys: Any) -> tuple[Any, Ledger]:
        for ledger in ledgers:
            ledger.close()
        values = {"bits": ["W3A3"], "num_trials": 30, "stop_when": "stagnation", "patience": 3, "seeds": [0, 1], **keys}
        ledgers.append(Ledger(tiny(tmp_path, **values)))
        ledgers[-1].open()
        return SweepSearcher(ledgers[-1].spec, ledgers[-1]), ledgers[-1]

    yield start
    for ledger in ledgers:
        ledger.close()


def complete(searcher: Any, ledger: Ledger, name: str, value: float) -> str:
    """Propose a trial and end it with a record; returns its stage."""
    task = searcher.suggest(name)
    if not isinstance(task, dict):
        return str(task)
    plan = ledger.plans[task["trial"]]
    from synq.config.run import config_to_dict

    record = RunRecord(
        name=plan.trial, config=config_to_dict(plan.config), config_digest=plan.config_digest, model="net",
        seed=plan.config.seed, data_seed=plan.config.data_seed,
        weight_bits=3, act_bits=3, protocol="A", act_points="relu", objective="synthetic", objective_value=value,
    )  # fmt: skip
    write_record(ledger.record_path(plan.trial), record)
    ledger.settle(plan.trial, status="completed", reason="", history=[], seconds=1.0)
    searcher.on_trial_complete(name, {"objective_value": value, "status": "completed"})
    return plan.stage


def test_an_ended_search_goes_on_to_its_seeds_and_stays_ended(opened: Any) -> None:
    searcher, ledger = opened()
    stages = [complete(searcher, ledger, f"t{number}", value) for number, value in enumerate([0.5, 0.2, 0.3, 0.3, 0.3])]
    assert stages == ["search"] * 5
    assert complete(searcher, ledger, "seed", 0.2) == "final", "the best one is run on the second seed"
    assert searcher.suggest("x") == "FINISHED" and searcher.num_left() == 0
    line = f"{GROUP}: search ended after 5 of 30 trials, no better trial among the last 3 completed ones"
    assert line in group_lines(ledger, searcher.exhausted, searcher.invalid)

    searcher, ledger = opened()
    assert searcher.num_left() == 0 and ledger.stopped[GROUP]["after"] == 5, "the same command does not go on"
    searcher, _ = opened(num_trials=31)
    assert searcher.num_left() == 0, "with one more trial it is decided again: three are still no better"
    searcher, ledger = opened(stop_when="budget")
    assert searcher.num_left() == 25 and not ledger.stopped


def test_the_page_says_why_a_search_ended(opened: Any, tmp_path: Path) -> None:
    from synq.sweeps.reports.summary import sweep_verdict
    from synq.sweeps.reports.sweep_view import read_sweep

    searcher, ledger = opened(seeds=[0])
    for number in range(5):
        complete(searcher, ledger, f"t{number}", 0.2)
    assert searcher.num_left() == 0
    view = read_sweep(tmp_path)
    text = " ".join(sweep_verdict(view, view.standings()))
    assert f"The search of {GROUP} ended after 4 of 30 trials, no better trial among the last 3" in text
