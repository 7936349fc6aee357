"""The way of a setting by text search: from the key in a spec to its column in the tables, through at most five
files.
"""

import re

import pytest

from support.source_tree import ROOT

MOST_FILES = 5
WAYS = {
    "difficulty_threshold": (
        "sweeps/space.py",  # the range that a spec without [space] searches
        "synq/config/finetune.py",  # the key, its type, default and range
        "synq/finetune/training_loss.py",  # handed to the loss
        "synq/losses.py",  # the formula
        "sweeps/leaderboard/columns.py",  # the column
    ),
    "cam_weight": (
        "sweeps/space.py",
        "synq/config/finetune.py",
        "synq/finetune/training_loss.py",
        "synq/losses.py",
        "sweeps/leaderboard/columns.py",
    ),
    "lowpass_cutoff": (
        "sweeps/space.py",
        "synq/config/finetune.py",
        "synq/synthesis/run_sets.py",  # converted to DFT bins, and the set filtered
        "synq/synthesis/lowpass.py",
        "sweeps/leaderboard/columns.py",
    ),
}


@pytest.mark.parametrize("name", WAYS)
def test_text_search_follows_a_setting_from_spec_to_column(name: str) -> None:
    assert len(WAYS[name]) <= MOST_FILES
    lost = [file for file in WAYS[name] if not re.search(rf"\b{name}\b", (ROOT / file).read_text(encoding="utf-8"))]
    assert not lost, f"a search for {name} does not find {lost}: keep its name there, or mend the way above"
