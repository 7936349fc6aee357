"""Two real processes on CPU train what one process trains on the joined batch."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

TERMS = ("loss", "kd", "ce", "cam", "kept", "gradient norm")


@pytest.mark.parametrize(("kind", "steps"), [("closed_form", "none"), ("autograd", "none"), ("closed_form", "all")])
def test_two_processes_train_the_same_loss(
    root: Path, tmp_path: Path, run_process: Callable[..., tuple[int, str, str]], kind: str, steps: str
) -> None:
    """Traps 6 and 7: a mask's share per rank as denominator, or a second backward pass that is not reduced, would show here."""
    worker, results = str(root / "tests" / "two_processes.py"), {}
    launch = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        str(root / "launch" / "accelerate_cpu2.yaml"),
    ]
    for name, words in (("one", [sys.executable]), ("two", launch)):
        file = tmp_path / f"{name}.json"
        code, out, err = run_process(
            [*words, worker, kind, steps, str(file)], cwd=root, PYTHONPATH=str(root), timeout=180
        )
        assert code == 0, out + err
        results[name] = json.loads(file.read_text())
    one, two = results["one"], results["two"]
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
