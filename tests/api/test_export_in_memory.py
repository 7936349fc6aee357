"""A network in memory to the file of an engine: the whole way of a user with the default target."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import synq
from support.api_tools import SMALL, labeled
from synq.export.targets.formats import PRECISE_SUMS
from synq.export.verify import open_session, sums_saturate

pytest.importorskip("onnxruntime")


class Block(nn.Module):
    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(before, after, 3, stride, 1, bias=False), nn.BatchNorm2d(after)
        self.conv2, self.bn2 = nn.Conv2d(after, after, 3, 1, 1, bias=False), nn.BatchNorm2d(after)
        self.down = nn.Sequential(nn.Conv2d(before, after, 1, stride, bias=False), nn.BatchNorm2d(after))
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return self.relu(y + self.down(x))


class SmallResNet(nn.Module):
    """As ResNet-18 is written, with two blocks and few channels."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 7, 2, 3, bias=False), nn.BatchNorm2d(8)
        self.relu, self.maxpool = nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)
        self.layer1, self.layer2 = Block(8, 8, 1), Block(8, 16, 2)
        self.avgpool, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        return self.fc(torch.flatten(self.avgpool(self.layer2(self.layer1(x))), 1))


def test_from_a_network_to_a_file_that_its_engine_runs(tmp_path: Path) -> None:
    net, (images, labels) = SmallResNet(), labeled(12)
    images = torch.nn.functional.interpolate(images, size=(32, 32)).expand(-1, 3, -1, -1)
    called = {"input_size": (3, 32, 32), "mean": (0.5,) * 3, "std": (0.25,) * 3, "weights": "random"}
    run = synq.quantize(
        net, **called, config=SMALL, dataset=(images, labels), output_dir=tmp_path, epochs=1, progress=False
    )
    assert run.record.act_points == "onnxruntime" and run.config.quant.label == "W4A4"
    pixels = (((images * 255).round() / 255) - 0.5) / 0.25
    expected = run.deployed(pixels).numpy()
    for opened, folder in (
        (run, None),
        (synq.open_run(run.path, model=SmallResNet(), dataset=(images, labels)), tmp_path / "labels"),
        (synq.open_run(run.path, model=SmallResNet()), tmp_path / "none"),
    ):
        exported = opened.export(folder, rounds=0)
        assert [file.name for file in exported.files] == ["model.onnx"] and exported.files[0].is_file()
        assert (exported.folder / "README.md").is_file()
        session = open_session(exported.files[0].read_bytes(), entries=PRECISE_SUMS if sums_saturate() else {})
        (logits,) = session.run(None, {session.get_inputs()[0].name: pixels.numpy()})
        np.testing.assert_array_equal(logits, expected)


def test_an_operation_without_a_form_in_the_engine_is_named(tmp_path: Path) -> None:
    class Sine(SmallResNet):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(torch.sin(x))

    with pytest.raises(ValueError, match="sin"):
        synq.quantize(
            Sine(), input_size=(3, 32, 32), mean=(0.5,) * 3, std=(0.5,) * 3, weights="random", output_dir=tmp_path
        )
    assert not tmp_path.joinpath("store").exists()
