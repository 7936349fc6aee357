"""Points known before the search: grids, lists, the best settings of earlier sweeps; and the space of two
objectives.
"""

import itertools
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from synq.config.run import RunConfig, config_digest, config_to_dict, with_overrides
from synq.runs.record import RunRecord, write_record
from synq.sweeps.points import grid, grid_size, point_params, read_earlier, warm_points
from synq.sweeps.space import BITS
from synq.sweeps.spec import run_config
from synq.sweeps.spec_file import spec_from_dict

SPACE = {
    "finetune.lr": {"type": "choice", "values": [0.1, 0.01]},
    "finetune.lowpass_cutoff": {"type": "float", "low": 0.5, "high": 1.5, "step": 0.5, "optional": True},
    "finetune.epochs": {"type": "int", "low": 2, "high": 3},
}


def test_a_grid_is_every_combination_once_in_a_fixed_order() -> None:
    spec = spec_from_dict({"sampler": "grid", "space": SPACE})
    points = list(grid(spec.dimensions))
    wanted = itertools.product([0.1, 0.01], [0.5, 1.0, 1.5, None], [2, 3])
    assert [tuple(point.values()) for point in points] == list(wanted)
    assert spec.search.num_trials == grid_size(spec.dimensions) == 16
    assert all(point_params(spec.dimensions, point) is not None for point in points)


def test_steps_of_a_grid_end_at_the_upper_end_despite_rounding() -> None:
    space = {"finetune.difficulty_threshold": {"type": "float", "low": 0.1, "high": 0.7, "step": 0.1}}
    spec = spec_from_dict({"sampler": "grid", "space": space})
    assert list(spec.dimensions[0].listed()) == [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7]


def test_a_list_of_points_is_the_whole_sweep() -> None:
    points = [{"finetune.lr": 0.1, "finetune.lowpass_cutoff": "none"}, {"finetune": {"lr": 0.02}}]
    spec = spec_from_dict({"sampler": "points", "points": points})
    assert spec.search.num_trials == 2 and spec.groups[0].base.finetune.lowpass_cutoff == 1.0
    assert {d.name: (d.low, d.high, d.optional) for d in spec.dimensions} == {
        "finetune.lr": (0.02, 0.1, False),
        "finetune.lowpass_cutoff": (1.0, 1.0, True),
    }
    assert spec.points[0]["finetune.lowpass_cutoff"] is None


def test_ten_thousand_points_are_read_without_stalling() -> None:
    points = [{"finetune.lr": 1e-4 + 1e-6 * i, "finetune.cam_weight": float(i % 7)} for i in range(10_000)]
    clock = time.process_time()
    assert spec_from_dict({"sampler": "points", "points": points}).search.num_trials == 10_000
    steps = {
        f"finetune.{key}": {"type": "float", "low": 0, "high": 0.99, "step": 0.01} for key in ("ce_weight", "momentum")
    }
    spec = spec_from_dict({"sampler": "grid", "space": steps})
    assert spec.search.num_trials == 10_000 and next(grid(spec.dimensions)) is not None
    assert time.process_time() - clock < 5


def test_two_objectives_search_the_widths_of_a_model_as_one_group() -> None:
    keys = {"second_objective": "bitops", "scheduler": "none", "bits": ["W8A8", "W3A4"]}
    spec = spec_from_dict({**keys, "points": [{BITS: "W3A4", "finetune.lr": 0.01}]})
    assert [group.key for group in spec.groups] == ["digits_resnet8"]
    assert spec.dimensions[0].name == BITS and spec.dimensions[0].values == ("W8A8", "W3A4")
    config = run_config(spec, spec.groups[0], {BITS: "W3A4", "finetune.lr": 0.02})
    assert (config.quant.weight_bits, config.quant.act_bits, config.finetune.lr) == (3, 4, 0.02)
    assert config.name == "digits_resnet8-W3A4"
    only = spec_from_dict(
        {**keys, "sampler": "points", "points": [{"finetune.lr": 0.01, BITS: "W3A4"}, {BITS: "W8A8"}]}
    )
    assert only.num_bit_choices == 2 and only.dimensions[0].name != BITS
    with pytest.raises(ValueError, match="`points` must name `bits` in every entry"):
        spec_from_dict({**keys, "sampler": "points", "points": [{"finetune.lr": 0.01}]})
    with pytest.raises(ValueError, match="`bits` must have no entry twice"):
        spec_from_dict({**keys, "bits": ["W8A8", "W8A8"]})


def _record(value: float, size: int = 32, **overrides: Any) -> RunRecord:
    config = with_overrides(RunConfig(), {key.replace("__", "."): part for key, part in overrides.items()})
    return RunRecord(
        name=f"t{value}",
        config=config_to_dict(config),
        config_digest=config_digest(config),
        model="m",
        teacher={"digest": "aa", "input_size": [3, size, size]},
        weight_bits=config.quant.weight_bits,
        act_bits=config.quant.act_bits,
        protocol="A",
        act_points="relu",
        objective="synthetic",
        objective_value=value,
        heldout_digest="hh",
    )


def test_a_warm_start_takes_the_best_of_the_same_teacher_and_width_first(tmp_path: Path) -> None:
    spec = spec_from_dict({"base": {"finetune": {"lowpass_unit": "nyquist"}}})
    base = config_to_dict(spec.groups[0].base)
    records = [
        _record(0.1, finetune__lr=0.001, quant__weight_bits=3, quant__act_bits=3),
        _record(0.2, finetune__lr=0.002),
        _record(0.3, finetune__lr=0.003),
        _record(0.01, finetune__lr=0.004, teacher__spec="torchvision:resnet18"),
        _record(0.001, finetune__lr=0.9),  # outside the space
        _record(0.02, finetune__lr=0.006, quant__target="litert"),
        _record(0.25, finetune__lr=0.005, finetune__lowpass_cutoff=12.0, finetune__lowpass_unit="bins"),
    ]
    found = warm_points(records, spec.dimensions, base, 9)
    assert [point["finetune.lr"] for point in found] == [0.002, 0.005, 0.003, 0.001, 0.006, 0.004]
    assert found[1]["finetune.lowpass_cutoff"] == 0.75, "12 bins at 32 pixels are 0.75 of the Nyquist frequency"
    assert warm_points(records, spec.dimensions, base, 2) == found[:2]
    chosen_by_labels = [replace(record, objective="selection") for record in records]
    assert warm_points(chosen_by_labels, spec.dimensions, base, 9) == [], "labels would open a search without them"
    write_record(tmp_path / "old" / "records" / "t.json", records[1])
    assert (
        read_earlier([str(tmp_path / "old" / "leaderboard.csv")])
        == read_earlier([str(tmp_path / "old")])
        == [records[1]]
    )
    with pytest.raises(FileNotFoundError, match="`warm_start` must name folders of earlier sweeps"):
        read_earlier([str(tmp_path / "absent")])
