"""The search of a group: what it proposes, and what Optuna hears of its trials."""

from typing import Any

import pytest

from synq.sweeps.conditions import When
from synq.sweeps.constraints import Constraint
from synq.sweeps.space import Dimension


def group_search(**keys: Any) -> Any:
    from synq.sweeps.driver.group_search import GroupSearch

    dimensions = (Dimension(name="finetune.lr", type="float", low=1e-4, high=1e-1, log=True),)
    values = {"minimize": True, "sampler": "tpe", "seed": "s", "num_startup": 2, "study_name": "x", **keys}
    return GroupSearch(values.pop("dimensions", dimensions), **values)


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


@pytest.mark.parametrize("sampler", ["tpe", "gp", "nsga2", "random"])
def test_every_sampler_is_seeded_by_the_number_of_the_proposal(sampler: str) -> None:
    def run(seed: str) -> list[float]:
        search = group_search(sampler=sampler, seed=seed, num_startup=2)
        values = []
        for number in range(6):
            point, _ = search.propose(f"p{number}", number)
            values.append(point["finetune.lr"])
            search.accept(f"p{number}", f"t{number}", f"trial-{number}")
            search.on_trial_complete(f"t{number}", {"objective_value": values[-1], "status": "completed"})
        return values

    first = run("a")
    assert first == run("a") != run("b") and len(set(first)) > 3
    assert all(1e-4 <= value <= 1e-1 for value in first)


def test_two_objectives_are_told_and_searched_together() -> None:
    search = group_search(second_objective="size_bytes", sampler="nsga2", num_startup=2)
    for number, size in enumerate((100.0, 50.0, None)):
        search.propose(f"p{number}", number)
        search.accept(f"p{number}", f"t{number}", f"trial-{number}")
        search.on_trial_result(f"t{number}", {"epoch": 1, "objective_value": 0.5})
        search.on_trial_complete(
            f"t{number}", {"objective_value": 0.1 + number, "size_bytes": size, "status": "completed"}
        )
    trials = search.study.get_trials()
    assert [trial.state.name for trial in trials] == ["COMPLETE", "COMPLETE", "FAIL"], (
        "a trial without a size has no place"
    )
    assert [trial.values for trial in trials[:2]] == [[0.1, 100.0], [1.1, 50.0]]
    assert len(search.study.best_trials) == 2


def run_search(search: Any, trials: int, size: Any) -> list[Any]:
    """Propose and end trials whose objective is their learning rate; returns Optuna's trials."""
    for number in range(trials):
        point, _ = search.propose(f"p{number}", number)
        value = point["finetune.lr"]
        search.accept(f"p{number}", f"t{number}", f"trial-{number}")
        result = {"objective_value": value, "size_bytes": size(value), "drop": None, "status": "completed"}
        search.on_trial_complete(f"t{number}", result)
    return search.study.get_trials()


@pytest.mark.parametrize("sampler", ["tpe", "gp", "nsga2", "random"])
def test_optuna_is_told_of_violations_and_its_best_trial_has_none(sampler: str) -> None:
    bounds = (Constraint(name="size_bytes", max=100.0), Constraint(name="drop", max=1.0))
    search = group_search(sampler=sampler, constraints=bounds)
    trials = run_search(search, 5, lambda lr: 150.0 if lr < 0.01 else 50.0)
    assert [trial.constraints["size_bytes"] > 0 for trial in trials] == [trial.value < 0.01 for trial in trials]
    assert {trial.constraints["drop"] for trial in trials} == {0.0}, "what is not known violates nothing"
    assert {trial.value < 0.01 for trial in trials} == {True, False}
    assert search.study.best_value >= 0.01


def test_a_sampler_avoids_what_violates() -> None:
    """Without the bound TPE goes to the lowest learning rates, with it to the lowest that satisfy it."""
    bounds = (Constraint(name="size_bytes", max=100.0),)
    free = run_search(group_search(num_startup=5), 40, lambda lr: 50.0)
    bounded = run_search(group_search(num_startup=5, constraints=bounds), 40, lambda lr: 150.0 if lr < 0.01 else 50.0)
    shares = [sum(trial.value >= 0.01 for trial in trials[20:]) / 20 for trials in (free, bounded)]
    assert shares[0] < 0.15 and shares[1] > 0.45, shares


def test_a_measurement_of_the_export_is_no_constraint_of_the_search() -> None:
    search = group_search(constraints=(Constraint(name="latency_ms", max=1.0),))
    assert [trial.constraints for trial in run_search(search, 2, lambda lr: 1.0)] == [{}, {}]


@pytest.mark.parametrize("sampler", ["tpe", "nsga2", "random"])
def test_a_setting_is_proposed_exactly_where_it_exists_and_a_replay_gives_it_again(sampler: str) -> None:
    dimensions = (
        Dimension(name="finetune.perturb_weight", type="choice", values=(0.0, 1.0)),
        Dimension(
            name="finetune.perturb_size", type="float", low=0.01, high=0.1,
            when=(When(name="finetune.perturb_weight", sign=">", values=(0.0,)),),
        ),
    )  # fmt: skip
    search, again = (group_search(dimensions=dimensions, sampler=sampler) for _ in range(2))
    seen = []
    for number in range(12):
        point, params = search.propose(f"p{number}", number)
        assert ("finetune.perturb_size" in point) == (point["finetune.perturb_weight"] == 1.0)
        search.accept(f"p{number}", f"t{number}", f"trial-{number}")
        again.attach(f"t{number}", params, f"trial-{number}")
        for one in (search, again):
            value = point.get("finetune.perturb_size", 0.05)
            one.on_trial_complete(f"t{number}", {"objective_value": value, "status": "completed"})
        seen.append(params)
    assert {len(params) for params in seen} == {1, 2}
    assert [trial.params for trial in again.study.get_trials()] == seen
    assert again.propose("p", 12) == search.propose("p", 12), "a restarted driver goes on as one that was not stopped"
