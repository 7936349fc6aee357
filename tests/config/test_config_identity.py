"""What decides a result counts in the digest of a configuration, and nothing else does."""

import dataclasses

import pytest

from synq.config.parsing import dotted_keys
from synq.config.run import (
    EvaluationConfig,
    QuantConfig,
    RunConfig,
    TeacherConfig,
    config_digest,
    config_to_dict,
    with_overrides,
)
from synq.config.synthesis import STRUCTURE_WEIGHTS

DECIDES_NOTHING = {
    "name",
    "finetune.log_every",
    "evaluation.batch_size",
    "evaluation.data_dir",
    "runtime.output_dir",
    "runtime.store_dir",
    "runtime.device",
    "runtime.memory_format",
    "runtime.compile",
    "runtime.num_threads",
    "runtime.progress",
    "runtime.tracker",
}


EVERYTHING_ON = with_overrides(
    RunConfig(),
    {
        "quant.rounding": "adaround",
        "quant.learned_steps": "all",
        "quant.last_bits": 7,
        "finetune.perturb_weight": 0.5,
        "finetune.own_term": "os:getcwd",
        "finetune.own_weight": 0.5,
    },
)


NEEDED: dict[str, dict[str, object]] = {
    "quant.portable": {"quant.target": "openvino"},
    "quant.power_of_two_scales": {"quant.target": "openvino", "quant.learned_steps": "none"},
    "quant.float_attention": {"quant.target": "onnxruntime"},
    "synthesis.source": {"synthesis.method": "own_images", "synthesis.source": "folder:here"},
}
"""What a setting is allowed with."""


def _another_value(key: str, value: object) -> object:
    """A valid value other than the default, for any key."""
    special = {
        "name": "other",
        "teacher.spec": "torchvision:resnet18",
        "teacher.num_classes": 7,
        "teacher.input_size": [3, 8, 8],
        "quant.first_bits": 8,
        "quant.last_bits": 8,
        "quant.layer_weight_bits": {"conv1": 8},
        "quant.layer_act_bits": {"relu": 8},
        "finetune.lowpass_cutoff": 4.0,
        "evaluation.num_images": 9,
        "evaluation.dataset": "digits",
        "runtime.num_threads": 3,
        "synthesis.schedule": "plateau",
        "synthesis.bns_form": "var_mean",
        "synthesis.augment": "flip_shift",
        "quant.act_points": "inputs",
        "quant.softmax": "log",
        "quant.target": "litert",
        "quant.weight_range": "mse",
        "quant.act_range": "minmax",
        "finetune.optimizer": "adam",
        "finetune.schedule": "step",
        "finetune.lowpass_unit": "bins",
        "finetune.augment": "flip_shift",
        "evaluation.objective": "selection",
        "evaluation.fidelity_measure": "kl_t4",
        "runtime.device": "cpu",
        "runtime.precision": "fp64",
        "runtime.memory_format": "contiguous",
        "runtime.tracker": "wandb",
        "finetune.grad_clip": None,
        "finetune.warmup_epochs": 1.0,
        "finetune.hard_labels": "top2",
        "finetune.cam_method": "cam",
        "finetune.ema_decay": 0.9,
        "synthesis.method": "zeroq",
        "synthesis.swing_conv": True,
        "quant.learned_steps": "activations",
        "quant.rounding": "nearest",
        "synthesis.start": "white",
        "synthesis.shift_color": True,
        "synthesis.prior_weight": 0.5,
        **{f"synthesis.{name}": 0.5 for name in STRUCTURE_WEIGHTS},
        "evaluation.resize_size": 256,
        "evaluation.interpolation": "bicubic",
    }
    if key in special:
        return special[key]
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + 1
    if isinstance(value, float):
        return value / 2 if value else 0.25
    return "other.pth" if key == "teacher.weights" else "/elsewhere"


@pytest.mark.parametrize("key", [key for key in dotted_keys(RunConfig) if key not in ("teacher.mean", "teacher.std")])
def test_the_digest_counts_exactly_what_decides_the_result(key: str) -> None:
    base = with_overrides(EVERYTHING_ON, NEEDED.get(key, {}))
    value = config_to_dict(base)
    for part in key.split("."):
        value = value[part]
    changed = with_overrides(base, {key: _another_value(key, value)})
    assert changed != base
    assert (config_digest(changed) == config_digest(base)) == (key in DECIDES_NOTHING)


@pytest.mark.parametrize(
    ("off", "inactive"),
    [
        ({"quant.rounding": "nearest"}, {"reconstruction.iterations": 7, "reconstruction.drop_prob": 0.1}),
        ({"quant.last_bits": None}, {"quant.last_bits_for_input": False}),
        ({"quant.learned_steps": "none"}, {"finetune.step_lr_factor": 3.0}),
        ({"finetune.own_weight": 0.0}, {"finetune.own_term": "other:term"}),
        ({"finetune.perturb_weight": 0.0}, {"finetune.perturb_size": 0.5}),
        ({"finetune.cam_weight": 0.0}, {"finetune.cam_method": "cam"}),
        ({"finetune.ce_weight": 0.0}, {"finetune.hard_labels": "top2"}),
        ({"quant.target": "litert", "quant.first_bits": None}, {"quant.first_bits": 8}),
    ],
    ids=str,
)
def test_settings_of_what_is_off_do_not_count(off: dict[str, object], inactive: dict[str, object]) -> None:
    without = with_overrides(EVERYTHING_ON, off)
    assert config_digest(with_overrides(without, inactive)) == config_digest(without)
    assert config_digest(with_overrides(EVERYTHING_ON, inactive)) != config_digest(EVERYTHING_ON)


def test_the_digest_is_fixed_for_ever_and_knows_repetitions() -> None:
    # A change here orphans every finished run of every user: raise DIGEST_FORMAT knowingly.
    changed = {"augment": "flip_shift", "start": "white", "iterations": 200, "lr": 0.5}
    settings: dict[str, object] = {f"synthesis.{name}": value for name, value in changed.items()}
    plain = with_overrides(RunConfig(), settings | {"finetune.grad_clip_relative": None})
    assert config_digest(plain) == "b3324b28d275706e"
    repeated = with_overrides(plain, {"seed": 5, "data_seed": 6})
    assert config_digest(repeated) != config_digest(plain)
    assert config_digest(repeated, with_seeds=False) == config_digest(plain, with_seeds=False) != config_digest(plain)


@pytest.mark.parametrize("method", ["inversion", "zeroq", "gdfq", "genie", "gaussian"])
def test_the_start_counts_for_every_method(method: str) -> None:
    """The held-out images are optimized pixels whatever makes the training images, and the objective is measured on
    them.
    """
    base = with_overrides(RunConfig(), {"synthesis.method": method})
    assert config_digest(base) != config_digest(with_overrides(base, {"synthesis.start": "white"}))


def test_a_moved_checkout_keeps_its_digests() -> None:
    def config(folder: str) -> RunConfig:
        return RunConfig(
            teacher=TeacherConfig(spec=f"{folder}/net.py:make", weights=f"{folder}/w.pth"),
            evaluation=EvaluationConfig(dataset=f"imagefolder:{folder}/val/"),
        )

    assert config_digest(config("/a")) == config_digest(config("/b/c"))
    other = dataclasses.replace(config("/a"), teacher=TeacherConfig(spec="/a/net.py:make", weights="/a/v.pth"))
    assert config_digest(other) != config_digest(config("/a"))


def test_students_of_earlier_rules_of_an_engine_have_another_digest(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, research = RunConfig(quant=QuantConfig(target="onnxruntime")), RunConfig()
    now = config_digest(engine), config_digest(research)
    monkeypatch.setattr("synq.config.identity.ENGINE_RULES", 1)
    assert config_digest(engine) != now[0] and config_digest(research) == now[1]
