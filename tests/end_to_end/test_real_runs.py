"""A whole run on the real CIFAR-10 teacher, at a budget of about two minutes on one core."""

from pathlib import Path

import pytest

from synq.config.run import RunConfig, config_from_dict, load_config, with_overrides
from synq.pipeline import run

SMALL = {
    "synthesis.num_images": 128,
    "synthesis.shard_size": 128,
    "synthesis.iterations": 80,
    "quant.weight_bits": 3,
    "quant.act_bits": 3,
    "finetune.epochs": 10,
    "finetune.batch_size": 32,
    "evaluation.num_images": 1000,
    "evaluation.heldout_images": 64,
    "runtime.device": "cpu",
    "runtime.progress": False,
}


@pytest.mark.real
def test_fine_tuning_on_synthetic_images_wins_on_real_ones(
    root: Path, data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SYNQ_DATA_DIR", str(data_dir))
    settings = load_config(root / "sweeps" / "specs" / "runs" / "cifar10_resnet20.toml")
    config = with_overrides(config_from_dict(RunConfig, settings), {**SMALL, "runtime.output_dir": str(tmp_path)})
    record = run(config)
    assert record.teacher_top1 is not None and record.top1 is not None and record.rtn_top1 is not None
    assert record.teacher_top1 == pytest.approx(91.5, abs=2.5) and record.num_eval == 1000
    assert record.top1 > record.rtn_top1 + 2, "128 images must already repair a part of what rounding broke"
    assert {row["bits"] for row in record.layers if row["role"] == "weight"} == {3}
