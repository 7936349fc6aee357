"""The benchmark of integer files in their engines: its files, its counts and its rows. No test asserts a speed."""

from dataclasses import replace

import pytest
import torch
from torch import nn

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from synq.commands.bench import ENGINES, NETWORKS
from synq.export.targets.formats import FORMATS
from synq.sweeps.benchmarks import engines
from synq.sweeps.benchmarks.engine_files import FLOAT, files_of
from synq.sweeps.benchmarks.engine_kernels import delegated_tensors
from synq.sweeps.benchmarks.engine_tools import TOOLS, own_file, own_tool
from synq.sweeps.benchmarks.subjects import Kind, classifier
from synq.sweeps.benchmarks.table import Context, processor_features


def _net() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.Conv2d(8, 8, 3, 1, 1, groups=8, bias=False), nn.BatchNorm2d(8), nn.ReLU6()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)),
    )


KIND = Kind("A small network", _net, (3, 16, 16), 5, {"cpu": 4})
CONTEXT = Context(device=torch.device("cpu"), threads=1, rounds=2, engines=("onnxruntime",), networks=("small",))


def test_every_engine_has_a_tool_and_every_network_an_option() -> None:
    running = {target for target, form in FORMATS.items() if not form.checked_for}
    assert set(ENGINES) == running == set(TOOLS) == set(engines.BITS)
    assert set(NETWORKS) == set(engines.KINDS)


def test_float_student_and_own_tool_are_one_network() -> None:
    module = classifier(KIND, 0)
    images = torch.randn(8, *KIND.size)
    files, content = files_of("onnxruntime", module, images, ((8, 8), (4, 4)), 1)
    assert own_tool("onnxruntime") == "quantize_static"
    files["own"] = own_file("onnxruntime", module, content, images, 1)
    expected = module(images)
    for name, difference in ((FLOAT, 1e-4), ("W8A8", 0.1), ("own", 0.1)):
        found = files[name].open(1)(images)
        assert float((found - expected).abs().max()) < difference * float(expected.std()), name
    layers = {name: file.layers() for name, file in files.items()}
    assert layers == {FLOAT: (0, 3), "W8A8": (3, 3), "W4A4": (3, 3), "own": (3, 3)}


class _Strided(nn.Module):
    """A slice with a stride, which XNNPACK does not take, between layers: LiteRT has several delegates."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Conv2d(3, 8, 3, 1, 1), nn.Conv2d(8, 8, 3, 2, 1), nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.first(x))
        x = torch.relu(self.second(x) + x[:, :, ::2, ::2])
        return self.last(x.mean((2, 3)))


def test_layers_in_several_delegates_of_litert_are_counted() -> None:
    pytest.importorskip("ai_edge_litert")
    torch.manual_seed(0)
    files, _ = files_of("litert", _Strided().eval(), torch.randn(8, 3, 16, 16), ((8, 8),), 1)
    assert {name: file.layers() for name, file in files.items()} == {FLOAT: (0, 3), "W8A8": (3, 3)}


def test_a_layer_outside_of_the_delegates_is_no_integer_layer() -> None:
    def operator(name: str, inputs: list[int], outputs: list[int]) -> dict[str, object]:
        return {"op_name": name, "inputs": inputs, "outputs": outputs}

    chain = [operator("CONV_2D", [tensor, 10 + tensor], [tensor + 1]) for tensor in range(5)]
    delegates = [operator("DELEGATE", [0, 10, 11], [2]), operator("DELEGATE", [3, 13], [4])]
    assert delegated_tensors(chain + delegates) == {1, 2, 4}
    assert delegated_tensors(chain) == set()


def test_a_row_for_each_file_and_comparison(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "KINDS", {"small": KIND})
    monkeypatch.setattr(engines, "CASES", ((1, 1), (2, 1)))
    found = list(engines.rows(CONTEXT))
    names = [row.what.partition(": ")[2] for row in found]
    rows = ["W8A8", "W4A4", "quantize_static", "W8A8 to quantize_static", "W4A4 to W8A8"]
    assert names == 2 * rows and len({row.what for row in found}) == len(found)
    assert all(row.value.median > 0 for row in found)
    assert "3 of 3 layers in integers" in found[0].note and "MB" in found[0].note
    has_targets = [row.target is not None for row in found]
    assert has_targets == [False, False, False, *(2 * ["VNNI" in processor_features()]), *(5 * [False])]


def test_a_missing_engine_is_named_if_it_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    form = replace(FORMATS["executorch"], packages=("no_such_package",))
    monkeypatch.setitem(engines.FORMATS, "executorch", form)
    with pytest.raises(ValueError, match=r"but for executorch no_such_package is missing: pip install"):
        list(engines.rows(replace(CONTEXT, engines=("executorch",))))
