"""The page of one run: measurements agree with the record, and failed ones are replaced by their reason."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from support.sealed import edit
from synq.commands.report import main as report
from synq.config.run import RunConfig, with_overrides
from synq.diagnostics.probe import _amplitude, _profile, probe_run
from synq.diagnostics.probe_parts import REACH, Probe
from synq.pipeline import run
from synq.runs.record import read_record, run_folder
from synq.sweeps.reports.page import Figure, Gap, Table
from synq.sweeps.reports.run_page import run_page
from synq.synthesis.lowpass import gaussian_lowpass

DRAWINGS = {
    "headline",
    "losses",
    "images",
    "images-filtered",
    "spectra",
    "spectrum-profile",
    "cam",
    "difficulty",
    "confusion",
    "layers",
    "ranges",
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_settings: dict[str, object]) -> Path:
    """Run the bundled teacher with a low-pass filter."""
    folder = tmp_path_factory.mktemp("run")
    changes = {"runtime.output_dir": str(folder), "finetune.lowpass_cutoff": 0.5, "finetune.lowpass_unit": "nyquist"}
    config = with_overrides(RunConfig(), {**tiny_settings, **changes})
    run(config)
    return run_folder(config)


@pytest.fixture(scope="module")
def probe(finished: Path) -> Probe:
    return probe_run(finished)


@pytest.mark.slow
def test_the_page_of_a_run_has_every_figure(finished: Path) -> None:
    page = run_page(finished)
    assert {figure.name for figure in page.figures()} == DRAWINGS
    assert not [block for tab in page.tabs for block in tab.blocks if isinstance(block, Gap)]
    record = read_record(finished / "record.json")
    assert f"Top-1 {record.top1:.2f} % on {record.num_eval} labeled images" in page.verdict[0]
    settings = next(
        block for tab in page.tabs for block in tab.blocks if isinstance(block, Table) and block.name == "settings"
    )
    assert {"setting": "finetune.lowpass_cutoff", "value": 0.5} in list(settings.rows)


def test_predictions_agree_with_the_record(probe: Probe) -> None:
    """All 64 labeled images are evaluated, so the accuracies are those of the record."""
    assert not isinstance(probe.predictions, str) and probe.predictions.labeled
    found, record = probe.predictions, probe.record
    assert len(found.labels) == record.num_eval == 64
    assert 100 * (found.teacher == found.labels).mean() == pytest.approx(record.teacher_top1)
    assert 100 * (found.student == found.labels).mean() == pytest.approx(record.top1)
    easy = found.difficulty < 0.5
    assert (found.teacher == found.labels)[easy].all()  # METHOD: below 0.5 the teacher is always right


def test_images_are_filtered_as_in_the_run(probe: Probe) -> None:
    assert not isinstance(probe.images, str) and not isinstance(probe.spectra, str)
    before, after = probe.images.before, probe.images.after
    assert before.shape == after.shape and before.min() >= 0 and before.max() <= 1 and probe.images.num_images == 32
    assert probe.spectra.cutoff == 4.0  # half of Nyquist at 16 pixels
    high = {name: profile[-1] / profile[1] for name, profile in probe.spectra.profiles.items()}
    assert high["filtered"] < 0.3 * high["synthetic"]
    gain = gaussian_lowpass(torch.eye(16).view(1, 1, 16, 16), 4.0)
    assert _profile(_amplitude(gain))[0] == pytest.approx(16.0, rel=1e-5)  # zero frequency is kept


def test_a_radial_profile_is_the_mean_over_rings() -> None:
    wave = torch.cos(2 * torch.pi * 3 * torch.arange(8) / 8).expand(8, 8)
    amplitude = _amplitude(wave.reshape(1, 1, 8, 8))
    assert amplitude.shape == (8, 8) and amplitude[4, 7] == pytest.approx(32)  # 3 bins right of the center
    profile = _profile(amplitude)
    assert len(profile) == 5 and np.argmax(profile) == 3 and profile[[0, 1, 2, 4]].max() < 1e-4


def test_layers_and_ranges_are_those_of_the_student(probe: Probe) -> None:
    assert not isinstance(probe.layers, str) and not isinstance(probe.ranges, str)
    weights = [row for row in probe.record.layers if row["role"] == "weight"]
    assert [(layer.name, layer.bits) for layer in probe.layers] == [(row["name"], row["bits"]) for row in weights]
    assert all(5 < layer.weight_db < 40 for layer in probe.layers)  # 4 bits: about 20 dB
    for one in probe.ranges:
        assert one.low <= 0 < one.high and one.shares.sum() == pytest.approx(1) and 0 <= one.clipped < 0.2
        edges = np.linspace(-REACH, REACH, len(one.shares) + 1)
        assert one.shares[edges[1:] < -1e-9].sum() == 0  # after a ReLU


def test_activation_maps_of_three_networks_on_the_same_images(probe: Probe) -> None:
    assert not isinstance(probe.maps, str)
    maps = probe.maps.maps
    assert list(maps) == ["teacher", "rounded to nearest", "student"]
    assert all(part.shape == maps["teacher"].shape and part.min() >= 0 for part in maps.values())
    assert not np.array_equal(maps["student"], maps["rounded to nearest"])


@pytest.mark.slow
def test_without_labels_synthetic_images_are_evaluated(finished: Path) -> None:
    probe = probe_run(finished, {"evaluation.dataset": "none"})
    assert not isinstance(probe.predictions, str) and not probe.predictions.labeled
    assert probe.predictions.source == "held-out synthetic images" and len(probe.predictions.labels) == 16
    np.savez(finished.parent / "other.npz", x=np.zeros((9, 16, 16), np.uint8), y=np.zeros(9, np.int64))
    other = probe_run(finished, {"evaluation.dataset": f"npz:{finished.parent / 'other.npz'}"})
    assert (
        not isinstance(other.predictions, str)
        and "differ from those that the run was evaluated on" in other.predictions.source
    )
    lost = probe_run(finished, {"evaluation.dataset": "npz:nosuch.npz"})
    assert not isinstance(lost.predictions, str) and "cannot be read" in lost.predictions.source
    page = run_page(finished, {"evaluation.dataset": "none"})
    (figure,) = [figure for figure in page.figures() if figure.name == "difficulty"]
    assert figure.title == "Disagreement against difficulty"


@pytest.mark.slow
def test_missing_files_of_a_run_become_gaps(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = run_page(finished, {"runtime.store_dir": str(tmp_path / "empty")})
    gaps = {block.title: block.reason for tab in page.tabs for block in tab.blocks if isinstance(block, Gap)}
    assert "must find its synthetic images" in gaps["Amplitude spectra"]
    assert {"headline", "losses", "difficulty", "confusion", "layers", "ranges"} == {
        figure.name for figure in page.figures()
    }
    copy = shutil.copytree(finished, tmp_path / "run")
    (copy / "student.safetensors").unlink()
    assert report([str(copy)]) == 0  # the record alone has a page, too
    text = (copy / "report.html").read_text()
    assert "must hold student.safetensors" in text and "Loss by epoch" in text
    assert str(copy / "report.html") in capsys.readouterr().out


def test_a_failed_run_has_its_reason_on_the_page(finished: Path, tmp_path: Path) -> None:
    shutil.copy(finished / "record.json", tmp_path)
    edit(tmp_path / "record.json", lambda content: content.update(status="failed", reason="kd became nan"))
    page = run_page(tmp_path)
    assert page.verdict == ["The run failed: kd became nan."]
    assert isinstance(next(iter(page.figures())), Figure)
