"""Samplers by name: CMA-ES on mixed spaces, AutoSampler, and what is said where a package is missing."""

import importlib.util
import math
from typing import Any

import pytest

from synq.sweeps.conditions import When
from synq.sweeps.driver.samplers import KnownGroups, always_ranges, auto_sampler, check_installed
from synq.sweeps.space import Dimension
from synq.sweeps.spec_file import spec_from_dict

SPACE = (
    Dimension(name="finetune.lr", type="float", low=1e-4, high=1e-1, log=True),
    Dimension(name="finetune.difficulty_threshold", type="float", low=0.1, high=0.9),
    Dimension(name="finetune.cam_weight", type="choice", values=(0.0, 20.0)),
    Dimension(name="finetune.lowpass_cutoff", type="float", low=0.4, high=1.6, optional=True),
    Dimension(
        name="finetune.epochs", type="int", low=2, high=9, when=(When(name="finetune.cam_weight", values=(20.0,)),)
    ),
)
needs_cmaes = pytest.mark.skipif(importlib.util.find_spec("cmaes") is None, reason="the package cmaes is not installed")
needs_hub = pytest.mark.skipif(importlib.util.find_spec("optunahub") is None, reason="optunahub is not installed")


def cost(point: dict[str, Any]) -> float:
    away = math.log10(point["finetune.lr"] / 0.003) ** 2 + (point["finetune.difficulty_threshold"] - 0.7) ** 2
    return away + 0.1 * (point["finetune.cam_weight"] > 0)


def search(sampler: str, trials: int, dimensions: tuple[Dimension, ...] = SPACE) -> tuple[Any, list[dict[str, Any]]]:
    from synq.sweeps.driver.group_search import GroupSearch

    made = GroupSearch(dimensions, minimize=True, sampler=sampler, seed="s", num_startup=4, study_name=sampler)
    points = []
    for number in range(trials):
        point, _ = made.propose(f"p{number}", number)
        made.accept(f"p{number}", f"t{number}", f"trial-{number}")
        made.on_trial_complete(f"t{number}", {"objective_value": cost(point), "status": "completed"})
        points.append(point)
    return made, points


def test_the_ranges_of_every_trial_are_those_of_cma_es() -> None:
    assert always_ranges(SPACE) == ["finetune.lr", "finetune.difficulty_threshold"]


@needs_cmaes
def test_cma_es_goes_to_the_optimum_although_other_settings_come_and_go() -> None:
    _, points = search("cmaes", 60)
    first, last = (sum(map(cost, part)) / len(part) for part in (points[:15], points[-15:]))
    assert last < 0.35 * first
    assert {"finetune.epochs" in point for point in points[20:]} == {True, False}
    assert {point["finetune.lowpass_cutoff"] is None for point in points[20:]} == {True, False}


@pytest.mark.parametrize(
    ("sampler", "key"),
    [
        pytest.param("cmaes", "cma:generation", marks=needs_cmaes),
        ("nsga2", "NSGAIISampler:generation"),
    ],
)
def test_a_replayed_search_has_its_generations_again(sampler: str, key: str) -> None:
    made, points = search(sampler, 20)
    again, _ = search(sampler, 0)
    for number, trial in enumerate(made.study.get_trials()):
        again.attach(f"t{number}", trial.params, f"trial-{number}")
        again.on_trial_complete(f"t{number}", {"objective_value": trial.value, "status": "completed"})
    one, other = ([trial.system_attrs.get(key) for trial in part.study.get_trials()] for part in (made, again))
    assert one == other and max(filter(None, one)) >= 1
    assert len(points) == 20


@pytest.mark.skipif(importlib.util.find_spec("cmaes") is not None, reason="the package cmaes is installed")
def test_a_missing_package_is_named_with_its_cure() -> None:
    from synq.sweeps.driver.group_search import check_sampler

    with pytest.raises(ValueError, match="must be one that is installed, but got cmaes: pip install cmaes"):
        check_sampler(spec_from_dict({"sampler": "cmaes"}))


@pytest.mark.skipif(importlib.util.find_spec("optunahub") is not None, reason="optunahub is installed")
def test_auto_needs_optunahub() -> None:
    from synq.sweeps.driver.group_search import check_sampler

    with pytest.raises(ValueError, match="but got auto: pip install optunahub cmaes"):
        check_sampler(spec_from_dict({"sampler": "auto"}))


@needs_cmaes
def test_cma_es_needs_two_ranges() -> None:
    with pytest.raises(ValueError, match=r"unless 2 ranges .* are searched, but got 1"):
        check_installed("cmaes", SPACE[1:])


def test_cma_es_has_one_objective() -> None:
    keys = {"sampler": "cmaes", "second_objective": "bitops", "scheduler": "none"}
    with pytest.raises(ValueError, match="`sampler` must be another with a `second_objective`, but got 'cmaes'"):
        spec_from_dict(keys)


@needs_hub
def test_the_auto_sampler_of_optunahub_proposes_where_its_code_can_be_loaded() -> None:
    try:
        auto_sampler()
    except ValueError as error:
        assert "whose code OptunaHub did not get" in str(error)
        pytest.skip("OptunaHub has not been loaded on this machine, and cannot be")
    _, points = search("auto", 12)
    assert len({point["finetune.lr"] for point in points}) == 12


def test_tpe_proposes_as_with_all_trials_of_optunas_own_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    quick, points = search("tpe", 40)
    added: list[int] = []
    parent = KnownGroups.__base__
    assert parent is not None

    def all_of_them(self: KnownGroups, study: Any, *args: Any, **options: Any) -> Any:
        added.append(len(study.get_trials(deepcopy=False)))
        return parent.calculate(self, study, *args, **options)  # type: ignore[attr-defined]

    monkeypatch.setattr(KnownGroups, "calculate", all_of_them)
    _, others = search("tpe", 40)
    assert points == others and len({frozenset(trial.params) for trial in quick.study.trials}) == 4
    assert max(added) >= 39, "the sampler asks it"
