"""Files under launch/clusters: they parse, name only what exists, and their shell does what its comments promise."""

import fnmatch
import os
import re
import signal
import subprocess
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.scripts.scripts import cli as ray_cli

from support.fake_slurm import calls, slurm_environment, write_programs
from support.source_tree import ROOT
from synq.cli import GROUP
from synq.config.command_line import Command

FOLDER = ROOT / "launch" / "clusters"
SCRIPTS = sorted(FOLDER.glob("*.sh"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
RAY_JOB = {
    "entrypoint", "submissionMode", "shutdownAfterJobFinishes", "ttlSecondsAfterFinished", "backoffLimit",
    "rayClusterSpec", "runtimeEnvYAML", "suspend", "activeDeadlineSeconds",
}  # fmt: skip
"""Fields of `spec` of a RayJob, ray.io/v1."""
RAY_CLUSTER = {"rayVersion", "authOptions", "headGroupSpec", "workerGroupSpecs", "enableInTreeAutoscaling"}
WORKER_GROUP = {"groupName", "replicas", "minReplicas", "maxReplicas", "rayStartParams", "template"}
SKY = {"name", "num_nodes", "workdir", "resources", "envs", "secrets", "setup", "run", "file_mounts"}
"""Fields of a task of SkyPilot."""


def with_gpus(text: str) -> str:
    """The form of a file for GPUs, as its head describes it."""
    lines = [line for line in text.splitlines() if not line.endswith("# CPU")]
    return "\n".join(line.replace("# GPU: ", "") for line in lines)


def forms(name: str) -> list[Any]:
    text = (FOLDER / name).read_text()
    assert text.count("# GPU: ") >= 2
    return [yaml.safe_load(text), yaml.safe_load(with_gpus(text))]


def calls_of_sweep(text: str) -> Iterator[list[str]]:
    """The options of every call of `synq sweep`; values of the shell are left out."""
    for line in re.sub(r"\\\n", " ", text).splitlines():
        _, found, rest = line.partition("synq sweep ")
        if found:
            yield re.findall(r"(?<![\w-])--[a-z][a-z-]+", rest)


def test_every_call_of_a_sweep_has_known_options() -> None:
    command = GROUP.get_command(None, "sweep")  # type: ignore[arg-type]
    assert isinstance(command, Command)
    known = {flag for option in command.own_options for flag in option.opts}
    found = {path.name: list(calls_of_sweep(path.read_text())) for path in FOLDER.iterdir()}
    assert sum(map(len, found.values())) >= 6
    assert {name: used for name, calls in found.items() for used in calls if not set(used) <= known} == {}
    options = {flag for name in ("slurm_ray.sh", "slurm_drivers.sh") for flag in options_for_sweep(name)}
    assert options == {"--output-dir", "--gpus-per-worker"} and options <= known


def options_for_sweep(script: str) -> list[str]:
    """The options behind the script's name in its examples."""
    lines = [
        line.partition(f"{script} ")[2] for line in (FOLDER / script).read_text().splitlines() if "sbatch -" in line
    ]
    return [flag for line in lines for flag in re.findall(r"--[a-z-]+", line)]


def test_every_option_of_ray_exists() -> None:
    known = {flag for option in ray_cli.commands["start"].params for flag in option.opts}
    for name in ("slurm_ray.sh", "sky.yaml"):
        lines = [
            line for line in (FOLDER / name).read_text().splitlines() if "ray start" in line or "ray_options=" in line
        ]
        used = {flag for line in lines for flag in re.findall(r"--[a-z][a-z-]+", line)}
        assert len(used) >= 4 and used <= known, used - known


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_a_script_is_valid_and_asks_slurm_in_its_head(script: Path) -> None:
    assert os.access(script, os.X_OK)
    subprocess.run(["bash", "-n", str(script)], check=True)
    head, _, body = script.read_text().partition("set -euo pipefail\n")
    assert "#SBATCH --requeue" in head and "#SBATCH" not in body, "Slurm reads no option after the first command"
    for given, unset, message in (
        ([], "", "usage: sbatch"),
        (["SPEC"], "SYNQ_STUDY_STORAGE", "must name the database"),
    ):
        if not given or "drivers" in script.name:
            environment = {name: value for name, value in os.environ.items() if name != unset}
            done = subprocess.run([script, *given], env=environment, capture_output=True, text=True, check=False)
            assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1


def test_the_ray_job_has_only_fields_of_kuberay() -> None:
    for job, gpus in zip(forms("kuberay_job.yaml"), (False, True), strict=True):
        assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob") and set(job["spec"]) <= RAY_JOB
        ray = job["spec"]["rayClusterSpec"]
        (group,) = ray["workerGroupSpecs"]
        assert set(ray) <= RAY_CLUSTER and set(group) <= WORKER_GROUP and ray["authOptions"] == {"mode": "token"}
        pods = [part["template"]["spec"] for part in (ray["headGroupSpec"], group)]
        for pod in pods:
            (container,) = pod["containers"]
            volumes = {volume["name"] for volume in pod["volumes"]}
            assert {mount["name"] for mount in container["volumeMounts"]} == volumes
        mounts = {mount["mountPath"] for mount in pods[0]["containers"][0]["volumeMounts"]}
        words = job["spec"]["entrypoint"].split()
        assert (
            words[:2] == ["synq", "sweep"] and {f"/{path.split('/')[1]}" for path in words if path[0] == "/"} <= mounts
        )
        assert "/results" in {mount["mountPath"] for mount in pods[1]["containers"][0]["volumeMounts"]}
        limits = pods[1]["containers"][0]["resources"]["limits"]
        assert ("nvidia.com/gpu" in limits) == gpus == ("--gpus-per-worker" in words)


def test_the_task_of_skypilot_is_whole() -> None:
    for task, gpus in zip(forms("sky.yaml"), (False, True), strict=True):
        assert set(task) <= SKY and ("accelerators" in task["resources"]) == gpus == (
            "--gpus" in task["envs"]["OPTIONS"]
        )
        for part in (task["setup"], task["run"]):
            subprocess.run(["bash", "-n"], input=part, text=True, check=True)
            given = {
                *task["envs"],
                *task["secrets"],
                *re.findall(r"^\s*(?:export )?(\w+)=", part, re.M),
                "HOME",
                "PATH",
            }
            given |= set(re.findall(r" (RAY_ADDRESS|VIRTUAL_ENV)=", part))
            used = set(re.findall(r"\$\{?([A-Z][A-Z_]+)", part))
            assert {name for name in used if not name.startswith("SKYPILOT_")} <= given
        extras = re.findall(r"\.\[([\w,]+)\]", task["setup"])[0].split(",")
        assert set(extras) <= set(PROJECT["optional-dependencies"])
        assert (ROOT / task["envs"]["SPEC"]).exists()


def test_the_image_copies_what_its_package_needs() -> None:
    text = re.sub(r"\\\n\s*", "", (FOLDER / "Dockerfile").read_text())
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    names = {line.split()[0] for line in lines}
    assert names == {"ARG", "FROM", "ENV", "RUN", "WORKDIR", "COPY", "USER", "ENTRYPOINT", "CMD"}
    declared = {line.split()[1].partition("=")[0] for line in lines if line.startswith("ARG")}
    assert set(re.findall(r"\$\{(\w+)\}", text)) == declared
    (extras,) = re.findall(r"^ARG EXTRAS=(\S+)$", text, re.M)
    assert set(extras.split(",")) <= set(PROJECT["optional-dependencies"])
    kept = [line[1:] for line in (FOLDER / "Dockerfile.dockerignore").read_text().splitlines() if line.startswith("!")]
    assert (FOLDER / "Dockerfile.dockerignore").read_text().startswith("*\n")
    for name in re.findall(r"^COPY ([^.].*) \./$", text, re.M)[0].split():
        assert (ROOT / name).exists() and any(fnmatch.fnmatch(name, pattern) for pattern in kept)
    assert {"synq", "sweeps"} <= set(kept), "synq/sweeps is a link to sweeps"


FAKES = {
    "ray": '#!/usr/bin/env bash\necho "ray $* ${RAY_AUTH_MODE}:${#RAY_AUTH_TOKEN}" >>"$FAKE_LOG"\nexec sleep 60\n',
    "python": '#!/usr/bin/env bash\n[ "$1" = -c ] && echo 0123456789abcdef || cat >/dev/null\n',
    "synq": """#!/usr/bin/env bash
trap 'exit 130' TERM
echo "synq $* at ${RAY_ADDRESS:-here}" >>"$FAKE_LOG"
for i in $(seq ${FAKE_TENTHS:-0}); do sleep 0.1; done
""",
}
"""Programs that a batch script starts; the test with the real ones is tests/end_to_end/test_slurm.py."""


def started(
    script: str, folder: Path, environment: dict[str, str], programs: dict[str, str] = FAKES
) -> "subprocess.Popen[bytes]":
    write_programs(folder / "bin", programs)
    with (folder / "log").open("w") as log:
        return subprocess.Popen(
            [FOLDER / script, "SPEC", "--output-dir", "OUT"], env=environment, stdout=log, stderr=log
        )


def test_each_machine_of_a_slurm_job_starts_ray_once_with_one_token(tmp_path: Path) -> None:
    environment = slurm_environment(tmp_path, nodes="node0 node1 node2", SLURM_GPUS_ON_NODE="4")
    assert started("slurm_ray.sh", tmp_path, environment).wait(timeout=30) == 0
    lines = calls(tmp_path)
    head, workers = (line for line in lines if line.startswith("srun"))
    assert "--nodelist=node0 ray start --head --node-ip-address=127.0.0.1 --port=24711" in head
    assert "--nodes=2 --ntasks=2 --exclude=node0 ray start --address=127.0.0.1:24711" in workers
    assert all("--num-cpus=1 --num-gpus=4 --block" in line for line in (head, workers))
    tokens = [line.rsplit(" ", 1)[1] for line in lines if line.startswith("ray ")]
    assert tokens == ["token:16"] * 3 and not any("0123456789abcdef" in line for line in lines)
    assert lines[-1] == "synq sweep SPEC --output-dir OUT at 127.0.0.1:24711"


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
@pytest.mark.parametrize(("number", "queued"), [(signal.SIGUSR1, True), (signal.SIGTERM, False)])
def test_a_job_is_queued_again_before_its_time_limit_and_not_when_it_is_canceled(
    script: Path, number: signal.Signals, queued: bool, tmp_path: Path
) -> None:
    environment = slurm_environment(
        tmp_path,
        FAKE_TENTHS="300",
        SYNQ_STUDY_STORAGE="postgresql://host/name",
        SLURM_ARRAY_JOB_ID="12",
        SLURM_ARRAY_TASK_ID="3",
    )
    process = started(script.name, tmp_path, environment)
    end = time.monotonic() + 30
    while not any(line.startswith("synq") for line in calls(tmp_path)):
        assert time.monotonic() < end and process.poll() is None, (tmp_path / "log").read_text()
        time.sleep(0.05)
    time.sleep(0.2)  # the script sets its traps after it has started synq
    process.send_signal(number)
    assert process.wait(timeout=30) == 130
    wanted = "scontrol requeue " + ("12_3" if "drivers" in script.name else "4711")
    assert (wanted in calls(tmp_path)) == queued


def test_a_machine_without_ray_ends_the_job_at_once(tmp_path: Path) -> None:
    broken = {**FAKES, "ray": "#!/usr/bin/env bash\nexit 127\n", "python": "#!/usr/bin/env bash\nexec sleep 60\n"}
    environment = slurm_environment(tmp_path, RAY_AUTH_MODE="disabled")
    assert started("slurm_ray.sh", tmp_path, environment, broken).wait(timeout=30) == 1
    assert "a step of srun with Ray ended before the sweep began" in (tmp_path / "log").read_text()
