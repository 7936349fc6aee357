"""Latency as a limit of a mixed-precision search: the budget, times of single steps, the constraint, the command."""

import itertools
import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from support.engine_nets import NETS, SIZE, student_for, traced
from support.mobile_nets import lowered
from synq.cli import run
from synq.config.run import QuantConfig
from synq.engines.checks import validate
from synq.engines.program import Layer, Movement, Program
from synq.engines.simulation import Simulation
from synq.export.targets.formats import FORMATS, image_size
from synq.export.verify import sums_saturate
from synq.mixed_precision.ilp import Key, Limit, check_limits, choose_bits
from synq.mixed_precision.latency import LatencyBudget, MeasuredLatency, parse_budget
from synq.mixed_precision.layer_times import LayerTimes, measure_layers
from synq.mixed_precision.problem import MixedPrecisionProblem
from synq.mixed_precision.single_steps import signature, single_step, with_output_bits, with_weight_bits
from synq.quant.layers import ActQuantizer
from synq.quant.student import quantize_model

FORM = FORMATS["onnxruntime"]


def test_a_budget_is_a_ratio_or_milliseconds() -> None:
    assert parse_budget("0.9").milliseconds(20.0) == 18.0
    assert parse_budget("12.5ms", 2) == LatencyBudget(amount=12.5, in_ms=True, threads=2)
    assert parse_budget("12 ms").milliseconds(20.0) == 12.0
    for text in ("fast", "0", "-1", "inf", "ms", "nan"):
        with pytest.raises(ValueError, match=f"`latency-budget` must be a number above 0, .* but got {text}"):
            parse_budget(text)
    with pytest.raises(ValueError, match="`latency-threads` must be at least 1, but got 0"):
        parse_budget("1", 0)


@pytest.mark.parametrize("name", ["resnet", "squeeze", "densenet", "flattened"])
def test_a_single_step_runs_in_the_engine_as_in_the_simulation(name: str) -> None:
    program, _ = lowered(name, "onnxruntime")
    for step in program.steps[1:]:
        grid = program.grids.get(step.output)
        variants = [single_step(program, step, grid)]
        if isinstance(step, Layer):
            variants.append(single_step(program, with_weight_bits(step, 4), grid))
        if grid is not None and not isinstance(step, Movement):
            variants.append(single_step(program, *with_output_bits(step, grid, 4)))
        for variant in variants:
            validate(variant)
            images = torch.randn(2, *image_size(variant), generator=torch.Generator().manual_seed(0))
            entries = FORM.session_entries if sums_saturate() else {}
            found = FORM.opener(entries)(FORM.write(variant), 1)(images)
            assert torch.equal(found, Simulation(variant)(images)), step.output


def test_a_signature_has_what_a_time_depends_on() -> None:
    program, _ = lowered("resnet", "onnxruntime")
    first, second = [step for step in program.layers() if step.layer in ("5.branch.0.0", "5.branch.2.0")]
    grid = program.grids[first.output]
    name = signature(single_step(program, first, grid))
    assert name != signature(single_step(program, with_weight_bits(first, 4), grid))
    fewer = [signature(single_step(program, *with_output_bits(first, grid, bits))) for bits in (3, 4, 8)]
    assert fewer[0] == fewer[1] != fewer[2] == name, "limits below 8 bits are one kernel"
    assert name == signature(single_step(program, second, program.grids[second.output])) or (
        program.grids[second.output].zero_point != grid.zero_point
    )


def test_times_are_measured_once_and_kept(tmp_path: Path) -> None:
    program, _ = lowered("flattened", "onnxruntime")
    layer = next(program.layers())
    options: dict[Key, list[int]] = {("weight", layer.layer): [4, 8], ("activation", layer.output): [4, 8]}
    found = measure_layers(program, FORM, options, tmp_path, rounds=3)
    [path] = tmp_path.glob("onnxruntime-*.json")
    kept = json.loads(path.read_text())
    assert kept["machine"]["cpu"] and kept["machine"]["versions"]["onnxruntime"] and kept["machine"]["threads"] == 1
    assert len(kept["steps"]) == 3, "at 8 bits the two tensors share a step"
    assert [(row["role"], row["bits"]) for row in found.rows] == list(
        itertools.product(("weight", "activation"), (4, 8))
    )
    assert all(row["ms"] > 0 for row in found.rows) and all(by_bits[8] == 0 for by_bits in found.changes.values())
    for entry in kept["steps"].values():
        entry |= {"ms": 7.0, "change_ms": 1.0}
    path.write_text(json.dumps(kept))
    again = measure_layers(program, FORM, options, tmp_path, rounds=3)
    assert {row["ms"] for row in again.rows} == {7.0}, "not measured again"


def measured(changes: dict[Key, dict[int, float]], budget: str, base: float) -> MeasuredLatency:
    times = LayerTimes(changes=changes, rows=[], machine={})
    program = Program(target="onnxruntime", image="x", logits="y", steps=(), grids={}, shapes={})
    return MeasuredLatency(budget=parse_budget(budget), base=base, times=times, form=FORM, program=program)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_the_choice_is_the_best_whose_predicted_latency_fits(data: st.DataObject) -> None:
    keys: list[Key] = [("weight", "a"), ("activation", "b"), ("activation", "c")]
    change = st.integers(-30, 30).map(lambda part: part / 100)
    changes = {key: {2: data.draw(change), 4: data.draw(change), 8: 0.0} for key in keys}
    losses = {key: {bits: data.draw(st.integers(0, 1000)) / 100 for bits in (2, 4, 8)} for key in keys}
    base = data.draw(st.sampled_from([1.0, 40.0]))
    choices = [dict(zip(keys, bits, strict=True)) for bits in itertools.product((2, 4, 8), repeat=3)]
    sample = data.draw(st.sampled_from(choices))
    free = measured(changes, "1", base)
    predicted = free.times.predicted(base, sample)
    limit = measured(changes, f"{predicted!r}ms", base).limit()
    assert limit.spent(sample) == pytest.approx(predicted)
    most = predicted + 1e-9
    limit = Limit(name=limit.name, most=most, unit="ms", single=limit.single)
    chosen = choose_bits(losses, [limit])
    fitting = [choice for choice in choices if limit.spent(choice) <= most]

    def total(choice: dict[Key, int]) -> float:
        return sum(losses[key][bits] for key, bits in choice.items())

    assert chosen in fitting and total(chosen) == pytest.approx(min(map(total, fitting)))


def test_a_budget_out_of_reach_is_one_line_with_what_can_be_reached() -> None:
    changes: dict[Key, dict[int, float]] = {("activation", "a"): {4: 0.01, 8: 0.0}, ("weight", "b"): {4: -0.002, 8: 0}}
    limit = measured(changes, "0.9", 1.0).limit()
    options = {key: list(by_bits) for key, by_bits in changes.items()}
    with pytest.raises(
        ValueError,
        match=r"`latency-budget` must be at least 0\.998 ms, the cost of the cheapest bit-widths .* got 0\.9 ms$",
    ):
        check_limits(options, [limit])
    check_limits(options, [measured(changes, "0.998", 1.0).limit()])


def test_limits_that_exclude_each_other_are_named() -> None:
    key: Key = ("activation", "a")
    limits = [
        Limit(name="max-bitops", most=5, single={key: {4: 4, 8: 8}}),
        measured({key: {4: 0.1, 8: 0.0}}, "1", 1.0).limit(),
        Limit(name="max-bytes", most=math.inf, single={key: {4: 4, 8: 8}}),
    ]
    with pytest.raises(ValueError, match="none meets `max-bitops` 5 and `latency-budget` 1 at once: raise one of them"):
        choose_bits({key: {4: 1.0, 8: 0.0}}, limits)


@pytest.mark.parametrize("name", list(NETS))
def test_free_activations_of_an_engine_are_those_that_layers_read(name: str) -> None:
    """Others keep the bits of a byte, whatever act_bits is: a scan at other bits has no line for them."""
    quant = QuantConfig(target="onnxruntime", weight_bits=4, act_bits=4)
    student = student_for(NETS[name][0](), "onnxruntime", weight_bits=4, act_bits=4)
    problem = MixedPrecisionProblem(student, quant, activations=True)
    uniform = quantize_model(traced(NETS[name][0](), SIZE), quant.at_uniform_bits(3)).net
    follow = {path for path, m in uniform.named_modules() if isinstance(m, ActQuantizer) and m.bits == 3}
    names = {path.split(".", 1)[1] for path in follow}
    assert {key[1] for key in problem.free if key[0] == "activation"} == names - set(student.at_ends)


def test_bytes_are_those_that_the_file_of_the_engine_stores() -> None:
    by_target = {}
    for target in ("onnxruntime", "litert", "research"):
        quant = QuantConfig(target=target, weight_bits=3, act_bits=8, first_bits=3, last_bits=3)  # type: ignore[arg-type]
        student = quantize_model(traced(NETS["residual"][0](), SIZE), quant)
        limit = MixedPrecisionProblem(student, quant, activations=False).bytes_limit(None)
        costs = limit.single["weight", "conv1"]
        by_target[target] = (costs[2] / costs[8], costs[3] / costs[8], costs[5] / costs[8])
    assert by_target == {"onnxruntime": (0.5, 0.5, 1.0), "litert": (1, 1, 1), "research": (0.25, 0.375, 0.625)}


SMALL = ("--synthesis.num_images", "64", "--synthesis.iterations", "2", "--candidates", "4", "8", "--activations")
FREE = ("--max-bytes", "inf", "--max-bitops", "inf")


@pytest.mark.slow
def test_the_command_measures_and_reports_the_latency(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = ["mixed-precision", "bundled:digits_resnet8", "--quant.target", "onnxruntime", *SMALL]
    args += ["--runtime.output_dir", str(tmp_path)]
    assert run([*args, *FREE, "--latency-budget", "1.0"]) == 0
    printed = capsys.readouterr().out
    [path] = tmp_path.glob("*-mixed-precision-*/latency.json")
    found = json.loads(path.read_text())
    assert found["engine"] == "ONNX Runtime" and found["machine"]["cpu"] in printed
    assert found["predicted_ratio"] <= 1.0 and 0.3 < found["measured_ratio"] < 3
    assert {row["bits"] for row in found["steps"]} == {4, 8} and {"weight", "activation"} == {
        row["role"] for row in found["steps"]
    }
    assert (
        f"predicted {found['predicted_ms']:.4g} ms" in printed and f"measured {found['measured_ms']:.4g} ms" in printed
    )
    chosen = json.loads((path.parent / "settings.json").read_text())["quant"]["layer_act_bits"]
    changes = {(row["layer"], row["bits"]): row["change_ms"] for row in found["steps"] if row["role"] == "activation"}
    assert chosen and all(bits == 8 for bits in chosen.values() if any(c > 0 for c in changes.values()))
    assert run([*args, *FREE, "--latency-budget", "0.5"]) == 2
    assert "`latency-budget` must be at least" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ((), "`latency-budget` must have an engine to be measured in, but `quant.target` is research"),
        (("--quant.target", "onnxruntime", "--latency-budget", "soon"), "`latency-budget` must be a number above 0"),
    ],
)
def test_a_wrong_budget_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], more: tuple[str, ...], message: str
) -> None:
    args = ["mixed-precision", "--runtime.output_dir", str(tmp_path), *SMALL, "--latency-budget", "0.9", *more]
    assert run(args) == 2
    printed = capsys.readouterr()
    assert message in printed.err and printed.err.count("\n") == 1 and not list(tmp_path.iterdir())
