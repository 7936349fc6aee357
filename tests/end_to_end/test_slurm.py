"""The scripts for Slurm with a real Ray on loopback and real sweeps; only Slurm's own commands are fake."""

import csv
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from support.fake_slurm import calls, slurm_environment
from synq.common.files import read_json

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

SPEC = """
name = "small"
bits = ["W8A8"]
num_trials = 2
seeds = []
report = false
{more}
[base.synthesis]
num_images = 32
shard_size = 16
iterations = 2
[base.quant]
calib_images = 32
[base.finetune]
epochs = 1
batch_size = 16
[base.evaluation]
heldout_images = 16
num_images = 64
"""


def environment_of(folder: Path, root: Path, **variables: str) -> dict[str, str]:
    given = slurm_environment(folder, OMP_NUM_THREADS="1", PYTHONPATH=str(root), **variables)
    return {**given, "PATH": given["PATH"].replace(os.pathsep, f"{os.pathsep}{Path(sys.executable).parent}:", 1)}


@pytest.mark.parametrize("mode", ["token", "disabled"])
def test_a_sweep_on_a_ray_that_slurm_started(mode: str, tmp_path: Path, root: Path) -> None:
    (tmp_path / "spec.toml").write_text(SPEC.format(more=""))
    environment = environment_of(tmp_path, root, RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER="0", RAY_AUTH_MODE=mode)
    done = subprocess.run(
        [root / "launch" / "clusters" / "slurm_ray.sh", "spec.toml", "--output-dir", "out"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 node, 1 CPU" in done.stdout, "the CPUs of Slurm's task, not those of the machine"
    with (tmp_path / "out" / "trials.csv").open(newline="") as file:
        assert [row["status"] for row in csv.DictReader(file)] == ["completed"] * 2
    assert not any(line.startswith("scontrol requeue") for line in calls(tmp_path))


def test_two_tasks_of_an_array_share_the_trials_of_one_database(tmp_path: Path, root: Path) -> None:
    (tmp_path / "spec.toml").write_text(SPEC.format(more='study_storage = "$SYNQ_STUDY_STORAGE"'))
    storage = f"sqlite:///{tmp_path / 'studies.db'}"
    tasks = []
    for number in range(2):
        environment = environment_of(
            tmp_path, root, SYNQ_STUDY_STORAGE=storage, SLURM_ARRAY_JOB_ID="12", SLURM_ARRAY_TASK_ID=str(number)
        )
        with (tmp_path / f"log{number}").open("w") as log:
            tasks.append(
                subprocess.Popen(
                    [root / "launch" / "clusters" / "slurm_drivers.sh", "spec.toml", "--output-dir", "out"],
                    cwd=tmp_path,
                    env=environment,
                    stdout=log,
                    stderr=log,
                )
            )
        while "1 node" not in (tmp_path / f"log{number}").read_text() and tasks[-1].poll() is None:
            time.sleep(1)  # one Ray starts at a time; Slurm's tasks are on machines of their own
    codes = [task.wait(timeout=500) for task in tasks]
    printed = "".join((tmp_path / f"log{number}").read_text() for number in range(2))
    assert codes == [0, 0], printed
    records = [read_json(path) for path in (tmp_path / "out" / "runs").glob("*/record.json")]
    assert [record["status"] for record in records] == ["completed"] * 2, "no trial ran twice"
