"""Results within a rounding of a half: every code of an engine is the simulation's there, too."""

import pytest

from support.near_ties import STEPS, near_tie
from synq.engines.simulation import Simulation
from synq.export.targets.formats import FORMATS

COUNT = 40


@pytest.mark.parametrize("target", ["litert", "onnxruntime"])
@pytest.mark.parametrize("step", STEPS)
def test_codes_near_a_half_are_those_of_the_engine(step: str, target: str) -> None:
    engine_format = FORMATS[target]
    if engine_format.missing():
        pytest.skip(f"{target} is not installed")
    different = []
    for seed in range(COUNT):
        tie = near_tie(step, seed, target)
        expected = Simulation(tie.program)(tie.images.clone())
        found = engine_format.open(engine_format.write(tie.program), 1)(tie.images.clone())
        found = found if found.shape == expected.shape else found.permute(0, 3, 1, 2)  # LiteRT's channels are the last
        if not bool((found == expected).all()):
            different.append(seed)
    assert not different


def test_the_results_are_near_a_half() -> None:
    for step in STEPS:
        tie = near_tie(step, 0, "litert")
        assert tie.images.shape == (1, 2, 4, 3)
        moved = near_tie(step, 1, "litert")
        assert moved.program.grids["y"].scale != tie.program.grids["y"].scale
