"""The leaderboard's command: rows chosen, ranked together, compared, merged and printed."""

import csv
import io
import math
import random
import statistics
import sys
from collections.abc import Callable
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest

from support.records import bits, folder_of, markdown_cells, record, table
from synq.commands.leaderboard import main
from synq.runs.record import RunRecord
from synq.sweeps.leaderboard.columns import COMPARE_COLUMNS, LEADERBOARD_COLUMNS
from synq.sweeps.leaderboard.records import write_tables


@pytest.fixture
def sweeps(tmp_path: Path) -> tuple[str, str]:
    """Two sweeps of two bit-widths: three seeds, two settings."""
    draw = random.Random(0)
    paths = []
    for name, started in (("before", "2026-01-01T00:00:00+00:00"), ("after", "2026-01-02T00:00:00+00:00")):
        runs = [
            record(
                draw.random(),
                seed=seed,
                overrides=bits(width, finetune__cam_weight=weight),
                top1=80 + 10 * draw.random(),
                size_bytes=100 * width,
                bitops=100 * width**2,
                started=started,
            )
            for width in (3, 4)
            for weight in (0.0, 20.0)
            for seed in (0, 1, 2)
        ]
        paths.append(folder_of(tmp_path / name, runs))
    return paths[0], paths[1]


def test_chosen_rows_are_printed_and_keep_their_rank(
    sweeps: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([sweeps[0], "--where", "weight_bits=3", "--where", "cam_weight=20", "--format", "csv"]) == 0
    (chosen,) = table(capsys.readouterr().out)
    assert main([sweeps[0], "--print", "--format", "csv"]) == 0
    whole = table(capsys.readouterr().out)
    assert len(whole) == 4 and tuple(whole[0]) == (*LEADERBOARD_COLUMNS, "params.finetune.cam_weight")
    assert [row for row in whole if (row["weight_bits"], row["cam_weight"]) == ("3", "20")] == [chosen]
    assert not list(Path(sweeps[0]).glob("*.csv"))


def test_a_sweeps_own_tables_are_never_replaced_by_chosen_rows(
    sweeps: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([sweeps[0], "--where", "weight_bits=3", "--output-dir", sweeps[0]]) == 2
    assert "`output_dir` must be another folder" in capsys.readouterr().err and not list(Path(sweeps[0]).glob("*.csv"))
    out = tmp_path / "out"
    assert main([*sweeps, "--where", "weight_bits=3", "--output-dir", str(out), "--markdown"]) == 0
    assert capsys.readouterr().out.startswith(f"2 rows of 24 records -> {out / 'leaderboard.csv'}")
    assert {path.name for path in out.iterdir()} == {"leaderboard.csv", "leaderboard.md"}
    assert {row["weight_bits"] for row in table((out / "leaderboard.csv").read_text())} == {"3"}


def test_one_ranking_is_given_where_all_rows_may_be_compared(
    sweeps: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--where", "weight_bits=4", "--where", "rank>1", "--single-ranking", "--format", "csv"]
    assert main([sweeps[0], *words]) == 0
    (row,) = table(capsys.readouterr().out)
    assert (row["rank"], row["best"], row["weight_bits"]) == ("1", "1", "4")


@pytest.mark.parametrize(
    ("other", "part"),
    [
        ({"model": "other"}, "model net and other"),
        ({"overrides": {"quant.weight_bits": 3}}, "weight_bits 3 and 4"),
        ({"overrides": {"quant.act_bits": 8}}, "act_bits 4 and 8"),
        ({"overrides": {"quant.first_bits": 8}}, "protocol A and B, first_bits 8 and none"),
        ({"overrides": {"quant.act_points": "inputs"}}, "act_points inputs and relu"),
        (
            {"overrides": {"evaluation.objective": "selection", "evaluation.dataset": "digits"}},
            "objective selection and",
        ),
        ({"overrides": {"evaluation.fidelity_measure": "logit_mse"}}, "fidelity_measure kl and logit_mse"),
        ({"heldout_digest": "gg"}, "heldout_digest gg and hh"),
        ({"eval_digest": "ee"}, "eval_digest ee and none"),
        ({"teacher": {"digest": "bb", "input_size": [3, 32, 32]}}, "teacher_digest aa and bb"),
    ],
)
def test_one_ranking_over_what_must_not_be_compared_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], other: dict[str, Any], part: str
) -> None:
    path = folder_of(tmp_path / "a", [record(0.1), record(0.2, **other)])
    assert main([path, "--single-ranking"]) == 2
    out, err = capsys.readouterr()
    assert part in err and err.startswith("synq: error: `single_ranking` must") and err.count("\n") == 1 and out == ""
    if "eval_digest" not in part and "heldout" not in part:
        column, value = part.replace(",", "").split()[:2]
        assert main([path, "--single-ranking", "--where", f"{column}={value}"]) == 0


def test_two_paths_side_by_side(sweeps: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*sweeps, "--compare", "--format", "csv", "--output-dir", str(tmp_path / "out")]) == 0
    out, err = capsys.readouterr()
    assert out == (tmp_path / "out" / "compare.csv").read_text() and "4 rows -> " in err
    lines = table(out)
    assert tuple(lines[0])[: len(COMPARE_COLUMNS)] == COMPARE_COLUMNS
    assert [(line["weight_bits"], line["path"]) for line in lines] == [
        ("4", "before"), ("4", "after"), ("3", "before"), ("3", "after")
    ]  # fmt: skip
    for width in ("3", "4"):
        one, other = (line for line in lines if line["weight_bits"] == width)
        groups = [
            [r for r in rows_of(path) if str(r.weight_bits) == width and r.config_digest in digests_of(path, line)]
            for path, line in zip(sweeps, (one, other), strict=True)
        ]
        for name, column in (("top1", "top1"), ("objective", "objective_value")):
            first, second = ([getattr(r, column) for r in group] for group in groups)
            assert len(first) == len(second) == 3
            difference = statistics.fmean(second) - statistics.fmean(first)
            stderr = math.sqrt(statistics.variance(first) / 3 + statistics.variance(second) / 3)
            assert float(other[f"{name}_diff"]) == pytest.approx(difference, rel=1e-6)
            assert float(other[f"{name}_stderr"]) == pytest.approx(stderr, rel=1e-6)
            assert one[f"{name}_diff"] == one[f"{name}_stderr"] == ""
    text = (tmp_path / "out" / "compare.md").read_text()
    assert (
        text.count("\n") == 6 and f"{float(lines[1]['top1_diff']):+.2f} ± {float(lines[1]['top1_stderr']):.2f}" in text
    )


def rows_of(path: str) -> list[RunRecord]:
    from synq.sweeps.leaderboard.records import load_records

    return load_records([path])


def digests_of(path: str, line: dict[str, str]) -> set[str]:
    """Digests of the runs behind a line: those of its setting."""
    weight = {r.config_digest: r.config["finetune"]["cam_weight"] for r in rows_of(path)}[line["config_digest"]]
    return {r.config_digest for r in rows_of(path) if r.config["finetune"]["cam_weight"] == weight}


def test_one_run_has_no_standard_error_and_a_ranking_without_the_first_path_no_difference(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = folder_of(tmp_path / "x" / "s", [record(0.1, overrides=bits(4), top1=90.0)])
    second = folder_of(tmp_path / "y" / "s", [record(0.3, overrides=bits(w), top1=91.5) for w in (4, 3)])
    assert main([first, second, "--compare", "--format", "csv"]) == 0
    lines = table(capsys.readouterr().out)
    assert [line["path"] for line in lines] == [first, second, second], "folders of one name are told apart"
    differences = [(line["top1_diff"], line["top1_stderr"], line["objective_diff"]) for line in lines]
    assert differences == [("", "", ""), ("1.5", "", "0.2"), ("", "", "")]


def test_what_cannot_be_compared_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = [folder_of(tmp_path / name, [record(0.1, heldout_digest=name)]) for name in ("first", "second")]
    assert main([*paths, "--compare"]) == 0
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 3 and "may be compared: heldout_digest first and second" in err


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["{a}", "--compare"], "`compare` must be given two or more different PATHs"),
        (["{a}", "{a}/", "--compare"], "`compare` must be given two or more different PATHs"),
        (["{a}", "{b}", "--compare", "--columns", "rank"], "`columns` must be left out"),
        (["{a}", "{b}"], "`output_dir` must be given unless PATH is one folder"),
        (
            ["{a}", "--print", "--columns", "rank,modell"],
            "`columns` must name columns of leaderboard.csv or settings, but got 'modell'; did",
        ),
        (["{a}/absent"], "`PATH` must exist"),
    ],
)
def test_words_that_do_not_fit_are_refused(
    sweeps: tuple[str, str], capsys: pytest.CaptureFixture[str], words: list[str], part: str
) -> None:
    assert main([word.format(a=sweeps[0], b=sweeps[1]) for word in words]) == 2
    out, err = capsys.readouterr()
    assert part in err and err.startswith("synq: error: ") and err.count("\n") == 1 and out == ""


@pytest.mark.parametrize(
    "words", [["a", "--single-ranking", "--compare"], ["a", "--format", "html"], ["--print"], ["a", "--prin"]]
)
def test_unknown_words_are_one_line(capsys: pytest.CaptureFixture[str], words: list[str]) -> None:
    assert main(words) == 2
    err = capsys.readouterr().err
    assert err.startswith("synq: error: ") and err.count("\n") == 1


def test_columns_are_those_asked_for(sweeps: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    words = [sweeps[0], "--print", "--columns", "rank, weight-bits"]
    assert main([*words, "--format", "markdown"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [markdown_cells(line) for line in lines if "---" not in line] == [
        ["rank", "weight_bits"], ["1", "4"], ["2", "4"], ["1", "3"], ["2", "3"]
    ]  # fmt: skip
    assert main(words) == 0
    assert [line.split() for line in capsys.readouterr().out.splitlines()][:2] == [["rank", "W"], ["1", "4"]]


def test_markdown_stands_beside_the_csv_with_the_same_cells(
    sweeps: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "both"
    assert main([*sweeps, "--output-dir", str(out), "--format", "markdown"]) == 0
    assert "24 records -> " in capsys.readouterr().out
    assert {path.name for path in out.iterdir()} == {"trials.csv", "leaderboard.csv", "leaderboard.md"}
    lines = (out / "leaderboard.md").read_text().splitlines()
    rows = list(csv.reader(io.StringIO((out / "leaderboard.csv").read_text())))
    assert [markdown_cells(line) for line in [lines[0], *lines[2:]]] == rows and len(rows) == 5


def test_merged_sweeps_count_a_run_in_two_folders_once(
    sweeps: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "copy"
    (copy / "records").mkdir(parents=True)
    for path in sorted((Path(sweeps[0]) / "records").iterdir())[::2]:
        (copy / "records" / path.name).write_bytes(path.read_bytes())
    assert main([sweeps[0], str(copy), sweeps[0], "--output-dir", str(tmp_path / "merged")]) == 0
    assert main([sweeps[0], "--output-dir", str(tmp_path / "alone")]) == 0
    assert capsys.readouterr().out.count("12 records -> ") == 2
    for name in ("trials.csv", "leaderboard.csv"):
        assert (tmp_path / "merged" / name).read_bytes() == (tmp_path / "alone" / name).read_bytes()


def test_the_same_bytes_in_any_order_hash_seed_and_locale(
    tmp_path: Path, root: Path, run_process: Callable[..., tuple[int, str, str]]
) -> None:
    # Ties at every step: equal settings, seeds, names and objectives from several folders, and letters outside ASCII.
    draw = random.Random(1)
    paths = []
    for name in "abc":
        runs = [
            record(
                draw.choice([0.1, 0.2]),
                seed=draw.randint(0, 2),
                overrides=bits(draw.choice([3, 4]), finetune__lr=draw.choice([1e-3, 2e-3])),
                host=draw.choice(["h", "ä"]),
                top1=draw.choice([90.0, 91.0, 92.5]),
                size_bytes=draw.choice([1, 2]),
                bitops=draw.choice([1, 2]),
                model=draw.choice(["nét", "net"]),
                heldout_digest=draw.choice(["h", "i"]),
                versions={"torch": draw.choice("12"), "numpy": "1"},
                status=draw.choice(["completed"] * 4 + ["failed"]),
            )
            for _ in range(25)
        ]
        paths.append(folder_of(tmp_path / name, runs))
    results = set()
    ways = [("0", "C.UTF-8", "1"), ("1", "C", "0"), ("77", "POSIX", "0")]
    for number, (order, (seed, language, utf8)) in enumerate(zip(list(permutations(paths))[1::2], ways, strict=True)):
        out = tmp_path / f"out{number}"
        command = [
            sys.executable,
            "-m",
            "synq.cli",
            "leaderboard",
            *order,
            "--output-dir",
            str(out),
            "--markdown",
        ]
        code, _, err = run_process(command, PYTHONHASHSEED=seed, LC_ALL=language, PYTHONUTF8=utf8)
        assert code == 0, err
        names = ("trials.csv", "leaderboard.csv", "leaderboard.md")
        results.add(tuple((out / name).read_bytes() for name in names))
    assert len(results) == 1
    records = [item for path in paths for item in rows_of(path)]
    for seed in range(5):
        random.Random(seed).shuffle(records)
        write_tables(records, tmp_path / "direct")
        files = tuple((tmp_path / "direct" / name).read_bytes() for name in ("trials.csv", "leaderboard.csv"))
        assert files == next(iter(results))[:2]


def test_printing_does_not_fail_where_the_terminal_lacks_a_letter(
    tmp_path: Path, root: Path, run_process: Callable[..., tuple[int, str, str]]
) -> None:
    path = folder_of(tmp_path / "a", [record(0.1, model="nét")])
    command = [sys.executable, "-m", "synq.cli", "leaderboard", path, "--print"]
    assert run_process(command, PYTHONIOENCODING="ascii")[:2] == (0, run_process(command)[1].replace("é", "?"))
