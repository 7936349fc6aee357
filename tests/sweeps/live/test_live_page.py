"""Live pages: drawn again when a trial ends, read-only, for this machine, ended with the sweep."""

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from support.made_sweeps import made_sweep
from support.records import record
from synq.commands.serve import main as serve
from synq.commands.sweep import main as sweep
from synq.runs.record import write_record
from synq.sweeps.live import pages
from synq.sweeps.live.child import live_page
from synq.sweeps.live.server import LiveServer


@contextmanager
def served(*paths: Path, host: str = "127.0.0.1") -> Iterator[LiveServer]:
    server = LiveServer(paths, host, 0)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def ask(
    server: LiveServer, path: str, method: str = "GET", headers: dict[str, str] | None = None
) -> tuple[int, str, http.client.HTTPMessage]:
    connection = http.client.HTTPConnection(str(server.server_address[0]), server.server_port, timeout=60)
    connection.request(method, path, headers=headers or {})
    reply = connection.getresponse()
    text = reply.read().decode()
    connection.close()
    return reply.status, text, reply.headers


def settled(server: LiveServer, number: int = 0, *, before: str = "") -> dict[str, str]:
    """Return the state of a page once it is drawn, as of another version than ``before``."""
    ends = time.monotonic() + 120
    while time.monotonic() < ends:
        state: dict[str, str] = json.loads(ask(server, f"/{number}/state")[1])
        if state["version"] not in ("", before):
            return state
        time.sleep(0.05)
    raise AssertionError("the page is not drawn")


def test_a_page_is_drawn_again_when_a_trial_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "LEAST_SECONDS", 0.0)
    monkeypatch.setattr(pages, "REST", 0.0)
    folder = tmp_path / "made"
    with served(folder) as server:
        waiting = settled(server)
        assert waiting["text"] == "waiting for the first trial", "the folder does not exist yet"
        shown = ask(server, "/")[1]
        assert "The first trial has not ended" in shown and "must hold" not in shown, "no error of a command"
        made_sweep(tmp_path / "elsewhere", trials=6)
        left_out = sorted((tmp_path / "elsewhere" / "records").glob("*.json"))[0]
        content = left_out.read_bytes()
        left_out.unlink()
        (tmp_path / "elsewhere").rename(folder)
        left_out = folder / "records" / left_out.name
        first = settled(server, before=waiting["version"])
        assert first["text"] == "11 trials ended, 1 without a result"
        status, text, headers = ask(server, "/")
        assert status == 200 and f'data-version="{first["version"]}"' in text and "Leaderboard" in text
        assert headers["Cache-Control"] == "no-store" and "default-src 'none'" in headers["Content-Security-Policy"]
        assert json.loads(ask(server, "/state")[1]) == first, "nothing has changed"
        left_out.write_bytes(content)
        second = settled(server, before=first["version"])
        assert second["version"] != first["version"] and second["text"] == "12 trials ended, 0 without a result"
        assert left_out.stem in ask(server, "/")[1]


def test_a_browser_keeps_the_last_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "POLL_SECONDS", 0.2)
    folder = made_sweep(tmp_path / "made", trials=2, bits=("W4A4",))
    with served(folder) as server:
        page, first = server.pages[0], settled(server)
        shown, is_over = [ask(server, "/")[1]], threading.Event()

        def browse() -> None:
            version = first["version"]
            while not is_over.wait(0.05):
                state = json.loads(ask(server, "/state")[1])
                if state["version"] != version:
                    version = state["version"]
                    shown.append(ask(server, "/")[1])

        browser = threading.Thread(target=browse)
        browser.start()
        last = sorted((folder / "records").glob("*.json"))[0]
        last.unlink()  # a moment after the last drawing, as at the end of a sweep
        page.finish(60)
        is_over.set()
        browser.join()
        assert "1 trial ended, 1 without a result" in shown[-1] and pages.version_of(folder) in shown[-1]
        page._asked -= 60
        began = time.monotonic()
        page.finish(60)
        assert time.monotonic() - began < 0.1, "nobody looks"


def test_drawings_are_some_seconds_apart(tmp_path: Path) -> None:
    folder = made_sweep(tmp_path / "made", trials=2, bits=("W4A4",))
    with served(folder) as server:
        page, version = server.pages[0], settled(server)["version"]
    sorted((folder / "records").glob("*.json"))[0].unlink()
    assert page.state()["version"] == version, "drawn a moment ago"
    assert pages.version_of(folder) != version


def test_a_damaged_record_is_named_and_the_page_stays(tmp_path: Path) -> None:
    folder = made_sweep(tmp_path / "made", trials=4, bits=("W4A4",))
    damaged = sorted((folder / "records").glob("*.json"))[0]
    damaged.write_text("{")
    with served(folder) as server:
        assert settled(server)["text"].startswith("3 trials ended")
        assert damaged.name in ask(server, "/")[1]
        (folder / "sweep.json").write_text("{")
    with served(folder) as server:
        assert settled(server)["text"] == "the page cannot be drawn"
        assert "sweep.json" in ask(server, "/")[1]


def test_a_fault_while_drawing_is_shown_and_the_server_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **options: object) -> None:
        raise KeyError("nosuch")

    folder = made_sweep(tmp_path / "made", trials=2, bits=("W4A4",))
    monkeypatch.setattr(pages, "sweep_page", fail)
    with served(folder) as server:
        assert settled(server)["text"] == "the page cannot be drawn" and "nosuch" in ask(server, "/")[1]


def test_a_folder_of_runs_is_drawn_again_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "LEAST_SECONDS", 0.0)
    monkeypatch.setattr(pages, "REST", 0.0)
    write_record(tmp_path / "run-a" / "record.json", record(0.1))
    with served(tmp_path) as server:
        first = settled(server)
        write_record(tmp_path / "run-b" / "record.json", record(0.2, seed=1))
        assert settled(server, before=first["version"])["text"].startswith("2 trials ended")


def test_runs_and_several_folders(tmp_path: Path) -> None:
    finished = tmp_path / "run-a"
    write_record(finished / "record.json", record(0.1))
    (tmp_path / "run-b").mkdir()
    (tmp_path / "run-b" / "config.json").write_text("{}")
    with served(finished, tmp_path / "run-b", tmp_path / "<b>") as server:
        for number in range(3):
            settled(server, number)
        status, text, _ = ask(server, "/")
        assert status == 200 and "run-a" in text and "&lt;b&gt;" in text and 'href="2/"' in text
        assert "completed" in ask(server, "/0/state")[1] and "Settings" in ask(server, "/0/")[1]
        assert "not finished" in ask(server, "/1/")[1]
        assert (ask(server, "/1")[0], ask(server, "/1")[2]["Location"]) == (301, "/1/")
        for path in ("/3/", "/0/record.json", "/../record.json", "/0/../../etc/passwd", "/x", "/0/state/x"):
            assert ask(server, path)[0] == 404


def test_it_is_read_only_and_for_local_names(tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    with served(tmp_path / "sweep") as server:
        assert server.server_address[0] == "127.0.0.1"
        for method in ("POST", "PUT", "DELETE"):
            assert ask(server, "/", method)[0] == 501
        assert ask(server, "/", "HEAD")[:2] == (200, "")
        for host, status in (("localhost:1", 200), ("127.0.0.1", 200), ("[::1]:80", 200), ("elsewhere.example", 403)):
            assert ask(server, "/state", headers={"Host": host})[0] == status
    assert sorted(tmp_path.rglob("*")) == before


def test_input_that_is_rejected(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with served(tmp_path) as server:
        assert serve([str(tmp_path), "--port", str(server.server_port)]) == 2
        assert f"`port` must be free on the address 127.0.0.1, but {server.server_port}" in capsys.readouterr().err
    assert serve([str(tmp_path), "--host", "192.0.2.1"]) == 2
    assert "`host` must be an address of this machine, but got 192.0.2.1" in capsys.readouterr().err
    assert serve([str(tmp_path), "--port", "70000"]) == 2 and "65535" in capsys.readouterr().err
    assert serve(["s3://bucket/sweep"]) == 2 and "`PATH` must be the folder" in capsys.readouterr().err
    assert sweep(["--serve", "0", "--output-dir", "s3://bucket/sweep"]) == 2
    assert "`serve` must come with a folder of this machine" in capsys.readouterr().err


def is_served(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=5).close()
    except (ConnectionRefusedError, ConnectionResetError):
        return False
    return True


@pytest.mark.slow
def test_the_page_of_a_sweep_ends_with_it_however_it_ends(tmp_path: Path) -> None:
    with live_page(tmp_path, 0) as url:
        port = int(url.rstrip("/").rpartition(":")[2])
        with pytest.raises(ValueError, match="`port` must be free"), live_page(tmp_path, port):
            pass
    code = "import sys, time; from pathlib import Path; from synq.sweeps.live.child import live_page\n"
    code += f"with live_page(Path({str(tmp_path)!r}), 0) as url: print(url, flush=True); time.sleep(600)"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as driver:
        assert driver.stdout is not None
        port = int(driver.stdout.readline().strip().rstrip("/").rpartition(":")[2])
        assert is_served(port)
        os.kill(driver.pid, signal.SIGKILL)
    ends = time.monotonic() + 60
    while is_served(port):
        assert time.monotonic() < ends, "the page is still served"
        time.sleep(0.1)
