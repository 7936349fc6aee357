"""Each measure against its slow twin; each view does what it says, the same each time; the study's table counts right."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from support import reference
from synq.commands.fidelity_study import main
from synq.common.exit_codes import USER_ERROR
from synq.config.run import RunConfig, with_overrides
from synq.evaluation import fidelity
from synq.pipeline import run
from synq.runs.record import RunRecord, write_record
from synq.sweeps.studies.fidelity_study import MEASURES, UNIONS, VIEWS
from synq.sweeps.studies.rank_table import COLUMNS, markdown, rank_correlation, table

pytestmark = pytest.mark.usefixtures("torch_rng_untouched")


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("name", MEASURES)
@pytest.mark.parametrize("classes", [2, 7])
def test_measure_equals_its_twin(name: str, classes: int) -> None:
    teacher, student = 3 * draw(20, classes), 3 * draw(20, classes, seed=1)
    got = MEASURES[name](teacher, student)
    expected = [
        reference.fidelity_measures(t, s)[name] for t, s in zip(teacher.tolist(), student.tolist(), strict=True)
    ]
    assert got.dtype == torch.float64
    assert got.tolist() == pytest.approx(expected, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("name", MEASURES)
def test_measure_of_certain_answers_is_finite_and_of_equal_ones_is_least(name: str) -> None:
    """A certain teacher has probabilities that are 0 in float32: 0 log 0 must not be NaN."""
    logits = torch.tensor([[400.0, 0.0, 0.0], [0.0, 400.0, 1.0], [3.0, 2.0, 1.0]])
    same, other = MEASURES[name](logits, logits), MEASURES[name](logits, logits.flip(1))
    assert torch.isfinite(same).all() and torch.isfinite(other).all()
    assert same.mean() < other.mean()
    if name != "hard_cross_entropy":
        assert same.tolist() == pytest.approx([0, 0, 0], abs=1e-9)


def test_scale_and_shift_blindness() -> None:
    teacher, student = draw(30, 5), draw(30, 5, seed=1)
    for name in MEASURES:
        shifted = MEASURES[name](teacher, student + 5)
        assert torch.allclose(shifted, MEASURES[name](teacher, student), atol=1e-4), f"{name}: a constant moves it"
        if name in ("logit_angle", "disagreement"):
            assert torch.allclose(MEASURES[name](teacher, 9 * student), MEASURES[name](teacher, student), atol=1e-6)


def test_feature_distance_by_hand() -> None:
    wanted = torch.tensor([[[[3.0, 4.0]]], [[[0.0, 0.0]]]])
    got = fidelity.feature_distance(wanted, wanted + torch.tensor([[[[0.0, 1.0]]], [[[0.0, 0.0]]]]))
    assert got.tolist() == pytest.approx([1 / 25, 0])


def net(x: Tensor) -> Tensor:
    """A teacher of three classes with a curved boundary."""
    return torch.stack([x.mean((1, 2, 3)), x[:, 0].square().mean((1, 2)) - 1, x[:, 1, 2:5].sum((1, 2)) / 9], 1)


IMAGES = torch.tensor([1.0, 2.0, 0.5])[None, :, None, None] * draw(24, 3, 8, 12) + 0.5
LABELS = torch.arange(24) % 3


@pytest.mark.parametrize("name", VIEWS)
def test_view_is_new_the_same_again_and_leaves_its_input(name: str) -> None:
    before = IMAGES.clone()
    first, again = (VIEWS[name](IMAGES, LABELS, net, generator()) for _ in range(2))
    assert torch.equal(IMAGES, before) and torch.equal(first, again)
    assert first.shape == IMAGES.shape and first.dtype == IMAGES.dtype and torch.isfinite(first).all()
    assert (name == "plain") == torch.equal(first, IMAGES)
    assert not first.requires_grad


def test_partner_is_of_another_class_and_every_such_image_occurs() -> None:
    labels = torch.tensor([0, 0, 0, 1, 2])
    seen: dict[int, set[int]] = {i: set() for i in range(5)}
    for seed in range(60):
        for i, j in enumerate(fidelity.partners(labels, generator(seed)).tolist()):
            seen[i].add(j)
    assert seen == {0: {3, 4}, 1: {3, 4}, 2: {3, 4}, 3: {0, 1, 2, 4}, 4: {0, 1, 2, 3}}
    assert fidelity.partners(torch.zeros(3, dtype=torch.int64), generator()).tolist() == [1, 2, 0]


def test_mixed_blends_image_by_image() -> None:
    x = torch.tensor([1.0, 2.0, 4.0])[:, None, None, None].expand(3, 1, 2, 2)
    partner = torch.tensor([1, 2, 0])
    assert fidelity.mixed(x, partner, 0.25)[:, 0, 0, 0].tolist() == [1.75, 3.5, 1.75]
    assert fidelity.mixed(x, partner, torch.tensor([0.0, 0.5, 1.0]))[:, 0, 1, 1].tolist() == [2.0, 3.0, 4.0]


@pytest.mark.parametrize("area", [0.25, 0.5])
def test_cut_and_erased_pixels_are_one_rectangle_of_the_area(area: float) -> None:
    partner = fidelity.partners(LABELS, generator())
    cut = fidelity.cut_mixed(IMAGES, partner, area, generator(1))
    hole = fidelity.erased(IMAGES, area, generator(1))
    changed = (cut != IMAGES).all(1)
    assert torch.equal(cut[:, 0][changed], IMAGES[partner][:, 0][changed]), "the pixels are the partner's"
    assert torch.equal((hole != IMAGES).all(1), changed), "one stream, one place"
    mean = IMAGES.mean((0, 2, 3))
    assert torch.allclose(hole.permute(0, 2, 3, 1)[changed], mean, atol=1e-6)
    side = (round(8 * area**0.5), round(12 * area**0.5))
    for mask in changed:
        rows, columns = mask.any(1), mask.any(0)
        assert (int(rows.sum()), int(columns.sum()), int(mask.sum())) == (*side, side[0] * side[1])
    assert len({tuple(mask.flatten().tolist()) for mask in changed}) > 5, "each image has a place of its own"


def test_noise_is_measured_in_the_images_own_deviation() -> None:
    added = fidelity.noisy(IMAGES, 0.5, generator()) - IMAGES
    assert (added.std((0, 2, 3)) / IMAGES.std((0, 2, 3))).tolist() == pytest.approx([0.5] * 3, rel=0.1)
    soft = fidelity.shaded(IMAGES, 0.5, generator()) - IMAGES
    assert (soft.std((0, 2, 3)) / IMAGES.std((0, 2, 3))).tolist() == pytest.approx([0.5] * 3, rel=0.1)
    step = [(x[..., 1:] - x[..., :-1]).square().mean() for x in (soft, added)]
    assert step[0] < 0.5 * step[1], "1/f noise is smooth"
    drowned = fidelity.drowned(IMAGES, 0.0, generator())
    assert torch.allclose(drowned.mean((0, 2, 3)), IMAGES.mean((0, 2, 3)), atol=0.2)
    assert torch.allclose(drowned.std((0, 2, 3)), IMAGES.std((0, 2, 3)), rtol=0.1)


def test_faded_keeps_the_mean_and_halves_the_deviation() -> None:
    half = fidelity.faded(IMAGES, 0.5)
    assert torch.allclose(half.mean((0, 2, 3)), IMAGES.mean((0, 2, 3)), atol=1e-6)
    assert torch.allclose(half.std((0, 2, 3)), IMAGES.std((0, 2, 3)) / 2)


def test_reweighted_spectrum_falls_by_frequency() -> None:
    power = torch.fft.rfft2(fidelity.reweighted(IMAGES) - IMAGES.mean((0, 2, 3), keepdim=True)).abs().square().mean(0)
    for channel in power:
        assert channel[0, 1] / channel[0, 4] == pytest.approx(16, rel=0.5), "amplitude 1/f is power 1/f^2"


def test_zoomed_is_a_part_of_the_image() -> None:
    ramp = torch.linspace(0, 1, 33)[None, None, None].expand(6, 1, 33, 33).contiguous()
    part = fidelity.zoomed(ramp, 0.5, generator())
    span = part[:, 0, 0, -1] - part[:, 0, 0, 0]
    assert span.tolist() == pytest.approx([0.5] * 6, abs=0.02)
    assert part.min() >= 0 and part.max() <= 1 and len(set(part[:, 0, 0, 0].tolist())) == 6
    assert torch.allclose(fidelity.zoomed(ramp, 1.0, generator()), ramp, atol=1e-5)


def test_adversarial_step_lowers_confidence_by_a_step_of_the_size_said() -> None:
    before = net(IMAGES).softmax(1).amax(1)
    moved = fidelity.adversarial(IMAGES, net, 0.05)
    after = net(moved).softmax(1).gather(1, net(IMAGES).argmax(1, keepdim=True))[:, 0]
    assert (after < before).all()
    steps = (moved - IMAGES).abs() / IMAGES.std((0, 2, 3), correction=0)[None, :, None, None]
    assert steps[steps > 1e-3].tolist() == pytest.approx([0.05] * int((steps > 1e-3).sum()), rel=1e-3)


def test_boundary_image_is_where_the_answer_changes() -> None:
    partner = fidelity.partners(net(IMAGES).argmax(1), generator())
    found = fidelity.on_boundary(IMAGES, partner, net, steps=12)
    assert torch.equal(net(found).argmax(1), net(IMAGES).argmax(1))
    gaps = [x.softmax(1).topk(2).values for x in (net(found), net(IMAGES))]
    assert (gaps[0][:, 0] - gaps[0][:, 1]).max() < 0.01 < (gaps[1][:, 0] - gaps[1][:, 1]).mean()


def test_rank_correlation_equals_scipy_and_the_twin_with_ties() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 6, (50, 9)).astype(float), rng.normal(size=(50, 9))
    got = rank_correlation(a, b)
    assert got.tolist() == pytest.approx([stats.spearmanr(x, y).statistic for x, y in zip(a, b, strict=True)])
    assert got.tolist() == pytest.approx(
        [reference.spearman(x, y) for x, y in zip(a.tolist(), b.tolist(), strict=True)]
    )
    assert rank_correlation(np.ones((1, 4)), b[:1, :4]).tolist() == [0.0], "a measure that says nothing ranks nothing"


def _trials(top1: list[float], **scores: list[float]) -> list[tuple[float, dict[tuple[str, str], float]]]:
    return [(value, {("plain", name): x[i] for name, x in scores.items()}) for i, value in enumerate(top1)]


def test_table_by_hand() -> None:
    top1 = [90.0, 80.0, 70.0, 60.0, 50.0]
    first = _trials(top1, kl=[2, 1, 3, 4, 5], perfect=[1, 2, 3, 4, 5], flat=[7] * 5)
    rows = {row["measure"]: row for row in table({"g": first})}
    assert set(rows["kl"]) == set(COLUMNS) and list(rows) == ["perfect", "kl", "flat"], "best first"
    assert rows["kl"]["spearman"] == pytest.approx(0.9) and rows["kl"]["kendall"] == pytest.approx(0.8)
    assert rows["kl"]["spearman_top_half"] == pytest.approx(0.5), "of 90, 80, 70"
    assert (rows["kl"]["picked_top1"], rows["kl"]["best_top1"], rows["kl"]["regret"]) == (80.0, 90.0, 10.0)
    assert rows["perfect"]["low"] == pytest.approx(1) and rows["kl"]["low"] < 0.9 < rows["kl"]["high"] + 0.11
    assert rows["kl"]["beats_reference"] == 0.5 and rows["perfect"]["beats_reference"] > 0.7
    assert rows["flat"]["beats_reference"] < 0.1
    assert (rows["flat"]["picked_top1"], rows["flat"]["spearman"]) == (70.0, 0.0), "a tie picks at random"


def test_joint_rows_are_the_mean_over_groups_and_sort_first() -> None:
    good = _trials([9.0, 8.0, 7.0], kl=[1, 2, 3], disagreement=[2, 1, 3])
    bad = _trials([9.0, 8.0, 7.0], kl=[3, 2, 1], disagreement=[2, 1, 3])
    rows = table({"g": good, "h": bad})
    assert [(row["group"], row["measure"]) for row in rows[:2]] == [("all", "disagreement"), ("all", "kl")]
    assert (rows[1]["spearman"], rows[1]["num_trials"]) == (pytest.approx(0.0), 6)
    assert rows[0]["spearman"] == pytest.approx(0.5) and rows[1]["regret"] == pytest.approx(1.0)
    text = markdown(rows, 1)
    assert text.count("| all |") == 2 and "| all | 2 | kl | plain | 6 | 0.00 |" in text, "plain KL is always shown"


@pytest.mark.slow
def test_the_door_studies_a_sweep(
    tmp_path: Path, tiny_settings: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """Students are rebuilt as they were, and what was answered once is only read the second time."""
    base = {**tiny_settings, "runtime.output_dir": str(tmp_path / "runs"), "runtime.store_dir": str(tmp_path / "store")}
    for bits in (2, 3):
        for i, lr in enumerate((1e-3, 1e-2, 1e-1)):
            widths = {"quant.weight_bits": bits, "quant.act_bits": bits, "finetune.lr": lr}
            name = f"t{bits}{i}"
            record = run(with_overrides(RunConfig(), {**base, **widths}))
            write_record(tmp_path / "records" / f"{name}.json", replace(record, name=name))
    words = [str(tmp_path), "--best", "2", "--output-dir", str(tmp_path / "study")]
    assert main(words) == 0
    first = (tmp_path / "study" / "fidelity_study.csv").read_text()
    assert first.count("\n") == 1 + 3 * (len(VIEWS) + len(UNIONS)) * (len(MEASURES) + 1)
    answers = {path: path.stat().st_mtime_ns for path in (tmp_path / "study" / "answers").iterdir()}
    assert len(answers) == 6
    assert main(words) == 0
    assert (tmp_path / "study" / "fidelity_study.csv").read_text() == first
    assert {path: path.stat().st_mtime_ns for path in answers} == answers
    assert main([*words, "--bits", "W3A3"]) == 0
    assert "W2A2" not in (tmp_path / "study" / "fidelity_study.csv").read_text()
    capsys.readouterr()

    damaged = next((tmp_path / "records").glob("t20.json"))
    damaged.write_text(damaged.read_text().replace('"kl": ', '"kl": 1'))
    assert main(words) == USER_ERROR
    assert "must hold the students of its records, but t20 has KL" in capsys.readouterr().err


def test_user_errors_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path)]) == USER_ERROR
    (tmp_path / "records").mkdir()
    write_record(tmp_path / "records" / "a.json", RunRecord(name="a", status="failed"))
    assert main([str(tmp_path)]) == USER_ERROR
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 2 and "must hold completed trials with labels" in lines[1]
