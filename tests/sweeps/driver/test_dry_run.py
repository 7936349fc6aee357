"""The estimate of a dry run: from a run that is warm, whatever the first one cost."""

from pathlib import Path

import pytest

from support.sweep_tools import tiny
from synq.sweeps.driver import dry_run

STAGES = ("teacher", "synthesis", "quantize", "finetune", "measure")


@pytest.mark.parametrize(
    ("first", "sizes"),
    [
        (1.0, [dry_run.WARM_UP, dry_run.CLOSER]),
        (40.0, [dry_run.WARM_UP, dry_run.WARM_UP]),
        (500.0, [dry_run.WARM_UP]),
    ],
)
def test_f_14_a_first_run_only_warms_up(
    first: float, sizes: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: list[tuple[int, int]] = []

    def measured(config: object, size: tuple[int, int]) -> dict[str, float]:
        asked.append(size)
        return dict.fromkeys(STAGES, (first if len(asked) == 1 else 1.0) / len(STAGES))

    monkeypatch.setattr(dry_run, "_measured", measured)
    spec = tiny(tmp_path)
    cost = dry_run._cost(spec, spec.groups[0], [])
    assert asked == sizes
    images, iterations = dry_run._size(spec.groups[0].base, sizes[-1])
    synthesis = spec.groups[0].base.synthesis
    passes = (synthesis.num_images + spec.groups[0].base.evaluation.heldout_images) * synthesis.iterations
    last = first if len(sizes) == 1 else 1.0
    assert cost.synthesis == pytest.approx(last / len(STAGES) * passes / (2 * images * iterations))
