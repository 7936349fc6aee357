"""All that a teacher's source does not say is asked for at once, with what its network lets one guess."""

from pathlib import Path

import pytest

from support.tiny_model import MODEL_FILE
from synq.config.run import RunConfig, with_overrides
from synq.teacher.teacher import load_teacher

MORE = """

def flat(width=28, channels=1):
    return nn.Sequential(
        nn.Conv2d(channels, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(),
        nn.Linear(4 * width * width, 10),
    )


def many():
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(4, 1000),
    )


def odd_size():
    return flat(45, 3)
"""
SIZE = {"teacher.input_size": (3, 32, 32)}
NORM = {"teacher.mean": (0.5, 0.5, 0.5), "teacher.std": (0.25, 0.25, 0.25)}
RANDOM = {"teacher.weights": "random"}
ALL = "`teacher.weights`, `teacher.input_size`, `teacher.mean` and `teacher.std` must be given"


@pytest.mark.parametrize(
    ("factory", "given", "parts"),
    [
        ("tiny", {}, [ALL, "perhaps 3,32,32, which the network accepts", "ImageNet's are 0.485", "`random` to use"]),
        ("flat", {}, [ALL, "perhaps 1,28,28, which the network accepts"]),
        ("many", {}, [ALL, "perhaps 3,224,224"]),
        ("odd_size", {}, [ALL, "input size: C,H,W; mean"]),
        ("tiny", RANDOM, ["`teacher.input_size`, `teacher.mean` and `teacher.std` must be given"]),
        ("tiny", {**RANDOM, **SIZE}, ["`teacher.mean` and `teacher.std` must be given"]),
        ("tiny", {**RANDOM, **NORM}, ["`teacher.input_size` must be given", "define it;"]),
        ("tiny", NORM, ["`teacher.weights` and `teacher.input_size` must be given"]),
        ("tiny", {**NORM, **SIZE}, ["must be trained, but the BatchNorm statistics of tiny have their initial values"]),
    ],
)
def test_m_10_everything_that_is_missing_is_in_one_message(
    factory: str, given: dict[str, object], parts: list[str], tmp_path: Path
) -> None:
    path = tmp_path / "nets.py"
    path.write_text(MODEL_FILE + MORE)
    config = with_overrides(RunConfig(), {"teacher.spec": f"{path}:{factory}", **given})
    with pytest.raises(ValueError, match="teacher") as caught:
        load_teacher(config.teacher)
    message = str(caught.value)
    assert all(part in message for part in parts), message
    assert "\n" not in message and ("ImageNet" in message) == ("mean" in parts[0] and factory != "flat")


def test_m_10_what_is_given_is_taken(tmp_path: Path) -> None:
    path = tmp_path / "nets.py"
    path.write_text(MODEL_FILE)
    config = with_overrides(RunConfig(), {"teacher.spec": f"{path}:tiny", **RANDOM, **SIZE, **NORM})
    teacher = load_teacher(config.teacher)
    assert (teacher.input_size, teacher.mean, teacher.std) == ((3, 32, 32), (0.5,) * 3, (0.25,) * 3)
