"""Classifiers that return more than their logits: the user names the output."""

from pathlib import Path

import pytest
import torch
from torch import nn

from synq.config.run import RunConfig, TeacherConfig, config_digest
from synq.network.tracing import trace_classifier
from synq.teacher.architecture import check_architecture
from synq.teacher.outputs import choose_output
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


TASKS = """
from collections import OrderedDict
import torchvision
class ModelOutput(OrderedDict):
    "As of transformers: values that are None are left out."
def hub(): return Net(lambda features, logits: ModelOutput(logits=logits, hidden_states=(features,)))
def only_tuple(): return Net(lambda features, logits: (logits,))
def only_value(): return Net(lambda features, logits: {"scores": logits, "loss": None})
def segmentation(): return Net(lambda features, logits: {"out": features, "aux": features})
def pixels(): return Net(lambda features, logits: features)
def detector(): return Net(lambda features, logits: [{"boxes": features, "labels": logits}])
def query_detector(): return Net(lambda features, logits: {"pred_boxes": logits, "logits": logits})
def classes(): return Net(lambda features, logits: logits.argmax(1))
def unflattened(): return Net(lambda features, logits: logits[:, :, None, None])
def library_detector():
    return torchvision.models.detection.ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None)
def library_segmentation():
    return torchvision.models.segmentation.lraspp_mobilenet_v3_large(weights=None, weights_backbone=None)
"""


def load_task(folder: Path, factory: str) -> Teacher:
    (folder / "heads.py").write_text(SOURCE + TASKS)
    facts = {"input_size": (3, 8, 8), "mean": (0.0,) * 3, "std": (1.0,) * 3}
    return load_teacher(TeacherConfig(spec=f"{folder}/heads.py:{factory}", weights="random", **facts))  # type: ignore[arg-type]


@pytest.mark.parametrize("factory", ["hub", "only_tuple", "only_value"])
def test_f_5_logits_that_are_the_only_choice_are_taken(tmp_path: Path, factory: str) -> None:
    assert load_task(tmp_path, factory).digest == load_task(tmp_path, "one").digest


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        ("segmentation", r"Net returned one of shape \(2, 6, 6, 6\), a value per pixel: a segmentation network"),
        ("pixels", r"a value per pixel: a segmentation network, or a network without its classifier"),
        ("detector", r"Net is a detector: it returns boxes"),
        ("query_detector", r"Net is a detector: it returns boxes"),
        ("classes", r"values of type int64, such as class numbers"),
        ("unflattened", r"one of shape \(2, 5, 1, 1\): return it as x.flatten\(1\)"),
        ("library_detector", r"library_detector_random \(SSD\) is a detector"),
        ("library_segmentation", r"\(LRASPP\) is a segmentation network"),
    ],
)
def test_f_6_networks_for_other_tasks_are_named(tmp_path: Path, factory: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_task(tmp_path, factory)


def test_f_4_networks_without_batch_norm_are_classifiers_like_others() -> None:
    class ViTAttention(nn.Module):
        """Named as in transformers, and without PyTorch's attention."""

    for norms in ([nn.LayerNorm(4)], [nn.GroupNorm(2, 4)], [nn.BatchNorm2d(4)], []):
        check_architecture(nn.Sequential(nn.Conv2d(3, 4, 4, 4), ViTAttention(), *norms), "net")


def test_f_5_classifiers_of_transformers_work_as_they_are() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.ResNetConfig(embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], num_labels=5)
    net = transformers.ResNetForImageClassification(config).eval().requires_grad_(False)
    images = torch.randn(3, 3, 32, 32)
    expected = net(images).logits
    choose_output(net, None, (3, 32, 32))
    assert torch.equal(trace_classifier(net, (3, 32, 32))(images), expected)
