"""The check of a cluster: its table, and every way to fail that can be made real here."""

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from synq.sweeps.doctor.check import CHECKS, CLAIMS, Result, bounded, make_site, run_check, run_checks, table
from synq.sweeps.doctor.facts import check_output, differences, enough_space, is_network
from synq.sweeps.doctor.probes import NodeProbe, code_digest, file_system, wait_for_text
from synq.sweeps.doctor.site import FailedError, Passed, Site, SkippedError, below
from synq.sweeps.doctor.work import judge_device, judge_group, judge_records, where_it_hangs
from synq.sweeps.doctor.workers import measure_device

VERSIONS = {"python": "3.11.7", "synq": "0.1", "torch": "2.6.0", "ray": "2.44", "accelerate": "1.2"}


def site(tmp_path: Path, *facts: dict[str, Any], gpus: int = 0) -> Site:
    """A site of nodes that have said these facts; Ray was told of `gpus` on each."""
    nodes = {f"node{number}": {"name": f"host{number}", "resources": {"GPU": gpus}} for number in range(len(facts))}
    return Site(tmp_path / "check-x", "", 2, nodes=nodes, facts=dict(zip(nodes, facts, strict=True)))


def said(machine: str = "a", **facts: Any) -> dict[str, Any]:
    """What a worker of a group says when all is well."""
    well = {"host": "h", "machine": machine, "node": machine, "joined": True, "world": 2, "backend": "gloo"}
    return {**well, "right": True, "bytes_per_second": 1e9, **facts}


# --- the table -----------------------------------------------------------------------------------------------------------------


def test_the_table_calls_nothing_verified_that_no_check_has_seen() -> None:
    results = [
        Result(name="nodes", status="PASS", detail="two", lacking={"machines": "2 nodes on 1 machine"}),
        Result(name="gloo", status="PASS", detail="ok", verified={"gloo": "2 processes"}),
        Result(name="faults", status="FAIL", detail="it died"),
        Result(name="gpus", status="SKIP", detail="no GPU"),
    ]
    rows = {row["what"]: (row["verified here"], row["how, or why not"]) for row in table(results)}
    words = {claim: rows[text] for claim, (_, text) in CLAIMS.items()}
    assert len(rows) == len(CLAIMS) and {name for name, _ in CLAIMS.values()} <= set(CHECKS)
    assert words["machines"] == ("no", "2 nodes on 1 machine")
    assert words["gloo"] == ("yes", "2 processes") and words["gloo machines"] == ("no", "ok")
    assert words["faults"] == ("no", "the check faults failed")
    assert words["gpus"] == ("no", "no GPU") and words["s3"] == ("no", "not checked")


def test_a_check_ends_as_its_line_says_and_one_that_hangs_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def skip(_: Site) -> Passed:
        raise SkippedError("not here")

    def fail(_: Site) -> Passed:
        raise OSError(5, "gone", "/mnt/x")

    def hang(_: Site) -> Passed:
        time.sleep(60)
        return Passed("late")

    place = site(tmp_path)
    assert run_check("a", skip, place, 5).line().startswith("SKIP  a        not here (0.")
    assert run_check("a", fail, place, 5).line().startswith("FAIL  a        OSError: [Errno 5] gone: '/mnt/x'")
    assert run_check("a", lambda _: Passed("well"), place, 5).line().startswith("PASS  a        well")
    monkeypatch.setattr("synq.sweeps.doctor.check.GRACE_SECONDS", 0.1)
    hangs = run_check("a", hang, place, 0.1)
    assert hangs.status == "FAIL" and "dead NFS server" in hangs.detail and hangs.seconds < 5
    assert bounded(lambda: 1, 5) == 1 and bounded(lambda: time.sleep(60), 0.05) is None


def test_a_failed_check_stops_those_that_need_it_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(_: Site) -> Passed:
        raise FailedError("no")

    for name in CHECKS:
        monkeypatch.setitem(CHECKS, name, fail if name in ("nodes", "output", "gpus") else lambda _: Passed("well"))
    results = {one.name: one for one in run_checks(site(tmp_path, {"machine": "a", "gpus": []}), 5, ["clock"])}
    skipped = {name: one.detail for name, one in results.items() if one.status == "SKIP"}
    needs = "needs output, which failed"
    assert skipped == {"clock": "left out (--skip)", "sweep": needs, "wide": needs, "faults": needs}
    assert results["gloo"].status == "PASS" and len(capsys.readouterr().out.splitlines()) == len(CHECKS)
    silent = run_checks(site(tmp_path), 5, [])
    assert {one.detail for one in silent if one.name != "nodes"} == {"no node answers"}


# --- what machines are ---------------------------------------------------------------------------------------------------------


def test_machines_that_differ_are_named() -> None:
    here = {"code": "c0", "versions": VERSIONS}
    assert differences({"a": here, "b": {**here, "versions": {**VERSIONS, "torch": "2.6.0+cu124"}}}) == []
    other = {"code": "c1", "versions": {**VERSIONS, "ray": "2.45", "torch": "2.7.0+cu124"}}
    assert differences({"a": here, "b": other, "c": here}) == [
        "`torch` must be the same everywhere, but got 2.6.0 on a c, 2.7.0 on b",
        "`ray` must be the same everywhere, but got 2.44 on a c, 2.45 on b",
        "the source files of this package must be the same everywhere, but got c0 on a c, c1 on b",
    ]


def test_the_digest_of_the_code_sees_one_changed_file(tmp_path: Path) -> None:
    for copy in ("here", "there"):
        for part in ("synq/a.py", "sweeps/deep/b.py"):
            (tmp_path / copy / part).parent.mkdir(parents=True)
            (tmp_path / copy / part).write_text("x = 1")
    here, there = tmp_path / "here", tmp_path / "there"
    assert code_digest(here) == code_digest(there)
    (there / "sweeps" / "deep" / "b.py").write_text("x = 2")
    assert code_digest(here) != code_digest(there)


def test_gpus_count_only_where_both_ray_and_torch_have_them(tmp_path: Path) -> None:
    none, two = {"machine": "a", "gpus": []}, {"machine": "b", "gpus": [("H", 1), ("H", 1)]}
    assert site(tmp_path, none, none, gpus=1).no_gpus().startswith("logical GPUs without devices")
    assert site(tmp_path, none, two, gpus=1).gpus() == {"node1": 1}
    assert site(tmp_path, two, gpus=4).gpus() == {"node0": 2}
    assert (
        "Ray was started without them" in site(tmp_path, two).no_gpus() and site(tmp_path, none).no_gpus() == "no GPU"
    )
    assert site(tmp_path, none, none).machines() == 1 and site(tmp_path, none, two).machines() == 2


def test_the_file_system_is_that_of_the_nearest_mount(tmp_path: Path) -> None:
    mounts = tmp_path / "mounts"
    lines = ["/dev/sda / ext4 rw 0 0", "fs1:/export /mnt/all nfs4 rw 0 0", "none /mnt/all/own\\040disk tmpfs rw 0 0"]
    mounts.write_text("\n".join(lines))
    found = [file_system(path, str(mounts)) for path in ("/mnt/all/x", "/mnt/all/own disk/x", "/mnt/allx", "/")]
    assert found == [("nfs4", "fs1:/export"), ("tmpfs", "none"), ("ext4", "/dev/sda"), ("ext4", "/dev/sda")]
    assert file_system("/", str(tmp_path / "absent")) == ("", "")
    assert is_network("nfs4") and is_network("fuse.glusterfs") and is_network("lustre")
    assert not is_network("ext4") and not is_network("overlay") and not is_network("fuse.sshfsx") and not is_network("")


def test_little_space_is_refused() -> None:
    assert enough_space(2**31, "here") == "2.0 GiB free (here)"
    with pytest.raises(FailedError, match=r"1 GiB free, but got 0\.5 GiB free \(here\)"):
        enough_space(2**29, "here")


def test_an_unwritable_folder_and_a_closed_address_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.chdir(tmp_path)
    result = run_check("output", check_output, make_site("file/sub", 2), 30)
    wanted = f"`output_dir` must be writable, but got {tmp_path}/file/sub: Not a directory"
    assert (result.status, result.detail) == ("FAIL", wanted)
    place = make_site((tmp_path / "file").as_uri(), 2)
    result = run_check("output", check_output, place, 30)
    assert result.status == "FAIL" and "must be writable, but got file:///" in result.detail and place.unreachable
    with pytest.raises(ValueError, match=r"no password .* but got ftp://host/x$"):
        make_site("ftp://me:secret@host/x", 2)
    assert below("s3://b/x/?region=eu", "check-1") == "s3://b/x/check-1?region=eu"


@pytest.mark.slow
def test_a_port_that_nobody_listens_on_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("synq.sweeps.storage.object_store.PAUSES", (0.01,))
    place = make_site("s3://bucket/x?endpoint_override=http://127.0.0.1:9", 2)
    result = run_check("output", check_output, place, 120)
    assert result.status == "FAIL" and "s3://bucket/x" in result.detail and "firewall" in result.detail
    assert result.verified == {} and place.unreachable


def test_a_probe_refuses_to_kill_what_is_not_rays() -> None:
    with pytest.raises(ValueError, match=r"`pid` must be a worker of Ray, but got \d+"):
        NodeProbe("n").kill(os.getpid())


def test_a_lock_of_one_process_is_refused_to_another(
    tmp_path: Path, run_process: Callable[..., tuple[int, str, str]]
) -> None:
    probe, path = NodeProbe("n"), str(tmp_path / "lock")
    words = [
        sys.executable,
        "-c",
        f"from synq.sweeps.doctor.probes import NodeProbe; print(NodeProbe('m').lock({path!r}))",
    ]
    assert probe.lock(path)
    assert run_process(words)[1].strip() == "False"
    probe.unlock()
    assert run_process(words)[1].strip() == "True"


def test_a_text_is_waited_for(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("old")
    assert wait_for_text(tmp_path / "x", "new", 0.1) is None and wait_for_text(tmp_path / "y", "new", 0.1) is None
    assert wait_for_text(tmp_path / "x", "old", 0.1) is not None


# --- what machines do ----------------------------------------------------------------------------------------------------------


def test_a_device_that_computes_otherwise_is_named() -> None:
    facts = measure_device("cpu", size=64, large=64)
    assert 0 < facts["fp32_error"] < 1e-5 < facts["bf16_error"] < 1e-2, "bf16 keeps eight bits"
    assert "bf16" in judge_device(facts, "here")
    for name, error in (("fp32_error", 1e-3), ("bf16_error", 0.1), ("fp32_error", float("nan"))):
        with pytest.raises(FailedError, match=r"here \(cpu\): a (fp32|bf16) product must be within"):
            judge_device({**facts, name: error}, "here")


def test_a_group_is_verified_across_machines_only_if_it_was() -> None:
    one, two = judge_group({0: said(), 1: said()}, 2, "gloo"), judge_group({0: said(), 1: said("b")}, 2, "gloo")
    assert set(one.verified) == {"gloo"} and set(two.verified) == {"gloo", "gloo machines"}
    for bad in ({0: said()}, {0: said(world=1), 1: said(world=1)}, {0: said(), 1: said(right=False)}):
        with pytest.raises(FailedError):
            judge_group(bad, 2, "gloo")
    with pytest.raises(FailedError, match=r"must be of nccl, but got \['gloo'\]"):
        judge_group({0: said(), 1: said()}, 2, "nccl")


def test_a_group_that_hangs_says_where() -> None:
    assert where_it_hangs({}, 2, "gloo").startswith("no worker began")
    began = {"host": "a", "machine": "a", "node": "a"}
    assert where_it_hangs({0: began, 1: said()}, 2, "gloo").startswith("1 of 2 workers joined the group (a, h)")
    text = where_it_hangs({0: said(), 1: said()}, 2, "nccl")
    assert "their data does not pass" in text and "NCCL_SOCKET_IFNAME" in text


def test_records_of_the_wrong_kind_fail() -> None:
    record = {
        "status": "completed",
        "reason": "",
        "device": "cpu, 1 threads x 2 processes",
        "host": "h",
        "objective_value": 0.5,
    }
    answer = {"code": 0, "printed": "", "records": [record]}
    assert "objective 0.5" in judge_records(answer, 1, gpu=False, processes=2)
    for wrong in (
        {"trials": 2},
        {"gpu": True},
        {"processes": 3},
        {"answer": {**answer, "code": 1}},
        {"answer": {**answer, "records": [{**record, "status": "failed", "reason": "burnt"}]}},
    ):
        words: dict[str, Any] = {"answer": answer, "trials": 1, "gpu": False, "processes": 2, **wrong}
        with pytest.raises(FailedError):
            judge_records(**words)
