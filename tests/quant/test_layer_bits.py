"""Bit-widths of single layers, by name and pattern, from the command line to the record and the files."""

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from synq.config.run import QuantConfig, RunConfig, TeacherConfig, config_digest, config_from_dict, config_to_dict
from synq.network.tracing import trace_classifier
from synq.quant.bit_patterns import BitPatterns
from synq.quant.student import Student, build_student, quantize_model
from synq.teacher.teacher import Teacher, load_teacher
from synq.train import command


@pytest.fixture(scope="module")
def teacher() -> Teacher:
    return load_teacher(TeacherConfig())


def bits_of(student: Student, role: str) -> dict[str, int]:
    return {row.name: row.bits for row in student.rows if row.role == role and row.bits < 32}


@pytest.mark.parametrize(
    ("widths", "name", "expected"),
    [
        ({"a.b": 8, "*": 3}, "a.b", 8),
        ({"*": 3, "a.b": 8}, "a.b", 8),
        ({"a*": 5, "a.b*": 6, "*": 3}, "a.bc", 6),
        ({"a?c": 5, "a*": 6}, "abc", 5),
        ({"[ab]1": 5, "*1": 6, "b*": 7}, "c1", 6),
        ({"a": 5}, "b", None),
        ({"A": 5}, "a", None),
        ({"a*": 5, "*b": 5}, "ab", 5),
        ({"layer[12]*": 5, "layer*": 6}, "layer1.0", 5),
    ],
)
def test_the_nearest_pattern_decides_whatever_the_order(
    widths: dict[str, int], name: str, expected: int | None
) -> None:
    assert BitPatterns(widths, "widths").width(name) == expected
    assert BitPatterns(dict(reversed(widths.items())), "widths").width(name) == expected


def test_equally_specific_patterns_that_disagree_are_rejected() -> None:
    with pytest.raises(
        ValueError, match=r"one bit-width for 'ab', but the patterns '\*b' and 'a\*' are equally specific"
    ):
        BitPatterns({"a*": 5, "*b": 6}, "widths").width("ab")


def test_weights_and_activations_of_single_layers(teacher: Teacher) -> None:
    quant = QuantConfig(layer_weight_bits={"conv1": 8, "stage3*": 3}, layer_act_bits={"relu_6": 7})
    student = build_student(teacher, quant)
    weights, activations = bits_of(student, "weight"), bits_of(student, "activation")
    assert weights["conv1"] == 8 and weights["stage1.0.conv1"] == 4 and weights["stage3.0.conv2"] == 3
    assert activations["relu_6"] == 7 and activations["relu_5"] == 4
    plain = build_student(teacher, QuantConfig())
    numbers = {row.name: row.numel for row in plain.rows if row.role == "weight"}
    saved = numbers["stage3.0.conv1"] + numbers["stage3.0.conv2"] - 4 * numbers["conv1"]
    assert plain.size_bytes - student.size_bytes == saved // 8


def test_under_inputs_the_name_is_that_of_the_layer_that_reads(teacher: Teacher) -> None:
    quant = QuantConfig(act_points="inputs", first_bits=8, layer_act_bits={"linear": 6, "stage2*conv2": 3})
    found = bits_of(build_student(teacher, quant), "activation")
    others = dict.fromkeys(["relu", "relu_1", "relu_2", "relu_4", "relu_5"], 4)
    assert found == {"x": 8, **others, "relu_3": 3, "flatten": 6}


def test_layers_that_read_one_tensor_have_one_width_for_it() -> None:
    class Fork(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
            self.a, self.b, self.fc = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1), nn.Linear(4, 5)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.relu(self.bn(self.stem(x)))
            return self.fc((self.a(x) + self.b(x)).mean((2, 3)))

    traced = trace_classifier(Fork(), (3, 8, 8))
    widths = {"weight_bits": 4, "act_bits": 4, "act_points": "inputs"}
    same = quantize_model(traced, QuantConfig(**widths, layer_act_bits={"a": 8, "b": 8}))  # type: ignore[arg-type]
    assert bits_of(same, "activation")["relu"] == 8
    with pytest.raises(
        ValueError, match="must set one bit-width for layers that read the same tensor, but got 2 for b and 4 for a"
    ):
        quantize_model(traced, QuantConfig(**widths, layer_act_bits={"b": 2}))  # type: ignore[arg-type]


def test_a_name_goes_before_first_and_last_bits(teacher: Teacher) -> None:
    quant = QuantConfig(first_bits=8, last_bits=8, layer_weight_bits={"conv1": 5, "*": 3})
    weights = bits_of(build_student(teacher, quant), "weight")
    assert weights["conv1"] == 5 and weights["linear"] == 3


@pytest.mark.parametrize(
    ("field", "widths", "message"),
    [
        ("layer_weight_bits", {"conv9": 8}, r"'conv9', which matches none; did you mean `conv1`\?"),
        ("layer_weight_bits", {"zzz*": 8}, r"'zzz\*', which matches none; there are conv1, "),
        (
            "layer_act_bits",
            {"conv1": 8},
            r"`quant.layer_act_bits` must name quantized tensors, .*there are relu, relu_1, relu_2",
        ),
        ("layer_act_bits", {"*function*": 8}, r"which matches none"),
    ],
)
def test_a_name_that_matches_nothing_is_rejected(
    teacher: Teacher, field: str, widths: dict[str, int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        build_student(teacher, QuantConfig(**{field: widths}))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"conv1": 9}, r"`quant.layer_weight_bits.conv1` must be a whole number in \[2, 8\], but got 9"),
        ({"conv1": "x"}, r"`quant.layer_weight_bits.conv1` must be a whole number, but got 'x'"),
        ({"conv1": True}, r"must be a whole number, but got True"),
        (["conv1"], r"must be a table of names and values, but got \['conv1'\]"),
        (
            {"stage1": {"0": 8}},
            r"`quant.layer_weight_bits.stage1` must be one value \(in TOML, quote a name with dots\)",
        ),
    ],
)
def test_widths_are_checked_where_they_are_written(value: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config_from_dict(RunConfig, {"quant": {"layer_weight_bits": value}})


def test_words_tables_and_records_say_the_same() -> None:
    widths = {"features.0": 8, "head*": 6}
    from_table = config_from_dict(RunConfig, {"quant": {"layer_weight_bits": widths}})
    spellings: Mapping[str, list[str]] = {
        "commas": ["--quant.layer_weight_bits", "features.0=8,head*=6"],
        "words": ["--quant.layer_weight_bits", "head*=6", "features.0=8"],
        "equals": ["--quant.layer_weight_bits=features.0=8,head*=6"],
    }
    for words in spellings.values():
        from_words = command.read(words)["config"]
        assert from_words.quant == from_table.quant and config_digest(from_words) == config_digest(from_table)
    stored = config_to_dict(from_table)
    assert config_from_dict(RunConfig, stored) == from_table and stored["quant"]["layer_weight_bits"] == widths
    stored["quant"]["layer_weight_bits"].clear()
    assert from_table.quant.layer_weight_bits == widths, "nothing is shared"
    assert command.read(["--quant.layer_weight_bits", "none"])["config"] == command.read([])["config"]
    for words, message in ((["conv1"], "must be given as NAME=VALUE"), (["a=3", "a=4"], "must have no name twice")):
        with pytest.raises(ValueError, match=message):
            command.read(["--quant.layer_weight_bits", *words])


def test_runs_without_them_keep_their_digest_and_mixed_ones_are_protocol_b(tmp_path: Path) -> None:
    assert config_digest(RunConfig()) != config_digest(RunConfig(quant=QuantConfig(layer_weight_bits={"conv1": 8})))
    uniform = QuantConfig(layer_weight_bits={"*": 4}, layer_act_bits={"*": 4})
    assert (uniform.protocol, uniform.layer_label) == ("A", "")
    mixed = QuantConfig(layer_weight_bits={"conv1": 8, "a": 3}, layer_act_bits={"relu": 8})
    assert mixed.protocol == "B" and mixed.layer_label == "a=W3 conv1=W8 relu=A8"
