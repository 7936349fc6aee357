"""What a finished run proposes next: only what is for its bit-widths, the largest gain first."""

from dataclasses import replace
from typing import Any

import pytest

from synq.runs.expected_agreement import closing_notes
from synq.runs.next_step import next_step
from synq.runs.record import RunRecord


def _record(weights: int, acts: int, quality: str = "", kl: float | None = 0.1, **quant: Any) -> RunRecord:
    budget = {"quality": quality, "rounded_kl": 2.5 if weights < 4 else 0.3} if quality else {}
    return RunRecord(
        name="run",
        status="completed",
        weight_bits=weights,
        act_bits=acts,
        fidelity={"kl": kl},
        budget=budget,
        config={"quant": {"rounding": "nearest", "layer_weight_bits": {}, "layer_act_bits": {}, **quant}},
    )


@pytest.mark.parametrize(
    ("record", "proposals"),
    [
        (_record(2, 4, "standard"), ["--quant.rounding adaround", "--quality best"]),
        (_record(2, 8, rounding="adaround"), []),
        (_record(3, 3, "standard"), ["--quality best", "--quant.act_bits 8"]),
        (_record(4, 4, "draft"), ["--quant.act_bits 8", "synq mixed-precision --activations"]),
        (_record(4, 8, "draft"), ["--quality standard"]),
        (_record(4, 4, layer_act_bits={"relu": 6}), ["--quant.act_bits 8"]),
        (_record(8, 8, "draft"), ["--quality standard"]),
        (_record(8, 8, "draft", kl=0.001), []),
        (_record(4, 4, kl=None), []),
    ],
)
def test_proposals_are_for_the_run(record: RunRecord, proposals: list[str]) -> None:
    line = next_step(record)
    places = [line.find(f"`{part}") for part in proposals]
    assert all(place > 0 for place in places) and places == sorted(places)
    assert line.count("; ") == max(0, len(proposals) - 1) and line.startswith("to lose less: ") == bool(proposals)


def test_a_kl_that_is_not_finite_is_none_in_a_file() -> None:
    record = replace(_record(3, 3, "standard"), budget={"quality": "standard", "rounded_kl": None})
    assert "`--quality best`" in next_step(record)


def test_standard_is_not_proposed_where_it_chooses_what_draft_did() -> None:
    record = replace(_record(8, 8, "draft"), budget={"quality": "draft", "rounded_kl": 0.01})
    assert next_step(record) == ""


def test_the_line_ends_what_is_printed_after_a_run() -> None:
    record = _record(4, 4)
    assert closing_notes(record)[-1] == next_step(record)
    assert closing_notes(replace(record, status="diverged")) == []
