"""ONNX graphs of small students, each exported once. Import it after `pytest.importorskip("onnx")`."""

from collections.abc import Callable
from functools import cache
from typing import Literal

import onnx
from torch import fx, nn

from support.integer_students import student
from support.small_nets import SIZE
from synq.export.onnx_graph import onnx_graph
from synq.quant.integer_form import integer_form


@cache
def graph_of(
    make: Callable[[], nn.Module], bits: int, act_points: Literal["relu", "inputs"]
) -> tuple[fx.GraphModule, onnx.ModelProto]:
    """The integer form of a student and its graph, which takes seconds: made once, for tests that only read them."""
    made = student(make(), bits, act_points)
    return integer_form(made.net), onnx_graph(integer_form(made.net, operations="onnx"), SIZE)
