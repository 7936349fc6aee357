"""An export prints what is to be expected of the student on real images, and its doubts before anything is written."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from synq.commands.export import main
from synq.common.notices import forget_notices
from synq.runs.expected_agreement import HeldOut, expected_agreement
from synq.runs.record import read_record, write_record


def _copy_with(finished: Path, folder: Path, after: float) -> Path:
    views = [{"agreement": value, "kl": 0.1, "confidence": 70.0} for value in (97.0, after)]
    field = expected_agreement(views[0], views[1], HeldOut(images=256, classes=10, side=16, shown=1.0), 2, after)
    there = folder / finished.name
    shutil.copytree(finished, there)
    shutil.copytree(finished.parent / "store", folder / "store")
    record = replace(read_record(there / "record.json"), expected_agreement=field)
    write_record(there / "record.json", record)
    return there


@pytest.mark.parametrize(("after", "is_doubted"), [(98.0, False), (12.0, True)])
def test_an_export_prints_the_expected_agreement_and_warns_first(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any, after: float, is_doubted: bool
) -> None:
    forget_notices()
    there = _copy_with(finished, tmp_path, after)
    printed: list[str] = []
    monkeypatch.setattr("synq.export.export.check_out_folder", lambda target: printed.append(capsys.readouterr().err))
    moved = ["--runtime.store_dir", str(tmp_path / "store")]
    assert main([str(there), "--formats", "packed", "--rounds", "0", *moved]) == 0
    out = capsys.readouterr().out
    assert "\nexpected agreement with the teacher on real images: " in out
    assert ("warning: the student is poor" in printed[0]) == is_doubted
    assert ("probably made the student worse" in printed[0]) == is_doubted
    card = (there / "export/README.md").read_text()
    assert ("**Warning**: the student is poor" in card) == is_doubted
    values = json.loads((there / "export/card.json").read_text())
    assert values["expected_agreement"]["views"]["agreement"] == after
