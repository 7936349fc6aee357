"""The calibration of the expected agreement: its line, its intervals by left-out networks, its counts of errors."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from synq.evaluation.harder_views import VIEWS
from synq.runs.expected_agreement import (
    CALIBRATION,
    MAX_CONFIDENCE,
    MIN_CONFIDENCE,
    MIN_LOSS,
    NETWORKS,
    POOR,
    SOURCE,
)
from synq.sweeps.studies.agreement_fit import COLUMNS, Errors, Row, errors, fit, left_out, pairs_of, row_of, table

CONFIDENCE = {"a": 50.0, "b": 60.0, "c": 70.0, "d": 65.0}


def _row(network: str, harder: float, real: float, variant: str = "rounded", **more: Any) -> Row:
    values: dict[str, Any] = {"bits": "W4A4", "points": "relu", "plain": 99.0, "top1": real, "teacher_top1": 100.0}
    values |= {"drop_stderr": 0.1, "images": 10**6, "labeled": 10**6, "confidence": CONFIDENCE[network]}
    return Row(network=network, harder=harder, real=real, variant=variant, **{**values, **more})


def _share(logit: float) -> float:
    return float(100 * torch.sigmoid(torch.tensor(logit, dtype=torch.float64)))


def _rows(shift: float = 0.0) -> list[Row]:
    """Four networks on the plane 1 + 2 x + z / 2, one of which is off by `shift`."""
    points = [(name, x / 2) for name in "abcd" for x in range(-2, 5)]
    certain = {name: math.log(share / (100 - share)) for name, share in CONFIDENCE.items()}
    shares = [(name, x, 1 + 2 * x + certain[name] / 2 + (shift if name == "d" else 0)) for name, x in points]
    return [_row(name, _share(x), _share(y), f"v{x}") for name, x, y in shares]


def test_the_line_is_found_and_its_interval_is_that_of_left_out_networks() -> None:
    line = fit(_rows())
    assert (line.intercept, line.slope, line.confidence_slope) == pytest.approx((1.0, 2.0, 0.5), abs=1e-2)
    assert (line.lower, line.upper) == pytest.approx((0.0, 0.0), abs=1e-2)
    assert fit(_rows(-1.0)).lower == pytest.approx(-1.0, abs=1e-2), "a network that the others do not predict"


def test_a_network_does_not_predict_itself() -> None:
    before, after = (
        {case.row.variant: case.value for case in left_out(_rows(shift)) if case.row.network == "d"}
        for shift in (0.0, -2.0)
    )
    assert before == pytest.approx(after)


def test_every_network_weighs_the_same() -> None:
    rows = _rows(-1.0)
    many = [*rows, *[row for row in rows if row.network == "a"] * 9]
    assert fit(many).intercept == pytest.approx(fit(rows).intercept)


def test_a_destroyed_student_is_no_part_of_the_fit() -> None:
    rows = _rows()
    assert fit([*rows, _row("a", 5.0, 5.0, "broken")]) == fit(rows)
    broken = [case for case in left_out([*rows, _row("a", 5.0, 5.0, "broken")]) if case.row.variant == "broken"]
    assert broken[0].low == 0.0


def test_pairs_and_counts_by_hand() -> None:
    other = {"bits": "W8A8"}
    rows = [
        *(_row(name, 95.0, 98.0) for name in "abc"),
        _row("a", 95.0 - MIN_LOSS - 1, 94.0, "harmed"),
        _row("a", 95.0 - MIN_LOSS - 1, 98.5, "not_harmed"),
        _row("b", 94.0, 90.0, "unseen"),
        _row("c", 97.0, 99.0, "tuned"),
        _row("c", 60.0, 70.0, "poor_rounded", **other),
        _row("c", 70.0, 80.0, "poor_tuned", **other),
        _row("c", 70.0, 80.0, "tuned", **other),
    ]
    assert {pair.tuned.variant for pair in pairs_of(rows)} == {
        "harmed",
        "not_harmed",
        "unseen",
        "tuned",
        "poor_tuned",
    }, "the last has no rounded student"
    found = errors(rows)
    assert found["worse"] == Errors(found=1, missed=1, false=1, silent=2)
    assert found["worse_top1"] == (1, 2)
    assert found["worse"].text() == "1 of 2 warned rightly, 1 missed; 1 of 3 others warned wrongly"
    verdicts = {(row["network"], row["student"]): row["verdict"] for row in table(rows)}
    assert "worse wrongly" in str(verdicts["a", "not_harmed"]) and "worse missed" in str(verdicts["b", "unseen"])


def test_poor_students_are_counted() -> None:
    rows = _rows()
    found = errors(rows)["poor"]
    assert found.found == sum(row.real < POOR for row in rows) > 0 and found.missed == found.false == 0
    wrong = [replace(row, real=99.0) if row.network == "d" else row for row in rows]
    assert errors(wrong)["poor"].false > 0


def test_a_file_gives_its_row(tmp_path: Path) -> None:
    eye = torch.eye(4)
    found = {f"{who}.{name}": eye.clone() for who in "ts" for name in (*VIEWS, "plain", "labeled")}
    found["s.labeled"] = eye[[0, 1, 2, 2]]
    found["s.mixup_0.5"] = eye[[0, 0, 0, 0]]
    found["t.mixup_0.5"] = 100 * eye
    found["labels"] = torch.tensor([0, 1, 1, 2])
    path = tmp_path / "net-W3A3-relu-poor_tuned.safetensors"
    path.write_bytes(safetensors.torch.save(found))
    row = row_of(path)
    assert (row.network, row.bits, row.points, row.variant) == ("net", "W3A3", "relu", "poor_tuned")
    assert (row.plain, row.real, row.top1, row.teacher_top1) == (100.0, 75.0, 75.0, 50.0)
    assert row.harder == pytest.approx(100 - 75 / len(VIEWS)) and row.labeled == 4
    assert row.images == 4 * len(VIEWS)
    one = math.e / (math.e + 3)
    assert row.confidence == pytest.approx(100 * (1 + (len(VIEWS) - 1) * one) / len(VIEWS))


def test_the_constants_of_the_product_are_those_of_the_table_in_the_docs(root: Path) -> None:
    text = (root / SOURCE).read_text(encoding="utf-8")
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    (head,) = (number for number, cells in enumerate(lines) if tuple(cells) == COLUMNS)
    rows = []
    for cells in lines[head + 2 :]:
        found = dict(zip(COLUMNS, cells, strict=True))
        shares = {"plain": "plain", "harder": "views", "confidence": "confidence", "real": "real"}
        texts = {"network": "network", "bits": "bits", "points": "points", "variant": "student"}
        values: dict[str, Any] = {key: float(found[column]) for key, column in shares.items()}
        values |= {key: found[column] for key, column in texts.items()}
        values |= {"images": 256 * len(VIEWS), "labeled": int(found["images"])}
        rows.append(Row(top1=0.0, teacher_top1=0.0, drop_stderr=0.0, **values))
    fitted = fit(rows)
    for name in ("intercept", "slope", "confidence_slope", "lower", "upper"):
        assert getattr(CALIBRATION, name) == pytest.approx(getattr(fitted, name), abs=5e-3), name
    assert len({row.network for row in rows}) == NETWORKS
    assert len({row.bits for row in rows}) >= 4
    certain = [row.confidence for row in rows]
    assert min(certain) >= MIN_CONFIDENCE and max(certain) <= MAX_CONFIDENCE
