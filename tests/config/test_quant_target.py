"""The engine of a student as a setting: what it goes with, its labels, its digest."""

from typing import Any

import pytest

from synq.config.quant import BY_RULES, TARGETS
from synq.config.run import QuantConfig, RunConfig, config_digest, config_to_dict, with_overrides
from synq.runs.record import RunRecord, run_protocol

ENGINES = [target for target in TARGETS if target != "research"]
DIGESTS = ["c6fd6bb4c38d875a", "d2e9f69462cd4760", "3965e415d6fcd34c", "8f20772a35233500", "c05ce20c8ade86b0"]
"""Of the default configuration with each target, before there were tensorrt and qnn, at version 2 of the rules."""


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target": "onnx"}, r"`quant\.target` must be one of research, onnxruntime, openvino, .*, but got 'onnx'"),
        (
            {"target": "litert", "act_points": "inputs"},
            r"`quant\.act_points` must be left out for target litert, which quantizes .*, but got 'inputs'",
        ),
        (
            {"target": "litert", "last_bits_for_input": False},
            r"`quant\.last_bits_for_input` must be left out for target litert, .*, but got False",
        ),
        (
            {"portable": True},
            r"`quant\.portable` must be false unless target is onnxruntime or openvino, .* but got true with target "
            "research",
        ),
        *(
            ({"target": target, "portable": True}, f"but got true with target {target}")
            for target in ("litert", "executorch")
        ),
        ({"target": "openvino", "weight_bits": 9}, r"`quant\.weight_bits` must be a whole number in \[2, 8\]"),
        *(
            (
                {"target": target, "act_bits": 8, **bits},
                rf"`quant\.{name}` must be 8 for target {target}, .*, but got 4",
            )
            for target in BY_RULES
            for name, bits in (
                ("act_bits", {"act_bits": 4}),
                ("first_bits", {"first_bits": 4}),
                ("last_bits", {"last_bits": 4}),
                (r"layer_act_bits\.relu", {"layer_act_bits": {"relu": 4}}),
            )
        ),
    ],
)
def test_what_does_not_go_together_is_rejected_in_one_line(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        QuantConfig(**settings)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("target", ENGINES)
def test_the_first_and_last_layer_have_eight_bits_unless_given(target: str) -> None:
    act_bits = 8 if target in BY_RULES else 4
    usual = QuantConfig(target=target, act_bits=act_bits)  # type: ignore[arg-type]
    labels = ((8, 8), "B", target, f"W4A{act_bits}-{target}")
    assert (usual.end_bits, usual.protocol, usual.points, usual.group) == labels
    if target not in BY_RULES:
        given = QuantConfig(target=target, first_bits=4, last_bits=4)  # type: ignore[arg-type]
        assert (given.end_bits, given.protocol) == ((4, 4), "A")
    assert QuantConfig(target=target, weight_bits=8, act_bits=8).protocol == "A"  # type: ignore[arg-type]


def test_further_targets_change_no_digest(monkeypatch: pytest.MonkeyPatch) -> None:
    """Finished runs of the same rules are found again."""
    monkeypatch.setattr("synq.config.identity.ENGINE_RULES", 2)
    found = [
        config_digest(RunConfig(quant=QuantConfig(target=target)))  # type: ignore[arg-type]
        for target in ("research", "onnxruntime", "openvino", "litert", "executorch")
    ]
    assert found == DIGESTS


def test_research_students_have_the_labels_that_they_had() -> None:
    for points in ("relu", "inputs"):
        quant = QuantConfig(act_points=points)  # type: ignore[arg-type]
        assert (quant.end_bits, quant.protocol, quant.points, quant.group) == ((None, None), "A", points, "W4A4")
    portable = QuantConfig(target="openvino", portable=True, weight_bits=8)
    assert (portable.points, portable.group) == ("openvino portable", "W8A4-openvino_portable")


def test_uniform_bits_keep_the_rule_and_nothing_else() -> None:
    quant = QuantConfig(target="openvino", portable=True, rounding="adaround", layer_act_bits={"relu": 8})
    assert quant.at_uniform_bits(3) == QuantConfig(
        target="openvino", portable=True, weight_bits=3, act_bits=3, first_bits=3, last_bits=3
    )
    research = QuantConfig(act_points="inputs", first_bits=8).at_uniform_bits(5)
    assert research == QuantConfig(act_points="inputs", weight_bits=5, act_bits=5)


def test_the_digest_knows_engines_and_research_digests_are_fixed() -> None:
    base = RunConfig()
    base = with_overrides(base, {"quant.act_bits": 8})
    digests = {target: config_digest(with_overrides(base, {"quant.target": target})) for target in TARGETS}
    assert len({*digests.values()}) == len(TARGETS)
    assert digests["research"] == config_digest(base)
    points = {config_digest(with_overrides(base, {"quant.act_points": rule})) for rule in ("relu", "inputs")}
    assert len(points) == 2
    portable = {"quant.target": "openvino", "quant.portable": True}
    assert config_digest(with_overrides(base, portable)) not in digests.values()
    coarser = {"quant.target": "openvino", "quant.power_of_two_scales": True}
    assert config_digest(with_overrides(base, coarser)) not in digests.values()
    explicit = {"quant.target": "openvino", "quant.first_bits": 8, "quant.last_bits": 8}
    assert config_digest(with_overrides(base, explicit)) == digests["openvino"]
    four = {"quant.target": "openvino", "quant.first_bits": 4}
    assert config_digest(with_overrides(base, four)) != digests["openvino"]


@pytest.mark.parametrize(
    ("settings", "protocol"),
    [
        ({"target": "litert"}, "B (8/8)"),
        ({"target": "litert", "last_bits": 4}, "B (8/4)"),
        ({}, "A"),
        ({"last_bits": 8}, "B (-/8)"),
    ],
)
def test_the_protocol_of_a_record_has_the_bits_that_the_engine_sets(settings: dict[str, Any], protocol: str) -> None:
    config = RunConfig(quant=QuantConfig(**settings))
    record = RunRecord(config=config_to_dict(config), protocol=config.quant.protocol)
    assert run_protocol(record) == protocol
    del record.config["quant"]["target"], record.config["quant"]["portable"]  # a record of an earlier version
    if "target" not in settings:
        assert run_protocol(record) == protocol


@pytest.mark.parametrize(
    ("settings", "found"),
    [
        ({"target": "litert"}, "litert and learned_steps none"),
        ({"learned_steps": "all"}, "openvino and learned_steps all"),
    ],
)
def test_power_of_two_scales_are_for_one_engine(settings: dict[str, Any], found: str) -> None:
    with pytest.raises(
        ValueError, match=f"`quant.power_of_two_scales` must be false unless .* got true with target {found}$"
    ):
        QuantConfig(**{"target": "openvino", "power_of_two_scales": True, **settings})
    kept = QuantConfig(target="openvino", power_of_two_scales=True).at_uniform_bits(8)
    assert kept.power_of_two_scales and not QuantConfig(target="openvino").at_uniform_bits(8).power_of_two_scales
