import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from synq.config.command_line import Command
from synq.config.finetune import inactive_keys
from synq.config.parsing import dotted_keys, nearest, values_from_text
from synq.config.run import (
    EvaluationConfig,
    FinetuneConfig,
    QuantConfig,
    ReconstructionConfig,
    RunConfig,
    RuntimeConfig,
    SynthesisConfig,
    TeacherConfig,
    config_from_dict,
    config_to_dict,
    load_config,
    make_absolute,
    parse_bits,
    with_overrides,
)


def test_importing_configs_and_results_loads_nothing_heavy() -> None:
    code = (
        "import sys, synq.config.run, synq.runs.record; print([m for m in ('torch', 'numpy', 'tyro', 'ray') "
        "if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_configuration_survives_its_own_dict() -> None:
    config = with_overrides(
        RunConfig(name="x"),
        {
            "teacher.input_size": [3, 32, 32],
            "teacher.mean": (0.5, 0.5, 0.5),
            "teacher.std": [1, 1, 1],
            "finetune.grad_clip": None,
        },
    )
    assert config.teacher.std == (1.0, 1.0, 1.0) and isinstance(config.teacher.std[0], float)
    assert config_from_dict(RunConfig, json.loads(json.dumps(config_to_dict(config)))) == config


def test_every_dotted_key_can_be_overridden_by_its_own_value() -> None:
    values = config_to_dict(RunConfig())
    keys = dotted_keys(RunConfig)
    assert "finetune.lr" in keys and "name" in keys and len(keys) == len(set(keys)) > 50
    for key in keys:
        value = values
        for part in key.split("."):
            value = value[part]
        assert with_overrides(RunConfig(), {key: value}) == RunConfig()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            {"finetune.lrr": 1.0},
            "`finetune.lrr` must be a known key, but got an unknown one; did you mean `finetune.lr`?",
        ),
        ({"cam_weight": 1.0}, "did you mean `finetune.cam_weight`"),
        ({"quant.weight_bits": 1}, "`quant.weight_bits` must be a whole number in [2, 8], but got 1"),
        ({"quant.act_bits": 9}, "`quant.act_bits` must be a whole number in [2, 8], but got 9"),
        ({"quant.first_bits": 1}, "`quant.first_bits` must be a whole number in [2, 8], but got 1"),
        ({"quant.weight_bits": True}, "`quant.weight_bits` must be a whole number, but got True"),
        ({"quant.weight_bits": 4.0}, "`quant.weight_bits` must be a whole number, but got 4.0"),
        ({"finetune.lr": True}, "`finetune.lr` must be a number, but got True"),
        ({"finetune.lr": "1e-3"}, "`finetune.lr` must be a number, but got '1e-3'"),
        ({"finetune.lr": math.nan}, "`finetune.lr` must be a finite number > 0, but got nan"),
        ({"finetune.lr": 0}, "`finetune.lr` must be a finite number > 0, but got 0.0"),
        ({"finetune.cam_weight": -1}, "`finetune.cam_weight` must be a finite number >= 0, but got -1.0"),
        ({"finetune.difficulty_threshold": 1.01}, "must be a number in [0, 1], but got 1.01"),
        ({"finetune.lowpass_cutoff": 0}, "`finetune.lowpass_cutoff` must be a finite number > 0"),
        ({"finetune.train_bn": 1}, "`finetune.train_bn` must be true or false, but got 1"),
        ({"finetune.train_bn": "False"}, "`finetune.train_bn` must be true or false, but got 'False'"),
        (
            {"finetune.optimizer": "sdg"},
            "`finetune.optimizer` must be one of sgd, adam, but got 'sdg'; did you mean `sgd`?",
        ),
        ({"finetune.batch_size": 2048}, "must be <= `synthesis.num_images` (1024, the default)"),
        ({"teacher.input_size": [3, 32]}, "`teacher.input_size` must be a list of 3 values, but got [3, 32]"),
        (
            {"teacher.mean": [0.5]},
            "exactly when `teacher.mean` ((0.5,)) is, but got None, the default: give both",
        ),
        ({"teacher.mean": [0.5], "teacher.std": [0]}, "`teacher.std` must hold one number > 0 per channel (1)"),
        ({"teacher.spec": "resnet18"}, "`teacher.spec` must read SOURCE:NAME"),
        ({"teacher": 3}, "`teacher` must be a known key"),
        (
            {"evaluation.objective": "selection", "evaluation.dataset": "none"},
            "be synthetic where `evaluation.dataset` is none",
        ),
        (
            {"synthesis.num_images": 32},
            "<= `synthesis.num_images` (32), because a batch has no image twice, but got 64, the default: "
            "set `finetune.batch_size` to 32 or less",
        ),
        ({"finetune.warmup_epochs": 99.0, "finetune.epochs": 3}, "be at most `finetune.epochs` (3), but got 99.0"),
        ({"finetune.warmup_epochs": 99.0}, "be at most `finetune.epochs` (15, the default), but got 99.0"),
        ({"synthesis.source": "folder:x"}, "for method own_images (it is 'inversion', the default)"),
        ({"synthesis.low_first": True, "synthesis.method": "gdfq"}, "unless `synthesis.method` ('gdfq') is one of"),
        ({"name": "a/b"}, "`name` must be letters"),
        ({"seed": -1}, "`seed` must be a number in [0, "),
    ],
)
def test_bad_values_are_refused_in_one_clear_line(overrides: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match="but got") as caught:
        with_overrides(RunConfig(), overrides)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_bad_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^my\.toml: `finetune\.epocs` must be .* did you mean `finetune\.epochs`\?$"):
        config_from_dict(RunConfig, {"finetune": {"epocs": 3}}, source="my.toml")
    with pytest.raises(ValueError, match="`finetune` must be a table of keys, but got 3"):
        config_from_dict(RunConfig, {"finetune": 3})
    with pytest.raises(FileNotFoundError, match="must name an existing file"):
        load_config(tmp_path / "absent.toml")
    with pytest.raises(ValueError, match=r"must name a \.toml or \.json file"):
        load_config(tmp_path / "x.yaml")
    for name, text in (("bad.toml", "a = ["), ("bad.json", "{"), ("list.json", "[1]")):
        (tmp_path / name).write_text(text)
        with pytest.raises(ValueError, match=name):
            load_config(tmp_path / name)


def test_toml_and_json_say_the_same(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text(
        'name = "n"\n[finetune]\nlr = 1\ngrad_clip = "none"\n[evaluation]\ndataset = "none"\n'
    )
    (tmp_path / "a.json").write_text(
        '{"name": "n", "finetune": {"lr": 1, "grad_clip": null}, "evaluation": {"dataset": "none"}}'
    )
    configs = [config_from_dict(RunConfig, load_config(tmp_path / name)) for name in ("a.toml", "a.json")]
    assert configs[0] == configs[1]
    assert configs[0].finetune.grad_clip is None
    assert configs[0].evaluation.dataset == "none"  # a text: it means "no labels", not "unset"


def overrides(args: list[str]) -> dict[str, object]:
    """Return the settings that a command with these arguments would override."""
    return Command("anything", settings="overrides").read(args)["overrides"]  # type: ignore[no-any-return]


def test_words_of_the_command_line() -> None:
    line = (
        "--finetune.lr 1e-3 --quant.act_bits=3 --finetune.train-bn False --teacher.input_size 1 16 16 "
        "--teacher.mean -0.5"
    )
    assert overrides(line.split()) == {
        "finetune.lr": 1e-3,
        "quant.act_bits": 3,
        "finetune.train_bn": False,
        "teacher.input_size": [1, 16, 16],
        "teacher.mean": [-0.5],
    }
    assert overrides(["--teacher.mean", "0.5,-0.4", "0.3"]) == {"teacher.mean": [0.5, -0.4, 0.3]}
    assert overrides(["--seed", "1", "--seed", "2"]) == {"seed": 2}
    assert overrides(["--finetune.grad_clip", "None", "--evaluation.dataset", "none"]) == {
        "finetune.grad_clip": None,
        "evaluation.dataset": "none",
    }


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--finetune.lr", "`finetune.lr` must be given one value, but got none"),
        ("--finetune.train_bn --seed 1", "`finetune.train_bn` must be given one value, but got none"),
        (
            "--name one bundled:digits_vit",
            "but got one bundled:digits_vit; TEACHER, which has no option, goes first",
        ),
        ("--seed 1 2", "`seed` must be given one value, but got 1 2"),
        ("--seed=1 seed=1", "each setting must read --KEY VALUE, but got seed=1"),
        ("--sed 1", "`sed` must be a known key, but got an unknown one; did you mean `seed`?"),
        ("--quant.bits 1", "`quant.bits` must be a known key"),
    ],
)
def test_bad_words_are_refused(line: str, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        overrides(line.split())
    assert message in str(caught.value)


@given(st.sampled_from(dotted_keys(RunConfig)), st.integers(0, 30))
def test_a_slip_of_one_letter_is_recognized(key: str, position: int) -> None:
    last = key.rpartition(".")[2]
    if len(last) < 4:
        return
    at = len(key) - 1 - position % len(last)
    assert f"`{key}`" in nearest(key[:at] + "_" + key[at:], dotted_keys(RunConfig))


def test_labels_and_protocols() -> None:
    assert QuantConfig(weight_bits=3, act_bits=8).label == "W3A8"
    assert QuantConfig().protocol == "A"
    assert QuantConfig(weight_bits=3, act_bits=3, first_bits=8).protocol == "B"
    assert QuantConfig(weight_bits=3, act_bits=3, last_bits=3).protocol == "A"
    assert QuantConfig(weight_bits=3, act_bits=4, last_bits=3).protocol == "B"
    assert QuantConfig(learned_steps="activations").protocol == QuantConfig(rounding="adaround").protocol == "B"
    assert QuantConfig(equalization=True, bn_correction=True, weight_range="mse").protocol == "A"
    assert parse_bits("W3A8") == (3, 8)
    for label in ("W1A4", "W4A9", "w4a4", "W4", "W4A4 "):
        with pytest.raises(ValueError, match="`bits` must read"):
            parse_bits(label)


def test_paths_become_absolute_and_names_stay(in_tmp: Path) -> None:
    config = make_absolute(
        RunConfig(
            teacher=TeacherConfig(spec="models/net.py:make", weights="w/a.safetensors"),
            evaluation=EvaluationConfig(dataset="npz:d/x.npz", data_dir="d"),
            runtime=RuntimeConfig(output_dir="out", store_dir="s3://bucket/store"),
        )
    )
    assert config.teacher.spec == f"{in_tmp}/models/net.py:make"
    assert config.teacher.weights == f"{in_tmp}/w/a.safetensors"
    assert config.evaluation.dataset == f"npz:{in_tmp}/d/x.npz" and config.evaluation.data_dir == f"{in_tmp}/d"
    assert config.runtime.output_dir == f"{in_tmp}/out" and config.runtime.store_dir == "s3://bucket/store"
    assert make_absolute(config) == config
    named = RunConfig(
        teacher=TeacherConfig(spec="torchvision:resnet18", weights="IMAGENET1K_V1"),
        evaluation=EvaluationConfig(dataset="digits"),
        runtime=RuntimeConfig(output_dir="/o"),
    )
    assert make_absolute(named) == named


@pytest.mark.parametrize(
    "part",
    [
        TeacherConfig,
        SynthesisConfig,
        QuantConfig,
        ReconstructionConfig,
        FinetuneConfig,
        EvaluationConfig,
        RuntimeConfig,
        RunConfig,
    ],
)
def test_parts_are_frozen_keyword_only_and_explained(part: type, root: Path) -> None:
    assert part.__doc__ and not part.__doc__.startswith(part.__name__)
    fields = dataclasses.fields(part)
    assert all(item.kw_only for item in fields)
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(part(), fields[0].name, 1)
    source = (
        (root / f"{part.__module__.replace('.', '/')}.py")
        .read_text()
        .split(f"class {part.__name__}:")[1]
        .split("\n@dataclass")[0]
        .splitlines()
    )
    for item in fields:
        at = next(number for number, line in enumerate(source) if line.startswith(f"    {item.name}: "))
        assert source[at + 1].startswith('    """'), f"{part.__name__}.{item.name} has no explanation"


@pytest.mark.parametrize(("weight", "uses_cam"), [(0.0, False), (1e-6, True), (20.0, True)])
def test_the_cam_term_is_used_at_any_positive_weight(weight: float, uses_cam: bool) -> None:
    config = with_overrides(RunConfig(), {"finetune.cam_weight": weight})
    assert config.finetune.uses_cam == uses_cam
    assert ("cam_method" in inactive_keys(config_to_dict(config)["finetune"], "none")) == (not uses_cam)


@pytest.mark.parametrize(
    "key",
    ["teacher.weights", "teacher.output", "teacher.cam_layer", "evaluation.data_dir", "runtime.store_dir"],
)
@pytest.mark.parametrize("text", ["none", "None"])
def test_f_16_none_unsets_every_optional_text(key: str, text: str) -> None:
    part, _, name = key.partition(".")
    given = with_overrides(RunConfig(), {key: "something"})
    assert getattr(getattr(given, part), name) == "something"
    from_file = config_from_dict(RunConfig, {part: {name: text}})
    from_line = with_overrides(given, values_from_text(RunConfig, {key: [text]}))
    assert getattr(getattr(from_file, part), name) is None and getattr(getattr(from_line, part), name) is None


def test_f_16_a_labeled_set_may_be_none_which_is_not_unset() -> None:
    for text, value in (("none", "none"), ("None", None)):
        assert config_from_dict(RunConfig, {"evaluation": {"dataset": text}}).evaluation.dataset == value
        given = values_from_text(RunConfig, {"evaluation.dataset": [text]})
        assert with_overrides(RunConfig(), given).evaluation.dataset == value


@pytest.mark.parametrize(
    ("tables", "hint"),
    [
        ({"finetune": {"lrr": 1}}, "did you mean `finetune.lr`?"),
        ({"fintune": {"lr": 1}}, "did you mean `finetune`?"),
        ({"quant": {"zzz": 1}}, "known are quant.weight_bits, quant.act_bits"),
        ({"zzz": 1}, "known are teacher, synthesis, quant"),
        ({"lr": 1}, "did you mean `synthesis.lr` or `finetune.lr`?"),
        ({"evaluation": {"zzz": "digits"}}, "known are evaluation.dataset"),
    ],
)
def test_f_16_every_unknown_key_is_told_near_or_known_ones(tables: dict[str, object], hint: str) -> None:
    with pytest.raises(ValueError, match="must be a known key, but got an unknown one") as caught:
        config_from_dict(RunConfig, tables)
    assert hint in str(caught.value)


def test_one_mean_and_std_are_those_of_all_channels() -> None:
    config = TeacherConfig(input_size=(3, 8, 8), mean=(0.5,), std=(0.25,))
    assert (config.mean, config.std) == ((0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
    assert TeacherConfig(mean=(0.1, 0.2, 0.3), std=(0.25,)).std == (0.25, 0.25, 0.25)
    assert TeacherConfig(mean=(0.5,), std=(0.25,)).mean == (0.5,), "the number of channels is not known yet"
    with pytest.raises(ValueError, match=r"one finite number per channel \(3\)"):
        TeacherConfig(input_size=(3, 8, 8), mean=(0.5, 0.5), std=(0.25,))
