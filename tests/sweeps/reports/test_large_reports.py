"""Pages of thousands of trials: tables in parts made from data, thinned plots, and importances that take no minutes."""

import json
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from support.made_sweeps import made_sweep
from synq.sweeps.reports.drawing import MOST_POINTS, draw, thinned, thinned_note
from synq.sweeps.reports.importance import main_effects
from synq.sweeps.reports.page import MOST_PLOT_BYTES, MOST_ROWS, PAGE_ROWS, Figure, Page, Tab, Table, render
from synq.sweeps.reports.table_data import table_data

HOSTILE = "</script><img src=x onerror=alert(1)> & "
COLUMNS = ("name", "value", "share", "weight_bits", "act_bits")


def table(rows: int) -> Table:
    values = [
        {"name": f"{HOSTILE}{i}", "value": i / 7e6, "share": 90 + i % 10, "weight_bits": 4, "act_bits": 4}
        for i in range(rows)
    ]
    bold = [i == 3 for i in range(rows)]
    return Table(name="t", title="T", caption="", columns=COLUMNS, rows=values, decimals={"share": 2}, bold=bold)


def page_of(*blocks: Any) -> Page:
    return Page(title="P", verdict=["V"], facts=[], tabs=[Tab(title="A", blocks=blocks)], foot="F")


class Data(HTMLParser):
    """Collects the rows of a page's markup and the texts of its data."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.rows, self.texts, self._in_data = 0, [], False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.rows += tag == "td" and dict(attrs).get("class") == "long"
        self._in_data = tag == "script" and ("type", "application/json") in attrs

    def handle_data(self, data: str) -> None:
        if self._in_data:
            self.texts.append(data)
            self._in_data = False


def expanded(column: dict[str, Any], rows: int) -> list[Any]:
    if "values" in column:
        return list(column["values"])
    return [column["of"][place] for place in column["at"] or [0] * rows]


def test_a_large_table_has_its_rows_as_data_and_a_small_one_as_markup() -> None:
    small = Data(render(page_of(table(MOST_ROWS))))
    assert (small.rows, small.texts) == (MOST_ROWS, [])
    large = Data(render(page_of(table(MOST_ROWS + 1))))
    assert large.rows == PAGE_ROWS
    content = json.loads(large.texts[0])
    assert content["rows"] == MOST_ROWS + 1 and content["best"] == [3]
    names, values, shares = (expanded(column, content["rows"]) for column in content["columns"][:3])
    assert names == [f"{HOSTILE}{i}" for i in range(MOST_ROWS + 1)]
    cells = [cells for _, _, cells in table(MOST_ROWS + 1).cells()]
    assert [float(value) for value in values] == [float(row[1][0]) for row in cells], "the digits that are shown"
    assert shares[:2] == ["90.00", "91.00"], "zeros at the end are shown, too"
    assert [column["numeric"] for column in content["columns"][:3]] == [False, True, True]
    assert expanded(content["search"], 2) == ["w4a4", "w4a4"]


def test_what_repeats_is_written_once() -> None:
    rows = [(False, "", [(str(i % 3), str(i % 3)), ("same", "")]) for i in range(3000)]
    text = table_data(rows, 2)
    assert len(text) < 3 * 3000 and text.count("same") == 1
    first, second = json.loads(text)["columns"]
    assert expanded(first, 3000) == [i % 3 for i in range(3000)] and expanded(second, 3000) == ["same"] * 3000


def test_many_points_are_thinned_and_few_are_not() -> None:
    values = [float(value) for value in np.random.default_rng(1).random(5 * MOST_POINTS)]
    assert thinned(values[:MOST_POINTS], values[:MOST_POINTS]) == values[:MOST_POINTS]
    kept = thinned(values, values)
    assert len(kept) == MOST_POINTS and kept == [value for value in values if value in set(kept)]
    assert {min(values), max(values)} <= set(kept) and kept == thinned(values, values)
    assert thinned_note(3, 3) == "" and "3 are drawn" in thinned_note(3, 9)


def test_the_plots_of_a_large_page_have_a_bounded_size() -> None:
    def plot(canvas: Any) -> None:
        x, y = np.random.default_rng(0).random((2, 2000))
        canvas.subplots().scatter(x, y)

    drawn = draw("a", "A", "c", plot)
    assert isinstance(drawn, Figure) and 100_000 < len(drawn.svg) < 300_000
    figures = [Figure(**{**vars(drawn), "name": f"f{i}"}) for i in range(6)]
    few, many = (render(page_of(table(rows), *figures)) for rows in (9, MOST_ROWS + 1))
    assert few.count("image/svg+xml") == 6, "small pages keep their drawings"
    assert many.count("image/svg+xml") < 6
    assert len(many) - len(render(page_of(table(MOST_ROWS + 1)))) < 1.4 * MOST_PLOT_BYTES


def settings(n: int) -> tuple[list[np.ndarray], list[np.ndarray], np.ndarray]:
    random = np.random.default_rng(0)
    number, choice = random.uniform(0, 10, (n, 1)), np.eye(3)[random.integers(0, 3, n)]
    bounds = [np.array([[0.0, 10.0]]), np.tile([0.0, 1.0], (3, 1))]
    return [number, choice], bounds, np.sin(number[:, 0]) + 0.5 * choice[:, 1]


def test_importance_is_the_share_of_the_variance() -> None:
    (number, choice), bounds, _ = settings(60)
    shares = main_effects([number, choice], bounds, number[:, 0] ** 2)
    assert shares.sum() == pytest.approx(1) and shares[0] > 0.95
    shares = main_effects([number, choice], bounds, choice[:, 2])
    assert shares[1] > 0.95
    with pytest.raises(ValueError, match="no tree of the forest has any variance"):
        main_effects([number, choice], bounds, np.ones(60))


@pytest.mark.slow
def test_importance_is_that_of_optuna() -> None:
    import optuna
    from optuna.distributions import CategoricalDistribution, FloatDistribution

    (number, choice), bounds, values = settings(40)
    ranges = {"number": FloatDistribution(0, 10), "choice": CategoricalDistribution(["a", "b", "c"])}
    study = optuna.create_study()
    for i in range(40):
        params = {"number": float(number[i, 0]), "choice": "abc"[int(choice[i].argmax())]}
        study.add_trial(optuna.trial.create_trial(value=values[i], params=params, distributions=ranges))
    evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
    found = optuna.importance.get_param_importances(study, evaluator=evaluator)
    shares = main_effects([choice, number], bounds[::-1], values)  # Optuna's columns are in alphabetical order
    np.testing.assert_allclose(shares, [found["choice"], found["number"]], rtol=0, atol=1e-12)


PROGRAM = """
import resource, sys, time
from synq.commands.leaderboard import main as leaderboard
from synq.commands.report import main as report
began = time.process_time()
assert leaderboard([sys.argv[1]]) == 0
middle = time.process_time()
assert report([sys.argv[1]]) == 0
assert "torch" not in sys.modules
ratio = (time.process_time() - middle) / (middle - began)
print(ratio, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""


@pytest.mark.slow
@pytest.mark.long
def test_the_report_of_5000_records(tmp_path: Path) -> None:
    folder = made_sweep(tmp_path, trials=2500)
    done = subprocess.run([sys.executable, "-c", PROGRAM, folder], capture_output=True, text=True, check=True)
    ratio, megabytes = map(float, done.stdout.split()[-2:])
    assert (folder / "report.html").stat().st_size <= 2e6
    assert megabytes <= 450 and ratio <= 6, "the tables of 5,000 records took 2 s where a page may take 10"
