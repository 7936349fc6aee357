"""A warning about the difficulty threshold is for those who can do something about it."""

from dataclasses import asdict

from synq.config.run import FinetuneConfig
from synq.runs.lifecycle import _mask_warnings

SETTINGS = asdict(FinetuneConfig())


def test_the_default_threshold_is_no_reason_for_a_warning() -> None:
    easy = [{"kept": 1.0}]
    assert _mask_warnings(SETTINGS, easy) == []
    (text,) = _mask_warnings({**SETTINGS, "difficulty_threshold": 0.6}, easy)
    assert text.startswith("difficulty_threshold 0.6 has no effect: 100.0 %")


def test_hard_labels_that_are_off_are_worth_one() -> None:
    (text,) = _mask_warnings(SETTINGS, [{"kept": 0.0}])
    assert "switches hard labels off" in text
    assert _mask_warnings({**SETTINGS, "ce_weight": 0.0}, [{"kept": 0.0}]) == []
