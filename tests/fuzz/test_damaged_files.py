"""Random and damaged files: a right answer or one line that names the file, never another exception, never silence."""

import json
import random
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fuzz.files_inputs import INPUTS, outcome
from fuzz.files_run import check
from synq.cli import run as command
from synq.common.notices import forget_notices
from synq.sweeps.spec_file import load_spec

PAST = (
    *(("array", 1861), ("image", 200), ("index", 188), ("index", 268), ("spec", 129), ("spec", 139), ("spec", 174)),
    *(("spec", 179), ("spec", 214), ("spec", 274), ("weights", 2227)),
)
"""Files that were faults once: kind and seed of `fuzz.files_run`."""
LONG = 2000


@pytest.mark.parametrize("kind", INPUTS)
def test_a_few_random_files_are_read_or_rejected_in_one_line(kind: str, tmp_path: Path) -> None:
    @settings(
        max_examples=20,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )
    @given(st.integers(0, 10**9))
    def read(seed: int) -> None:
        check(kind, seed, tmp_path / "files")

    read()


@pytest.mark.parametrize(("kind", "seed"), PAST)
def test_files_that_were_faults(kind: str, seed: int, tmp_path: Path) -> None:
    check(kind, seed, tmp_path / "files")


@pytest.mark.fuzz
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("kind", INPUTS)
def test_many_random_files_are_read_or_rejected_in_one_line(kind: str, tmp_path: Path) -> None:
    results = {check(kind, seed, tmp_path / "files") == "read" for seed in range(LONG)}
    assert results == {True, False}, "both right and wrong files must be among them"


@pytest.mark.parametrize("kind", INPUTS)
def test_the_generator_makes_right_and_wrong_files_and_the_same_ones_again(kind: str, tmp_path: Path) -> None:
    said = [check(kind, seed, tmp_path / "files") for seed in range(30)]
    assert "read" in said and any(text != "read" for text in said)
    rejected = next(seed for seed, text in enumerate(said) if text != "read")
    forget_notices()
    assert check(kind, rejected, tmp_path / "files") == said[rejected]


def test_a_fault_is_seen() -> None:
    """The check itself fails where a reader is silent about the file, or raises what no command expects."""

    def fails(error: Exception) -> None:
        raise error

    file = Path("some.file")
    for error in (ValueError("without its name"), ValueError("some.file:\ntwo lines"), ValueError("some.file " * 90)):
        with pytest.raises(AssertionError):
            outcome(lambda error=error: fails(error), file)
    for error in (KeyError("some.file"), RuntimeError("some.file"), RecursionError("some.file")):
        with pytest.raises(type(error)):
            outcome(lambda error=error: fails(error), file)
    assert outcome(lambda: fails(ValueError("some.file must be right")), file) == "some.file must be right"


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("spec.toml", f"bits = {'[' * 120_000}{']' * 120_000}"),
        ("spec.toml", f"bits = {'[' * 300}{']' * 300}"),
        ("spec.toml", f"base = {'{a=' * 120_000}1{'}' * 120_000}"),
        ("spec.json", '{"bits": ' + "[" * 120_000),
        ("spec.json", json.dumps({"base": json.loads("[" * 21 + "]" * 21)})),
        ("spec.toml", f"num_trials = {'9' * 5000}"),
        ("spec.json", f'{{"num_trials": {"9" * 5000}}}'),
        ("spec.json", f'{{"name": "{"x" * 5000}"}}'),
        ("spec.toml", f"bits = [{', '.join(['1979-05-27T07:32:00Z'] * 500)}]"),
        ("spec.toml", 'sampler = "grid"\n[space."finetune.lr"]\ntype = "float"\nlow = 0.1\nhigh = 0.9\nstep = 1e-300'),
        ("spec.toml", 'sampler = "grid"\n[space."finetune.lr"]\ntype = "float"\nlow = 0.1\nhigh = 0.9\nstep = 1e-9'),
        ("spec.toml", 'sampler = "grid"\n[space."finetune.epochs"]\ntype = "int"\nlow = 1\nhigh = 1e9'),
    ],
)
def test_specs_that_ask_for_too_much(name: str, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / name
    file.write_text(text)
    assert outcome(lambda: load_spec(file), file) != "read"
    assert command(["sweep", str(file), "--dry-run"]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and name in err and len(err) < 700


def test_random_numbers_are_pythons_own() -> None:
    """A seed means the same file for everyone: Python keeps `Random` of a text the same over versions."""
    assert random.Random("image 1").randrange(10**9) == 149528702
