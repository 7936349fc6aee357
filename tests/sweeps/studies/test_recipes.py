"""A recipe: its file, its rows, the table from the records by hand, and what it promises."""

import csv
import math
import statistics
from pathlib import Path
from typing import Any

import pytest

from synq.commands.recipe import main
from synq.common.files import read_json
from synq.config.parsing import parse_bits
from synq.config.run import config_to_dict, with_overrides
from synq.runs.record import RunRecord, read_record
from synq.sweeps.leaderboard.columns import RECIPE_TABLE, keys
from synq.sweeps.studies.expected import Expected, Published, compare
from synq.sweeps.studies.recipes import load_recipe, markdown, plan, table
from synq.sweeps.studies.study_folder import same_result

ONE_THREAD = ("--runtime.device", "cpu", "--runtime.num_threads", "1")
FILE = """
name = "mine"
bits = "W3A3"
seeds = [0, 4]
[teacher]
spec = "bundled:digits_resnet8"
[evaluation]
heldout_images = 16
num_images = 64
[synthesis]
num_images = 32
shard_size = 16
iterations = 2
start = "white"
[quant]
calib_images = 32
act_points = "inputs"
[finetune]
epochs = 1
batch_size = 16
warmup_epochs = 1.0
[published]
top1 = 88.11
teacher_top1 = 93.89
source = "A paper, Table 1"
"""
EXPECTED = """
[expected]
top1 = 50.0
std = 0.5
drop = 48.9
images = 64
teacher_top1 = 98.9
seeds = [0, 1, 2]
commit = "abc"
hardware = "2 cores"
minutes = 1
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "mine.toml"
    path.write_text(FILE)
    return path


def test_a_recipe_is_the_whole_setting_and_its_rows_differ_in_one_thing(file: Path) -> None:
    recipe = load_recipe(file)
    assert recipe.published == Published(top1=88.11, teacher_top1=93.89, source="A paper, Table 1")
    assert recipe.expected is None and recipe.seeds == (0, 4)
    base = recipe.base()
    assert (base.quant.weight_bits, base.quant.act_bits, base.quant.act_points) == (*parse_bits("W3A3"), "inputs")
    runs = plan(base, recipe.seeds)
    assert list(runs) == [(row, seed) for row in ("noise", "recipe") for seed in (0, 4)]
    own, noise = (config_to_dict(runs[row, 4]) for row in ("recipe", "noise"))
    assert own == {**config_to_dict(base), "seed": 4, "data_seed": 4}
    assert noise == {**own, "synthesis": {**own["synthesis"], "method": "gaussian"}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (('bits = "W3A3"', ""), "`bits` must be given"),
        (("[teacher]\nspec", "[evaluation2]\nspec"), "`teacher` must be given"),
        (
            ("iterations = 2", "iteration = 2"),
            "`synthesis.iteration` must be a known key, but got an unknown one; did you",
        ),
        (("seeds = [0, 4]", "seeds = [4, 4]"), "`seeds` must have no entry twice"),
        (("seeds = [0, 4]", "seeds = [0, 4]\nseed = 1"), "`seed` must be left out (it is set by the file's `seeds`)"),
        (
            ("calib_images = 32", "weight_bits = 3"),
            "`quant.weight_bits` must be left out (it is set by the file's `bits`)",
        ),
        (
            ("[published]", "[publshed]"),
            "`publshed` must be a known key, but got an unknown one; did you mean `published`",
        ),
        (('source = "A paper, Table 1"', ""), "`published.source` must be given"),
        (("top1 = 88.11", "top1 = 88.11\ntop5 = 99.0"), "`published.top5` must be a known key, but got an unknown one"),
        (("top1 = 88.11", "top1 = 881.1"), "`published.top1` must be a number in [0, 100]"),
        (("top1 = 88.11", 'top1 = "high"'), "`top1` must be a number"),
        (('bits = "W3A3"', 'bits = "W1A3"'), "`bits` must read W<2..8>A<2..8>"),
        (('name = "mine"', 'name = "my net"'), "`name` must be letters"),
        (("batch_size = 16", "batch_size = 64"), "`finetune.batch_size` must be <="),
    ],
)
def test_a_wrong_file_is_refused_by_name(file: Path, change: tuple[str, str], message: str) -> None:
    assert change[0] in FILE
    file.write_text(FILE.replace(*change))
    with pytest.raises(ValueError) as caught:
        load_recipe(file)
    assert message in str(caught.value) and "mine.toml" in str(caught.value)


@pytest.mark.parametrize("line", EXPECTED.strip().splitlines()[1:])
def test_an_expected_figure_comes_with_everything_that_belongs_to_it(file: Path, line: str) -> None:
    file.write_text(FILE + EXPECTED)
    assert load_recipe(file).expected is not None
    file.write_text(FILE + EXPECTED.replace(line, ""))
    with pytest.raises(ValueError, match=rf"`expected\.{line.split()[0]}` must be given"):
        load_recipe(file)


def test_rows_that_would_be_the_recipe_itself_are_refused(file: Path) -> None:
    base = load_recipe(file).base()
    assert list(plan(base, [0], ["recipe", "noise"])) == [("noise", 0), ("recipe", 0)]
    with pytest.raises(ValueError, match=r"quant\.act_points` must be another one where there is a row inputs"):
        plan(base, [0], ["recipe", "inputs"])
    noise = with_overrides(base, {"synthesis.method": "gaussian", "quant.act_points": "relu"})
    with pytest.raises(ValueError, match=r"synthesis\.method` must be another one where there is a row noise"):
        plan(noise, [0], ["noise"])
    assert list(plan(noise, [0])) == [("inputs", 0), ("recipe", 0)], "unasked they are left out"
    assert plan(noise, [0])["inputs", 0].quant.act_points == "inputs"
    named = with_overrides(noise, {"quant.layer_act_bits": {"relu_1": 8}})
    assert list(plan(named, [0])) == [("recipe", 0)], "non-linearities have no name under inputs"


def record(top1: float, **changes: Any) -> RunRecord:
    values: dict[str, Any] = {
        "model": "net",
        "protocol": "A",
        "act_points": "relu",
        "weight_bits": 3,
        "act_bits": 3,
        "teacher_top1": 92.0,
        "drop": 92.0 - top1,
        "num_eval": 1000,
        "lost": 60,
        "gained": 20,
        "rtn_top1": 70.0,
        "rtn_lost": 230,
        "rtn_gained": 10,
        "loss_history": [{"loss": 1.0}],
        "set_digest": "s0",
        "seconds": {"synthesis": 0.0, "finetune": 9.0},
        "total_seconds": 10.0,
        "commit": "abc",
        "device": "cpu",
    }
    return RunRecord(top1=top1, **{**values, **changes})


def test_the_table_by_hand() -> None:
    records = {
        ("other", 0): record(70.0, seconds={"synthesis": 50.0}, total_seconds=52.0, set_seconds=50.0),
        ("other", 1): record(72.0, set_digest="s1", seconds={"synthesis": 60.0}, total_seconds=62.0, set_seconds=60.0),
        ("recipe", 0): record(88.0, rtn_top1=74.0, rtn_lost=190, set_seconds=50.0),
        ("recipe", 1): record(89.0, set_digest="s1", lost=40, gained=10, set_seconds=60.0),
    }
    ptq, other, own, paper = table(records, Published(top1=88.11, teacher_top1=93.89, source="a | b"))
    assert tuple(own) == keys(RECIPE_TABLE) and (own["row"], own["bits"], own["seeds"]) == ("recipe", "W3A3", "0 1")
    assert own["top1_mean"] == 88.5 and own["top1_std"] == pytest.approx(math.sqrt(0.5)) and own["drop_mean"] == 3.5
    errors = [100 * math.sqrt(80 - 1.6) / 1000, 100 * math.sqrt(50 - 0.9) / 1000]
    assert own["drop_stderr"] == pytest.approx(statistics.fmean(errors))
    assert (other["seconds_mean"], other["set_seconds_mean"]) == (2.0, 55.0)
    assert ptq["seconds_mean"] == 1.0, "the same runs, less their 9 s of fine-tuning"
    assert (ptq["row"], ptq["top1_mean"], ptq["drop_mean"]) == ("ptq", 72.0, 20.0)
    errors = [100 * math.sqrt(200 - 32.4) / 1000, 100 * math.sqrt(240 - 48.4) / 1000]
    assert ptq["drop_stderr"] == pytest.approx(statistics.fmean(errors))
    seconds = (own["seconds_mean"], own["set_seconds_mean"])
    assert seconds == (10.0, 55.0), "the seconds of its sets are apart, whichever row made them"
    assert paper["drop_mean"] == pytest.approx(5.78) and paper["num_seeds"] is None and paper["source"] == "a | b"
    text = markdown([ptq, own, paper], "expected ...")
    assert "| recipe | A | relu | W3A3 | 2 | 92.00 | 88.50 ± 0.71 | 3.50 ± 0.79 | 10 | 55 | measured |" in text
    assert "| published | - | - | W3A3 | - | 93.89 | 88.11 | 5.78 | - | - | a \\| b |" in text
    assert "net | seeds 0 1 | 1000 labeled images | commit abc | cpu\n" in text and text.endswith("\nexpected ...\n")


def test_a_teacher_without_labels_has_a_table_too() -> None:
    blind = record(0.0, num_eval=None, teacher_top1=None, drop=None, lost=None, gained=None, rtn_top1=None)
    _, line = table({("recipe", 0): RunRecord(**{**config_to_dict(blind), "top1": None})})
    assert (line["top1_mean"], line["drop_mean"], line["drop_stderr"]) == (None, None, None)
    assert "| 1 | - | - | - | 10 | - |" in markdown([line]) and "no labeled images" in markdown([line])


PROMISE = Expected(
    top1=88.0,
    std=0.3,
    drop=4.0,
    images=1000,
    teacher_top1=92.0,
    seeds=(0, 1, 2),
    commit="abc",
    hardware="2 cores",
    minutes=9,
)


@pytest.mark.parametrize(
    ("tops", "words"),
    [
        # Pooled deviation 0.3, standard error of the difference 0.3 sqrt(1/3 + 1/1): 3 of them are 1.04.
        ([88.9], "measured 88.90: within 3 standard errors (1.04)"),
        ([86.9], "measured 86.90: OUTSIDE 3 standard errors (1.04)"),
        # Of five figures, two with deviation 0.71: sqrt((2 0.09 + 1 0.5) / 3) sqrt(5/6) 3 = 1.30.
        ([89.0, 90.0], "measured 89.50 ± 0.71: OUTSIDE 3 standard errors (1.30)"),
        ([88.7, 89.7], "measured 89.20 ± 0.71: within 3 standard errors (1.30)"),
    ],
)
def test_what_is_expected_is_compared(tops: list[float], words: str) -> None:
    line = compare(PROMISE, {("recipe", seed): record(top1) for seed, top1 in enumerate(tops)})
    assert line == f"expected 88.00 ± 0.30 (commit abc, 2 cores), {words}"


def test_what_must_not_be_compared_is_said() -> None:
    one = {("recipe", 0): record(88.0)}
    changed = compare(PROMISE, one, same_settings=False)
    assert changed == (
        "measured 88.00; not comparable with the expected 88.00 ± 0.30 (commit abc, 2 cores) of the file, because the "
        "settings were changed"
    )
    fewer = {("recipe", 0): record(88.0, num_eval=64)}
    assert "because it is on 64 images and not on 1000" in compare(PROMISE, fewer)
    other = {("recipe", 0): record(88.0, teacher_top1=91.9)}
    assert "because the teacher has 91.90 and not 92.00" in compare(PROMISE, other)
    assert compare(PROMISE, {("noise", 0): record(70.0)}).endswith("not measured")
    single = Expected(**{**config_to_dict(PROMISE), "seeds": (0,)})
    assert "one seed each has no standard error" in compare(single, one)


def test_the_door_runs_resumes_and_only_reads_what_is_finished(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file.write_text(FILE + EXPECTED)
    words = [str(file), "--runtime.output_dir", str(tmp_path / "out"), *ONE_THREAD, "--seeds", "3"]
    assert main([*words, "--rows", "recipe"]) == 0
    out = capsys.readouterr().out
    assert "because the teacher has" in out, "64 images never give 98.90"
    assert out.splitlines()[-1] == str(tmp_path / "out" / "mine" / "recipe.csv")
    (path,) = tmp_path.glob("out/mine-*/record.json")
    before, done = read_json(path), read_record(path)
    assert (done.seed, done.data_seed, done.act_points, done.num_eval) == (3, 3, "inputs", 64)
    with (tmp_path / "out" / "mine" / "recipe.csv").open(newline="") as table_file:
        ptq, own, paper = csv.DictReader(table_file)
    for line, top1, b, c in (
        (ptq, done.rtn_top1, done.rtn_lost, done.rtn_gained),
        (own, done.top1, done.lost, done.gained),
    ):
        assert b is not None and c is not None and top1 is not None
        assert float(line["top1_mean"]) == pytest.approx(top1) and line["top1_std"] == ""
        assert float(line["drop_mean"]) == pytest.approx(100 * (b - c) / 64, abs=1e-5)
        assert float(line["drop_stderr"]) == pytest.approx(100 * math.sqrt(b + c - (b - c) ** 2 / 64) / 64, abs=1e-5)
    assert ptq["seconds_mean"] < own["seconds_mean"]
    assert (paper["row"], paper["top1_mean"], paper["seconds_mean"]) == ("published", "88.11", "")
    assert (tmp_path / "out" / "mine" / "recipe.md").read_text() in out
    # Once more with the row of noise: the finished run stays as it is, one is added.
    assert main(words) == 0
    after = {path: read_json(path) for path in tmp_path.glob("out/mine-*/record.json")}
    assert len(after) == 2 and after[path] == before
    (noise,) = (content for other, content in after.items() if other != path)
    assert noise["config"]["synthesis"]["method"] == "gaussian" and noise["config"]["finetune"]["epochs"] == 1
    text = (tmp_path / "out" / "mine" / "recipe.md").read_text()
    assert [line.split(" | ")[0] for line in text.splitlines()[2:6]] == ["| ptq", "| noise", "| recipe", "| published"]


def test_words_that_change_the_result_are_told_from_those_that_do_not(file: Path) -> None:
    base = load_recipe(file).base()
    elsewhere = with_overrides(base, {"runtime.output_dir": "x", "evaluation.batch_size": 3, "seed": 5, "data_seed": 5})
    assert same_result(base, elsewhere)
    assert not same_result(base, with_overrides(base, {"finetune.lr": 0.02}))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["absent.toml"], "absent.toml"),
        (["FILE", "--rows", "recipes"], "but got 'recipes'; did you mean `recipe`?"),
        (["FILE", "--seed", "3"], "`seed` must be left out (`seeds` sets it)"),
        (["FILE", "--finetune.lrr", "3"], "`finetune.lrr` must be a known key"),
        (["FILE", "--jobs", "0"], "`jobs` must be >= 1"),
    ],
)
def test_user_errors_are_one_line(
    file: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(file) if word == "FILE" else word for word in words]) == 2
    line = capsys.readouterr().err
    assert line.startswith("synq: error: ") and message in line and line.count("\n") == 1


def test_m_1_every_teacher_and_setting_has_a_table_of_its_own(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file.write_text(FILE + EXPECTED)
    plain = [str(file), "--runtime.output_dir", str(tmp_path / "out"), *ONE_THREAD, "--seeds", "0", "--rows", "recipe"]
    assert main(plain) == 0
    own = {path: path.read_bytes() for path in (tmp_path / "out" / "mine").iterdir()}
    assert len(own) == 2
    capsys.readouterr()
    texts = {}
    for extra in (["--teacher.weights", "random"], ["--finetune.lr", "0.02"]):
        assert main([*plain, *extra]) == 0
        out = capsys.readouterr().out
        folder = Path(out.splitlines()[-1]).parent
        assert folder.name.startswith("mine-digits_resnet8") and folder not in texts
        texts[folder] = out
    other, changed = texts.values()
    assert "published" not in other and "expected" not in other, "they are of another network"
    assert "published" in changed and "not comparable with the expected 50.00" in changed
    assert {path: path.read_bytes() for path in own} == own, "nothing is overwritten"


def test_m_1_a_table_loses_no_finished_run(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [str(file), "--runtime.output_dir", str(tmp_path / "out"), *ONE_THREAD, "--rows", "recipe", "--seeds"]
    assert main([*words, "0"]) == 0 and main([*words, "4"]) == 0
    with (tmp_path / "out" / "mine" / "recipe.csv").open(newline="") as table_file:
        lines = {line["row"]: line for line in csv.DictReader(table_file)}
    assert lines["recipe"]["seeds"] == "0 4" and lines["ptq"]["num_seeds"] == "2"
    assert float(lines["recipe"]["set_seconds_mean"]) > 0
