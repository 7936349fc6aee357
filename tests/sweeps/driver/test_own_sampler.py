"""Samplers of a user: their inputs, their proposals in a search, and what is rejected before anything is computed."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest

import synq
from support.added import install, nothing_added
from synq.config import plugins
from synq.sweeps.driver.group_search import GroupSearch, check_sampler
from synq.sweeps.space import Dimension
from synq.sweeps.spec_file import spec_from_dict

FILE = """
import optuna

class Halves(optuna.samplers.RandomSampler):
    def sample_independent(self, study, trial, name, distribution):
        if name == "finetune.epochs":
            return distribution.low
        return (distribution.low * distribution.high) ** 0.5

def halves(inputs):
    return Halves(seed=inputs.seed)
"""
SPACE = {
    "finetune.lr": {"type": "float", "low": 1e-4, "high": 1e-2, "log": True},
    "finetune.epochs": {"type": "int", "low": 2, "high": 9},
}


@pytest.fixture(autouse=True)
def _nothing_added(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with nothing_added(monkeypatch):
        yield


def spec(sampler: str, **more: Any) -> Any:
    return spec_from_dict({"sampler": sampler, "space": SPACE, "num_trials": 9, **more})


def search(sampler: str) -> GroupSearch:
    dimensions = spec("tpe").dimensions
    return GroupSearch(dimensions, minimize=True, sampler=sampler, seed="s", num_startup=3, study_name="x")


def test_a_sampler_is_made_for_every_proposal_from_its_inputs() -> None:
    seen: list[synq.SamplerInputs] = []

    @synq.sampler("mine", version="1")
    def made(inputs: synq.SamplerInputs) -> optuna.samplers.BaseSampler:
        seen.append(inputs)
        return optuna.samplers.RandomSampler(seed=inputs.seed)

    found = search("mine@1")
    points = [found.propose(f"p{number}", number)[0] for number in range(3)]
    assert len(seen) == 4 and len({inputs.seed for inputs in seen}) == 3, "that of the first proposal twice"
    assert seen[0].directions == ("minimize",) and seen[0].num_startup == 3
    assert [dimension.name for dimension in seen[0].dimensions] == list(SPACE)
    assert len({point["finetune.lr"] for point in points}) == 3
    assert points == [search("mine@1").propose("p", number)[0] for number in range(3)], "as in a restarted driver"


def test_the_proposals_are_those_of_the_sampler(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(FILE)
    resolved = spec(f"{tmp_path}/mine.py:halves")
    assert resolved.search.sampler == plugins.versioned(plugins.SAMPLER, f"{tmp_path}/mine.py:halves")
    check_sampler(resolved)
    point, params = search(resolved.search.sampler).propose("p", 0)
    assert point == {"finetune.lr": 1e-3, "finetune.epochs": 2} and params["finetune.lr"] == pytest.approx(1e-3)


def test_results_reach_the_sampler_by_the_study() -> None:
    best: list[float] = []

    class Best(optuna.samplers.RandomSampler):
        def sample_independent(self, study: Any, trial: Any, name: str, distribution: Any) -> Any:
            done = study.get_trials(states=[optuna.trial.TrialState.COMPLETE])
            if name == "finetune.epochs" and done:
                best.append(min(one.value for one in done))
            return super().sample_independent(study, trial, name, distribution)

    synq.sampler("best", version="1")(lambda inputs: Best(seed=inputs.seed))
    found = search("best@1")
    for number, value in enumerate((0.5, 0.25)):
        found.propose(f"p{number}", number)
        found.accept(f"p{number}", f"t{number}", f"trial-{number}")
        found.on_trial_complete(f"t{number}", {"epoch": 1, "objective_value": value, "status": "completed"})
    found.attach("given", {"finetune.lr": 1e-3, "finetune.epochs": 3}, "listed")
    found.propose("p3", 3)
    assert best[-1] == 0.25


class _Outside(optuna.samplers.RandomSampler):
    def sample_independent(self, study: Any, trial: Any, name: str, distribution: Any) -> Any:
        return {"finetune.lr": float("nan"), "finetune.epochs": 3}[name]


class _Above(optuna.samplers.RandomSampler):
    def sample_independent(self, study: Any, trial: Any, name: str, distribution: Any) -> Any:
        return {"finetune.lr": 1e-3, "finetune.epochs": 40}[name]


class _Raising(optuna.samplers.RandomSampler):
    def infer_relative_search_space(self, study: Any, trial: Any) -> Any:
        raise KeyError("nothing\nknown")


BAD: dict[str, tuple[Callable[[synq.SamplerInputs], Any], str]] = {
    "nothing": (lambda inputs: None, "must return an optuna.samplers.BaseSampler, but nothing returned NoneType"),
    "class": (lambda inputs: optuna.samplers.RandomSampler, "class returned the class RandomSampler"),
    "raises": (lambda inputs: inputs.space, "raises raised AttributeError"),
    "exits": (lambda inputs: exit(1), "exits raised SystemExit"),
    "nan": (lambda inputs: _Outside(), "must propose settings, but nan raised ValueError: `nan` is invalid"),
    "above": (lambda inputs: _Above(), r"propose finetune\.epochs in \[2, 9\], but above proposed 40"),
    "later": (lambda inputs: _Raising(), r"must propose settings, but later raised KeyError: 'nothing\\nknown'"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_proposes_no_settings_is_rejected_before_any_trial(name: str, tmp_path: Path) -> None:
    function, reason = BAD[name]
    synq.sampler(name, version="1")(function)
    with pytest.raises(ValueError, match=reason) as found:
        synq.sweeps.run({"sampler": name, "space": SPACE}, output_dir=tmp_path / "out", progress=False)
    assert "\n" not in str(found.value) and not (tmp_path / "out").exists()


def test_a_sampler_of_a_package_and_unknown_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    from synq.commands.sweep import main

    install(tmp_path / "site", monkeypatch, "synq.samplers", "halves", FILE)
    assert spec("acme").search.sampler == "acme@2.5"
    assert search("acme@2.5").propose("p", 0)[0]["finetune.lr"] == 1e-3
    for wrong, near in (("acmee", "did you mean `acme`"), ("tpee", "did you mean `tpe`")):
        file = tmp_path / "spec.toml"
        file.write_text(f'sampler = "{wrong}"\n')
        assert main([str(file), "--output-dir", str(tmp_path / "out")]) == 2
        (line,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
        assert "`sampler` must be one of tpe, random, gp, cmaes, nsga2, auto, grid, points, acme, " in line
        assert near in line
    assert not (tmp_path / "out").exists()


def test_methods_of_synthesis_are_searched_with_one_set_each(tmp_path: Path) -> None:
    from synq.sweeps.driver.synthetic_sets import sets_needed
    from synq.sweeps.space import METHOD

    (tmp_path / "mine.py").write_text("def images(inputs): ...\n")
    values = ["inversion", "gaussian", f"{tmp_path}/mine.py:images"]
    space = {"type": "choice", "values": values}
    found = spec_from_dict({"sampler": "grid", "space": {METHOD: space}, "seeds": [0, 1]})
    (dimension,) = found.dimensions
    own = plugins.versioned(plugins.SYNTHESIS_METHOD, values[2])
    assert isinstance(dimension, Dimension) and dimension.values == ("inversion", "gaussian", own)
    needed = [(config.synthesis.method, config.data_seed) for _, config in sets_needed(found).values()]
    assert sorted(needed) == sorted((method, seed) for method in dimension.values for seed in (0, 1))
    points = spec_from_dict({"sampler": "points", "points": [{METHOD: values[2]}, {"finetune.lr": 0.1}]})
    assert points.points[0][METHOD] == own and {one.name for one in points.dimensions} == {METHOD, "finetune.lr"}
    for wrong, reason in (("inversoin", "did you mean `inversion`"), ("own_images", r"`synthesis\.source` must be")):
        with pytest.raises(ValueError, match=reason):
            spec_from_dict({"space": {METHOD: {"type": "choice", "values": ["inversion", wrong]}}})
    synq.synthesis_method("deco", version="1")(lambda inputs: None)
    with pytest.raises(ValueError, match=r"`synthesis\.method` must be FILE\.py:FUNCTION, .* but got 'deco'"):
        spec_from_dict({"space": {METHOD: {"type": "choice", "values": ["inversion", "deco"]}}})
    with pytest.raises(ValueError, match=r"of the synthesis only `synthesis\.method` can be searched"):
        spec_from_dict({"space": {"synthesis.lr": {"type": "choice", "values": [0.1]}}})
