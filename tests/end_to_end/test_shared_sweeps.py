"""Several drivers of one sweep against a real PostgreSQL: killed, joined, with folders of their own or one folder."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.databases import PASSWORD, postgresql, why_no_postgresql
from support.sweep_tools import Start, board, finish, listed, ray_head, rows, until, whole

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(bool(why_no_postgresql()), reason=why_no_postgresql()),
]


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with postgresql() as address:
        yield address


EPOCHS = 6


@pytest.fixture(scope="module")
def head() -> Iterator[str]:
    """A Ray for the jobs of all drivers, as starting one for each takes longer than their trials."""
    with ray_head() as address:
        yield address


@pytest.fixture
def drive(start: Start, head: str) -> Start:
    return lambda *words, **variables: start(*words, RAY_ADDRESS=head, **variables)


@pytest.fixture(scope="module")
def alone(root: Path, head: str, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    """The leaderboard of one driver without a database."""
    folder = tmp_path_factory.mktemp("alone")
    words = [str(listed(folder, epochs=EPOCHS)), "--output-dir", str(folder / "out")]
    command = [sys.executable, str(root / "launch" / "sweep.py"), *words]
    subprocess.run(command, check=True, timeout=600, env={**os.environ, "RAY_ADDRESS": head})
    return board(folder / "out")


def spec_of(folder: Path, address: str, name: str, head: str = "") -> str:
    path = listed(folder, epochs=EPOCHS, head=f'study_storage = "{address}"\nmax_concurrent = 1\n{head}')
    path.write_text(path.read_text().replace('name = "tiny"', f'name = "{name}"'))
    return str(path)


def states(address: str, name: str) -> list[tuple[str, str]]:
    """Name and state of the trials in the study of the sweep."""
    import optuna

    from synq.sweeps.storage.databases import engine_address

    storage = optuna.storages.RDBStorage(engine_address(address))
    study = optuna.load_study(study_name=f"{name}-digits_resnet8-W3A3", storage=storage)
    found = sorted((trial.user_attrs["trial"], trial.state.name) for trial in study.get_trials())
    storage.engine.dispose()
    return found


def starts(*folders: Path) -> dict[str, int]:
    """How often each trial was started, by its logs."""
    logs = [path for folder in folders for path in folder.glob("logs/*.log")]
    found: dict[str, int] = {}
    for path in logs:
        found[path.stem] = found.get(path.stem, 0) + path.read_text().count("starts\n")
    return found


def without_password(text: str, *folders: Path) -> None:
    assert PASSWORD not in text
    command = ["grep", "-rlaF", PASSWORD, *map(str, folders)]
    assert not subprocess.run(command, capture_output=True, text=True, check=False).stdout


TRIALS = [f"digits_resnet8-W3A3-t{index:03d}" for index in range(4)]


def test_a_driver_finishes_what_a_killed_one_began_with_folders_of_their_own(
    drive: Start, tmp_path: Path, server: str, alone: list[dict[str, str]]
) -> None:
    spec, one, two = spec_of(tmp_path, server, "killed"), tmp_path / "one", tmp_path / "two"
    first = drive(spec, "--output-dir", str(one))
    until(lambda: 1 <= len(list(one.glob("records/*.json"))) < len(list(one.glob("logs/*.log"))), first, 400)
    os.killpg(first.pid, signal.SIGSTOP)  # between a trial that has ended and one that is running, however slow
    second = drive(spec, "--output-dir", str(two))
    until(lambda: "starts" in "".join(path.read_text() for path in two.glob("logs/*.log")), second, 400)
    os.killpg(first.pid, signal.SIGKILL)
    printed = first.communicate(timeout=60)[0]
    text = finish(second, 400)
    assert board(two) == alone and [row["trial"] for row in rows(two / "trials.csv")] == TRIALS
    assert re.search("[123] trials are there already, 0 were interrupted, 1 are run by other drivers", text), text
    assert states(server, "killed") == [(name, "COMPLETE") for name in TRIALS]
    begun = sorted(starts(one, two).values())
    assert begun in ([1, 1, 1, 2], [1, 1, 1, 1]), "at most the trial that was killed is begun again"
    whole(two)
    again = finish(drive(spec, "--output-dir", str(one)), 200)
    assert "4 trials are there already" in again and board(one) == alone
    assert (one / "trials.csv").read_text() == (two / "trials.csv").read_text()
    without_password(printed + text + again, one, two)


def test_two_drivers_with_one_folder_run_each_trial_once_and_end_together(
    drive: Start, tmp_path: Path, server: str, alone: list[dict[str, str]]
) -> None:
    out = tmp_path / "out"
    spec = spec_of(tmp_path, server, "together", "seeds = [0, 1]\n")
    drivers = [drive(spec, "--output-dir", str(out)) for _ in range(2)]
    texts = [finish(driver, 800) for driver in drivers]
    elsewhere = [len(re.findall("by another driver", text)) for text in texts]
    before = [sum(map(int, re.findall(r"(\d+) trials are there already", text))) for text in texts]
    assert sum(elsewhere) + sum(before) == 5 and min(elsewhere) >= 1, texts
    assert all("[5/5]" in text for text in texts), "both wait for the last one, whoever runs it"
    assert len(starts(out)) == 5 and set(starts(out).values()) == {1}
    assert [row["config_digest"] for row in board(out)] == [row["config_digest"] for row in alone]
    assert states(server, "together") == [(name, "COMPLETE") for name in TRIALS]
    whole(out)
    third = drive(spec, "--output-dir", str(out), "--num-trials", "4")
    assert "the sweep is finished" in finish(third, 200)
    without_password("".join(texts), out)


def test_a_wrong_password_and_an_absent_server_are_one_line(start: Start, tmp_path: Path, server: str) -> None:
    for address in (server.replace(PASSWORD, "wrong-s3cret"), re.sub(r":\d+/", ":1/", server)):
        spec = spec_of(tmp_path, address, "rejected")
        process = start(spec, "--output-dir", str(tmp_path / "none"))
        text, _ = process.communicate(timeout=100)
        assert process.returncode == 2 and "`study_storage` must be a database that can be opened" in text, text
        assert "s3cret" not in text and "Traceback" not in text
        assert sum("study_storage" in line for line in text.splitlines()) == 1


def test_the_python_driver_is_named_where_it_is_missing(tmp_path: Path, server: str) -> None:
    spec = spec_of(tmp_path, server, "nodriver")
    code = (
        "import sys; sys.modules['psycopg'] = sys.modules['psycopg2'] = None\n"
        f"sys.argv = ['synq', 'sweep', {spec!r}, '--output-dir', {str(tmp_path / 'o')!r}]\n"
        "from synq.cli import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and 'pip install -e ".[postgresql]"' in done.stderr, done.stderr
