"""Sweeps on simulated clusters: a lost machine, wide trials, packing on logical GPUs, sweeps at an address, a
killed search.
"""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from support.sweep_tools import Start, board, finish, listed, rows, until, whole, write_spec
from synq.runs.record import read_record

pytestmark = [pytest.mark.slow, pytest.mark.long, pytest.mark.timeout(900)]


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """Make simulated machines on this one, each with a cache folder: `cluster({"num_cpus": 1}, {"num_cpus": 1})`."""
    from ray.cluster_utils import Cluster

    made: list[Any] = []

    def make(*machines: dict[str, Any]) -> Any:
        nodes: list[dict[str, Any]] = [
            {
                "object_store_memory": 2**27,
                "include_dashboard": False,
                "env_vars": {"SYNQ_CACHE_DIR": str(tmp_path / f"cache{number}")},
                **machine,
            }
            for number, machine in enumerate(machines)
        ]
        made.append(Cluster(initialize_head=True, head_node_args=nodes[0]))
        for node in nodes[1:]:
            made[-1].add_node(**node)
        made[-1].wait_for_nodes()
        return made[-1]

    yield make
    for one in made:
        one.shutdown()


@pytest.mark.parametrize("place", ["folder", "address"])
def test_a_lost_machine_gives_its_trials_to_the_others(
    cluster: Callable[..., Any], start: Start, tmp_path: Path, undisturbed: list[dict[str, str]], place: str
) -> None:
    """With an address, what the lost machine had done is known to the others by what it had sent alone."""
    machines = cluster({"num_cpus": 1}, {"num_cpus": 1})
    out, spec = tmp_path / "out", str(listed(tmp_path))
    where = str(out) if place == "folder" else f"file://{out}"
    variables = {"RAY_ADDRESS": machines.address, "SYNQ_CACHE_DIR": str(tmp_path / "cache0")}
    process = start(spec, "--output-dir", where, **variables)
    until(lambda: bool(list(out.glob("runs/*/checkpoint.pt"))), process)
    machines.remove_node(next(iter(machines.worker_nodes)), allow_graceful=False)
    text = finish(process, 400)
    assert "2 nodes, 2 CPUs" in text and text.count("ready after") == 1
    assert board(out) == undisturbed
    whole(out, killed=True)
    if place == "address":
        sets = {path.name for path in (out / "store").iterdir()}
        for number in (0, 1):
            copies = list((tmp_path / f"cache{number}").glob("sweeps/*/store/*/manifest.json"))
            assert {path.parent.name for path in copies} == sets and len(sets) == 2, "a set did not reach every machine"
        assert not list(out.glob("runs/*/checkpoint.pt")) and len(list(out.glob("runs/*/student.safetensors"))) == 4


def test_trials_of_a_lost_machine_are_pre_empted_and_can_be_tried_again(
    cluster: Callable[..., Any], start: Start, tmp_path: Path, undisturbed: list[dict[str, str]]
) -> None:
    machines = cluster({"num_cpus": 1}, {"num_cpus": 1})
    out, spec = tmp_path / "out", str(listed(tmp_path, head="max_failures = 0\n"))
    words = (spec, "--output-dir", str(out))
    process = start(*words, RAY_ADDRESS=machines.address)
    until(lambda: len(list(out.glob("runs/*/checkpoint.pt"))) == 2, process)
    machines.remove_node(next(iter(machines.worker_nodes)), allow_graceful=False)
    finish(process, 400)
    (row,) = [row for row in rows(out / "trials.csv") if row["status"] != "completed"]
    assert row["status"] == "pre-empted" and row["reason"] and row["host"], row
    finish(start(*words, "--retry", "lost,pre-empted"), 400)
    assert board(out) == undisturbed and (out / row["log"]).read_text().count("starts\n") == 2


def test_a_sweep_at_an_address_outlives_every_local_copy(
    start: Start, tmp_path: Path, undisturbed: list[dict[str, str]]
) -> None:
    out, spec = tmp_path / "out", str(listed(tmp_path))
    words = (spec, "--output-dir", f"file://{out}")
    process = start(*words, SYNQ_CACHE_DIR=str(tmp_path / "first"))
    until(lambda: bool(list(out.glob("records/*.json"))), process)
    process.kill()
    process.wait()
    before = {path: path.stat().st_mtime_ns for path in out.glob("records/*.json")}
    shutil.rmtree(tmp_path / "first")
    text = finish(start(*words, SYNQ_CACHE_DIR=str(tmp_path / "second")), 400)
    assert (
        f"{len(before)} trials are there already" in text and "there already" in text.partition("trials at a time")[2]
    )
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in before.items())
    assert board(out) == undisturbed


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_a_sweep_in_a_bucket(start: Start, tmp_path: Path, undisturbed: list[dict[str, str]]) -> None:
    pytest.importorskip("moto.server", reason="needs moto[server], an S3-compatible server for tests")
    from pyarrow.fs import FileSelector, S3FileSystem

    port = _free_port()
    command = [str(Path(sys.executable).parent / "moto_server"), "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        keys = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}
        files = S3FileSystem(
            access_key="test",
            secret_key="test",
            scheme="http",
            endpoint_override=f"127.0.0.1:{port}",
            allow_bucket_creation=True,
        )
        end = time.monotonic() + 60
        while True:
            try:
                files.create_dir("bucket")
                break
            except OSError:
                assert server.poll() is None and time.monotonic() < end
                time.sleep(0.5)
        address = f"s3://bucket/sweeps/one?endpoint_override=http://127.0.0.1:{port}"
        words = (str(listed(tmp_path)), "--output-dir", address)
        finish(start(*words, SYNQ_CACHE_DIR=str(tmp_path / "cache"), **keys), 400)
        found = {info.path for info in files.get_file_info(FileSelector("bucket/sweeps/one", recursive=True))}
        table = tmp_path / "leaderboard.csv"
        table.write_bytes(files.open_input_stream("bucket/sweeps/one/leaderboard.csv").read())
        assert board(tmp_path) == undisturbed
        assert sum(path.endswith("student.safetensors") for path in found) == 4
        assert sum("/records/" in path for path in found) == 4
    finally:
        server.terminate()
        server.wait(timeout=30)


def test_a_wide_trial_is_what_accelerate_launch_makes_of_its_run(
    cluster: Callable[..., Any],
    start: Start,
    root: Path,
    tmp_path: Path,
    run_process: Callable[..., tuple[int, str, str]],
) -> None:
    machines = cluster({"num_cpus": 1}, {"num_cpus": 1})
    out = tmp_path / "out"
    spec = listed(tmp_path, epochs=3, head="num_trials = 1\nworkers_per_trial = 2\n")
    text = finish(start(str(spec), "--output-dir", str(out), RAY_ADDRESS=machines.address), 400)
    assert "at most 1 trial at a time" in text
    inside = read_record(next(out.glob("records/*.json")))
    assert inside.status == "completed" and inside.device.endswith("x 2 processes")
    config = {**inside.config, "evaluation": {**inside.config["evaluation"], "every_epoch": True}}
    config["runtime"] = {**config["runtime"], "output_dir": str(tmp_path / "alone")}
    (tmp_path / "run.json").write_text(json.dumps(config))
    words = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        str(root / "launch" / "accelerate_cpu2.yaml"),
    ]
    words += [str(root / "synq" / "train.py"), "--config", str(tmp_path / "run.json")]
    code, printed, errors = run_process(words, timeout=300)
    assert code == 0, printed + errors
    alone = read_record(next((tmp_path / "alone").glob("*/record.json")))
    times = {"seconds", "total_seconds", "started", "host", "name", "config", "config_digest", "loss_history"}
    for field in set(type(alone).__dataclass_fields__) - times:
        assert getattr(inside, field) == getattr(alone, field), field
    for a, b in zip(inside.loss_history, alone.loss_history, strict=True):
        assert {key: value for key, value in a.items() if key != "seconds"} == {
            k: v for k, v in b.items() if k != "seconds"
        }


def test_a_weak_wide_trial_is_asked_to_stop_and_the_next_one_starts(
    cluster: Callable[..., Any], start: Start, tmp_path: Path
) -> None:
    machines = cluster({"num_cpus": 2})
    spec = listed(tmp_path, epochs=60, head="workers_per_trial = 2\nreduction_factor = 2\n")
    spec.write_text(spec.read_text().replace('scheduler = "none"', 'scheduler = "asha"'))
    out = tmp_path / "out"
    text = finish(start(str(spec), "--output-dir", str(out), RAY_ADDRESS=machines.address), 800)
    states = [row["status"] for row in rows(out / "trials.csv")]
    assert len(states) == 4 and set(states) == {"completed", "pruned"} and "[4/4]" in text
    pruned = [row["reason"] for row in rows(out / "trials.csv") if row["status"] == "pruned"]
    assert all(
        re.fullmatch(r"stopped after epoch [1-5]?\d: weak among the trials of its group", reason) for reason in pruned
    )


def test_a_killed_rank_of_a_wide_trial_is_started_again(
    cluster: Callable[..., Any], start: Start, tmp_path: Path
) -> None:
    machines = cluster({"num_cpus": 2})
    spec = listed(tmp_path, epochs=150, head="num_trials = 1\nworkers_per_trial = 2\n")
    out = tmp_path / "out"
    process = start(str(spec), "--output-dir", str(out), RAY_ADDRESS=machines.address)
    until(lambda: bool(list(out.glob("runs/*/checkpoint.pt"))), process, 300)
    ranks = subprocess.run(
        ["pgrep", "-f", "^ray::RayTrainWorker"], capture_output=True, text=True, check=False
    ).stdout.split()
    assert len(ranks) >= 2
    os.kill(int(ranks[-1]), signal.SIGKILL)
    finish(process, 500)
    (row,) = rows(out / "trials.csv")
    assert row["status"] == "completed" and row["device"].endswith("x 2 processes")


DEVICES = """
import os

from synq.teacher.cifar_resnet import cifar_resnet


def net():
    with open(os.environ["SYNQ_TEST_LOG"], "a") as log:
        log.write(f"{os.getpid()} {os.environ.get('CUDA_VISIBLE_DEVICES')}\\n")
    return cifar_resnet(8, 10, 1, 4)
"""


def test_trials_share_logical_gpus_and_too_large_ones_are_refused_at_once(
    cluster: Callable[..., Any], start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = tmp_path / "devices.log"
    monkeypatch.setenv("SYNQ_TEST_LOG", str(log))
    machines = cluster({"num_cpus": 2, "num_gpus": 4})
    (tmp_path / "nets.py").write_text(DEVICES)
    model = (
        'weights = "random"\ninput_size = [1, 8, 8]\nmean = [0.0]\nstd = [1.0]\nnum_classes = 10\ndataset = "none"\n'
    )
    spec = listed(tmp_path, epochs=2, head="cpus_per_worker = 0.5\ngpus_per_worker = 0.5\n")
    text = spec.read_text().replace("[base.finetune]", '[base.runtime]\ndevice = "cpu"\n[base.finetune]')
    spec.write_text(f'{text}[[models]]\nspec = "{tmp_path}/nets.py:net"\n{model}')
    printed = finish(start(str(spec), "--output-dir", str(tmp_path / "out"), RAY_ADDRESS=machines.address), 400)
    assert "2 CPUs, 4 GPUs; at most 4 trials at a time" in printed
    seen = dict(line.split() for line in log.read_text().splitlines())
    assert set(seen.values()) <= set("0123") and len(set(seen.values())) < len(seen), "no two trials shared a device"
    for words, answer in (
        (("--gpus-per-worker", "1", "--workers-per-trial", "5"), "`workers_per_trial` must be at most 4"),
        (("--cpus-per-worker", "3"), "`cpus_per_worker` must be at most 2"),
    ):
        began = time.monotonic()
        process = start(str(spec), "--output-dir", str(tmp_path / "large"), *words, RAY_ADDRESS=machines.address)
        text, _ = process.communicate(timeout=120)
        assert process.returncode == 2 and answer in text, text
        assert time.monotonic() - began < 60


def test_a_killed_search_ends_with_every_trial_told_and_true(start: Start, root: Path, tmp_path: Path) -> None:
    """TPE and ASHA, the driver killed twice: nothing lost, nothing twice, nothing left running, every record a
    run's own.
    """
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    from synq.config.run import RunConfig, config_from_dict, with_overrides
    from synq.pipeline import run

    spec = write_spec(tmp_path / "search.toml", epochs=12)
    text = spec.read_text().replace(
        'scheduler = "none"', 'study_storage = "journal"\nreduction_factor = 2\ngrace_epochs = 2'
    )
    spec.write_text(text.replace("num_trials = 2", "num_trials = 8"))
    out = tmp_path / "out"
    words = (str(spec), "--output-dir", str(out))
    kept: dict[Path, bytes] = {}
    for count in (3, 8):
        process = start(*words)
        until(lambda count=count: len(list(out.glob("records/*.json"))) >= count, process)
        process.kill()
        process.wait()
        kept |= {path: path.read_bytes() for path in out.glob("records/*.json")}
    finish(start(*words), 400)
    trials = rows(out / "trials.csv")
    assert len(trials) == 16 and len({row["config_digest"] for row in trials}) == 16
    assert all(path.read_bytes() == content for path, content in kept.items())
    assert {row["status"] for row in trials} == {"completed", "pruned"}
    storage = JournalStorage(JournalFileBackend(str(out / "optuna.journal")))
    for study in optuna.get_all_study_summaries(storage):
        states = [trial.state.name for trial in optuna.load_study(study_name=study.study_name, storage=storage).trials]
        assert len(states) == 8 and set(states) <= {"COMPLETE", "PRUNED"}
    completed = [row["trial"] for row in trials if row["status"] == "completed"]
    for name in (completed[0], completed[len(completed) // 2], completed[-1]):
        record = read_record(out / "records" / f"{name}.json")
        config = config_from_dict(RunConfig, record.config)
        alone = run(with_overrides(config, {"runtime.output_dir": str(tmp_path / "alone")}))
        assert (alone.objective_value, alone.top1, alone.set_digest) == (
            record.objective_value,
            record.top1,
            record.set_digest,
        )
