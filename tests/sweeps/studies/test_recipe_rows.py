"""Rows of a recipe next to its own: naive rounding and real images."""

from pathlib import Path

import numpy as np
import pytest

from synq.commands.recipe import main
from synq.config.run import with_overrides
from synq.runs.record import read_record
from synq.sweeps.studies.recipes import load_recipe, plan

FILE = """
name = "mine"
bits = "W3A3"
seeds = [0, 4]
real_images = "npz:own.npz"
[teacher]
spec = "bundled:digits_resnet8"
[synthesis]
num_images = 32
[finetune]
epochs = 1
batch_size = 16
warmup_epochs = 1.0
"""


def test_naive_and_real_are_rows_where_they_differ_and_have_images(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(FILE)
    recipe = load_recipe(file)
    base = recipe.base()
    runs = plan(base, [0], None, recipe.real_images)
    assert [row for row, _ in runs] == ["noise", "real", "inputs", "recipe"], "rounded to nearest is ptq already"
    real, own = runs["real", 0], runs["recipe", 0]
    assert (real.synthesis.method, real.synthesis.source, real.protocol) == (
        "own_images",
        "npz:own.npz",
        "A own_images",
    )
    assert (real.synthesis.num_images, real.quant, real.finetune) == (
        own.synthesis.num_images,
        own.quant,
        own.finetune,
    )
    with pytest.raises(ValueError, match=r"`real_images` must be given where there is a row real"):
        plan(base, [0], ["real"])
    with pytest.raises(ValueError, match=r"quant\.softmax` must be another one where there is a row naive"):
        plan(base, [0], ["naive"])
    learned = with_overrides(base, {"quant.rounding": "adaround", "quant.softmax": "log"})
    naive = plan(learned, [0])["naive", 0]
    assert (naive.quant, naive.finetune.epochs, naive.synthesis) == (base.quant, 0, base.synthesis)


def test_the_row_of_real_images_is_run_on_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("IMAGES", str(tmp_path))
    np.savez(tmp_path / "own.npz", x=np.random.default_rng(0).integers(0, 256, (40, 16, 16), np.uint8))
    file = tmp_path / "mine.toml"
    small = "[evaluation]\nheldout_images = 8\nnum_images = 64\n[synthesis]\nshard_size = 8\niterations = 1"
    text = FILE.replace("npz:own.npz", "npz:${IMAGES}/own.npz").replace("[synthesis]", small)
    file.write_text(text.replace("warmup_epochs", "cam_weight"))
    args = [str(file), "--seeds", "4", "--rows", "real", "--runtime.output_dir", str(tmp_path / "out")]
    assert main([*args, "--runtime.device", "cpu", "--runtime.num_threads", "1"]) == 0
    out = capsys.readouterr().out
    assert "| real | A own_images | relu | W3A3 | 1 |" in out
    (path,) = tmp_path.glob("out/mine-*/record.json")
    record = read_record(path)
    assert record.protocol == "A own_images" and record.config["synthesis"]["source"].endswith("own.npz")
    assert "real seed 4" in out and "| recipe |" not in out, "what was not run has no row"
