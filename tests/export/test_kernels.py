"""The count of kernels knows every operation of ONNX Runtime that multiplies matrices or convolves."""

import re

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

from onnxruntime.capi.onnxruntime_pybind11_state import get_all_operator_schema

from support.integer_students import student
from support.small_nets import SIZE
from synq.export.kernels import FLOAT_KERNELS, INTEGER_KERNELS, count_kernels, kernels_of
from synq.export.onnx_graph import onnx_graph, write_container
from synq.quant.integer_form import integer_form

OTHERS = {
    *("CausalConvWithState", "VarlenCausalConvWithState", "ConvStateReplay", "WordConvEmbedding"),
    *("GemmaRotaryEmbedding", "LinearAttention", "LinearAttentionGate"),
}
"""Operations of language models whose names contain conv, matmul or gemm, and which no such layer becomes."""


def test_l_9_every_product_of_the_runtime_is_in_one_list() -> None:
    names = {schema.name for schema in get_all_operator_schema()}
    products = {name for name in names if re.search("conv|matmul|gemm|einsum", name, re.I)} - OTHERS
    assert products <= INTEGER_KERNELS | FLOAT_KERNELS, products - INTEGER_KERNELS - FLOAT_KERNELS
    assert not INTEGER_KERNELS & FLOAT_KERNELS
    unknown = (INTEGER_KERNELS | FLOAT_KERNELS) - names - {"MatMulPacked"}
    assert unknown <= {"QLinearConvTranspose"}, "an internal operation"


class OnMaps(nn.Module):
    """Linear layers on the last axis of (N, H, W, C), as in ConvNeXt, and a linear classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.wide, self.narrow = nn.Conv2d(3, 8, 4, 4), nn.Linear(8, 16), nn.Linear(16, 8)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.conv(x)).permute(0, 2, 3, 1)
        x = torch.relu(self.narrow(torch.relu(self.wide(x))))
        return self.fc(x.mean((1, 2)))


def test_l_9_linear_layers_on_maps_are_counted() -> None:
    form = integer_form(student(OnMaps(), 4, "inputs").net, operations="onnx")
    model = write_container(onnx_graph(form, SIZE), "int8")
    integers, floats = count_kernels(model)
    assert (integers + floats, integers >= 2) == (4, True), kernels_of(model)
