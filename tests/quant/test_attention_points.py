"""Students of networks with attention: what is quantized, at how many bits, and that they train, pack and measure."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import synq
from synq.config.quant import QuantConfig
from synq.network.tracing import trace_classifier
from synq.quant.layers import ACT_QUANTIZERS, ActQuantizer
from synq.quant.student import Student, observe_ranges, quantize_model

SIZE = (3, 16, 16)


class Hybrid(nn.Module):
    """A convolution with BatchNorm, and a transformer block over its 16 positions."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm, self.act = nn.Conv2d(3, 16, 4, 4), nn.BatchNorm2d(16), nn.ReLU()
        self.before, self.qkv, self.proj = nn.LayerNorm(16), nn.Linear(16, 48), nn.Linear(16, 16)
        self.again, self.fc1, self.fc2, self.head = (
            nn.LayerNorm(16),
            nn.Linear(16, 32),
            nn.Linear(32, 16),
            nn.Linear(16, 5),
        )

    def forward(self, images: Tensor) -> Tensor:
        x = self.act(self.norm(self.stem(images))).flatten(2).transpose(1, 2)
        q, k, v = (part.unflatten(2, (4, 4)).transpose(1, 2) for part in self.qkv(self.before(x)).chunk(3, -1))
        x = x + self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        x = x + self.fc2(F.gelu(self.fc1(self.again(x))))
        return self.head(x.mean(1))


def net() -> Hybrid:
    torch.manual_seed(0)
    module = Hybrid().train()
    for _ in range(20):
        module(torch.randn(32, *SIZE))
    return module.eval()


def student(points: str) -> Student:
    quant = QuantConfig(act_points=points, weight_bits=4, act_bits=6, layer_act_bits={"softmax": 8})  # type: ignore[arg-type]
    return quantize_model(trace_classifier(net(), SIZE), quant)


@pytest.mark.parametrize("points", ["relu", "inputs"])
def test_layers_and_both_inputs_of_products_read_codes_and_sums_are_float(points: str) -> None:
    made = student(points)
    graph = made.net.graph
    quantized = {
        str(node.target).removeprefix(ACT_QUANTIZERS)
        for node in graph.nodes
        if str(node.target).startswith(ACT_QUANTIZERS)
    }
    readers = {
        node.name
        for node in graph.nodes
        if node.op == "call_module" and isinstance(made.net.get_submodule(str(node.target)), nn.Linear)
    }
    assert len(readers) == 5
    key, value = "transpose_5", "transpose_3"
    expected = {"before", "mul", key, value, "softmax", "flatten_1", "again", "gelu", "mean"}
    assert quantized == expected | ({"images"} if points == "inputs" else set())
    assert not any(name.startswith("add") for name in quantized), "residual sums stay float"
    bits = {row.name: row.bits for row in made.rows if row.role == "activation" and row.bits < 32}
    assert bits["softmax"] == 8 and {bits[name] for name in bits if name != "softmax"} == {6}


def test_ranges_are_observed_and_the_student_has_gradients() -> None:
    made = student("relu")
    images = torch.randn(8, *SIZE)
    observe_ranges(made.net, images, act_range="mse")
    assert all(part.has_range for part in made.net.modules() if isinstance(part, ActQuantizer))
    made.net.requires_grad_(True)
    with torch.enable_grad():
        made.net(images).square().sum().backward()
    weights = [part.weight.grad for part in made.net.modules() if isinstance(part, nn.Linear)]
    assert weights and all(grad is not None and bool(grad.any()) for grad in weights)


def test_a_whole_run_and_its_packed_file(tmp_path: Path) -> None:
    settings = {
        "synthesis.num_images": 16,
        "synthesis.shard_size": 16,
        "synthesis.iterations": 3,
        "synthesis.start": "white",
        "finetune.epochs": 1,
        "finetune.batch_size": 8,
        "evaluation.heldout_images": 16,
        "quant.target": "research",
    }
    run = synq.quantize(
        net(), weight_bits=8, act_bits=8, input_size=SIZE, mean=(0.5,) * 3, std=(0.5,) * 3,
        config=settings, output_dir=tmp_path, progress=False,
    )  # fmt: skip
    assert run.metrics["agreement"] >= 90
    run.export(tmp_path / "out", formats=["packed"])
    assert list((tmp_path / "out").rglob("model.safetensors"))
