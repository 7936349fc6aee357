"""The rule of `preprocessing` for resizing image files: of a network or a spec, in the run, and in the opened run."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import synq
from support.api_tools import RESEARCH, SIZE, GrayNet
from synq.runs import finished
from synq.teacher.preprocessing import stored_rule

TIMM: dict[str, Any] = {"input_size": SIZE, "mean": (0.5,), "std": (0.25,), "interpolation": "bicubic", "crop_pct": 0.5}
RULE = "shorter side to 24 (bicubic"


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Noise of 40 x 40 in five class folders, of which another crop has other classes."""
    numbers = np.random.default_rng(0)
    for number in range(30):
        file = tmp_path / "photos" / f"class{number % 5}" / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(numbers.integers(0, 256, (40, 40), dtype=np.uint8)).save(file)
    return tmp_path / "photos"


@pytest.mark.parametrize("kind", ["network", "spec"])
def test_an_opened_run_resizes_as_the_run(photos: Path, tmp_path: Path, kind: str) -> None:
    (tmp_path / "nets.py").write_text("from support.api_tools import GrayNet\n\ndef make():\n    return GrayNet()\n")
    net: Any = GrayNet() if kind == "network" else f"{tmp_path / 'nets.py'}:make"
    called = {"config": RESEARCH, "epochs": 1, "progress": False, "dataset": f"imagefolder:{photos}"}
    run = synq.quantize(net, preprocessing=TIMM, output_dir=tmp_path / "out", **called)
    assert RULE in run.record.evaluation["preprocessing"]
    opened = synq.open_run(run.path, model=GrayNet() if kind == "network" else None)
    default = synq.quantize(net, input_size=SIZE, mean=0.5, std=0.25, output_dir=tmp_path / "default", **called)
    for found in (run, opened):
        counted = found.evaluate()
        assert (counted.labels_digest, counted.top1) == (run.record.eval_digest, run.record.top1)
        assert counted.labels_digest != default.record.eval_digest, "the default rule is another"
        assert found.export(tmp_path / "export", formats=["packed"], rounds=0).files
    if kind == "spec":
        assert finished.open_run(run.path).teacher.preprocessing == run.teacher.preprocessing


def test_a_damaged_rule_is_named() -> None:
    assert stored_rule(None) is None
    for values in ({"resize_size": [8]}, {"resize_size": [8, 8], "fill": []}):
        with pytest.raises(ValueError, match=r"`teacher\.preprocessing` of a record must be a rule of resizing"):
            stored_rule(values)
