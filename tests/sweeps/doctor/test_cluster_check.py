"""The checks of a cluster: their table, and every failure that can be reproduced here."""

import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from synq.sweeps.doctor.check import (
    CHECKS,
    CLAIMS,
    Result,
    make_cluster,
    run_check,
    run_checks,
    run_with_timeout,
    table,
)
from synq.sweeps.doctor.cluster_state import Cluster, FailedError, Passed, SkippedError, join_address
from synq.sweeps.doctor.node_checks import check_output, differences, is_network, require_space
from synq.sweeps.doctor.probes import NodeProbe, code_digest, file_system, wait_for_text
from synq.sweeps.doctor.workers import measure_device
from synq.sweeps.doctor.workload_checks import diagnose_hang, validate_device, validate_group, validate_records

VERSIONS = {"python": "3.11.7", "synq": "0.1", "torch": "2.6.0", "ray": "2.44", "accelerate": "1.2"}


def cluster(tmp_path: Path, *facts: dict[str, Any], gpus: int = 0) -> Cluster:
    """Return a cluster whose nodes responded with these facts; Ray registered `gpus` on each."""
    nodes = {f"node{number}": {"name": f"host{number}", "resources": {"GPU": gpus}} for number in range(len(facts))}
    return Cluster(tmp_path / "check-x", "", 2, nodes=nodes, facts=dict(zip(nodes, facts, strict=True)))


def report(machine: str = "a", **facts: Any) -> dict[str, Any]:
    """Return the report of a worker in a process group that works."""
    good = {"host": "h", "machine": machine, "node": machine, "joined": True, "world": 2, "backend": "gloo"}
    return {**good, "right": True, "bytes_per_second": 1e9, **facts}


# --- the table -------------------------------------------------------------------------------------------


def test_the_table_lists_as_verified_only_what_a_check_verified() -> None:
    results = [
        Result(name="nodes", status="PASS", detail="two", lacking={"machines": "2 nodes on 1 machine"}),
        Result(name="gloo", status="PASS", detail="ok", verified={"gloo": "2 processes"}),
        Result(name="faults", status="FAIL", detail="it died"),
        Result(name="gpus", status="SKIP", detail="no GPU"),
    ]
    rows = {row["what"]: (row["verified here"], row["how, or why not"]) for row in table(results)}
    by_claim = {claim: rows[text] for claim, (_, text) in CLAIMS.items()}
    assert len(rows) == len(CLAIMS) and {name for name, _ in CLAIMS.values()} <= set(CHECKS)
    assert by_claim["machines"] == ("no", "2 nodes on 1 machine")
    assert by_claim["gloo"] == ("yes", "2 processes") and by_claim["gloo machines"] == ("no", "ok")
    assert by_claim["faults"] == ("no", "the check faults failed")
    assert by_claim["gpus"] == ("no", "no GPU") and by_claim["s3"] == ("no", "not checked")


def test_the_line_of_a_check_has_its_status_and_a_hanging_check_is_abandoned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def skip(_: Cluster) -> Passed:
        raise SkippedError("not here")

    def fail(_: Cluster) -> Passed:
        raise OSError(5, "gone", "/mnt/x")

    def hang(_: Cluster) -> Passed:
        time.sleep(60)
        return Passed("late")

    one = cluster(tmp_path)
    assert run_check("a", skip, one, 5).line().startswith("SKIP  a        not here (0.")
    assert run_check("a", fail, one, 5).line().startswith("FAIL  a        OSError: [Errno 5] gone: '/mnt/x'")
    assert run_check("a", lambda _: Passed("well"), one, 5).line().startswith("PASS  a        well")
    monkeypatch.setattr("synq.sweeps.doctor.check.GRACE_SECONDS", 0.1)
    hangs = run_check("a", hang, one, 0.1)
    assert hangs.status == "FAIL" and "dead NFS server" in hangs.detail and hangs.seconds < 5
    assert run_with_timeout(lambda: 1, 5) == 1 and run_with_timeout(lambda: time.sleep(60), 0.05) is None


def test_a_failed_check_skips_only_the_checks_that_need_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(_: Cluster) -> Passed:
        raise FailedError("no")

    for name in CHECKS:
        monkeypatch.setitem(CHECKS, name, fail if name in ("nodes", "output", "gpus") else lambda _: Passed("well"))
    results = {one.name: one for one in run_checks(cluster(tmp_path, {"machine": "a", "gpus": []}), 5, ["clock"])}
    skipped = {name: one.detail for name, one in results.items() if one.status == "SKIP"}
    needs = "needs output, which failed"
    assert skipped == {"clock": "left out (--skip)", "sweep": needs, "wide": needs, "faults": needs}
    assert results["gloo"].status == "PASS" and len(capsys.readouterr().out.splitlines()) == len(CHECKS)
    silent = run_checks(cluster(tmp_path), 5, [])
    assert {one.detail for one in silent if one.name != "nodes"} == {"no node responds"}


# --- properties of nodes ---------------------------------------------------------------------------------


def test_machines_that_differ_are_named() -> None:
    here = {"code": "c0", "versions": VERSIONS}
    assert differences({"a": here, "b": {**here, "versions": {**VERSIONS, "torch": "2.6.0+cu124"}}}) == []
    other = {"code": "c1", "versions": {**VERSIONS, "ray": "2.45", "torch": "2.7.0+cu124"}}
    assert differences({"a": here, "b": other, "c": here}) == [
        "`torch` must be the same everywhere, but got 2.6.0 on a c, 2.7.0 on b",
        "`ray` must be the same everywhere, but got 2.44 on a c, 2.45 on b",
        "the source files of this package must be the same everywhere, but got c0 on a c, c1 on b",
    ]


def test_the_digest_of_the_code_changes_with_one_file(tmp_path: Path) -> None:
    for copy in ("here", "there"):
        for part in ("synq/a.py", "sweeps/deep/b.py"):
            (tmp_path / copy / part).parent.mkdir(parents=True)
            (tmp_path / copy / part).write_text("x = 1")
    here, there = tmp_path / "here", tmp_path / "there"
    assert code_digest(here) == code_digest(there)
    (here / "synq" / "sweeps").symlink_to("../sweeps")  # a checkout; the other is installed or uploaded
    shutil.copytree(there / "sweeps", there / "synq" / "sweeps")
    shutil.rmtree(there / "sweeps")
    assert code_digest(here) == code_digest(there)
    (there / "synq" / "sweeps" / "deep" / "b.py").write_text("x = 2")
    assert code_digest(here) != code_digest(there)


def test_gpus_count_only_where_both_ray_and_torch_have_them(tmp_path: Path) -> None:
    none, two = {"machine": "a", "gpus": []}, {"machine": "b", "gpus": [("H", 1), ("H", 1)]}
    assert cluster(tmp_path, none, none, gpus=1).no_gpus_reason().startswith("logical GPUs without devices")
    assert cluster(tmp_path, none, two, gpus=1).gpus() == {"node1": 1}
    assert cluster(tmp_path, two, gpus=4).gpus() == {"node0": 2}
    assert (
        "Ray was started without them" in cluster(tmp_path, two).no_gpus_reason()
        and cluster(tmp_path, none).no_gpus_reason() == "no GPU"
    )
    assert cluster(tmp_path, none, none).num_machines() == 1 and cluster(tmp_path, none, two).num_machines() == 2


def test_the_file_system_is_that_of_the_nearest_mount(tmp_path: Path) -> None:
    mounts = tmp_path / "mounts"
    lines = ["/dev/sda / ext4 rw 0 0", "fs1:/export /mnt/all nfs4 rw 0 0", "none /mnt/all/own\\040disk tmpfs rw 0 0"]
    mounts.write_text("\n".join(lines))
    found = [file_system(path, str(mounts)) for path in ("/mnt/all/x", "/mnt/all/own disk/x", "/mnt/allx", "/")]
    assert found == [("nfs4", "fs1:/export"), ("tmpfs", "none"), ("ext4", "/dev/sda"), ("ext4", "/dev/sda")]
    assert file_system("/", str(tmp_path / "absent")) == ("", "")
    assert is_network("nfs4") and is_network("fuse.glusterfs") and is_network("lustre")
    assert not is_network("ext4") and not is_network("overlay") and not is_network("fuse.sshfsx") and not is_network("")


def test_too_little_free_space_is_rejected() -> None:
    assert require_space(2**31, "here") == "2.0 GiB free (here)"
    with pytest.raises(FailedError, match=r"1 GiB free, but got 0\.5 GiB free \(here\)"):
        require_space(2**29, "here")


def test_an_unwritable_folder_and_a_closed_address_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.chdir(tmp_path)
    result = run_check("output", check_output, make_cluster("file/sub", 2), 30)
    expected = f"`output_dir` must be writable, but got {tmp_path}/file/sub: Not a directory"
    assert (result.status, result.detail) == ("FAIL", expected)
    one = make_cluster((tmp_path / "file").as_uri(), 2)
    result = run_check("output", check_output, one, 30)
    assert result.status == "FAIL" and "must be writable, but got file:///" in result.detail and one.unreachable
    with pytest.raises(ValueError, match=r"no password .* but got ftp://host/x$"):
        make_cluster("ftp://me:secret@host/x", 2)
    assert join_address("s3://b/x/?region=eu", "check-1") == "s3://b/x/check-1?region=eu"


@pytest.mark.slow
def test_a_port_without_a_server_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("synq.sweeps.storage.object_store.PAUSES", (0.01,))
    one = make_cluster("s3://bucket/x?endpoint_override=http://127.0.0.1:9", 2)
    result = run_check("output", check_output, one, 120)
    assert result.status == "FAIL" and "s3://bucket/x" in result.detail and "firewall" in result.detail
    assert result.verified == {} and one.unreachable


def test_a_probe_kills_no_process_but_rays_workers() -> None:
    with pytest.raises(ValueError, match=r"`pid` must be a worker of Ray, but got \d+"):
        NodeProbe("n").kill(os.getpid())


def test_a_lock_of_one_process_excludes_another(
    tmp_path: Path, run_process: Callable[..., tuple[int, str, str]]
) -> None:
    probe, path = NodeProbe("n"), str(tmp_path / "lock")
    command = [
        sys.executable,
        "-c",
        f"from synq.sweeps.doctor.probes import NodeProbe; print(NodeProbe('m').lock({path!r}))",
    ]
    assert probe.lock(path)
    assert run_process(command)[1].strip() == "False"
    probe.unlock()
    assert run_process(command)[1].strip() == "True"


def test_wait_for_text(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("old")
    assert wait_for_text(tmp_path / "x", "new", 0.1) is None and wait_for_text(tmp_path / "y", "new", 0.1) is None
    assert wait_for_text(tmp_path / "x", "old", 0.1) is not None


# --- workloads -------------------------------------------------------------------------------------------


def test_a_device_with_wrong_products_is_named() -> None:
    facts = measure_device("cpu", size=64, large=64)
    assert 0 < facts["fp32_error"] < 1e-5 < facts["bf16_error"] < 1e-2, "bf16 keeps eight bits"
    assert "bf16" in validate_device(facts, "here")
    for name, error in (("fp32_error", 1e-3), ("bf16_error", 0.1), ("fp32_error", float("nan"))):
        with pytest.raises(FailedError, match=r"here \(cpu\): a (fp32|bf16) product must be within"):
            validate_device({**facts, name: error}, "here")


def test_a_group_is_verified_across_machines_only_if_it_spans_several() -> None:
    one, two = (
        validate_group({0: report(), 1: report()}, 2, "gloo"),
        validate_group({0: report(), 1: report("b")}, 2, "gloo"),
    )
    assert set(one.verified) == {"gloo"} and set(two.verified) == {"gloo", "gloo machines"}
    for bad in ({0: report()}, {0: report(world=1), 1: report(world=1)}, {0: report(), 1: report(right=False)}):
        with pytest.raises(FailedError):
            validate_group(bad, 2, "gloo")
    with pytest.raises(FailedError, match=r"must be of nccl, but got \['gloo'\]"):
        validate_group({0: report(), 1: report()}, 2, "nccl")


def test_the_message_of_a_group_that_hangs_names_the_cause() -> None:
    assert diagnose_hang({}, 2, "gloo").startswith("no worker started")
    started = {"host": "a", "machine": "a", "node": "a"}
    assert diagnose_hang({0: started, 1: report()}, 2, "gloo").startswith("1 of 2 workers joined the group (a, h)")
    text = diagnose_hang({0: report(), 1: report()}, 2, "nccl")
    assert "but cannot exchange data" in text and "NCCL_SOCKET_IFNAME" in text


def test_records_of_the_wrong_kind_fail() -> None:
    record = {
        "status": "completed",
        "reason": "",
        "device": "cpu, 1 threads x 2 processes",
        "host": "h",
        "objective_value": 0.5,
    }
    outcome = {"code": 0, "printed": "", "records": [record]}
    assert "objective 0.5" in validate_records(outcome, 1, gpu=False, processes=2)
    for wrong in (
        {"trials": 2},
        {"gpu": True},
        {"processes": 3},
        {"outcome": {**outcome, "code": 1}},
        {"outcome": {**outcome, "records": [{**record, "status": "failed", "reason": "burnt"}]}},
    ):
        args: dict[str, Any] = {"outcome": outcome, "trials": 1, "gpu": False, "processes": 2, **wrong}
        with pytest.raises(FailedError):
            validate_records(**args)
