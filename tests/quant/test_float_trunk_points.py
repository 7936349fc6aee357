"""Which tensors of a network with LayerNorm and attention are on a grid."""

import pytest

from support.token_nets import SIZE, Joined, Separate, TokenNet, spread
from synq.config.quant import QuantConfig
from synq.network.tracing import trace_classifier
from synq.quant.student import quantize_model

QUANT = QuantConfig(weight_bits=8, act_bits=4, target="onnxruntime")


def points(quant: QuantConfig, net: TokenNet) -> dict[str, int]:
    student = quantize_model(trace_classifier(spread(net), SIZE), quant)
    rows = [row for row in student.rows if row.role == "activation"]
    return {row.name: row.bits for row in rows if row.bits < 32 and not row.note}


def test_layers_and_products_read_codes_and_all_else_is_in_floats() -> None:
    found = points(QUANT, TokenNet(Separate))
    assert found == {
        "x": 8,
        "patch": 8,
        "blocks_0_norm1": 4,
        "blocks_0_attention_q": 4,
        "blocks_0_attention_k": 4,
        "blocks_0_attention_v": 4,
        "softmax": 4,
        "matmul_1": 4,
        "blocks_0_norm2": 4,
        "blocks_0_mlp_1": 4,
        "getitem": 8,
    }


def test_query_key_and_value_of_one_layer_have_grids_of_their_own() -> None:
    found = points(QUANT, TokenNet(Joined))
    assert len([name for name, bits in found.items() if bits == 4]) == 8
    assert "blocks_0_attention_qkv" not in found


def test_attention_in_floats_leaves_the_inputs_of_layers() -> None:
    quant = QuantConfig(weight_bits=8, act_bits=4, target="onnxruntime", float_attention=True)
    assert [*points(quant, TokenNet(Separate))] == [
        *("x", "patch", "blocks_0_norm1", "matmul_1", "blocks_0_norm2", "blocks_0_mlp_1", "getitem")
    ]


def test_bits_by_name() -> None:
    quant = QuantConfig(weight_bits=8, act_bits=4, target="onnxruntime", layer_act_bits={"softmax": 8})
    assert points(quant, TokenNet(Separate))["softmax"] == 8


def test_attention_in_floats_is_for_the_engine_that_has_it() -> None:
    with pytest.raises(ValueError, match=r"`quant\.float_attention` must be false unless target is onnxruntime"):
        QuantConfig(target="litert", float_attention=True)
