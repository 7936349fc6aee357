"""`synq check-cluster` as a user starts it: invalid arguments, all checks on two nodes, an absent cluster."""

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from synq.commands.check_cluster import main
from synq.sweeps.doctor.check import CHECKS

RUN = Callable[..., tuple[int, str, str]]


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["--workers", "1"], "`workers` must be a finite number >= 2, but got 1"),
        (["--timeout", "0"], "`timeout` must be a finite number > 0, but got 0.0"),
        (["--skip", "nccl", "glo"], "but got 'glo'; did you mean `gloo`?"),
        (["--json", "absent/x.json"], "`json` must name a file in an existing folder, but got 'absent/x.json'"),
        (["--output-dir", "s3://me:secret@b/x"], "must carry no password"),
    ],
)
def test_invalid_arguments_are_rejected(
    args: list[str], expected: str, in_tmp: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "environ", os.environ.copy())
    assert main(args) == 2
    printed = capsys.readouterr().err
    assert expected in printed and printed.count("\n") == 1 and "secret" not in printed


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """Start a cluster of two nodes on this machine, with one CPU and one logical GPU each, and yield its address."""
    from synq.sweeps.driver.cluster import prepare_environment

    prepare_environment()
    import ray
    from ray.cluster_utils import Cluster

    assert not ray.is_initialized()
    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "num_gpus": 1, "include_dashboard": False})
    try:
        nodes.add_node(num_cpus=1, num_gpus=1)
        yield nodes.address
    finally:
        nodes.shutdown()


COMMAND = [sys.executable, "-m", "synq.cli", "check-cluster"]


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.timeout(900)
def test_all_checks_on_two_nodes(address: str, tmp_path: Path, run_process: RUN) -> None:
    folder, report = tmp_path / "new" / "out", tmp_path / "report.json"
    folder.parent.mkdir()
    args = [*COMMAND, "--output-dir", str(folder), "--timeout", "240", "--json", str(report)]
    code, out, err = run_process(args, timeout=850, RAY_ADDRESS=address)
    assert code == 0, out + err
    found = {one["name"]: one for one in json.loads(report.read_text())["checks"]}
    assert list(found) == list(CHECKS)
    for name, one in found.items():
        assert f"{one['status']}  {name}" in out and one["status"] == (
            "SKIP" if name in ("gpus", "packing", "nccl") else "PASS"
        )
    for name in ("gpus", "packing", "nccl"):
        assert found[name]["detail"].startswith("logical GPUs without devices")
    assert found["gloo"]["detail"].startswith("2 processes on 2 nodes of 1 machine, sums right")
    assert " x 2 processes" in found["wide"]["detail"] and "killed after epoch" in found["faults"]["detail"]
    verified = set().union(*(one["verified"] for one in found.values()))
    assert verified == {"folder", "capacity", "gloo", "sweep", "wide", "faults"}, (
        "two nodes of one machine must verify no more"
    )
    assert out.count("| yes |") == len(verified) and "Failed: nothing." in out
    assert os.listdir(folder.parent) == [], "files are left"


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.timeout(400)
def test_an_address_is_left_as_it_was(address: str, tmp_path: Path, run_process: RUN) -> None:
    far, skip = tmp_path / "far", [name for name in CHECKS if name not in ("nodes", "output", "disk", "sweep")]
    args = [*COMMAND, "--output-dir", far.as_uri(), "--timeout", "240", "--skip", *skip]
    cache = {"SYNQ_CACHE_DIR": str(tmp_path / "cache")}
    code, out, err = run_process(args, timeout=390, RAY_ADDRESS=address, **cache)
    assert code == 0, out + err
    assert "PASS  output   file://" in out and "8 MiB sent at" in out and "PASS  sweep    4 trials completed" in out
    assert list(far.iterdir()) == []


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_nodes_that_do_not_respond_in_time_fail(address: str, in_tmp: Path, root: Path, run_process: RUN) -> None:
    code, out, _ = run_process([*COMMAND, "--output-dir", str(in_tmp), "--timeout", "0.5"], RAY_ADDRESS=address)
    assert code == 1 and out.count("no reply in time") >= 2 and out.count("no node responds (") == len(CHECKS) - 1


GROUPS = """
import sys
from pathlib import Path
from synq.sweeps.driver.cluster import cluster as join_cluster, prepare_environment
prepare_environment()
from synq.sweeps.doctor.check import CHECKS, run_check
from synq.sweeps.doctor.cluster_state import Cluster
from synq.sweeps.search_config import SearchConfig
cluster = Cluster(Path(sys.argv[1]), "", 2)
with join_cluster(SearchConfig()):
    cluster.start_probes()
    for name, limit in (("nodes", 120), ("gloo", 8), ("gloo", 200)):
        print(run_check(name, CHECKS[name], cluster, limit).line(), flush=True)
"""


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.timeout(400)
def test_a_group_that_times_out_is_killed_and_frees_its_resources(
    address: str, tmp_path: Path, run_process: RUN
) -> None:
    lines = run_process([sys.executable, "-c", GROUPS, str(tmp_path)], timeout=390, RAY_ADDRESS=address)[1].splitlines()
    status = [line.split()[:2] for line in lines if line[:4] in ("PASS", "FAIL")]
    assert status == [["PASS", "nodes"], ["FAIL", "gloo"], ["PASS", "gloo"]], lines


@pytest.mark.parametrize("port", ["9", "99999"])
def test_no_cluster_at_the_address_is_reported_at_once(
    port: str, in_tmp: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "environ", {**os.environ, "RAY_ADDRESS": f"127.0.0.1:{port}"})
    started = time.monotonic()
    assert main([]) == 2 and time.monotonic() - started < 15
    printed = capsys.readouterr()
    assert f"`RAY_ADDRESS` must name a running Ray cluster, but got '127.0.0.1:{port}'" in printed.err
    assert printed.out == "" and os.listdir(in_tmp) == []
