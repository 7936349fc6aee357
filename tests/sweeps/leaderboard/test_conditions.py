"""Which rows a condition chooses, and which conditions are refused."""

from pathlib import Path

import pytest

from support.records import bits, folder_of, record
from synq.commands.leaderboard import main
from synq.sweeps.leaderboard.records import Tables
from synq.sweeps.leaderboard.views import choose, parse_condition

CHOICES = [record(0.1 + 0.2, overrides=bits(4)), record(0.5, overrides=bits(3), model="b net")]
CHOICES += [
    record(0.7, overrides=bits(3, finetune__lowpass_cutoff=None), model="b net", top1=None, drop=None),
    record(0.9, overrides=bits(8, quant__first_bits=6), teacher_top1=88.5),
]


@pytest.mark.parametrize(
    ("condition", "values"),
    [
        ("weight_bits=4", {0.3}),
        ("weight-bits = 4.0", {0.3}),
        ("weight_bits!=4", {0.5, 0.7, 0.9}),
        ("weight_bits<4", {0.5, 0.7}),
        ("weight_bits<=4", {0.3, 0.5, 0.7}),
        ("weight_bits>4", {0.9}),
        ("weight_bits>=4", {0.3, 0.9}),
        ("objective_value=0.3", {0.3}),  # 0.1 + 0.2 stands as 0.3 in the table
        ("objective_value<=0.3", {0.3}),
        ("objective_value<0.3", set()),
        ("drop>-2", {0.3, 0.5, 0.9}),  # an empty cell is on neither side
        ("drop<=2", {0.3, 0.5, 0.9}),
        ("drop!=2", {0.7, 0.9}),
        ("drop=", {0.7}),
        ("first_bits=", {0.3, 0.5, 0.7}),
        ("first_bits!=", {0.9}),
        ("model=b net", {0.5, 0.7}),
        ("model!=b net", {0.3, 0.9}),
        ("protocol=B", {0.9}),
        ("lowpass_cutoff=None", {0.7}),
        ("lowpass_cutoff!=None", {0.3, 0.5, 0.9}),
        ("lowpass_cutoff>=16", {0.3, 0.5, 0.9}),
    ],
)
def test_a_condition_reads_numbers_as_numbers_and_texts_as_texts(condition: str, values: set[float]) -> None:
    chosen = choose(Tables(CHOICES).standings(), [parse_condition(condition)])
    assert {round(standing.row["objective_value"], 6) for standing in chosen} == values


@pytest.mark.parametrize(
    ("condition", "part"),
    [
        ("weigth_bits=4", "did you mean `weight_bits`?"),
        ("top1=90", "did you mean `top1_"),
        ("weight_bits", "COLUMN, one of"),
        ("weight_bits~4", "COLUMN, one of"),
        ("=4", "COLUMN, one of"),
        ("weight_bits=four", "weight_bits with a number"),
        ("lr<nan", "lr with a number"),
        ("drop<", "the texts of drop by = or !="),
        ("model<b", "the texts of model by = or !="),
        ("lowpass_cutoff<None", "the texts of lowpass_cutoff by = or !="),
        ("model=b nett", "did you mean `b net`?"),
        ("weight_bits=5", "holds for none of 4"),
    ],
)
def test_a_bad_condition_is_refused_by_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], condition: str, part: str
) -> None:
    path = folder_of(tmp_path / "a", CHOICES)
    assert main([path, "--where", condition, "--output-dir", str(tmp_path / "out")]) == 2
    out, err = capsys.readouterr()
    assert err.startswith("synq: error: `where` must") and part in err and err.count("\n") == 1 and out == ""
    assert not (tmp_path / "out").exists() and not list((tmp_path / "a").glob("*.csv"))


def test_conditions_that_only_together_leave_nothing_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = folder_of(tmp_path / "a", CHOICES)
    assert main([path, "--where", "weight_bits=4", "--where", "model=b net"]) == 2
    assert "of which none of 4 rows satisfies all" in capsys.readouterr().err
