"""`targets` of a spec: each engine is a group with a search of its own."""

from typing import Any

import pytest

from synq.sweeps.spec import SweepSpec, run_config
from synq.sweeps.spec_file import spec_from_dict


def spec(**content: Any) -> SweepSpec:
    return spec_from_dict({"name": "t", "bits": ["W8A8", "W4A8"], "num_trials": 1, **content})


def test_each_model_has_a_group_for_each_target_and_bit_width() -> None:
    made = spec(models=["bundled:digits_resnet8"], targets=["research", "openvino"])
    keys = [group.key for group in made.groups]
    assert keys == [
        "digits_resnet8-W8A8",
        "digits_resnet8-W4A8",
        "digits_resnet8-W8A8-openvino",
        "digits_resnet8-W4A8-openvino",
    ]
    assert [group.base.quant.target for group in made.groups] == ["research"] * 2 + ["openvino"] * 2
    assert [run_config(made, group, {}).name for group in made.groups] == keys


def test_without_targets_the_groups_are_those_of_the_base() -> None:
    assert [group.key for group in spec().groups] == ["digits_resnet8-W8A8", "digits_resnet8-W4A8"]
    made = spec(base={"quant": {"target": "litert"}})
    assert [group.key for group in made.groups] == ["digits_resnet8-W8A8-litert", "digits_resnet8-W4A8-litert"]


def test_a_search_for_two_objectives_is_one_for_each_target() -> None:
    made = spec(targets=["openvino", "litert"], second_objective="size_bytes", scheduler="none")
    assert [group.key for group in made.groups] == ["digits_resnet8-openvino", "digits_resnet8-litert"]
    portable = {"quant": {"portable": True}}
    made = spec(targets=["openvino"], second_objective="bitops", scheduler="none", base=portable)
    assert [group.key for group in made.groups] == ["digits_resnet8-openvino_portable"]
    run = run_config(made, made.groups[0], {"bits": "W4A8"})
    assert (run.quant.weight_bits, run.quant.target, run.name) == (
        4,
        "openvino",
        "digits_resnet8-W4A8-openvino_portable",
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"targets": []}, "`targets` must be a list with at least one entry"),
        ({"targets": "openvino"}, "`targets` must be a list with at least one entry"),
        ({"targets": ["onnx"]}, "`targets` must be one of research, onnxruntime"),
        (
            {"targets": ["openvino", "openvino"]},
            "`bits` and `targets` no entry twice, but got digits_resnet8-W8A8-openvino twice",
        ),
        (
            {"targets": ["openvino"], "base": {"quant": {"target": "litert"}}},
            r"`base.quant.target` must be left out \(the spec's key `targets` sets it\), but got 'litert'",
        ),
        ({"targets": ["litert"], "base": {"quant": {"portable": True}}}, "`quant.portable` must be false unless"),
        ({"targets": ["openvino"], "base": {"quant": {"act_points": "inputs"}}}, "`quant.act_points` must be left out"),
        ({"space": {"quant.target": {"type": "choice", "values": ["openvino"]}}}, "engines are groups .*`targets`"),
        ({"space": {"quant.portable": {"type": "choice", "values": [True]}}}, "portable belong in"),
    ],
)
def test_what_is_wrong_with_targets_is_one_line(content: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        spec(**content)
    assert "\n" not in str(caught.value)
