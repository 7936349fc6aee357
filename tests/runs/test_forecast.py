"""What a run says before its work: minutes, memory and disk, and a smaller budget where it takes hours."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from synq import pipeline
from synq.common.notices import forget_notices
from synq.common.text_tables import duration
from synq.config.run import RunConfig, with_overrides
from synq.pipeline import run
from synq.quant.student import build_student
from synq.runs.forecast import LEARNED_ROUNDING, Forecast, estimate, forecast, forecast_line, probe
from synq.synthesis.step_probe import num_passes, saved_bytes
from synq.teacher.teacher import load_teacher


def _found(**changes: float) -> Forecast:
    values = {"synthesis": 10.0, "rounding": 0.0, "finetune": 5.0, "measure": 1.0}
    return Forecast(**{**values, "memory": 2e9, "disk": 3e8, "free": 5e10, **changes})


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({}, "about 16 s (synthesis 10 s, fine-tuning 5 s, measurement 1 s), 1.9 GB of memory per process, 0.3 GB"),
        (
            {"rounding": 70.0},
            "about 86 s (synthesis 10 s, learned rounding 70 s, fine-tuning 5 s, measurement 1 s), ",
        ),
        ({"synthesis": 0.0, "measure": 0.2}, "about 5 s, 1.9 GB"),
        ({"disk": 1e6}, "1 MB of disk (46.6 GB free)"),
        ({"synthesis": 30000.0}, "`--synthesis.num_images 128` takes about"),
        ({"synthesis": 8000.0}, "`--synthesis.num_images 128` takes about"),
        ({"finetune": 8000.0}, "for a first result"),
    ],
)
def test_m_9_the_line_names_time_memory_disk_and_a_smaller_budget(changes: dict[str, float], part: str) -> None:
    line = forecast_line(RunConfig(), _found(**changes))
    assert part in line and ("--synthesis" in line) == (_found(**changes).seconds >= 7200)


def test_m_9_no_smaller_budget_is_proposed_where_none_helps() -> None:
    small = with_overrides(RunConfig(), {"synthesis.num_images": 64, "finetune.batch_size": 64})
    assert "--synthesis" not in forecast_line(small, _found(measure=9000.0, synthesis=9000.0))
    assert "--synthesis" not in forecast_line(RunConfig(), _found(rounding=9000.0))


def test_m_9_a_smaller_budget_has_the_time_of_learned_rounding() -> None:
    line = forecast_line(RunConfig(), _found(synthesis=8000.0, rounding=1200.0))
    assert line.endswith(f"num_images 128` takes about {duration(8005.0 / 8 + 1200 + 1)}, for a first result")


def test_m_9_the_probe_counts_the_work_that_is_left(config: RunConfig, accelerator: Accelerator) -> None:
    teacher = load_teacher(config.teacher)
    student = build_student(teacher, config.quant)
    before = {name: tensor.clone() for name, tensor in student.net.state_dict().items()}
    state = torch.get_rng_state()
    found = forecast(config, teacher, student, 64, accelerator)
    assert torch.equal(torch.get_rng_state(), state), "a run with a forecast draws the same numbers as one without"
    assert found.synthesis > 0 and found.finetune > 0 and found.measure > 0
    assert found.memory > 2**28 and found.disk > 0 and found.free > 0
    after = student.net.state_dict()
    assert all(torch.allclose(value, after[name], rtol=0, atol=0, equal_nan=True) for name, value in before.items())
    rest = forecast(with_overrides(config, {"finetune.epochs": 0}), teacher, student, 64, accelerator)
    assert rest.finetune == 0 == rest.rounding
    learned = with_overrides(
        config, {"quant.rounding": "adaround", "reconstruction.iterations": 10, "reconstruction.images": 16}
    )
    costs = probe(learned, teacher, student, accelerator)
    steps = estimate(learned, teacher, student, 64, accelerator, costs)
    blended = estimate(with_overrides(config, {"finetune.augment": "mixup"}), teacher, student, 64, accelerator, costs)
    assert blended.finetune / steps.finetune == pytest.approx(1 + costs.inference / costs.training.seconds)
    assert steps.rounding == pytest.approx(LEARNED_ROUNDING * 10 * 16 * costs.training.seconds)
    gaussian = with_overrides(config, {"synthesis.method": "gaussian"})
    size = teacher.input_size
    assert num_passes(gaussian.synthesis, 32, size, 10) == 0
    assert num_passes(config.synthesis, 32, size, 10) == 64
    centers = replace(config.synthesis, calib_centers=True, center_iterations=7)
    assert num_passes(centers, 32, size, 10) == 64 + 70
    assert num_passes(replace(config.synthesis, start="fitted"), 32, size, 10) > 64


def test_m_9_saved_bytes_are_those_of_the_graph() -> None:
    x = torch.ones(4, 25, requires_grad=True)
    with saved_bytes() as count:
        (x.exp() * 2).sum().backward()
    assert count[0] == 400, "the exponential keeps its result"


def test_m_9_a_run_says_it_once_and_before_the_images(
    config: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    forget_notices()
    shown = with_overrides(config, {"runtime.progress": True, "finetune.epochs": 0})
    run(shown)
    err = capsys.readouterr().err
    assert err.count("of memory per process") == 1
    run(shown)
    assert "of memory per process" not in capsys.readouterr().err, "a finished run has no work"
    run(with_overrides(shown, {"runtime.progress": False, "seed": 1}))
    assert "of memory per process" not in capsys.readouterr().err


@pytest.mark.parametrize("is_main", [True, False])
def test_a_forecast_that_fails_on_the_main_process_ends_all(
    is_main: bool, config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[list[bool]] = []

    def fails(*args: object) -> Forecast:
        raise MemoryError("too large")

    def received(values: list[bool]) -> list[bool]:
        if values in ([True], [False]):
            sent.append(list(values))
            return [True]
        return values

    monkeypatch.setattr(pipeline, "forecast", fails)
    monkeypatch.setattr(pipeline, "broadcast_object_list", received)
    monkeypatch.setattr(Accelerator, "is_main_process", is_main)
    teacher, measure = pipeline.check(config)
    shown, student = with_overrides(config, {"runtime.progress": True}), build_student(teacher, config.quant)
    expected, text = (MemoryError, "too large") if is_main else (RuntimeError, "failed on the main process")
    with pytest.raises(expected, match=text):
        pipeline._trained_before(shown, teacher, student, measure, Accelerator(cpu=True))
    assert sent == [[is_main]], "each process takes part in the broadcast, before it ends"


def test_f_13_durations_have_no_minus() -> None:
    texts = [duration(seconds) for seconds in (-1e-9, 0.0, 99.4, 100, 5999, 6000, 36000)]
    assert texts == ["0 s", "0 s", "99 s", "2 min", "100 min", "1.7 h", "10.0 h"]
