"""The agreement expected on real images: an interval, a warning where it is low, and silence only where it is high."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from synq.config.run import RunConfig, with_overrides
from synq.export.card import card_values
from synq.export.card_text import card_markdown
from synq.pipeline import run
from synq.runs import expected_agreement as module
from synq.runs.expected_agreement import HeldOut, agreement_line, doubts, expected_agreement
from synq.runs.record import RunRecord, read_record, run_folder
from synq.train import main

USUAL = HeldOut(images=256, classes=10, side=32, shown=0.95)


def _field(before: float, after: float, heldout: HeldOut = USUAL, confidence: float = 75.0) -> dict[str, Any]:
    rtn, final = ({"agreement": value, "kl": 0.1, "confidence": confidence} for value in (before, after))
    return expected_agreement(rtn, final, heldout, 2, min(100.0, after + 10))


def test_prediction_by_hand() -> None:
    agreed, sure = (math.log((p * 512 + 0.5) / ((1 - p) * 512 + 0.5)) for p in (0.9, 0.7))
    line, predict = module.CALIBRATION, module.CALIBRATION.predict
    middle = line.intercept + line.slope * agreed + line.confidence_slope * sure
    value, low, high = predict(90.0, 99.0, 70.0, 512)
    assert value == pytest.approx(100 / (1 + math.exp(-middle)))
    assert 0 < low < value < high < 100
    assert predict(100.0, 100.0, 70.0, 512)[0] < 100, "no image of 512 is no proof"
    values = [predict(agreement, agreement, 70.0, 512) for agreement in (0.0, 10.0, 50.0, 80.0, 99.0, 100.0)]
    assert values == sorted(values)
    assert predict(80.0, 99.0, 80.0, 512) > predict(80.0, 99.0, 60.0, 512), "certain of blends: certain of real images"
    assert predict(10.0, 90.0, 70.0, 512)[1] == 0.0, "a collapsed student has no lower bound"
    assert predict(60.0, 12.0, 70.0, 512)[:2] == (12.0, 0.0), "nor one that fails on the held-out images"


def test_a_good_student_has_no_warning_and_an_interval() -> None:
    field = _field(95.0, 98.0)
    assert doubts(field) == []
    assert agreement_line(field).startswith("expected agreement with the teacher on real images: ")
    assert f"({field['low']:.0f} to {field['high']:.0f}; calibrated on {module.NETWORKS} networks" in agreement_line(
        field
    )


def test_a_destroyed_student_is_poor_and_worse_than_the_rounded_one() -> None:
    poor, worse = doubts(_field(97.0, 12.0))
    assert "the student is poor" in poor and "`synq mixed-precision`" in poor
    assert "worse" in worse and "12.0 %" in worse and "97.0 %" in worse and "`--finetune.epochs 0`" in worse


def test_a_difference_of_one_image_is_no_harm() -> None:
    few = replace(USUAL, images=16)
    assert not any("worse" in text for text in doubts(_field(100.0, 93.8, few)))
    assert any("worse" in text for text in doubts(_field(100.0, 50.0, few)))


def test_a_student_slightly_worse_than_the_rounded_one_is_named_where_neither_is_poor() -> None:
    (worse,) = doubts(_field(99.0, 99.0 - module.MIN_LOSS - 0.1))
    assert "the rounded student for 99.0 %" in worse
    assert doubts(_field(99.0, 99.0 - module.MIN_LOSS + 0.1)) == []


@pytest.mark.parametrize(
    ("heldout", "reason"),
    [
        (replace(USUAL, images=63), "there are 63 held-out images and it takes"),
        (replace(USUAL, classes=1000), "calibrated up to 100 classes, and the teacher has 1000"),
        (replace(USUAL, side=224), "images of 32 pixels, and the teacher's have 224"),
        (replace(USUAL, shown=0.2), "the teacher classifies only 20 %"),
    ],
)
def test_outside_the_calibration_it_cannot_be_estimated(heldout: HeldOut, reason: str) -> None:
    field = _field(97.0, 97.0, heldout)
    assert field["value"] is None and doubts(field) == []
    assert "cannot be estimated: " in agreement_line(field) and reason in agreement_line(field)
    assert any("worse" in text for text in doubts(_field(97.0, 12.0, heldout))), "the comparison needs no calibration"


@pytest.mark.parametrize("confidence", [module.MIN_CONFIDENCE - 1, module.MAX_CONFIDENCE + 1])
def test_a_teacher_unlike_those_of_the_calibration_is_not_judged(confidence: float) -> None:
    assert "is outside the calibration's" in agreement_line(_field(97.0, 97.0, confidence=confidence))


def test_logits_that_are_not_finite_are_no_agreement() -> None:
    final = {"agreement": 10.0, "kl": math.nan, "confidence": 75.0}
    field = expected_agreement({"agreement": 97.0, "kl": 0.1, "confidence": 75.0}, final, USUAL, 2, 10.0)
    assert "cannot be estimated: the student has no finite logits" in agreement_line(field)


def test_a_record_of_before_has_none() -> None:
    assert "the run did not measure it" in agreement_line(RunRecord().expected_agreement)
    assert doubts({}) == []


def test_a_run_records_it_and_changes_nothing_else(config: RunConfig, tmp_path: Path) -> None:
    record = run(config)
    field = read_record(run_folder(config) / "record.json").expected_agreement
    assert field == record.expected_agreement and field["heldout"]["images"] == 16
    assert 0 <= field["views"]["agreement"] <= 100 and field["rtn_views"]["kl"] >= 0
    assert "it takes 64" in agreement_line(field), "16 held-out images prove nothing"


def test_the_command_and_the_card_print_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], tiny_settings: dict[str, Any]
) -> None:
    """A student whose fine-tuning destroyed it: 256 held-out images, the settings of no use otherwise."""
    broken = {"finetune.lr": 5.0, "finetune.grad_clip": "none", "finetune.grad_clip_relative": "none"}
    settings = {**tiny_settings, **broken, "evaluation.heldout_images": 256, "quant.weight_bits": 8}
    settings |= {"quant.act_bits": 8, "runtime.output_dir": tmp_path, "synthesis.iterations": 30}
    args = [part for key, value in settings.items() for part in (f"--{key}", str(value))]
    assert main([arg.lower() if arg in ("True", "False") else arg for arg in args]) == 0
    out, err = capsys.readouterr()
    assert err.splitlines()[-2].startswith("synq: expected agreement with the teacher on real images: ")
    assert len(out.splitlines()) == 1
    assert "warning: the student is poor" in err and "probably made the student worse" in err
    (folder,) = (path.parent for path in tmp_path.glob("*/record.json"))
    record = read_record(folder / "record.json")
    deployed = {"float_bytes": 1.0, "bitops": 1.0, "files": [], "float_norms": 0, "exact": True}
    deployed |= {"tolerance": {"margin": 0, "agreement": 99, "mean_difference": 0.05}}
    deployed |= {"machine": {"versions": {}, "cpu": "x", "threads": 1}}
    card = card_markdown(card_values(replace(record, deployment=deployed), [record]))
    assert "- **expected**: expected agreement with the teacher on real images" in card
    assert "**Warning**: the student is poor" in card


def test_measuring_it_changes_neither_student_nor_objective_nor_digest(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for name in ("with", "without"):
        if name == "without":
            monkeypatch.setattr("synq.evaluation.measure.HarderViews", lambda images, labels: None)
        there = with_overrides(config, {"runtime.output_dir": str(tmp_path / name)})
        record = run(there)
        student = (run_folder(there) / "student.safetensors").read_bytes()
        found.append((student, record.config_digest, record.objective_value, record.fidelity, record.top1))
        assert bool(record.expected_agreement["views"]) == (name == "with")
    assert found[0] == found[1]


@pytest.mark.parametrize("agreement, plain", [(98.0, None), (math.nan, 98.0), (98.0, math.nan)])
def test_what_was_not_measured_has_a_reason(agreement: float, plain: float | None) -> None:
    final = {"agreement": agreement, "kl": 0.1, "confidence": 75.0}
    field = expected_agreement({"agreement": 97.0, "kl": 0.1, "confidence": 75.0}, final, USUAL, 2, plain)
    assert field["value"] is None and agreement_line(field).endswith(
        "cannot be estimated: the student has no finite logits"
    )
