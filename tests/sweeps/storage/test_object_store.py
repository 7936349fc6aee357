"""Folders in object stores: the same tests on a mounted folder, fsspec's memory and (slow) an S3-compatible server."""

import errno
import importlib.util
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from synq.sweeps.storage import object_store as storage
from synq.sweeps.storage.lease import Lease
from synq.sweeps.storage.object_store import Storage, open_storage

ROOT = Path(__file__).resolve().parents[3]
ODD = "a b/é #%+.json"
S3 = pytest.param("s3", marks=pytest.mark.slow)
WAIT = 60.0


def _server(**variables: str) -> Iterator[str]:
    """Yield the endpoint of an S3-compatible server on loopback."""
    if not all(importlib.util.find_spec(name) for name in ("moto", "flask")):
        pytest.skip("needs moto[server]")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-W", "ignore", "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    environment, silent = {**os.environ, **variables}, subprocess.DEVNULL
    process = subprocess.Popen(command, env=environment, stdout=silent, stderr=silent, start_new_session=True)
    try:
        end = time.monotonic() + WAIT
        while not _listens(port):
            assert process.poll() is None and time.monotonic() < end, "moto's server did not start"
            time.sleep(0.02)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


def _listens(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    """Yield the endpoint of an S3 server with the bucket `bucket`; its credentials are in the environment."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_REGION", "AWS_DEFAULT_REGION", "AWS_ENDPOINT_URL"):
            patch.delenv(name, raising=False)
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.setenv(name, "testing")
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        server = _server()
        endpoint = next(server)
        from pyarrow.fs import S3FileSystem

        made = S3FileSystem(endpoint_override=endpoint, region="us-east-1", allow_bucket_creation=True)
        made.create_dir("bucket")
        yield endpoint
        server.close()


def _address(kind: str, tmp_path: Path, request: pytest.FixtureRequest) -> str:
    if kind == "file":
        return (tmp_path / "far away").as_uri()
    if kind == "memory":
        return f"memory://{uuid.uuid4().hex}/far away"
    return f"s3://bucket/{uuid.uuid4().hex}/far away?endpoint_override={request.getfixturevalue('s3')}"


@pytest.fixture(params=["file", "memory", S3])
def address(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Return a new folder in each kind of store."""
    return _address(request.param, tmp_path, request)


@pytest.fixture(params=["file", S3])
def shared(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Return a new folder that other processes see as well."""
    return _address(request.param, tmp_path, request)


@pytest.fixture
def child() -> Iterator[Callable[..., "subprocess.Popen[str]"]]:
    """Yield a function that starts Python code in a separate process, which ends with the test."""
    started = []

    def start(code: str, *args: object) -> "subprocess.Popen[str]":
        command = [sys.executable, "-c", code, *map(str, args)]
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True)
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def _fill(folder: Path, **files: bytes) -> Path:
    for name, content in files.items():
        path = folder / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return folder


def test_files_are_written_read_and_removed(address: str, tmp_path: Path) -> None:
    store, here = open_storage(address), tmp_path / "here" / "x"
    store.check_writable()
    assert store.names("") == [] and store.names("plans") == [] and store.read("none") is None
    assert not store.get("plans/none", here) and not here.exists() and not store.exists("plans")
    (tmp_path / "empty").touch()
    store.put(tmp_path / "empty", "plans/empty")
    store.put(b"first", ODD)
    store.put(b"second", ODD)  # replaces the first
    store.put(b"below", "plans/deeper/file")
    store.put(b"not gzip", "plans/x.gz")
    assert store.names("plans") == ["empty", "x.gz"] and store.names("a b") == ["é #%+.json"]
    assert [store.read(name) for name in ("plans/empty", ODD, "plans/x.gz")] == [b"", b"second", b"not gzip"]
    assert store.get(ODD, here) and here.read_bytes() == b"second"
    assert store.get("plans/empty", here) and here.read_bytes() == b""
    assert os.listdir(here.parent) == ["x"] and here.stat().st_mode & 0o777 == 0o666 & ~_umask()
    assert pickle.loads(pickle.dumps(store)).read(ODD) == b"second"
    store.delete(ODD)
    store.delete(ODD)
    assert not store.exists(ODD) and store.exists("plans/x.gz") and store.names("a b") == []


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_a_large_file_is_sent_in_chunks(address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "CHUNK_BYTES", 6 * 2**20)
    content = os.urandom(13 * 2**20 + 1)
    (tmp_path / "large").write_bytes(content)
    store = open_storage(address)
    store.put(tmp_path / "large", "x/large")
    assert store.get("x/large", tmp_path / "back") and (tmp_path / "back").read_bytes() == content


def test_a_folder_is_whole_once_its_last_file_is_there(
    address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_storage(address)
    local = _fill(tmp_path / "set", a=b"1", deep__b=b"2", manifest=b"3", z=b"")
    (local / ".z.1234.tmp").write_bytes(b"left by a kill")
    with pytest.raises(ValueError, match="`last` must name a file"):
        store.put_folder(local, "store/set", last="none")
    sent, put = [], Storage.put
    monkeypatch.setattr(Storage, "put", lambda self, content, name: (put(self, content, name), sent.append(name))[0])
    store.put_folder(local, "store/set", last="manifest")
    assert sorted(sent) == [f"store/set/{name}" for name in ("a", "deep/b", "manifest", "z")]
    assert sent[-1] == "store/set/manifest"
    fetched = tmp_path / "node" / "set"
    assert not store.get_folder("store/none", fetched) and not fetched.exists()
    assert store.get_folder("store/set", fetched) and not store.get_folder("store/set", fetched)
    files = {path.relative_to(fetched).as_posix(): path.read_bytes() for path in fetched.rglob("*") if path.is_file()}
    assert files == {"a": b"1", "deep/b": b"2", "manifest": b"3", "z": b""}
    assert not (fetched.parent / ".set.coming").exists()


def test_get_all_mirrors_the_store(address: str, tmp_path: Path) -> None:
    store = open_storage(address)
    for number in range(40):
        store.put(f"plan {number}".encode(), f"plans/{number}.json")
    store.put(b"record", "records/1.json")
    _fill(tmp_path, plans__stale=b"gone there", plans__keep__file=b"", **{"plans__1.json": b"old"})
    assert store.get_all(["plans", "records", "absent"], tmp_path) == 41
    assert sorted(os.listdir(tmp_path / "plans")) == sorted([*(f"{number}.json" for number in range(40)), "keep"])
    assert (tmp_path / "plans" / "1.json").read_bytes() == b"plan 1" and os.listdir(tmp_path / "absent") == []


def test_a_lease_on_each_kind_of_store(address: str) -> None:
    first, second = (Lease(open_storage(address), settle=0.05) for _ in range(2))
    first.acquire()
    with pytest.raises(ValueError, match="must not be in use"):
        second.acquire()
    first.release()
    second.acquire()
    assert not second.lost
    second.release()
    assert open_storage(address).names("") == []


def test_ctrl_c_publishes_no_partial_file(address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "CHUNK_BYTES", 2**20)
    os.mkfifo(tmp_path / "slow")
    store = open_storage(address)

    def write() -> None:
        with (tmp_path / "slow").open("wb") as file:
            file.write(b"x" * 2 * 2**20)
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.2)
            file.write(b"x" * 2**20)

    writer = threading.Thread(target=write)
    writer.start()
    with pytest.raises(KeyboardInterrupt):
        store.put(tmp_path / "slow", "x")
    writer.join()
    # Whole, or absent where the signal came before the first block was handed over (on a busy machine).
    assert (store.read("x"), store.names("")) in ((b"x" * 3 * 2**20, ["x"]), (None, []))


PUT = """
import sys; from pathlib import Path; from synq.sweeps.storage import object_store as storage
storage.CHUNK_BYTES = 2**20
storage.open_storage(sys.argv[1]).put(Path(sys.argv[2]), "x/file")
"""


def test_killed_while_it_sends(shared: str, tmp_path: Path, child: Callable[..., "subprocess.Popen[str]"]) -> None:
    store = open_storage(shared)
    os.mkfifo(tmp_path / "slow")
    for before in (None, b"before"):
        if before is not None:
            store.put(before, "x/file")
        process = child(PUT, shared, tmp_path / "slow")
        with (tmp_path / "slow").open("wb") as file:
            file.write(b"x" * 3 * 2**20)  # more than a pipe holds: a part of it has been sent
            process.kill()
            process.wait()
        assert store.read("x/file") == before and store.names("x") == ([] if before is None else ["file"])


GET = """
import sys, time; from pathlib import Path; from synq.sweeps.storage import object_store as storage
def half(source, target, length):
    target.write(source.read(3)); target.flush(); sys.stdout.write("half\\n"); sys.stdout.flush(); time.sleep(600)
store = storage.open_storage(sys.argv[1])
storage.shutil.copyfileobj = half
getattr(store, sys.argv[2])(sys.argv[3], Path(sys.argv[4]))
"""


@pytest.mark.parametrize("how, name", [("get", "set/a"), ("get_folder", "set")])
def test_killed_while_it_fetches(
    shared: str, tmp_path: Path, child: Callable[..., "subprocess.Popen[str]"], how: str, name: str
) -> None:
    store, local = open_storage(shared), tmp_path / "node" / "it"
    store.put_folder(_fill(tmp_path / "set", a=b"content", b=b"more"), "set")
    process = child(GET, shared, how, name, local)
    assert process.stdout is not None and process.stdout.readline() == "half\n"
    process.kill()
    process.wait()
    assert not local.exists() and os.listdir(local.parent) != []
    assert getattr(store, how)(name, local)
    assert (local / "a" if how == "get_folder" else local).read_bytes() == b"content"


BOTH = """
import sys, time; from pathlib import Path; from synq.sweeps.storage import object_store as storage
store, get = storage.open_storage(sys.argv[1]), storage.Storage.get
def slow(self, name, local):
    sys.stdout.write(name + "\\n"); time.sleep(0.5); return get(self, name, local)
storage.Storage.get = slow
print("ready", flush=True)
while not Path(sys.argv[3]).exists(): time.sleep(0.001)
print(store.get_folder("set", Path(sys.argv[2])))
"""


def test_one_of_two_processes_downloads(
    shared: str, tmp_path: Path, child: Callable[..., "subprocess.Popen[str]"]
) -> None:
    open_storage(shared).put_folder(_fill(tmp_path / "set", a=b"content", b=b"more"), "set")
    both = [child(BOTH, shared, tmp_path / "node" / "set", tmp_path / "go") for _ in range(2)]
    for process in both:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
    (tmp_path / "go").touch()
    printed = sorted(process.communicate(timeout=WAIT)[0].split() for process in both)
    assert printed[0] == ["False"] and sorted(printed[1]) == ["True", "set/a", "set/b"]


QUOTA = """
import resource, signal, sys; from synq.sweeps.storage.object_store import open_storage
signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try: open_storage(sys.argv[1]).put(b"x" * 5000, "x/file")
except OSError as error: print(error.errno, error)
"""


def test_a_full_disk_keeps_its_errno(tmp_path: Path, child: Callable[..., "subprocess.Popen[str]"]) -> None:
    printed = child(QUOTA, (tmp_path / "far").as_uri()).communicate(timeout=WAIT)[0]
    assert printed.startswith(f"{errno.EFBIG} ") and f"file://{tmp_path}/far/x/file" in printed
    assert printed.count("\n") == 1
    assert os.listdir(tmp_path / "far" / "x") == []


def test_an_unwritable_folder_is_reported_with_the_reason(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"`output_dir` must be writable, but got file:///.*file/x: .*[Dd]irectory"):
        open_storage((tmp_path / "file" / "x").as_uri()).check_writable()
    with pytest.raises(FileNotFoundError, match=r"none' -> 'memory://b/x'"):
        open_storage("memory://b").put(tmp_path / "none", "x")


@pytest.mark.slow
def test_problems_of_a_bucket_are_reported(s3: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(storage, "PAUSES", (0.01,))
    with pytest.raises(ValueError, match=r"must name an existing bucket, but got s3://nobucket/x$"):
        open_storage(f"s3://nobucket/x?endpoint_override={s3}")
    with pytest.raises(OSError, match=r"s3://bucket/x"):
        open_storage("s3://bucket/x?endpoint_override=http://127.0.0.1:9")
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3)
    open_storage("s3://bucket/by-environment").put(b"1", "x")
    options = f"endpoint_override={s3.removeprefix('http://')}&scheme=http&region=us-east-1"
    assert open_storage(f"s3://bucket/by-environment?{options}").read("x") == b"1"
    strict = _server(INITIAL_NO_AUTH_ACTION_COUNT="0")
    with pytest.raises(ValueError, match=r"credentials in use, but got .*ACCESS_KEY") as caught:
        open_storage(f"s3://bucket/x?endpoint_override={next(strict)}")
    strict.close()
    assert "testing" not in str(caught.value)


STREAM = """
import resource, sys; from pathlib import Path; from synq.sweeps.storage.object_store import open_storage
store, path = open_storage(sys.argv[1]), Path(sys.argv[2])
store.put(b"1", "small"); store.read("small")
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
store.put(path, "huge"); store.get("huge", path)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


@pytest.mark.slow
def test_a_huge_file_is_never_in_memory(s3: str, tmp_path: Path, child: Callable[..., "subprocess.Popen[str]"]) -> None:
    with (tmp_path / "huge").open("wb") as file:
        file.truncate(200 * 2**20)
    grown = child(STREAM, f"s3://bucket/stream?endpoint_override={s3}", tmp_path / "huge").communicate(timeout=200)[0]
    assert float(grown) < 100
