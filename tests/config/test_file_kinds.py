"""A settings file that is given to the wrong command."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from synq.config.run import load_run
from synq.sweeps.spec_file import load_spec
from synq.sweeps.studies.ablation import load_ablation
from synq.sweeps.studies.recipes import load_recipe

SPECS = {
    "run": "runs/cifar10_resnet20.toml",
    "recipe": "recipes/digits_resnet8_w3a3.toml",
    "sweep": "demo.toml",
    "ablation": "ablations/demo.toml",
}
READERS: dict[str, Callable[[Any], Any]] = {
    "run": load_run,
    "recipe": load_recipe,
    "sweep": load_spec,
    "ablation": load_ablation,
}
COMMANDS = {"run": "synq train", "recipe": "synq recipe", "sweep": "synq sweep", "ablation": "synq ablate"}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("kind", COMMANDS)
def test_a_file_is_told_the_command_that_takes_it(
    kind: str, reader: str, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SYNQ_DATA_DIR", "anywhere")
    path = root / "sweeps" / "specs" / SPECS[kind]
    if kind == reader:
        READERS[reader](path)
        return
    with pytest.raises(ValueError, match=f"it looks like the file of an? {kind}: {COMMANDS[kind]} .*{path.name}"):
        READERS[reader](path)


def test_an_error_in_the_right_file_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text("[finetune]\nlr = -1.0\n")
    with pytest.raises(ValueError, match=r"finetune\.lr") as caught:
        load_run(tmp_path / "run.toml")
    assert "looks like" not in str(caught.value)
    (tmp_path / "recipe.toml").write_text("name = 'a'\nseeds = [0]\n[teacher]\n")
    with pytest.raises(ValueError, match=r"`bits` must be given, but is missing$"):
        load_recipe(tmp_path / "recipe.toml")
    (tmp_path / "odd.toml").write_text("oddity = 1\n")
    with pytest.raises(ValueError, match="oddity") as caught:
        load_run(tmp_path / "odd.toml")
    assert "looks like" not in str(caught.value)
