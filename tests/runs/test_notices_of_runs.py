"""What a run tells its user about its result: poor images at once, fine-tuning that harmed, the drop and its error."""

from pathlib import Path
from typing import Any

import pytest

from support.records import record as made_record
from synq.common.notices import forget_notices, print_notice, was_printed
from synq.common.statistics import drop_of, drop_text
from synq.config.run import RunConfig, SynthesisConfig, with_overrides
from synq.pipeline import run
from synq.runs.record import RunRecord, read_record, run_folder, summary_line
from synq.runs.tuning_effect import effect_sentence, harm_warnings, rounding_warnings, tuning_changes
from synq.sweeps.reports.summary import run_verdict
from synq.synthesis.dataset import SyntheticSet
from synq.synthesis.run_sets import set_warnings
from synq.train import main

POOR = {"synthesis.iterations": 0}


def _set(agreement: float, classes: int = 10) -> SyntheticSet:
    import torch

    manifest = {"agreement": agreement, "num_classes": classes}
    empty = torch.empty(0)
    return SyntheticSet(images=empty, labels=empty, digest="", manifest=manifest, path=Path())


@pytest.mark.parametrize(
    ("changes", "shares", "part"),
    [
        ({}, (0.9, 0.9), ""),
        ({}, (0.0, 0.9), "only 0 % of the synthetic images as their assigned class"),
        ({}, (0.9, 0.3), "only 30 % of the held-out synthetic images"),
        ({"method": "gdfq"}, (0.4, 0.9), "raise `synthesis.iterations` (now 100)"),
        ({"method": "zeroq"}, (0.0, 0.9), ""),
        ({"method": "gaussian"}, (0.0, 0.9), ""),
        ({"method": "gaussian"}, (0.0, 0.2), "held-out"),
        ({"inception_weight": 0.0}, (0.1, 0.1), "`synthesis.inception_weight` 0 no image is made to show it"),
        ({"start": "white"}, (0.2, 0.9), "use `synthesis.start` fitted"),
        ({"schedule": "plateau"}, (0.2, 0.9), "use `synthesis.schedule` cosine"),
    ],
)
def test_m_2_poor_images_are_said_with_what_to_do(
    changes: dict[str, Any], shares: tuple[float, float], part: str
) -> None:
    found = set_warnings(SynthesisConfig(**changes), *map(_set, shares))
    assert (part in found[0]) if part else found == []


def test_m_2_half_of_two_classes_is_chance() -> None:
    assert set_warnings(SynthesisConfig(), _set(0.55, classes=2)) and not set_warnings(SynthesisConfig(), _set(0.8, 2))


def test_m_2_poor_images_are_said_before_anything_is_spent_on_them_and_once(
    config: RunConfig, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from synq import pipeline

    forget_notices()
    config = with_overrides(config, POOR)
    text = "of the synthetic images as their assigned class"

    def spend(*args: Any, **kwargs: Any) -> Any:
        assert text in capsys.readouterr().err
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "prepare_networks", spend)
        with pytest.raises(KeyboardInterrupt):
            run(config)
    run(config)
    assert text not in capsys.readouterr().err, "said in this process already"
    assert any(text in warning for warning in read_record(run_folder(config) / "record.json").warnings)


def test_m_2_the_command_says_it_once(tmp_path: Path, capsys: pytest.CaptureFixture[str], tiny_settings: Any) -> None:
    forget_notices()
    settings = {**tiny_settings, **POOR, "runtime.output_dir": str(tmp_path), "finetune.epochs": 0}
    args = [word for key, value in settings.items() for word in (f"--{key}", str(value).lower())]
    args[args.index("--runtime.output_dir") + 1] = str(tmp_path)
    assert main(args) == 0
    out, err = capsys.readouterr()
    assert err.count("of the synthetic images as their assigned class") == 1
    assert " images)" in out.splitlines()[-1] and " ± " in out.splitlines()[-1] and " s of synthesis" in out


@pytest.mark.parametrize(
    ("before", "after", "worse", "better"),
    [
        ((98.0, 99.0, 0.1), (97.0, 99.0, 0.05), "better by top-1 (98.00 before, 97.00 after),", "the tuned one by KL"),
        ((98.0, 99.0, 0.1), (98.0, 98.0, 0.1), "better by agreement with the teacher", "the tuned one by none"),
        ((98.0, 99.0, 0.1), (99.0, 99.5, 0.3), "better by KL to the teacher", "the tuned one by top-1"),
        ((None, 99.0, 0.1), (None, 90.0, 0.3), "synthetic images (99.0 before, 90.0 after) and KL", "by none"),
        ((98.0, 99.0, 0.1), (98.0, 99.0, 0.1), "", ""),
        ((98.0, 99.0, 0.1), (98.5, 99.5, 0.05), "", ""),
        ((98.0, 100.0, 1e-5), (98.0, 100.0, 2e-5), "", ""),
    ],
)
def test_f_20_fine_tuning_that_harmed_names_who_is_better_by_what(
    before: tuple[float | None, ...], after: tuple[float | None, ...], worse: str, better: str
) -> None:
    fidelity = [{"agreement": values[1], "kl": values[2]} for values in (before, after)]
    changes = tuning_changes(before[0], after[0], *fidelity)
    found = harm_warnings(changes)
    if not worse:
        assert found == []
        return
    assert worse in found[0] and better in found[0] and "`--finetune.epochs 0` keeps the rounded one" in found[0]


def test_f_20_the_report_says_what_each_measure_did() -> None:
    fields: dict[str, Any] = {
        "rtn_top1": 98.87,
        "top1": 98.71,
        "rtn_fidelity": {"kl": 0.1, "agreement": 99.6},
        "fidelity": {"kl": 0.03, "agreement": 99.6},
        "loss_history": [{"loss": 1.0}],
    }
    sentence = effect_sentence(made_record(**fields))
    assert sentence == (
        "Fine-tuning improved KL to the teacher on held-out synthetic images (0.1 before, 0.03 after), made worse "
        "top-1 (98.87 before, 98.71 after) and did not change agreement with the teacher on held-out synthetic images "
        "(99.6 before, 99.6 after)."
    )
    assert sentence in run_verdict(made_record(**fields))
    assert effect_sentence(made_record(**{**fields, "loss_history": []})) == "", "nothing was tuned"


@pytest.mark.parametrize(
    ("drop", "stderr", "text"),
    [
        (1.08, 0.35, "drop 1.08 ± 0.35"),
        (-0.5, None, "gain 0.50"),
        (-0.5, 0.2, "gain 0.50 ± 0.20"),
        (0.0, 0.0, "drop 0.00 ± 0.00"),
        (-0.001, None, "drop 0.00"),
        (-1.4e-14, None, "drop 0.00"),
    ],
)
def test_f_13_a_negative_drop_is_a_gain_and_no_zero_has_a_sign(drop: float, stderr: float | None, text: str) -> None:
    assert drop_text(drop, stderr) == text


def test_f_13_a_report_speaks_of_a_gain() -> None:
    better = made_record(top1=92.5, drop=-0.5, lost=1, gained=2)
    assert "a gain of 0.50 percentage points ± " in " ".join(run_verdict(better))


def test_m_8_the_summary_has_the_standard_error_and_the_number_of_images() -> None:
    measured = made_record(lost=6, gained=4, num_eval=100, drop=2.0)
    assert "| drop 2.00 ± 3.16 (100 images) |" in summary_line(measured)
    assert summary_line(made_record()).endswith("| drop 2.00 (100 images) | 10 s")


def test_m_7_the_seconds_of_the_sets_are_apart() -> None:
    made = made_record(seconds={"synthesis": 4.0, "finetune": 6.0}, set_seconds=4.1)
    stored = made_record(seconds={"synthesis": 0.0, "finetune": 6.0}, total_seconds=6.0, set_seconds=4.1)
    assert made.seconds_without_sets == stored.seconds_without_sets == 6.0
    assert [summary_line(item).rpartition(" | ")[2] for item in (made, stored)] == ["6 s + 4 s of synthesis"] * 2
    assert RunRecord().seconds_without_sets is None


def test_m_2_a_notice_is_one_line_of_the_main_process(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    forget_notices()
    monkeypatch.setenv("RANK", "1")
    print_notice("one\n two")
    assert capsys.readouterr().err == "" and not was_printed("one two")
    monkeypatch.setenv("RANK", "0")
    for text in ("one\n two", "one two"):
        print_notice(text)
    assert capsys.readouterr().err == "synq: one two\n" and was_printed("one\n two")


def test_f_19_a_student_of_8_bits_that_disagrees_is_suspect() -> None:
    (text,) = rounding_warnings(8, {"agreement": 84.4})
    assert "on only 84.4 %" in text and "`quant.act_range`" in text
    assert rounding_warnings(8, {"agreement": 98.4}) == [] == rounding_warnings(8, {"agreement": None})
    assert rounding_warnings(4, {"agreement": 50.0}) == [], "fewer bits explain it"


def test_f_19_it_is_said_before_fine_tuning_and_recorded(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    said: list[str] = []
    monkeypatch.setattr("synq.runs.tuning_effect.MIN_AGREEMENT_AT_8_BITS", 101.0)
    monkeypatch.setattr("synq.pipeline._finetune", lambda *_: said.append(capsys.readouterr().err) or [])
    settings = {"quant.weight_bits": 8, "quant.act_bits": 8, "quant.first_bits": None}
    record = run(with_overrides(config, settings))
    assert "so many bits cannot explain" in said[0]
    assert sum("so many bits cannot explain" in text for text in record.warnings) == 1
    narrow = run(with_overrides(config, {**settings, "quant.layer_weight_bits": {"linear": 4}}))
    assert not any("so many bits" in text for text in narrow.warnings)


def test_f_13_a_drop_of_nothing_is_zero_to_the_last_bit() -> None:
    assert (drop_of(1, 1, 620), drop_of(2, 1, 620)) == (0.0, 100 / 620)
    assert drop_of(None, None, None) is None
    assert drop_of(2, 1, 620) + drop_of(1, 2, 620) == 0.0, "nor is the mean over seeds 7e-15"  # type: ignore[operator]
