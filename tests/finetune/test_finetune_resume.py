"""A stopped fine-tuning goes on bit for bit, whatever its options, and only from a checkpoint of its own."""

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from support.finetune_tools import CONFIG, images, labels, taps, train
from support.sealed import flip
from synq.config.run import FinetuneConfig
from synq.finetune.loop import finetune


def test_resume_is_bit_equal(tiny_classifier: nn.Module, accelerator: Accelerator, tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, epochs=4, augment="flip_shift", warmup_epochs=0.5)
    whole, history = train(tiny_classifier, accelerator, config)

    class KilledError(Exception):
        pass

    def kill(epoch: dict[str, float]) -> None:
        if epoch["epoch"] == 3:
            raise KilledError

    file = tmp_path / "checkpoint.pt"
    with pytest.raises(KilledError):
        train(tiny_classifier, accelerator, config, checkpoint=file, on_epoch=kill)
    seen: list[float] = []
    resumed, rest = train(
        tiny_classifier, accelerator, config, checkpoint=file, on_epoch=lambda epoch: seen.append(epoch["epoch"])
    )
    assert seen == [3, 4], "finished epochs are not repeated"
    state = resumed.net.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in whole.net.state_dict().items())
    drop = {"seconds"}
    assert [{k: v for k, v in h.items() if k not in drop} for h in rest] == [
        {k: v for k, v in h.items() if k not in drop} for h in history
    ]


def test_a_checkpoint_of_another_teacher_or_set_is_refused(
    tiny_classifier: nn.Module, accelerator: Accelerator, tmp_path: Path
) -> None:
    file = tmp_path / "checkpoint.pt"
    train(tiny_classifier, accelerator, checkpoint=file, identity="teacher a")
    with pytest.raises(ValueError, match=r"must not mix runs: .*checkpoint.pt belongs to other"):
        train(tiny_classifier, accelerator, checkpoint=file, identity="teacher b")


@pytest.mark.parametrize("damage", ["cut", "flipped"])
def test_a_damaged_checkpoint_is_named_and_not_used(
    tiny_classifier: nn.Module,
    accelerator: Accelerator,
    tmp_path: Path,
    damage: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = tmp_path / "checkpoint.pt"
    whole, _ = train(tiny_classifier, accelerator, checkpoint=file)
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:100])
    else:
        flip(file, file.stat().st_size // 2)
    seen: list[float] = []
    again, _ = train(tiny_classifier, accelerator, checkpoint=file, on_epoch=lambda epoch: seen.append(epoch["epoch"]))
    assert seen[0] == 1, "fine-tuning starts again"
    state = again.net.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in whole.net.state_dict().items())
    (line,) = capsys.readouterr().err.splitlines()
    assert str(file) in line and "starts again" in line and "weights_only" not in line


@pytest.mark.parametrize(
    "options",
    [
        {"feature_weight": 2.0},
        pytest.param({"ema_decay": 0.9}, marks=pytest.mark.slow),
        {"perturb_weight": 0.5},
        {"augment": "mixup", "ema_decay": 0.5},
        pytest.param({"augment": "cutmix"}, marks=pytest.mark.slow),
        {"cam_method": "gradcam++"},
        pytest.param({"cam_method": "cam"}, marks=pytest.mark.slow),
        {"hard_labels": "top2", "difficulty_threshold": 0.3},
    ],
    ids=str,
)
def test_every_option_resumes_bit_equal(
    tiny_classifier: nn.Module, accelerator: Accelerator, tmp_path: Path, options: dict[str, Any]
) -> None:
    config = dataclasses.replace(CONFIG, epochs=3, **options)
    plain = dataclasses.replace(CONFIG, epochs=3)

    def run(config: FinetuneConfig, **extra: Any) -> dict[str, Tensor]:
        student, teacher = taps(copy.deepcopy(tiny_classifier))
        finetune(student, teacher, images(), labels(), config, accelerator=accelerator, seed=1, **extra)
        return student.net.state_dict()

    class KilledError(Exception):
        pass

    def kill(epoch: dict[str, float]) -> None:
        if epoch["epoch"] == 2:
            raise KilledError

    whole = run(config)
    file = tmp_path / "checkpoint.pt"
    with pytest.raises(KilledError):
        run(config, checkpoint=file, on_epoch=kill)
    resumed = run(config, checkpoint=file)
    assert all(torch.equal(value, resumed[key]) for key, value in whole.items())
    assert any(not torch.equal(value, whole[key]) for key, value in run(plain).items()), "the option does something"
