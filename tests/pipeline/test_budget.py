"""The budget that a quality chooses: more images the more rounding alone loses, within a time limit, and on record."""

import itertools
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from accelerate import Accelerator
from torch import fx, nn

import synq
from synq import train
from synq.api.settings import planned_keys_of
from synq.budget import Budget, _learned_rounding, _wants_it, budgeted, plan_budget
from synq.common.digests import write_sealed_json
from synq.config.budget import (
    BLEND_KEY,
    BLENDED_ABOVE,
    BUDGET_KEYS,
    LADDER,
    PLANNED_KEYS,
    RANGE_KEY,
    ROUNDING_KEY,
    planned_keys,
)
from synq.config.quant import WEIGHT_RANGES
from synq.config.run import RunConfig, with_overrides
from synq.quant import student as quant_student
from synq.teacher.teacher import Teacher, load_teacher

FAST = {"synthesis.iterations": 4, "evaluation.heldout_images": 16}
"""Kept as they are, so that the probe takes less than a second."""


@pytest.fixture(scope="module")
def teacher() -> Teacher:
    return load_teacher(RunConfig().teacher)


@pytest.fixture
def base(tmp_path: Any) -> RunConfig:
    return with_overrides(
        RunConfig(),
        {
            **FAST,
            "synthesis.start": "white",
            "runtime.output_dir": str(tmp_path),
            "runtime.progress": False,
            "evaluation.dataset": "none",
        },
    )


def planned(
    base: RunConfig, teacher: Teacher, accelerator: Accelerator, bits: int, quality: str, **more: Any
) -> Budget:
    config = with_overrides(base, {"quant.weight_bits": bits, "quant.act_bits": bits})
    return plan_budget(config, quality, given=FAST, accelerator=accelerator, teacher=teacher, **more)


def test_the_ladder_rises() -> None:
    for below, above in itertools.pairwise(LADDER):
        assert below.num_images <= above.num_images and below.iterations <= above.iterations
        assert below.num_images * below.epochs < above.num_images * above.epochs
        assert below.enough_for <= above.enough_for and below.num_images >= below.batch_size


def test_fewer_bits_get_more_images(base: RunConfig, teacher: Teacher, accelerator: Accelerator) -> None:
    high, low = (planned(base, teacher, accelerator, bits, "standard") for bits in (8, 2))
    assert high.rounded_kl < 0.01 < 1 < low.rounded_kl
    assert high.rung == 0 and high.config.synthesis.num_images == LADDER[0].num_images
    assert low.rung > 1 and low.config.synthesis.num_images == LADDER[low.rung].num_images
    assert low.config.finetune.epochs == LADDER[low.rung].epochs and not low.shortened
    assert low.config.synthesis.iterations == 4, "what was given is kept"
    assert planned(base, teacher, accelerator, 2, "standard") == low, "the same settings choose the same"


def test_the_student_is_built_once_to_check_and_to_choose(
    base: RunConfig, teacher: Teacher, accelerator: Accelerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, build = [], quant_student.quantize_model

    def counted(*given: Any, **named: Any) -> quant_student.Student:
        calls.append(given)
        return build(*given, **named)

    monkeypatch.setattr(quant_student, "quantize_model", counted)
    planned(base, teacher, accelerator, 8, "standard")
    assert len(calls) == 1


def test_a_quality_is_some_rungs_up_or_down(base: RunConfig, teacher: Teacher, accelerator: Accelerator) -> None:
    draft, standard, best = (planned(base, teacher, accelerator, 3, name) for name in ("draft", "standard", "best"))
    assert draft.rung == standard.rung - 1 and best.rung == standard.rung + 1
    assert (
        f"so {best.config.synthesis.num_images} images x 4 iterations" in best.line() and "quality best" in best.line()
    )


def test_what_loses_more_gets_learned_rounding_unless_a_rounding_was_given(
    base: RunConfig, teacher: Teacher, accelerator: Accelerator
) -> None:
    high, draft, low = (
        planned(base, teacher, accelerator, bits, name)
        for bits, name in ((8, "standard"), (2, "draft"), (2, "standard"))
    )
    assert high.config.protocol == draft.config.protocol == "A"
    assert planned(base, teacher, accelerator, 3, "standard").config.protocol == "A", "a ResNet at 3 bits gains nothing"
    assert low.config.protocol == "B" and low.config.reconstruction.iterations == LADDER[low.rung].rounding_steps
    assert "learned rounding (protocol B; `--quant.rounding nearest` leaves it out)" in low.line()
    assert "learned rounding" not in draft.line()
    config = with_overrides(base, {"quant.weight_bits": 2, "quant.act_bits": 2})
    kept = plan_budget(config, given={*FAST, ROUNDING_KEY}, accelerator=accelerator, teacher=teacher)
    assert kept.config.protocol == "A" and kept.rung == low.rung and "learned" not in kept.line()


def test_many_epochs_get_blended_batches_where_much_was_lost(
    base: RunConfig, teacher: Teacher, accelerator: Accelerator
) -> None:
    found = {
        (bits, name): planned(base, teacher, accelerator, bits, name)
        for bits, name in ((2, "best"), (2, "standard"), (4, "best"))
    }
    assert found[2, "best"].rounded_kl > BLENDED_ABOVE > found[4, "best"].rounded_kl
    assert {key for key, budget in found.items() if budget.config.finetune.augment == "mixup"} == {(2, "best")}
    blended = {key for key, budget in found.items() if "`--finetune.augment none` leaves that out" in budget.line()}
    assert blended == {(2, "best")}
    config = with_overrides(base, {"quant.weight_bits": 2, "quant.act_bits": 2})
    kept = plan_budget(config, "best", given={*FAST, BLEND_KEY}, accelerator=accelerator, teacher=teacher)
    assert kept.config.finetune.augment == "none" and "blended" not in kept.line()


def test_a_kl_that_is_not_finite_is_resumed(
    base: RunConfig, teacher: Teacher, accelerator: Accelerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("synq.budget.fidelity", lambda *_, **__: {"kl": math.nan})
    first, again = (planned(base, teacher, accelerator, 2, "best") for _ in range(2))
    assert first == again and first.rounded_kl == math.inf and first.line() == again.line()


def test_the_weights_get_the_range_that_loses_less(base: RunConfig, teacher: Teacher, accelerator: Accelerator) -> None:
    config = with_overrides(base, {"quant.weight_bits": 2, "quant.act_bits": 8})
    found = plan_budget(config, "draft", given=FAST, accelerator=accelerator, teacher=teacher)
    losses = {}
    for name in WEIGHT_RANGES:
        given = with_overrides(config, {RANGE_KEY: name})
        one = plan_budget(given, "draft", given={*FAST, RANGE_KEY}, accelerator=accelerator, teacher=teacher)
        assert one.weight_range == one.config.quant.weight_range == name
        losses[name] = one.rounded_kl
    assert found.weight_range == found.config.quant.weight_range == min(losses, key=losses.__getitem__)
    assert found.rounded_kl == min(losses.values()) < max(losses.values())


def test_depthwise_convolutions_get_learned_rounding_at_any_bits(teacher: Teacher) -> None:
    config = with_overrides(RunConfig(), {"quant.weight_bits": 4})
    plain = nn.Sequential(nn.Conv2d(1, 8, 3), nn.Conv2d(8, 8, 3, groups=2), nn.Conv2d(1, 4, 3, groups=1))
    depthwise = nn.Sequential(nn.Conv2d(1, 8, 3), nn.Conv2d(8, 8, 3, groups=8))
    found = [
        _wants_it(config, LADDER[-1], replace(teacher, graph=fx.symbolic_trace(net))) for net in (plain, depthwise)
    ]
    assert found == [False, True]
    assert not _wants_it(config, LADDER[0], replace(teacher, graph=fx.symbolic_trace(depthwise)))


def test_images_of_learned_rounding_fit_the_memory_of_large_inputs(teacher: Teacher) -> None:
    for side, images in ((28, 1024), (32, 1024), (64, 256), (224, 64)):
        at = replace(teacher, input_size=(3, side, side))
        assert _learned_rounding(LADDER[-1], at)["reconstruction.images"] == images


def test_a_time_limit_takes_a_lower_rung(base: RunConfig, teacher: Teacher, accelerator: Accelerator) -> None:
    from synq.quant.student import build_student
    from synq.runs.forecast import estimate, probe

    config = with_overrides(base, {"quant.weight_bits": 2, "quant.act_bits": 2})
    student = build_student(teacher, config.quant)
    costs = probe(config, teacher, student, accelerator)
    least = with_overrides(config, {"synthesis.num_images": LADDER[1].num_images})
    minutes = estimate(least, teacher, student, 0, accelerator, costs).seconds / 60
    found = planned(base, teacher, accelerator, 2, "best", max_minutes=2 * minutes)
    assert found.shortened and found.rung < len(LADDER) - 1 and "time limit" in found.line()
    with pytest.raises(
        ValueError, match=r"`max_minutes` must leave time for the smallest budget, about .*, but got 1e-"
    ):
        planned(base, teacher, accelerator, 2, "best", max_minutes=1e-9)


def test_a_batch_is_no_larger_than_the_images_that_were_given(
    base: RunConfig, teacher: Teacher, accelerator: Accelerator
) -> None:
    config = with_overrides(base, {"synthesis.num_images": 8, "finetune.batch_size": 8})
    given = {*FAST, "synthesis.num_images"}
    found = plan_budget(config, "best", given=given, accelerator=accelerator, teacher=teacher).config
    assert (found.synthesis.num_images, found.finetune.batch_size) == (8, 8)


@pytest.mark.parametrize(
    ("tables", "keys"),
    [
        ([{"finetune.lr": 0.1}, {"synthesis": {"lr": 0.1}}], set()),
        ([{"finetune.epochs": 0}, {"synthesis": {"num_images": 8}}], {"finetune.epochs", "synthesis.num_images"}),
        ([{"evaluation": {"heldout_images": 16}, "name": "a"}], {"evaluation.heldout_images"}),
        ([{"quant": {"rounding": "nearest"}}, {"quant.weight_range": "mse"}], {RANGE_KEY, ROUNDING_KEY}),
    ],
)
def test_which_settings_are_of_the_budget(tables: list[Mapping[str, Any]], keys: set[str]) -> None:
    assert planned_keys(*tables) == keys


def test_settings_that_were_given_are_no_budget_unless_a_quality_is(base: RunConfig) -> None:
    assert budgeted(base, None, None, set(BUDGET_KEYS)) == (base, {})
    assert budgeted(base, None, None, {ROUNDING_KEY, "finetune.epochs"}) == (base, {})


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--quality", "good"], "`quality` must be one of draft, standard, best, but got 'good'"),
        (["--max-minutes", "0"], "`max_minutes` must be a finite number > 0, but got 0"),
        (["--max-minutes", "soon"], "`max-minutes` must be a number, but got 'soon'"),
    ],
)
def test_bad_input(words: list[str], message: str, tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main([*words, "--runtime.output_dir", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err and not list(tmp_path.rglob("record.json"))


def test_a_run_records_its_budget(tmp_path: Any) -> None:
    config = {**FAST, "synthesis.start": "white", "finetune.epochs": 1, "evaluation.num_images": 64}
    place: dict[str, Any] = {"output_dir": tmp_path, "progress": False}
    run = synq.quantize(None, 8, 8, config=config, quality="draft", target="research", **place)
    assert run.record.budget["quality"] == "draft" and run.record.budget["rung"] == 0
    assert run.config.synthesis.num_images == LADDER[0].num_images and run.config.synthesis.iterations == 4
    again = synq.quantize(config=replace(run.config, name="again"), **place)
    assert again.record.budget == {} and again.record.set_digest == run.record.set_digest


def test_the_same_command_keeps_its_choice(base: RunConfig, teacher: Teacher, accelerator: Accelerator) -> None:
    """Under a time limit, images that are there already would allow a higher rung, and so another run."""
    found = planned(base, teacher, accelerator, 2, "best", max_minutes=600)
    (file,) = (Path(base.runtime.output_dir) / "budgets").glob("*.json")
    write_sealed_json(file, {**found.values(), "rung": 1})
    assert planned(base, teacher, accelerator, 2, "best", max_minutes=600).rung == 1
    file.write_text("{")
    assert planned(base, teacher, accelerator, 2, "best", max_minutes=600) == found, "a damaged file is made again"


def test_a_batch_that_was_given_excludes_smaller_sets(
    base: RunConfig, teacher: Teacher, accelerator: Accelerator
) -> None:
    config = with_overrides(base, {"quant.weight_bits": 8, "quant.act_bits": 8, "finetune.batch_size": 256})
    given = {*FAST, "finetune.batch_size"}
    found = plan_budget(config, "draft", given=given, accelerator=accelerator, teacher=teacher)
    assert found.config.finetune.batch_size == 256 <= found.config.synthesis.num_images


def test_fp64_has_a_budget_too(base: RunConfig, teacher: Teacher, accelerator: Accelerator) -> None:
    config = with_overrides(base, {"runtime.precision": "fp64"})
    found = plan_budget(config, given=FAST, accelerator=accelerator, teacher=teacher)
    assert 0 < found.rounded_kl < 10


def test_own_images_that_are_absent_are_rejected_before_any_is_made(
    base: RunConfig, teacher: Teacher, accelerator: Accelerator, tmp_path: Path
) -> None:
    config = with_overrides(base, {"synthesis.method": "own_images", "synthesis.source": f"folder:{tmp_path / 'no'}"})
    with pytest.raises((ValueError, OSError), match="no"):
        plan_budget(config, given=FAST, accelerator=accelerator, teacher=teacher)
    assert not (Path(base.runtime.output_dir) / "store").exists()


def test_a_run_config_keeps_its_rounding_when_a_quality_is_asked_for() -> None:
    config = with_overrides(
        RunConfig(), {"quant.weight_range": "mse", "finetune.augment": "mixup", "finetune.epochs": 2}
    )
    assert planned_keys_of(config, {}, "best") == {RANGE_KEY, BLEND_KEY}


def test_a_run_config_has_every_number_unless_a_quality_is_asked_for() -> None:
    assert planned_keys_of(RunConfig(), {}) == set(PLANNED_KEYS)
    assert planned_keys_of(RunConfig(), {"finetune.epochs": 2, "synthesis.num_images": None}, "best") == {
        "finetune.epochs"
    }
