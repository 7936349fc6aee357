"""Blocks of pixels as channels: where a convolution reads them, and that no bit of a logit changes."""

from dataclasses import replace

import pytest
import torch

from support.program_builder import ProgramBuilder
from synq.engines import image_blocks
from synq.engines.image_blocks import with_image_blocks
from synq.engines.program import Convolution, Program, SpaceToDepth
from synq.engines.simulation import Simulation

FORMS = [  # kernel, stride, padding (top, left, bottom, right), kernel on blocks of rows and columns
    ((7, 7), 2, (3, 3, 3, 3), (4, 4)),
    ((3, 3), 2, (1, 1, 1, 1), (2, 2)),
    ((3, 3), 2, (0, 1, 1, 0), (2, 2)),
    ((3, 5), 3, (1, 0, 1, 2), (2, 2)),
    ((4, 4), 4, (0, 0, 0, 0), (1, 1)),
    ((4, 3), 2, (0, 0, 0, 0), (2, 2)),
    ((6, 6), 2, (2, 1, 2, 2), (3, 4)),
]


def _program(
    kernel: tuple[int, int],
    stride: int,
    padding: tuple[int, int, int, int],
    target: str = "onnxruntime",
    bits: int = 8,
    size: tuple[int, int, int] = (3, 40, 36),
) -> Program:
    builder = ProgramBuilder(size, 3, weight_bits=bits, act_bits=bits)
    image = builder.quantize(bits=8)
    value = builder.convolution(image, 5, kernel, stride=(stride, stride), padding=padding)
    value = builder.convolution(value, 6, (3, 3), stride=(2, 2))
    logits = builder.dense(builder.flatten(builder.global_average_pool(value)), 5, floats=target == "onnxruntime")
    if target != "onnxruntime":
        logits = builder.dequantize(logits)
    return builder.build(logits, target)


def _images(program: Program) -> torch.Tensor:
    return torch.randn(3, *program.shapes[program.image], generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize(("kernel", "stride", "padding", "windows"), FORMS)
@pytest.mark.parametrize("engine", ["onnxruntime", "litert"])
@pytest.mark.parametrize("bits", [8, 4])
def test_no_bit_changes_in_simulation_and_engine(
    kernel: tuple[int, int],
    stride: int,
    padding: tuple[int, int, int, int],
    windows: tuple[int, int],
    engine: str,
    bits: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(image_blocks, "MIN_SAVED_READS", 1)
    size = (3, 41 if any(padding) else 40, 36)  # 41: the last block of rows is half a block
    program = _program(kernel, stride, padding, engine, bits, size)
    images = _images(program)
    for rows in (True, False):
        blocked = with_image_blocks(program, rows=rows)
        (made,) = [step for step in blocked.steps if isinstance(step, SpaceToDepth)]
        assert made.block == (stride if rows else 1, stride)
        if rows:
            (layer,) = [step for step in blocked.steps if made.output in step.inputs]
            assert isinstance(layer, Convolution) and layer.weight.shape[1:] == (3 * stride**2, *windows)
        assert torch.equal(Simulation(blocked)(images), Simulation(program)(images))
    if engine == "onnxruntime":
        pytest.importorskip("onnx")
        pytest.importorskip("onnxruntime")
        from support.standard_models import ALL, EXTENDED, differing

        assert not differing(program, images)  # every value, not the logits only
        for level in (ALL, EXTENDED):
            assert not differing(program, images, intermediate=False, level=level)
    else:
        pytest.importorskip("ai_edge_litert")
        from support.litert_models import differing_logits

        assert not differing_logits(program, images)


@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "size"),
    [
        ((7, 7), 1, (3, 3, 3, 3), (3, 96, 96)),  # no stride
        ((1, 1), 2, (0, 0, 0, 0), (3, 400, 400)),  # pixels that no window meets
        ((7, 7), 2, (3, 3, 3, 3), (5, 96, 96)),  # enough channels
        ((3, 3), 2, (1, 1, 1, 1), (3, 64, 64)),  # 5,120 reads to save
        ((5, 5), 5, (0, 0, 0, 0), (3, 404, 404)),  # the last rows are in no window
    ],
)
def test_other_convolutions_stay(
    kernel: tuple[int, int], stride: int, padding: tuple[int, int, int, int], size: tuple[int, int, int]
) -> None:
    program = _program(kernel, stride, padding, size=size)
    assert with_image_blocks(program) is program


def test_a_stem_of_an_ordinary_size_reads_blocks() -> None:
    program = _program((7, 7), 2, (3, 3, 3, 3), size=(3, 96, 96))
    assert any(isinstance(step, SpaceToDepth) for step in with_image_blocks(program).steps)


def test_nodes_that_make_blocks_belong_to_the_convolution() -> None:
    pytest.importorskip("onnx")
    from synq.export.standard_onnx import onnx_with_owners

    program = _program((7, 7), 2, (3, 3, 3, 3), size=(3, 96, 96))
    (layer, _) = [step for step in program.steps if isinstance(step, Convolution)]
    model, owners = onnx_with_owners(program)
    assert set(owners.values()) == {step.output for step in program.steps}
    assert {node.name for node in model.graph.node} == set(owners)
    assert [owners[node.name] for node in model.graph.node if "blocks" in node.name] == [layer.output] * 6


def test_groups_and_dilation_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_blocks, "MIN_SAVED_READS", 1)
    program = _program((3, 3), 2, (1, 1, 1, 1))
    for fields in ({"dilation": (2, 1)}, {"groups": 3}, {"stride": (2, 1)}):
        first = next(number for number, step in enumerate(program.steps) if isinstance(step, Convolution))
        steps = list(program.steps)
        steps[first] = replace(steps[first], **fields)  # type: ignore[arg-type]
        changed = replace(program, steps=tuple(steps))
        assert with_image_blocks(changed) is changed
