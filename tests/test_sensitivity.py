"""The scan of single tensors, and the widths chosen from it under a budget."""

import itertools
import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_nets import NETS, images, rounded, trained
from torch import Tensor, fx

from synq.cli import run
from synq.configs import RunConfig, TeacherConfig, config_from_dict
from synq.fidelity import kl
from synq.pipeline import build_student
from synq.quant_layers import quantizers_bypassed
from synq.sensitivity import choose_widths, logits_of, scan_quantizers, scan_widths, sqnr_db, width_costs
from synq.students import observe_ranges, quantize_model
from synq.teachers import load_teacher

Scanned = tuple[fx.GraphModule, fx.GraphModule, Tensor, Tensor]


@pytest.fixture(scope="module")
def scanned() -> Scanned:
    """Teacher, 4-bit student, images and the teacher's logits."""
    teacher = trained(NETS["residual"][0]())
    batch = images(16)
    return teacher, rounded(teacher, 4, batch).net, batch, logits_of(teacher, batch)


def test_sqnr_is_that_of_its_formula() -> None:
    reference = torch.tensor([[3.0, 4.0]])
    assert sqnr_db(reference, torch.tensor([[3.0, 3.5]])) == pytest.approx(10 * math.log10(25 / 0.25))
    assert sqnr_db(reference, reference) == math.inf


def test_a_layer_is_measured_with_all_else_float(scanned: Scanned) -> None:
    teacher, net, batch, reference = scanned
    state = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    (score,) = [s for s in scan_widths(net, batch, reference, [3]) if s.name == "conv2"]
    alone = quantize_model(teacher, weight_bits=3, act_bits=8).net
    observe_ranges(alone, batch, act_range="minmax")
    with quantizers_bypassed(alone):
        alone.get_submodule("conv2").weight_quantizer.enabled = True  # type: ignore[union-attr]
        found = logits_of(alone, batch)
    assert score.kl == pytest.approx(float(kl(reference, found).mean()), abs=1e-9)
    assert score.sqnr_db == pytest.approx(sqnr_db(reference, found), abs=1e-3)
    after = net.state_dict()
    assert after.keys() == state.keys() and all(torch.equal(after[name], state[name]) for name in state)
    assert net.get_submodule("conv2").weight_quantizer.bits == 4  # type: ignore[union-attr]


def test_every_quantizer_of_a_student_has_its_line(scanned: Scanned) -> None:
    _, net, batch, reference = scanned
    scores = scan_quantizers(net, batch, reference)
    assert [(s.name, s.role, s.bits) for s in scores if s.role == "weight"] == [
        (name, "weight", 4) for name in ("conv1", "conv2", "conv3", "fc")
    ]
    assert [s.name for s in scores if s.role == "activation"] == ["relu", "relu_1", "relu_2"]
    assert all(s.sqnr_db < 60 for s in scores), "each does something"
    for score in scores:  # the same as a whole pass with all other rounding switched off
        name = score.name if score.role == "weight" else f"act_quantizers.{score.name}"
        module = net.get_submodule(name)
        with quantizers_bypassed(net), torch.no_grad():
            getattr(module, "weight_quantizer", module).enabled = True
            assert score.sqnr_db == sqnr_db(reference, net(batch))


def test_more_bits_cost_less_fidelity_and_more_bytes(scanned: Scanned) -> None:
    teacher, net, batch, reference = scanned
    scores = scan_widths(net, batch, reference, [2, 4, 8])
    for name in ("conv1", "conv2", "conv3", "fc"):
        losses = [s.kl for s in scores if s.name == name]
        assert losses == sorted(losses, reverse=True)
    rows = quantize_model(teacher, weight_bits=4, act_bits=4).rows
    costs = width_costs(rows, [2, 4, 8], "bytes")
    assert costs["conv1"] == {2: 54, 4: 108, 8: 216}
    bitops = width_costs(rows, [2, 4], "bitops")
    assert bitops["conv1"] == {2: 216 * 256 * 2 * 32, 4: 216 * 256 * 4 * 32}


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_the_chosen_widths_are_the_best_of_all_that_fit(data: st.DataObject) -> None:
    layers, widths = [f"layer{i}" for i in range(data.draw(st.integers(1, 4)))], [2, 4, 8]
    scale = data.draw(st.sampled_from([1.0, 1e-5, 1e-9]))
    number = st.integers(0, 10**6).map(lambda part: scale * part / 10**4)
    losses = {name: {bits: data.draw(number) for bits in widths} for name in layers}
    costs = {name: {bits: bits * data.draw(st.integers(1, 1000)) for bits in widths} for name in layers}
    everything = list(itertools.product(widths, repeat=len(layers)))

    def total(table: dict[str, dict[int, float]] | dict[str, dict[int, int]], choice: tuple[int, ...]) -> float:
        return sum(table[name][bits] for name, bits in zip(layers, choice, strict=True))

    budget = total(costs, data.draw(st.sampled_from(everything)))
    chosen = choose_widths(losses, costs, budget)
    found = tuple(chosen[name] for name in layers)
    best = min(total(losses, choice) for choice in everything if total(costs, choice) <= budget)
    assert total(costs, found) <= budget
    assert total(losses, found) == pytest.approx(best, rel=1e-6)


def test_a_budget_below_the_least_widths_is_refused() -> None:
    with pytest.raises(ValueError, match="`budget` must be at least 10, what the least widths cost, but got 9"):
        choose_widths({"a": {2: 1.0}}, {"a": {2: 10}}, 9)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder that `synq widths` makes for the bundled teacher."""
    folder = tmp_path_factory.mktemp("widths")
    words = ["--synthesis.num_images", "32", "--synthesis.iterations", "10", "--synthesis.start", "white"]
    words += ["--evaluation.heldout_images", "16", "--finetune.batch_size", "16"]
    words += ["--runtime.output_dir", str(folder), "--runtime.device", "cpu"]
    assert run(["widths", "bundled:digits_resnet8", "--candidates", "3", "4", "6", *words]) == 0
    (made,) = folder.glob("run-widths-*")
    return made


def test_the_command_writes_a_run_no_larger_than_the_uniform_one(found: Path) -> None:
    config = config_from_dict(RunConfig, json.loads((found / "config.json").read_text()))
    widths = config.quant.layer_weight_bits
    assert set(widths.values()) <= {3, 4, 6} and len(set(widths.values())) > 1
    teacher = load_teacher(TeacherConfig())
    uniform = build_student(teacher, RunConfig().quant)
    mixed = build_student(teacher, config.quant)
    assert mixed.size_bytes <= uniform.size_bytes and config.quant.protocol == "B"
    lines = (found / "scan.csv").read_text().splitlines()
    assert lines[0] == "layer,bits,kl,sqnr_db,bytes,bitops" and len(lines) == 1 + 3 * len(widths)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--candidates", "9"], "`candidates` must be a number in [2, 8], but got 9"),
        (["nosuch"], "`teacher.spec` must read SOURCE:NAME"),
        (["--quant.nosuch", "3"], "`quant.nosuch` must be a known key"),
    ],
)
def test_bad_words_are_refused(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["widths", *words]) == 2
    assert message in capsys.readouterr().err


def test_widths_that_are_named_stay_and_count(found: Path, capsys: pytest.CaptureFixture[str]) -> None:
    again = ["widths", "--config", str(found / "config.json"), "--cost", "bitops", "--candidates", "3", "8"]
    named = ["--quant.layer_weight_bits", "conv1=5,stage1_0_conv1=6", "--quant.last_bits", "7"]
    assert run([*again, *named, "--budget", "1e99"]) == 0
    out = capsys.readouterr().out
    config = config_from_dict(RunConfig, json.loads(Path(out.split()[-1]).read_text()))
    widths = config.quant.layer_weight_bits
    assert widths == {"conv1": 5, "stage1_0_conv1": 6, **dict.fromkeys(widths.keys() - {"conv1", "stage1_0_conv1"}, 8)}
    assert "linear" not in widths and config.quant.last_bits == 7
    student = build_student(load_teacher(TeacherConfig()), config.quant)
    (line,) = [line for line in out.splitlines() if line.startswith("chosen:")]
    assert f" {student.bitops:,} bit operations" in line


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--quant.layer_weight_bits", "none", "--budget", "100"], "`budget` must be at least"),
        ([], "must leave a layer whose width is to be chosen"),
        (["--budget", "nan"], "`budget` must be a finite number >= 0"),
    ],
)
def test_what_leaves_no_choice_is_one_line(
    found: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["widths", "--config", str(found / "config.json"), *words]) == 2
    assert message in capsys.readouterr().err
