"""Specs and search spaces: what is read, what is refused and with which words."""

from pathlib import Path
from typing import Any

import pytest

from synq.config.run import config_digest, with_overrides
from synq.sweeps.points import point_params
from synq.sweeps.space import Dimension, base_values, sample
from synq.sweeps.spec import run_config
from synq.sweeps.spec_file import DEMO_SPEC, check_spec, load_spec, parse_spec, resolve_spec, spec_from_dict


class Fixed:
    """Stands in for an Optuna trial: gives prepared values and notes what was asked."""

    def __init__(self, values: dict[str, Any]) -> None:
        self.values = values
        self.asked: list[str] = []

    def _give(self, name: str) -> Any:
        self.asked.append(name)
        return self.values[name]

    def suggest_float(
        self, name: str, low: float, high: float, *, step: float | None = None, log: bool = False
    ) -> float:
        assert low <= self.values[name] <= high
        return self._give(name)

    def suggest_int(self, name: str, low: int, high: int, *, step: int = 1, log: bool = False) -> int:
        assert low <= self.values[name] <= high
        return self._give(name)

    def suggest_categorical(self, name: str, choices: Any) -> Any:
        assert self.values[name] in choices
        return self._give(name)


def test_demo_spec_has_two_groups_of_four_trials() -> None:
    spec = load_spec(DEMO_SPEC)
    assert len(spec.groups) >= 2 and spec.search.num_trials >= 4
    assert len({group.key for group in spec.groups}) == len(spec.groups)
    assert {dimension.name.partition(".")[2] for dimension in spec.dimensions} == {
        "lowpass_cutoff",
        "cam_weight",
        "ce_weight",
        "difficulty_threshold",
        "lr",
    }


def test_the_search_opens_with_the_base_of_the_default_space() -> None:
    spec = spec_from_dict({})
    point = point_params(spec.dimensions, base_values(spec.dimensions, spec.groups[0].base))
    assert point is not None and point["finetune.lowpass_cutoff.on"] is True
    assert point["finetune.lowpass_cutoff"] == spec.groups[0].base.finetune.lowpass_cutoff
    assert sample(spec.dimensions, Fixed(point))["overrides"] == {
        "finetune.lowpass_cutoff": 1.0,
        "finetune.cam_weight": 20.0,
        "finetune.ce_weight": 0.1,
        "finetune.difficulty_threshold": 0.5,
        "finetune.lr": 0.01,
    }


def test_base_outside_the_space_gives_no_point() -> None:
    spec = spec_from_dict({"space": {"finetune.lr": {"type": "float", "low": 0.1, "high": 0.2}}})
    assert point_params(spec.dimensions, base_values(spec.dimensions, spec.groups[0].base)) is None


def test_groups_are_models_times_bits_with_their_own_settings() -> None:
    models = [
        "bundled:digits_resnet8",
        {"spec": "torchvision:resnet18", "dataset": "none", "base": {"finetune": {"epochs": 2}}},
    ]
    spec = spec_from_dict({"models": models, "bits": ["W8A8", "W3A4"], "base": {"finetune": {"epochs": 7, "lr": 0.1}}})
    assert [group.key for group in spec.groups] == [
        "digits_resnet8-W8A8",
        "digits_resnet8-W3A4",
        "torchvision_resnet18-W8A8",
        "torchvision_resnet18-W3A4",
    ]
    last = spec.groups[3].base
    assert (last.quant.weight_bits, last.quant.act_bits, last.evaluation.dataset) == (3, 4, "none")
    assert (last.finetune.epochs, last.finetune.lr) == (2, 0.1)
    assert spec.groups[0].base.finetune.epochs == 7


def test_a_trial_is_its_group_with_the_point_put_in() -> None:
    spec = spec_from_dict({"name": "x", "output_dir": "here", "cpus_per_worker": 2})
    group = spec.groups[0]
    config = run_config(spec, group, {"finetune.lr": 0.02, "finetune.lowpass_cutoff": 1.0}, seeds=(3, 4))
    assert (config.finetune.lr, config.finetune.lowpass_cutoff, config.seed, config.data_seed) == (0.02, 1.0, 3, 4)
    assert config.runtime.num_threads == 2 and config.runtime.output_dir == str(Path.cwd() / "here" / "runs")
    assert config_digest(config, with_seeds=False) == config_digest(
        with_overrides(config, {"seed": 9}), with_seeds=False
    )


def test_optional_range_asks_for_the_value_only_when_on() -> None:
    dimension = Dimension(name="finetune.lowpass_cutoff", type="float", low=0.5, high=2.0, optional=True)
    off = Fixed({"finetune.lowpass_cutoff.on": False})
    assert dimension.suggest(off) is None and off.asked == ["finetune.lowpass_cutoff.on"]
    assert dimension.suggest(Fixed({"finetune.lowpass_cutoff.on": True, "finetune.lowpass_cutoff": 1.5})) == 1.5


@pytest.mark.parametrize(
    ("dimension", "value", "point"),
    [
        (Dimension(name="a.b", type="choice", values=("none", 1.0)), None, {"a.b": "none"}),
        (Dimension(name="a.b", type="choice", values=(1.0, 2.0)), 3.0, None),
        (Dimension(name="a.b", type="float", low=0.0, high=1.0, step=0.25), 0.5, {"a.b": 0.5}),
        (Dimension(name="a.b", type="float", low=0.0, high=1.0, step=0.25), 0.6, None),
        (Dimension(name="a.b", type="float", low=0.0, high=1.0), None, None),
        (Dimension(name="a.b", type="int", low=1, high=4), 4, {"a.b": 4}),
    ],
)
def test_point_of_a_value(dimension: Dimension, value: Any, point: Any) -> None:
    assert dimension.point(value) == point


@pytest.mark.parametrize(
    ("mapping", "words"),
    [
        ({"num_trial": 3}, "`num_trial` must be a known key, but got an unknown one; did you mean `num_trials`?"),
        ({"num_trials": 0}, "`num_trials` must be a finite number >= 1, but got 0"),
        ({"num_trials": "4"}, "`num_trials` must be a whole number, but got '4'"),
        ({"bits": ["W1A4"]}, "`bits` must read W<2..8>A<2..8>"),
        ({"bits": "W4A4"}, "`bits` must be a list"),
        ({"bits": ["W4A4", "W4A4"]}, "digits_resnet8-W4A4 twice"),
        ({"models": []}, "`models` must be a list with at least one entry"),
        ({"models": [{"spec": "a:b", "weigths": "x"}]}, "did you mean `teacher.weights`?"),
        ({"base": {"finetune": {"learning_rate": 1.0}}}, "`finetune.learning_rate` must be a known key"),
        ({"base": {"teacher": {"spec": "a:b"}}}, "`base.teacher` must be left out"),
        ({"base": {"finetune": {"lowpass_unit": "bins"}}}, "must be nyquist with the default search space"),
        ({"space": {"finetune.lrr": {}}}, "did you mean `finetune.lr`?"),
        (
            {"space": {"finetune": {"lr": {"type": "float", "low": 0.0, "high": 1.0}}}},
            "`finetune.lr` must be a finite number > 0",
        ),
        ({"space": {"finetune.lr": {"type": "float", "low": 1.0}}}, "must give low and high"),
        ({"space": {"finetune.lr": {"type": "float", "low": 1.0, "high": 0.1}}}, "`space.finetune.lr.high` must be"),
        ({"space": {"finetune.lr": {"type": "float", "low": "a", "high": 0.1}}}, "`low` must be a number"),
        ({"space": {"finetune.lr": {"type": "flaot", "low": 0.1, "high": 0.2}}}, "did you mean `float`?"),
        ({"space": {"finetune.lr": {"low": 0.1, "high": 0.2}}}, "`space.finetune.lr.type` must be given"),
        ({"space": {"finetune.lr": {"type": "choice", "value": [1]}}}, "did you mean `values`?"),
        ({"space": {"finetune.epochs": {"type": "int", "low": 1.5, "high": 3}}}, "must be a whole number for type int"),
        ({"space": {"quant.weight_bits": {"type": "int", "low": 2, "high": 4}}}, "engines are groups"),
        ({"space": {"synthesis.lr": {"type": "float", "low": 0.1, "high": 0.2}}}, "sets are made once"),
        ({"output_dir": "$SYNQ_NO_SUCH_FOLDER/x"}, "set SYNQ_NO_SUCH_FOLDER"),
        ({"gpus_per_worker": 1.5}, "`gpus_per_worker` must be a part of one GPU"),
        ({"workers_per_trial": 2, "gpus_per_worker": 0.5}, "must be 0 or 1 if a trial has several workers"),
        ({"workers_per_trial": 0}, "`workers_per_trial` must be"),
        ({"gpus_per_trial": 1}, "`gpus_per_trial` must be a known key"),
        ({"second_objective": "size_bytes"}, "`scheduler` must be none with a `second_objective`"),
        ({"study_storage": "redis"}, "`study_storage` must be none, journal or the address of a database"),
        ({"sampler": "points"}, "`points` must hold at least one table"),
        ({"sampler": "grid"}, "`space.finetune.lowpass_cutoff` must give `step`, or be a choice"),
        ({"sampler": "points", "points": [{"finetune.lr": 0.1}], "space": {}}, "`space` must be left out for sampler"),
        ({"points": [{"finetune.lrr": 0.1}]}, "did you mean `finetune.lr`?"),
        ({"points": [{"finetune.lr": 5.0}]}, "`points` must lie in the search space, but got"),
        ({"points": [{"bits": "W2A2"}]}, "finetune or quant, or `synthesis.method`, but got 'bits'"),
        ({"points": {"finetune.lr": 0.1}}, "`points` must be a list of tables"),
        ({"seeds": [1, 1]}, "`seeds` must be different numbers"),
        ({"sampler": "tp"}, "did you mean `tpe`?"),
        ({"base": {"evaluation": {"objective": "selection"}}}, "`base.evaluation.objective` must be left out"),
        ({"base": {"quant": {"weight_bits": 2}}}, "`base.quant.weight_bits` must be left out (the spec's key `bits`"),
        (
            {"models": [{"spec": "bundled:digits_resnet8", "base": {"quant": {"act_bits": 3}}}]},
            "`base.quant.act_bits` must be left out",
        ),
        ({"base": {"quant": 3}}, "`quant` must be a table of keys"),
        ({"base": {"finetune": 3}}, "`base.finetune` must be a table of keys"),
        ({"models": [{"spec": "bundled:digits_resnet8", "base": {"evaluation": 5}}]}, "`evaluation` must be a table"),
        ({"base": {"runtime": {"store_dir": "s3://bucket/x"}}}, "`runtime.store_dir` must be a folder path"),
        ({"base": {"finetune": {"lr": 10**400}}}, "`finetune.lr` must be a number below 1e308"),
        ({"num_trials": 10**400}, "`num_trials` must be a finite number >= 1"),
    ],
)
def test_rejections_name_the_cure(mapping: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError) as error:
        spec_from_dict(mapping, source="some.toml")
    assert words in str(error.value) and str(error.value).startswith("some.toml: ") and "\n" not in str(error.value)


def test_environment_variables_stand_for_folders(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SYNQ_DATA_DIR", str(tmp_path))
    models = [
        {
            "spec": "${SYNQ_DATA_DIR}/nets.py:tiny",
            "weights": "$SYNQ_DATA_DIR/w.safetensors",
            "dataset": "npz:$SYNQ_DATA_DIR/a.npz",
        }
    ]
    base = spec_from_dict({"models": models}).groups[0].base
    assert base.teacher.spec == f"{tmp_path}/nets.py:tiny" and base.evaluation.dataset == f"npz:{tmp_path}/a.npz"


def test_the_data_folder_is_that_of_the_one_who_starts_the_sweep(monkeypatch: pytest.MonkeyPatch, in_tmp: Path) -> None:
    def data_dir(**base: Any) -> str | None:
        return spec_from_dict({"base": base}).groups[0].base.evaluation.data_dir

    monkeypatch.delenv("SYNQ_DATA_DIR", raising=False)
    assert data_dir() == str(in_tmp / "data")
    monkeypatch.setenv("SYNQ_DATA_DIR", "elsewhere")
    assert data_dir() == str(in_tmp / "elsewhere")
    assert data_dir(evaluation={"data_dir": "mine"}) == str(in_tmp / "mine")


def test_trials_without_a_gpu_stay_off_it() -> None:
    def device(**keys: Any) -> str:
        spec = spec_from_dict(keys)
        return run_config(spec, spec.groups[0], {}).runtime.device

    assert device() == "cpu" and device(gpus_per_worker=0.5) == "auto"
    assert device(base={"runtime": {"device": "cuda"}}) == "cuda"


def test_a_batch_is_divided_between_the_workers() -> None:
    spec = spec_from_dict({"workers_per_trial": 3, "space": {}})
    with pytest.raises(
        ValueError, match=r"`finetune.batch_size` must be divisible by `workers_per_trial` \(3\), but got 64"
    ):
        run_config(spec, spec.groups[0], {})
    assert run_config(spec, spec.groups[0], {"finetune.batch_size": 63}).finetune.batch_size == 63


def test_a_model_that_the_spec_names_has_that_name() -> None:
    models = [{"spec": "bundled:digits_resnet8", "name": "my net"}, "bundled:digits_resnet8"]
    assert [(g.model, g.named) for g in spec_from_dict({"models": models}).groups] == [
        ("my_net", "my_net"),
        ("digits_resnet8", ""),
    ]


def test_overrides_win_and_the_root_moves_relative_folders(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text('num_trials = 3\n[space."finetune.lr"]\ntype = "choice"\nvalues = [0.1]\n')
    spec = load_spec(file, {"num_trials": 5}, root=tmp_path / "home")
    assert spec.search.num_trials == 5 and spec.output_dir == tmp_path / "home" / "runs" / "mine"
    with pytest.raises(FileNotFoundError, match="`spec` must name an existing file"):
        load_spec(tmp_path / "absent.toml")


def test_a_spec_is_parsed_as_written_then_resolved_then_checked(in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SYNQ_WEIGHTS", "w.safetensors")
    written = parse_spec(
        {
            "name": "mine",
            "models": [{"spec": "nets.py:tiny", "weights": "$SYNQ_WEIGHTS", "dataset": "npz:a.npz"}],
            "points": [{"finetune": {"lr": 5.0, "lowpass_cutoff": "none"}}],
        }
    )
    (model,) = written.models
    assert (model.teacher.spec, model.teacher.weights) == ("nets.py:tiny", "w.safetensors")
    assert model.name == "" and model.settings == {"evaluation": {"dataset": "npz:a.npz"}}
    assert (written.search.output_dir, written.search.num_trials) == ("none", None)
    assert written.space is None and written.base == {} and written.bits == ("W4A4",)
    assert written.points == ({"finetune.lr": 5.0, "finetune.lowpass_cutoff": None},)
    spec = resolve_spec(written)
    assert spec.search.output_dir == str(in_tmp / "runs" / "mine") and spec.search.num_trials == 8
    assert spec.groups[0].base.teacher.weights == str(in_tmp / "w.safetensors") and len(spec.dimensions) == 5
    with pytest.raises(ValueError, match="`points` must lie in the search space"):
        check_spec(spec)
