"""Rows of a recipe next to its own: naive rounding and real images."""

from pathlib import Path

import pytest

from synq.config.run import with_overrides
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
