"""The widths that are chosen under limits: the solver, and the command."""

import itertools
import json
import math
import random
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from support.small_nets import trained
from synq.cli import run
from synq.config.run import QuantConfig, RunConfig, TeacherConfig, config_from_dict
from synq.mixed_precision.ilp import Key, Limit, Product, choose_bits
from synq.mixed_precision.problem import MixedPrecisionProblem
from synq.quant.student import Student, build_student, quantize_model
from synq.teacher.teacher import load_teacher

WIDTHS = [2, 4, 8]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_the_chosen_widths_are_the_best_of_all_that_fit(data: st.DataObject) -> None:
    weights: list[Key] = [("weight", f"layer{i}") for i in range(data.draw(st.integers(1, 3)))]
    activations: list[Key] = [("activation", f"relu{i}") for i in range(data.draw(st.integers(0, 2)))]
    scale = data.draw(st.sampled_from([1.0, 1e-5, 1e-9]))
    number = st.integers(0, 10**6).map(lambda part: scale * part / 10**4)
    keys = [*weights, *activations]
    losses = {key: {bits: data.draw(number) for bits in WIDTHS} for key in keys}
    if data.draw(st.booleans()):  # a width that is given
        losses[keys[0]] = {4: losses[keys[0]][4]}
    sizes = {key: data.draw(st.integers(1, 1000)) for key in weights}
    single = {key: {bits: float(math.ceil(bits * size / 8)) for bits in WIDTHS} for key, size in sizes.items()}
    products = [
        Product(
            factor=data.draw(st.integers(1, 1000)),
            tensor=weight,
            others=tuple(data.draw(st.lists(st.sampled_from(activations), min_size=1, unique=True))),
        )
        for weight in weights
        if activations
    ]
    tied = [activations] if len(activations) > 1 and data.draw(st.booleans()) else []
    free = [Limit(name="a", most=math.inf, single=single), Limit(name="b", most=math.inf, products=products)]
    everything = [dict(zip(keys, choice, strict=True)) for choice in itertools.product(*(losses[key] for key in keys))]
    everything = [choice for choice in everything if all(len({choice[key] for key in same}) == 1 for same in tied)]
    sample = data.draw(st.sampled_from(everything))
    limits = [Limit(name=x.name, most=x.spent(sample), single=x.single, products=x.products) for x in free]

    def total(choice: dict[Key, int]) -> float:
        return sum(losses[key][bits] for key, bits in choice.items())

    def fits(choice: dict[Key, int]) -> bool:
        return all(limit.spent(choice) <= limit.most for limit in limits)

    chosen = choose_bits(losses, limits, tied)
    assert chosen in everything and fits(chosen)
    assert total(chosen) == pytest.approx(min(total(choice) for choice in everything if fits(choice)), rel=1e-6)


def test_differences_below_the_solvers_tolerance_count() -> None:
    """Losses over eight orders of magnitude, sizes that are nearly equal, a limit that one choice just meets."""
    draw = random.Random(0)
    for _ in range(40):
        keys: list[Key] = [("weight", f"layer{i}") for i in range(4)]
        losses = {key: {bits: 10 ** draw.uniform(-7, 1) for bits in WIDTHS} for key in keys}
        sizes = {key: 10**7 + draw.randint(-30, 30) for key in keys}
        single = {key: {bits: float(bits * size) for bits in WIDTHS} for key, size in sizes.items()}
        everything = [dict(zip(keys, choice, strict=True)) for choice in itertools.product(WIDTHS, repeat=4)]
        most = Limit(name="a", most=math.inf, single=single).spent(draw.choice(everything))
        limit = Limit(name="a", most=most, single=single)
        chosen = choose_bits(losses, [limit])
        fitting = (choice for choice in everything if limit.spent(choice) <= most)
        best = min(sum(losses[key][bits] for key, bits in choice.items()) for choice in fitting)
        assert sum(losses[key][bits] for key, bits in chosen.items()) == pytest.approx(best, rel=1e-6)


def test_limits_below_the_least_widths_are_refused() -> None:
    key: Key = ("weight", "a")
    with pytest.raises(
        ValueError,
        match="`max-bytes` must be at least 10, the cost of the lowest bit-widths to choose from, but got 9",
    ):
        choose_bits({key: {2: 1.0}}, [Limit(name="max-bytes", most=9, single={key: {2: 10}})])


def test_a_limit_counts_the_most_bits_of_joined_inputs() -> None:
    a, b, w = ("activation", "a"), ("activation", "b"), ("weight", "w")
    limit = Limit(name="x", most=0, products=[Product(factor=3, tensor=w, others=(a, b))])  # type: ignore[arg-type]
    assert limit.spent({a: 2, b: 5, w: 4}) == 3 * 4 * 5  # type: ignore[dict-item]


@pytest.mark.parametrize("points", ["relu", "inputs"])
def test_the_problem_of_a_student_counts_what_its_account_counts(points: str) -> None:
    quant = QuantConfig(act_points=points, weight_bits=3, act_bits=5, layer_weight_bits={"conv1": 7})  # type: ignore[arg-type]
    teacher = load_teacher(TeacherConfig())
    problem = MixedPrecisionProblem(build_student(teacher, quant), quant, activations=True)
    assert problem.bitops_limit(None).most == build_student(teacher, quant).bitops
    assert ("weight", "conv1") not in problem.free and ("weight", "linear") in problem.free
    changed = {key: 2 + index % 7 for index, key in enumerate(problem.free)}
    student = build_student(teacher, problem.with_bits(changed))
    again = MixedPrecisionProblem(student, quant, activations=True)
    assert again.as_given == {**problem.as_given, **changed}
    assert problem.bitops_limit(None).spent(again.as_given) == student.bitops
    weights = [row for row in student.rows if row.role == "weight"]
    assert problem.bytes_limit(None).spent(again.as_given) == sum(
        math.ceil(row.numel * row.bits / 8) for row in weights
    )


def test_for_an_engine_the_first_and_last_layers_are_no_choice_and_names_are_those_of_tensors() -> None:
    quant = QuantConfig(target="openvino", weight_bits=3, act_bits=5, layer_act_bits={"relu_1": 6})
    teacher = load_teacher(TeacherConfig())
    student = build_student(teacher, quant)
    problem = MixedPrecisionProblem(student, quant, activations=True)
    fixed = {key: bits for key, bits in problem.as_given.items() if key not in problem.free}
    read_by_no_layer = (
        "relu_6",
        "stage1_0_bn2",
        "stage2_0_bn2",
        "stage3_0_bn2",
    )  # only by a sum or a pool: a byte each
    assert fixed == {
        ("weight", "conv1"): 8,
        ("weight", "linear"): 8,
        ("activation", "x"): 8,
        ("activation", "pool"): 8,
        ("activation", "relu_1"): 6,
        **{("activation", name): 8 for name in read_by_no_layer},
    }
    assert not problem.tied
    changed = {key: 2 + index % 7 for index, key in enumerate(problem.free)}
    again = build_student(teacher, problem.with_bits(changed))
    assert problem.bitops_limit(None).spent({**problem.as_given, **changed}) == again.bitops


def test_what_is_named_or_placed_is_no_choice() -> None:
    quant = QuantConfig(act_points="inputs", first_bits=8, last_bits=7, layer_act_bits={"stage1_0_conv2": 5})
    student = build_student(load_teacher(TeacherConfig()), quant)
    problem = MixedPrecisionProblem(student, quant, activations=True)
    fixed = {key: bits for key, bits in problem.as_given.items() if key not in problem.free}
    assert sorted(fixed.values()) == [5, 7, 7, 8, 8]
    assert {("weight", "conv1"), ("weight", "linear")} < set(fixed)
    only_weights = MixedPrecisionProblem(student, quant, activations=False)
    assert {role for role, _ in only_weights.free} == {"weight"}


class _Shared(nn.Module):
    """The last layer was called before; another one reads what it reads, and its inputs are joined with the image."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(11, 8, 1)
        self.shared, self.beside = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.relu(self.shared(F.relu(self.first(x))))
        y = F.relu(self.middle(torch.cat([y, x], 1)))
        return (self.beside(y) + self.shared(y)).mean((2, 3))


@pytest.mark.parametrize("points", ["relu", "inputs"])
@pytest.mark.parametrize("ends", [{}, {"first_bits": 8}, {"last_bits": 8}])
def test_layers_that_are_called_twice(points: str, ends: dict[str, int]) -> None:
    quant = QuantConfig(act_points=points, **ends)  # type: ignore[arg-type]
    teacher = trained(_Shared())

    def build(quant: QuantConfig) -> Student:
        return quantize_model(
            teacher,
            QuantConfig(
                weight_bits=4,
                act_bits=4,
                act_points=quant.act_points,
                first_bits=quant.first_bits,
                last_bits=quant.last_bits,
                layer_weight_bits=quant.layer_weight_bits,
                layer_act_bits=quant.layer_act_bits,
            ),
        )

    student = build(quant)
    problem = MixedPrecisionProblem(student, quant, activations=True)
    losses = {key: {b: (1 + i % 3) * 4.0**-b for b in WIDTHS} for i, key in enumerate(problem.as_given)}
    limits = [problem.bytes_limit(None), problem.bitops_limit(None)]
    assert limits[1].most == student.bitops
    chosen = choose_bits(problem.options(losses, WIDTHS), limits, problem.tied)
    made = build(problem.with_bits(chosen))
    assert MixedPrecisionProblem(made, quant, activations=True).as_given == chosen
    assert made.bitops <= student.bitops
    if "last_bits" in ends:
        assert chosen["weight", "shared"] == 8 and ("weight", "beside") in problem.free


def _words(folder: Path) -> list[str]:
    words = ["--synthesis.num_images", "32", "--synthesis.iterations", "10", "--synthesis.start", "white"]
    words += ["--evaluation.heldout_images", "16", "--finetune.batch_size", "16"]
    return [*words, "--runtime.output_dir", str(folder), "--runtime.device", "cpu"]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder that `synq mixed-precision` makes for the bundled teacher."""
    folder = tmp_path_factory.mktemp("mixed-precision")
    assert run(["mixed-precision", "bundled:digits_resnet8", "--candidates", "3", "4", "6", *_words(folder)]) == 0
    (made,) = folder.glob("run-mixed-precision-*")
    return made


def test_the_command_writes_a_run_no_larger_than_the_uniform_one(found: Path) -> None:
    config = config_from_dict(RunConfig, json.loads((found / "settings.json").read_text()))
    widths = config.quant.layer_weight_bits
    assert set(widths.values()) <= {3, 4, 6} and len(set(widths.values())) > 1
    assert config.quant.layer_act_bits == {}
    teacher = load_teacher(TeacherConfig())
    uniform = build_student(teacher, RunConfig().quant)
    mixed = build_student(teacher, config.quant)
    assert mixed.size_bytes <= uniform.size_bytes and config.quant.protocol == "B"
    lines = (found / "scan.csv").read_text().splitlines()
    assert lines[0] == "tensor,role,bits,kl,sqnr_db,numel,macs" and len(lines) == 1 + 3 * len(widths)


@pytest.mark.parametrize("points", ["relu", "inputs"])
def test_activations_are_chosen_within_the_bit_operations(
    points: str, found: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--candidates", "3", "4", "6", "--quant.act_points", points, *_words(found.parent)]
    words += ["--runtime.precision", "fp64"] if points == "inputs" else []
    assert run(["mixed-precision", "bundled:digits_resnet8", "--activations", *words]) == 0
    out = capsys.readouterr().out
    config = config_from_dict(RunConfig, json.loads(Path(out.split()[-1]).read_text()))
    assert len({*config.quant.layer_act_bits.values()}) > 1
    teacher = load_teacher(TeacherConfig())
    uniform = build_student(teacher, QuantConfig(act_points=points))  # type: ignore[arg-type]
    mixed = build_student(teacher, config.quant)
    assert mixed.size_bytes <= uniform.size_bytes and mixed.bitops <= uniform.bitops
    now, chosen = (line for line in out.splitlines() if line.startswith(("now:", "chosen:")))
    assert f" {uniform.bitops:,} bit operations" in now and f" {mixed.bitops:,} bit operations" in chosen


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--candidates", "9"], "`candidates` must be a number in [2, 8], but got 9"),
        (["nosuch"], "`teacher.spec` must read SOURCE:NAME"),
        (["--quant.nosuch", "3"], "`quant.nosuch` must be a known key"),
        (["--max-bitops", "nan"], "`max-bitops` must be a number >= 0, but got nan"),
        (["--activation-factor", "-1"], "`activation-factor` must be a finite number >= 0, but got -1"),
    ],
)
def test_bad_words_are_refused(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["mixed-precision", *words]) == 2
    assert message in capsys.readouterr().err


def test_widths_that_are_named_stay_and_count(found: Path, capsys: pytest.CaptureFixture[str]) -> None:
    again = [
        "mixed-precision",
        "--config",
        str(found / "settings.json"),
        "--max-bytes",
        "inf",
        "--candidates",
        "3",
        "8",
    ]
    named = ["--quant.layer_weight_bits", "conv1=5,stage1_0_conv1=6", "--quant.last_bits", "7"]
    assert run([*again, *named, "--max-bitops", "1e99"]) == 0
    out = capsys.readouterr().out
    config = config_from_dict(RunConfig, json.loads(Path(out.split()[-1]).read_text()))
    widths = config.quant.layer_weight_bits
    assert widths == {"conv1": 5, "stage1_0_conv1": 6, **dict.fromkeys(widths.keys() - {"conv1", "stage1_0_conv1"}, 8)}
    assert "linear" not in widths and config.quant.last_bits == 7
    student = build_student(load_teacher(TeacherConfig()), config.quant)
    (line,) = [line for line in out.splitlines() if line.startswith("chosen:")]
    assert f" {student.bitops:,} bit operations" in line


def test_activations_alone_can_be_chosen(found: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--config", str(found / "settings.json"), "--quant.layer_weight_bits", "*=4", "--candidates", "3", "8"]
    assert run(["mixed-precision", "--activations", *words]) == 0
    config = config_from_dict(RunConfig, json.loads(Path(capsys.readouterr().out.split()[-1]).read_text()))
    assert config.quant.layer_weight_bits == {"*": 4} and {*config.quant.layer_act_bits.values()} == {3, 8}


def test_limits_that_cannot_be_met_are_refused_before_any_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["mixed-precision", "bundled:digits_resnet8", "--candidates", "8", *_words(tmp_path)]) == 2
    assert "`max-bytes` must be at least" in capsys.readouterr().err and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--quant.layer_weight_bits", "none", "--max-bytes", "100"], "`max-bytes` must be at least"),
        ([], "`quant` must leave a bit-width to choose"),
    ],
)
def test_what_leaves_no_choice_is_one_line(
    found: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["mixed-precision", "--config", str(found / "settings.json"), *words]) == 2
    assert message in capsys.readouterr().err
