"""Settings that exist only under others: how conditions are read, sampled, listed, and how important they are."""

import itertools
import json
import random
from typing import Any

import numpy as np
import pytest

from synq.config.run import config_digest
from synq.sweeps.conditions import When, read_when
from synq.sweeps.points import grid, grid_size, point_params
from synq.sweeps.reports.study_trials import Trial, importances
from synq.sweeps.space import (
    Dimension,
    dimension_from,
    dimension_values,
    existing,
    in_order,
    points_where_it_exists,
    sample,
)
from synq.sweeps.spec import run_config
from synq.sweeps.spec_file import spec_from_dict

WEIGHT, SIZE, LR = "finetune.perturb_weight", "finetune.perturb_size", "finetune.lr"
SPACE: dict[str, Any] = {
    SIZE: {"type": "float", "low": 0.01, "high": 0.1, "when": {WEIGHT: "> 0"}},
    WEIGHT: {"type": "choice", "values": [0.0, 1.0, 5.0]},
}


class Drawn:
    """Gives the first value of everything but those that are given."""

    def __init__(self, **values: Any) -> None:
        self.values, self.asked = values, []

    def suggest_float(self, name: str, low: float, high: float, **_: Any) -> float:
        self.asked.append(name)
        return low

    suggest_int: Any = suggest_float

    def suggest_categorical(self, name: str, choices: Any) -> Any:
        self.asked.append(name)
        return self.values.get(name.rpartition(".")[2], choices[0])


def test_a_condition_is_a_value_a_list_or_a_comparison() -> None:
    read = read_when({"finetune": {"cam_weight": "> 0", "lowpass_cutoff": "!= none"}, "a.b": [1, True], "c.d": 2}, "w")
    by_name = {one.name: one for one in read}
    assert [by_name["finetune.cam_weight"].holds(value) for value in (0, 0.1, None, "x", True)] == [
        False, True, False, False, False,
    ]  # fmt: skip
    assert [by_name["finetune.lowpass_cutoff"].holds(value) for value in (None, 0.0, 3)] == [False, True, True]
    assert [by_name["a.b"].holds(value) for value in (1, 1.0, True, 2, False)] == [True, True, True, False, False]
    assert not by_name["c.d"].holds(None) and by_name["c.d"].holds(2.0)
    assert When(name="x", values=(1,)).holds(True) is False, "True and 1 are different values"


def test_a_comparison_reads_its_value_as_the_space_has_it() -> None:
    (unlike,) = read_when({"quant.equalization": "!= true"}, "w")
    assert unlike.holds(False) and not unlike.holds(True)
    (equal,) = read_when({"quant.weight_bits": "== 4"}, "w")
    assert equal.holds(4) and not equal.holds(3)
    for text in ("> nan", "< inf"):
        with pytest.raises(ValueError, match="finite"):
            read_when({"finetune.lr": text}, "w")


def test_a_setting_is_drawn_only_where_it_exists_and_has_the_value_of_the_base_elsewhere() -> None:
    spec = spec_from_dict({"space": SPACE})
    assert [dimension.name for dimension in spec.dimensions] == [WEIGHT, SIZE], "after what it depends on"
    off, on = Drawn(), Drawn(perturb_weight=5.0)
    assert sample(spec.dimensions, off)["overrides"] == {WEIGHT: 0.0} and off.asked == [WEIGHT]
    assert sample(spec.dimensions, on)["overrides"] == {WEIGHT: 5.0, SIZE: 0.01} and on.asked == [WEIGHT, SIZE]
    group = spec.groups[0]
    assert run_config(spec, group, {WEIGHT: 0.0}).finetune.perturb_size == group.base.finetune.perturb_size
    point = {WEIGHT: 0.0, SIZE: 99.0}
    assert point_params(spec.dimensions, point) == {WEIGHT: 0.0}, "what does not exist has no range"
    assert existing(spec.dimensions, point) == {WEIGHT: 0.0}
    assert point_params(spec.dimensions, {**point, WEIGHT: 1.0}) is None


def test_a_chain_of_conditions_ends_where_its_first_link_does() -> None:
    space = {
        "finetune.cam_method": {"type": "choice", "values": ["cam", "gradcam"], "when": {SIZE: "<= 0.05"}},
        **SPACE,
    }
    dimensions = spec_from_dict({"space": space}).dimensions
    assert existing(dimensions, {WEIGHT: 0.0, SIZE: 0.01, "finetune.cam_method": "cam"}) == {WEIGHT: 0.0}
    assert len(existing(dimensions, {WEIGHT: 1.0, SIZE: 0.05, "finetune.cam_method": "cam"})) == 3
    assert len(existing(dimensions, {WEIGHT: 1.0, SIZE: 0.06, "finetune.cam_method": "cam"})) == 2


CAM, EPOCHS, WARMUP = "finetune.cam_weight", "finetune.epochs", "finetune.warmup_epochs"
CHAINS: dict[str, dict[str, Any]] = {
    "bounds from both sides": {
        CAM: {"type": "float", "low": 0, "high": 10},
        WEIGHT: {"type": "float", "low": 0.5, "high": 1, "when": {CAM: "> 2"}},
        SIZE: {**SPACE[SIZE], "when": {WEIGHT: ">= 0.5", CAM: "< 8"}},
    },
    "the other way round": {
        CAM: {"type": "float", "low": 0, "high": 10},
        WEIGHT: {"type": "float", "low": 0.5, "high": 1, "when": {CAM: "< 8"}},
        SIZE: {**SPACE[SIZE], "when": {CAM: "> 2", WEIGHT: ">= 0.5"}},
    },
    "a value between the edges of whole numbers": {
        EPOCHS: {"type": "int", "low": 2, "high": 10, "step": 4},
        WEIGHT: {"type": "float", "low": 0.5, "high": 1, "when": {EPOCHS: "> 3"}},
        SIZE: {**SPACE[SIZE], "when": {WEIGHT: "<= 1", EPOCHS: "< 10"}},
    },
    "not none": {
        "finetune.lowpass_cutoff": {"type": "float", "low": 0.4, "high": 1.6, "optional": True},
        WEIGHT: {"type": "float", "low": 0.5, "high": 1, "when": {"finetune.lowpass_cutoff": "!= 0.4"}},
        SIZE: {**SPACE[SIZE], "when": {WEIGHT: "<= 1", "finetune.lowpass_cutoff": "< 1.6"}},
    },
    "an edge that is valid with another value only": {
        EPOCHS: {"type": "choice", "values": [2, 4]},
        WARMUP: {"type": "float", "low": 0, "high": 3, "when": {EPOCHS: [2, 4]}},
    },
}


@pytest.mark.parametrize("name", CHAINS)
def test_conditions_that_hold_together_somewhere_are_accepted(name: str) -> None:
    assert len(spec_from_dict({"space": CHAINS[name]}).dimensions) == len(CHAINS[name])


def test_conditions_that_exclude_each_other_along_a_chain_are_rejected() -> None:
    space = {**CHAINS["bounds from both sides"], SIZE: {**SPACE[SIZE], "when": {WEIGHT: ">= 0.5", CAM: "<= 2"}}}
    message = "`space.finetune.perturb_size.when` must hold together, but got finetune.cam_weight <= 2.0; "
    with pytest.raises(ValueError, match=message + "finetune.cam_weight > 2.0"):
        spec_from_dict({"space": space})


def test_a_point_is_found_exactly_where_one_exists() -> None:
    """Against all values of random small spaces."""
    draw = random.Random(0)
    numbers = [0, 1, 2, 3, 4, 5, 6, 7, 8]
    found = 0
    for _ in range(300):
        low, step = draw.choice(numbers[:4]), draw.choice([1, 2, 3])
        names = ["a", "b", "c"]
        made = []
        for index, name in enumerate(names):
            when = tuple(
                When(
                    name=draw.choice(names[:index]), sign=draw.choice(["<", ">", "<=", ">=", "!=", "in"]), values=(one,)
                )
                for one in draw.sample(numbers, draw.randint(1, 2))
                if index
            )
            made.append(Dimension(name=name, type="int", low=low, high=low + 2 * step, step=step, when=when))
        grid = list(itertools.product(*(one.listed() for one in made)))
        for dimension in made:
            exists = any(dimension.name in existing(made, dict(zip(names, values, strict=True))) for values in grid)
            try:
                point = next(points_where_it_exists(made, dimension))
            except ValueError:
                assert not exists
                continue
            assert dimension.exists(point) and all(one.point(point[one.name]) for one in made if one.name in point)
            assert exists
            found += bool(point)
    assert found > 100


def test_a_grid_has_each_different_run_once() -> None:
    sizes = {**SPACE[SIZE], "step": 0.045}
    rates = {"type": "choice", "values": [1e-3, 1e-2]}
    spec = spec_from_dict({"sampler": "grid", "space": {SIZE: sizes, WEIGHT: SPACE[WEIGHT], LR: rates}})
    points = list(grid(spec.dimensions))
    assert len(points) == grid_size(spec.dimensions) == spec.search.trials == (1 + 2 * 3) * 2
    digests = {config_digest(run_config(spec, spec.groups[0], point)) for point in points}
    assert len(digests) == len(points)
    assert [point[LR] for point in points[:2]] == [1e-3, 1e-2], "the last setting changes fastest"


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({SIZE: {**SPACE[SIZE], "when": {"finetune.perturb_wight": 1}}}, "must name other searched settings"),
        ({**SPACE, SIZE: {**SPACE[SIZE], "when": {WEIGHT: 7.0}}}, "must hold for a value of finetune.perturb_weight"),
        ({**SPACE, WEIGHT: {**SPACE[WEIGHT], "when": {SIZE: "> 0"}}}, "must not depend on the setting itself"),
        ({**SPACE, SIZE: {**SPACE[SIZE], "when": "on"}}, "must be a table of other searched settings"),
        ({**SPACE, SIZE: {**SPACE[SIZE], "when": {WEIGHT: "> much"}}}, "must compare with a number, but got '> much'"),
        ({**SPACE, SIZE: {**SPACE[SIZE], "wenn": {WEIGHT: 1.0}}}, "wenn"),
    ],
)
def test_a_wrong_condition_is_rejected(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        spec_from_dict({"space": keys})


def test_a_listed_point_names_no_setting_that_does_not_exist_in_it() -> None:
    spec = spec_from_dict({"space": SPACE, "points": [{WEIGHT: 1.0, SIZE: 0.05}, {WEIGHT: 0.0}]})
    assert len(spec.points) == 2
    with pytest.raises(ValueError, match=r"got finetune.perturb_size where its `when` does not hold \(number 1\)"):
        spec_from_dict({"space": SPACE, "points": [{WEIGHT: 0.0, SIZE: 0.05}]})


def test_the_sweep_file_keeps_conditions_and_is_as_before_without() -> None:
    spec = spec_from_dict({"space": SPACE})
    values = json.loads(json.dumps([dimension_values(dimension) for dimension in spec.dimensions]))
    assert tuple(map(dimension_from, values)) == spec.dimensions
    assert "when" not in values[0] and "when" in values[1], "a sweep of before is still the same sweep"


def study(trials: int, value: Any) -> tuple[dict[str, Dimension], list[Trial]]:
    """Random trials of a switch, a number that exists where it is on, and one that never matters."""
    switch = Dimension(name="switch", type="choice", values=(True, False))
    number = Dimension(name="x", type="float", low=0.0, high=1.0, when=(When(name="switch", values=(True,)),))
    other = Dimension(name="z", type="float", low=0.0, high=1.0)
    draw, found = np.random.default_rng(0), []
    for count in range(trials):
        params: dict[str, Any] = {"switch": bool(draw.random() < 0.5), "z": draw.random()}
        if params["switch"]:
            params["x"] = draw.random()
        found.append(Trial(number=count, value=value(params), params=params, top1=None))
    return {one.name: one for one in in_order([number, switch, other])}, found


def test_the_only_setting_that_matters_is_the_important_one_though_it_exists_only_sometimes() -> None:
    varied, trials = study(60, lambda params: params.get("x", 0.5))
    shares = importances(varied, trials)
    assert shares["x"] > 0.9 and sum(shares.values()) == pytest.approx(1)


def test_importances_follow_the_law_of_total_variance() -> None:
    """Off is 0, on is 1 + x: the switch explains 0.5625, x where it exists 1/12 and so 1/24 in all."""
    varied, trials = study(300, lambda params: 1 + params["x"] if params["switch"] else 0.0)
    shares = importances(varied, trials)
    whole = 0.5625 + 1 / 24
    assert shares["x"] == pytest.approx(1 / 24 / whole, abs=0.02)
    assert shares["switch"] == pytest.approx(0.5625 / whole, abs=0.02) and shares["z"] < 0.01


@pytest.mark.slow
def test_optunas_evaluators_leave_it_out_or_give_it_nothing() -> None:
    """Why there is one of our own."""
    import optuna

    def study_of(value: Any) -> optuna.Study:
        _, trials = study(200, value)
        made = optuna.create_study()
        ranges: dict[str, Any] = {
            "switch": optuna.distributions.CategoricalDistribution([True, False]),
            "x": optuna.distributions.FloatDistribution(0, 1),
            "z": optuna.distributions.FloatDistribution(0, 1),
        }
        for trial in trials:
            distributions = {name: ranges[name] for name in trial.params}
            params = dict(trial.params)
            made.add_trial(optuna.trial.create_trial(value=trial.value, params=params, distributions=distributions))
        return made

    importance = optuna.importance
    fanova = importance.get_param_importances(
        study_of(lambda params: params.get("x", 0.5)), evaluator=importance.FanovaImportanceEvaluator(seed=0)
    )
    assert "x" not in fanova and fanova["z"] > 0.5
    default = importance.get_param_importances(study_of(lambda params: 1 + params["x"] if params["switch"] else 0.0))
    assert default["x"] == 0 < default["z"]
