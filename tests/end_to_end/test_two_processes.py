"""Two real processes on CPU train what one process trains on the joined batch."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from support.two_processes import train_case

TERMS = ("loss", "kd", "ce", "cam", "kept", "gradient norm")


CASES = (("closed_form", "none"), ("autograd", "none"), ("closed_form", "all"))


@pytest.fixture(scope="module")
def by_two(
    root: Path, tmp_path_factory: pytest.TempPathFactory, run_process: Callable[..., tuple[int, str, str]]
) -> dict[str, dict[str, Any]]:
    """What two processes make of every case, by its name: their start is nearly all of the time, so they do all
    cases.
    """
    file = tmp_path_factory.mktemp("two") / "two.json"
    config = ["--config_file", str(root / "launch" / "accelerate_cpu2.yaml"), "--main_process_port", "0"]
    launch = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        *config,
        str(root / "tests" / "support" / "two_processes.py"),
    ]
    words = [*launch, str(file), *(f"{kind}-{steps}" for kind, steps in CASES)]
    code, out, err = run_process(words, cwd=root, PYTHONPATH=str(root), timeout=180)
    assert code == 0, out + err
    return json.loads(file.read_text())


@pytest.mark.parametrize(("kind", "steps"), CASES)
def test_two_processes_train_the_same_loss(by_two: dict[str, dict[str, Any]], kind: str, steps: str) -> None:
    """Traps 6 and 7: a mask's share per rank as denominator, or a second backward pass that is not reduced, would
    show here.
    """
    one, two = train_case(kind, steps), by_two[f"{kind}-{steps}"]  # type: ignore[arg-type]
    assert (one["processes"], two["processes"]) == (1, 2)
    assert one["flips"] == two["flips"] == 0, "an integer weight flipped: lower the learning rate of this test"
    kept = two["kept"]
    assert any(abs(a - b) > 0.1 for a, b in zip(*kept, strict=True)), "the masks must differ between ranks"
    assert 0 < sum(map(sum, kept)) < 20, "the mask must do something"
    assert two["ranks_agree"]
    assert len(one["history"]) == len(two["history"]) == 10
    for a, b in zip(one["history"], two["history"], strict=True):
        assert [b[term] for term in TERMS] == pytest.approx([a[term] for term in TERMS], rel=1e-4)
    exact = 1e-9 if steps == "none" else 1e-6  # steps, and what is multiplied with them, are float32
    assert two["weights"] == pytest.approx(one["weights"], rel=exact, abs=1e-12 if steps == "none" else 1e-9)
    assert one["history"][0]["loss"] != one["history"][9]["loss"]
