"""Classifiers that return more than their logits: the user names the output."""

from pathlib import Path

import pytest

from synq.config.run import RunConfig, TeacherConfig, config_digest
from synq.teacher.teacher import Teacher, load_teacher

SOURCE = """
from collections import namedtuple
from dataclasses import dataclass
import torch
from torch import nn
Named = namedtuple("Named", "features logits")

class Net(nn.Module):
    def __init__(self, give):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.bn, self.fc, self.give = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Linear(6, 5), give
    def forward(self, x):
        features = torch.relu(self.bn(self.conv(x)))
        return self.give(features, self.fc(features.mean((2, 3))))

@dataclass
class Values:
    features: torch.Tensor
    logits: torch.Tensor

def numbered(): return Net(lambda features, logits: {0: features, 1: logits})
def record(): return Net(lambda features, logits: Values(features, logits))
def one(): return Net(lambda features, logits: logits)
def mapping(): return Net(lambda features, logits: {"features": features, "logits": logits})
def pair(): return Net(lambda features, logits: (features, logits))
def named(): return Net(lambda features, logits: Named(features, logits))
"""


def load(folder: Path, factory: str, output: str | None) -> Teacher:
    path = folder / "heads.py"
    path.write_text(SOURCE)
    facts = {"input_size": (3, 8, 8), "mean": (0.0,) * 3, "std": (1.0,) * 3}
    return load_teacher(TeacherConfig(spec=f"{path}:{factory}", weights="random", output=output, **facts))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("factory", "output"),
    [
        ("mapping", "logits"),
        ("pair", "1"),
        ("named", "logits"),
        ("named", "1"),
        ("numbered", "1"),
        ("record", "logits"),
    ],
)
def test_the_named_value_is_the_logits_and_layers_keep_their_names(tmp_path: Path, factory: str, output: str) -> None:
    teacher, plain = load(tmp_path, factory, output), load(tmp_path, "one", None)
    assert teacher.num_classes == 5 and teacher.cam == plain.cam
    assert teacher.digest == plain.digest, "the same network"
    assert type(teacher.module).__name__ == "Net"


@pytest.mark.parametrize(
    ("factory", "output", "message"),
    [
        ("mapping", None, r"returned a dict; name the one in it by `teacher.output`: features, logits"),
        ("pair", None, r"returned a tuple; .*: 0, 1"),
        ("named", None, r"returned a Named; .*: features, logits, 0, 1"),
        ("mapping", "scores", r"`teacher.output` must be one of features, logits, but got 'scores'"),
        ("pair", "2", r"must be one of 0, 1, but got '2'"),
        ("one", "logits", r"must be left out: the model returns one value"),
        ("mapping", "features", r"one .N, classes. tensor of logits, but Net returned one of shape \(2, 6, 6, 6\)"),
    ],
)
def test_outputs_that_cannot_be_logits_are_rejected(
    tmp_path: Path, factory: str, output: str | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        load(tmp_path, factory, output)


def test_runs_without_it_keep_their_digest() -> None:
    plain = config_digest(RunConfig())
    assert plain != config_digest(RunConfig(teacher=TeacherConfig(output="logits")))
