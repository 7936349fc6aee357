"""Latencies are taken in turns, in processor time, and only stored where they mean something."""

import pytest

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from onnx import TensorProto, helper

from support.integer_students import images
from synq.export.export import _speed
from synq.export.files import ExportedFile
from synq.export.targets.export import with_latency
from synq.export.timing import MAX_SPREAD, Latency, latencies, unstable_times


def relu(count: int) -> bytes:
    """An ONNX model of ``count`` operations."""
    nodes = [helper.make_node("Tanh", ["images" if not n else f"x{n}"], [f"x{n + 1}"]) for n in range(count)]
    shape = [None, 3, 16, 16]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(f"x{count}", TensorProto.FLOAT, shape)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    return bytes(model.SerializeToString())


def test_f_12_ratios_hold_on_a_busy_machine() -> None:
    sample = images(1)
    times = latencies({"one": relu(2), "same": relu(2), "long": relu(30)}, sample, rounds=7)
    assert all(len(latency.rounds) == 7 and 0 < latency.median < 1000 for latency in times.values())
    assert 0.5 < times["one"].ratio_to(times["same"]) < 2 < times["long"].ratio_to(times["one"])


def test_several_threads_are_timed_by_the_clock_on_the_wall() -> None:
    times = latencies({"one": relu(2)}, images(1), threads=2, rounds=3)
    assert times["one"].median > 0


def test_medians_spreads_and_ratios_by_hand() -> None:
    own, teacher = Latency(rounds=[1.0, 2.0, 3.0, 4.0, 9.0]), Latency(rounds=[2.0, 2.0, 2.0, 4.0, 3.0])
    assert (own.median, own.spread, own.is_stable) == (3.0, (4 - 2) / 3, False)
    assert own.ratio_to(teacher) == 1.0, "of the ratios 0.5, 1, 1.5, 1, 3"
    assert Latency(rounds=[5.0]).is_stable and Latency(rounds=[1.0, 1.0 + MAX_SPREAD / 2]).is_stable


STEADY, WILD = Latency(rounds=[2.0, 2.1, 2.0]), Latency(rounds=[1.0, 2.0, 4.0])


@pytest.mark.parametrize(("own", "teacher"), [(STEADY, WILD), (WILD, STEADY), (WILD, WILD)])
def test_f_12_times_that_vary_are_not_stored(own: Latency, teacher: Latency) -> None:
    metrics = _speed(own, teacher)
    assert metrics == {"latency_spread": WILD.spread}
    file = with_latency(ExportedFile(name="x", format="onnx", bytes=1, sha256=""), {"x": own, "": teacher})
    assert file.latency_ratio is None and (file.latency_ms is None) == (own is WILD)
    assert "spread over 75 % of their median, but at most 20 %" in unstable_times(metrics["latency_spread"])


def test_f_12_steady_times_are_stored_with_their_ratio() -> None:
    metrics = _speed(STEADY, Latency(rounds=[4.0, 4.2, 4.0]))
    assert metrics["latency_ratio"] == 0.5 and (metrics["latency_ms"], metrics["float_latency_ms"]) == (2.0, 4.0)
    assert metrics["latency_spread"] <= MAX_SPREAD
