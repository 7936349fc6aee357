"""Unknown keys of a spec and unknown columns: the message names the most similar ones, or all that are known."""

from typing import Any

import pytest

from support.records import record
from synq.sweeps.leaderboard import ranking
from synq.sweeps.leaderboard.views import check_column, parse_condition
from synq.sweeps.spec_file import spec_from_dict


@pytest.mark.parametrize(
    ("keys", "hint"),
    [
        ({"epochs": 3}, "did you mean `base.finetune.epochs`"),
        ({"num_trial": 3}, "did you mean `num_trials`?"),
        ({"base": {"finetune": {"zzz": 1}}}, "known are finetune."),
        ({"base": {"fintune": {"lr": 1}}}, "did you mean `finetune`?"),
        ({"space": {"lr": {"type": "choice", "values": [1]}}}, "did you mean `finetune.lr`?"),
        ({"space": {"zzz": {"type": "choice", "values": [1]}}}, "known are"),
        ({"space": {"finetune.lr": {"typ": "choice"}}}, "did you mean `type`?"),
        ({"space": {"finetune.lr": {"type": "choice", "zzz": 1}}}, "known are type, low, high, log, step"),
        ({"points": [{"finetune.zzzz": 1}], "sampler": "points"}, "known are finetune."),
    ],
)
def test_f_16_unknown_keys_of_a_spec_are_told_known_ones(keys: dict[str, Any], hint: str) -> None:
    with pytest.raises(ValueError, match="must") as caught:
        spec_from_dict({"name": "s", **keys})
    assert hint in str(caught.value)


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("weight_bit=4", "did you mean `weight_bits`?"),
        ("zzz=4", "known are rank, model"),
        ("top1>=3", "did you mean `top1_mean` or `top1_std`?"),
        ("objectiv=synthetic", "did you mean `objective`?"),
        ("droop<3", "did you mean `drop`?"),
    ],
)
def test_f_16_unknown_columns_are_told_known_ones(text: str, hint: str) -> None:
    with pytest.raises(ValueError, match="must") as caught:
        parse_condition(text)
    assert hint in str(caught.value)
    with pytest.raises(ValueError, match="`columns` must name columns"):
        check_column("columns", "zzz")


def test_f_16_a_column_that_nothing_fills_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TRIAL_COLUMNS", "LEADERBOARD_COLUMNS"):
        with monkeypatch.context() as patch:
            patch.setattr(ranking, name, (*getattr(ranking, name), "objectve_value"))
            with pytest.raises(KeyError, match="objectve_value"):
                ranking.standings([ranking.read_run(record())])
    assert len(ranking.standings([ranking.read_run(record())])) == 1
