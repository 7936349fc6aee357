"""Packed files: bit by bit what was written, small, and never a wrong model."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from support.integer_students import images, student
from support.small_nets import Residual, plain
from synq.config.run import QuantConfig
from synq.export.packed import load_packed, pack, packed_size, read_packed, save_packed, unpack
from synq.network.tracing import trace_classifier
from synq.quant.integer_form import integer_form
from synq.quant.integer_layers import IntegerActivation
from synq.quant.student import observe_ranges, quantize_model


@pytest.mark.parametrize("bits", range(2, 9))
def test_the_round_trip_is_exact_and_needs_no_numbers_of_the_network(bits: int, tmp_path: Path) -> None:
    form = integer_form(student(Residual(), bits, "inputs").net)
    size = save_packed(tmp_path / "x.safetensors", form, {"who": "me"})
    assert size == (tmp_path / "x.safetensors").stat().st_size
    other = student(Residual(), bits, "inputs", observed=False)
    for parameter in other.net.parameters():
        parameter.data.fill_(7.0)
    again = load_packed(tmp_path / "x.safetensors", other.net)
    assert torch.equal(again(images()), form(images()))
    state, wanted = again.state_dict(), form.state_dict()
    assert state.keys() == wanted.keys()
    assert all(torch.equal(state[name], wanted[name]) and state[name].dtype == wanted[name].dtype for name in wanted)
    ranges = [
        [(m.scale, m.zero_point) for m in net.modules() if isinstance(m, IntegerActivation)] for net in (again, form)
    ]
    assert ranges[0] == ranges[1] and read_packed(tmp_path / "x.safetensors")[1]["about"] == {"who": "me"}


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    bits=st.integers(2, 8),
    channels=st.lists(st.integers(1, 7), min_size=2, max_size=3),
    kernel=st.sampled_from([1, 3]),
    norm=st.booleans(),
    bias=st.booleans(),
    seed=st.integers(0, 99),
)
def test_random_shapes_and_widths_come_back(
    bits: int, channels: list[int], kernel: int, norm: bool, bias: bool, seed: int, tmp_path: Path
) -> None:
    torch.manual_seed(seed)
    parts: list[nn.Module] = []
    for fan_in, fan_out in zip([3, *channels], channels, strict=False):
        parts += [nn.Conv2d(fan_in, fan_out, kernel, padding=kernel // 2, bias=bias)]
        parts += [nn.BatchNorm2d(fan_out)] if norm else []
        parts += [nn.PReLU(fan_out)]
    net = nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels[-1], 3))
    traced = trace_classifier(net.eval().requires_grad_(False), (3, 5, 5))
    made = quantize_model(traced, QuantConfig(weight_bits=bits, act_bits=bits))
    sample = torch.randn(4, 3, 5, 5)
    observe_ranges(made.net, sample, act_range="minmax")
    form = integer_form(made.net)
    save_packed(tmp_path / "x.safetensors", form)
    assert torch.equal(load_packed(tmp_path / "x.safetensors", made.net)(sample), form(sample))


def test_codes_take_their_real_width(tmp_path: Path) -> None:
    form = integer_form(student(plain(), 3).net)
    save_packed(tmp_path / "x.safetensors", form)
    tensors, facts = read_packed(tmp_path / "x.safetensors")
    assert {name: tensors[f"{name}.codes"].numel() for name, *_ in facts["layers"]} == {
        "0": 3 * 8 * 27 // 8,
        "3": 3 * 6 * 72 // 8,
        "7": 3 * 960 // 8,
        "10": -(-3 * 50 // 8),
    }


def _tied(kind: str) -> nn.Module:
    parts = [nn.Conv2d(3, 8, 3), nn.PReLU(8), nn.Conv2d(8, 8, 3), nn.PReLU(8), nn.Conv2d(8, 8, 1), nn.PReLU(8)]
    if kind == "two slopes":
        parts[3].weight = parts[1].weight
    elif kind == "three slopes":
        parts[3].weight = parts[5].weight = parts[1].weight
    elif kind == "one module":
        parts[3] = parts[1]
    elif kind == "views of one tensor":
        slopes = torch.rand(16)
        parts[1].weight.data, parts[3].weight.data = slopes[:8], slopes[8:]
    elif kind == "expanded":
        parts[1].weight.data = torch.rand(1).expand(8)
    elif kind == "convolutions":
        parts[4] = nn.Conv2d(8, 8, 3)
        parts[4].weight = parts[2].weight
    else:
        parts[3:3] = [nn.BatchNorm2d(8), nn.PReLU(8), nn.BatchNorm2d(8)]
        parts[5].weight = parts[3].weight
    return nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))


@pytest.mark.parametrize(
    "kind",
    ["two slopes", "three slopes", "one module", "views of one tensor", "expanded", "convolutions", "batch norms"],
)
def test_l_8_tied_tensors_are_written_and_come_back(kind: str, tmp_path: Path) -> None:
    made = student(_tied(kind), 4, "inputs")
    form = integer_form(made.net)
    save_packed(tmp_path / "x.safetensors", form)
    assert torch.equal(load_packed(tmp_path / "x.safetensors", made.net)(images()), form(images()))


@pytest.mark.parametrize("change", ["stride", "activation"])
def test_a_network_that_computes_something_else_is_refused(change: str, tmp_path: Path) -> None:
    def net(stride: int, activation: type[nn.Module]) -> nn.Module:
        parts = (nn.Conv2d(3, 4, 3, stride), activation(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5))
        return nn.Sequential(*parts)

    save_packed(tmp_path / "x.safetensors", integer_form(student(net(1, nn.ReLU)).net))
    other = student(net(2, nn.ReLU) if change == "stride" else net(1, nn.Hardswish))
    with pytest.raises(ValueError, match="was written from a network that computes something else"):
        load_packed(tmp_path / "x.safetensors", other.net)


def rewritten(path: Path, metadata: dict[str, str] | None = None, name: str = "") -> None:
    """The file once more, with other metadata, or one tensor changed."""
    with safe_open(path, framework="pt") as file:
        tensors = {key: file.get_tensor(key) for key in list(file.keys())}
        facts = dict(file.metadata()) | (metadata or {})
    if name:
        tensors[name] = tensors[name] ^ 1
    save_file(tensors, path, facts)


def test_what_is_no_packed_student_of_this_network_is_refused(tmp_path: Path) -> None:
    path, made = tmp_path / "x.safetensors", student(Residual())
    form = integer_form(made.net)

    def refused(match: str, net: Any = made.net) -> None:
        with pytest.raises(ValueError, match=match):
            load_packed(path, net)

    save_packed(path, form)
    refused("must fit its network", student(Residual(), 5).net)
    refused("must fit its network", student(plain()).net)
    refused("must fit its network", student(Residual(), 4, "inputs").net)
    rewritten(path, name="conv2.codes")
    refused("must match its digest")
    save_packed(path, form)
    layers = read_packed(path)[1]["layers"]
    layers[0][1] = 3
    rewritten(path, {"layers": json.dumps(layers)})
    refused("must match its digest")
    for version, got in (
        ("2", "got format 2, written by an earlier"),
        ("x", "got no format number, written by an earlier"),
    ):
        rewritten(path, {"version": version})
        refused(f"must hold a packed student of format 3, but {got} version of SynQ: run it again and export it")
    rewritten(path, {"format": "something"})
    refused("must have the format")
    whole = path.read_bytes()
    for length in (0, 7, 100, len(whole) - 1):
        path.write_bytes(whole[:length])
        refused("must be a safetensors file, but .* is damaged")
    path.write_bytes(whole + b"\0")
    refused("damaged")
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"x\.safetensors does not exist"):
        load_packed(path, made.net)


def test_the_layout_by_hand() -> None:
    assert pack(np.array([1, 2, 3]), 3).tolist() == [0b11_010_001, 0b0]
    assert pack(np.array([[1, 2], [15, 0]]), 4).tolist() == [0x21, 0x0F]
    assert pack(np.array([7]), 8).tolist() == [7] and pack(np.array([], dtype=int), 5).size == 0


@given(st.integers(1, 8).flatmap(lambda b: st.tuples(st.just(b), st.lists(st.integers(0, 2**b - 1), max_size=70))))
def test_every_code_comes_back(case: tuple[int, list[int]]) -> None:
    bits, codes = case
    packed = pack(np.array(codes, dtype=np.int64), bits)
    assert packed.dtype == np.uint8 and packed.size == packed_size(len(codes), bits) == -(-len(codes) * bits // 8)
    assert unpack(packed, bits, len(codes)).tolist() == codes
    # The stream is the binary number whose digits are the codes.
    number = sum(code << (bits * place) for place, code in enumerate(codes))
    assert int.from_bytes(packed.tobytes(), "little") == number


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match=r"codes must be in \[0, 7\] for 3 bits, but got 0 to 8"):
        pack(np.array([0, 8]), 3)
    with pytest.raises(ValueError, match="but got -1 to 2"):
        pack(np.array([2, -1]), 3)
    with pytest.raises(ValueError, match=r"bits must be in \[1, 8\], but got 9"):
        pack(np.array([0]), 9)
    with pytest.raises(ValueError, match="3 codes of 3 bits must take 2 bytes, but got 1"):
        unpack(np.zeros(1, np.uint8), 3, 3)
