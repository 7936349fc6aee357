"""Databases of tests: a quick SQLite, and a PostgreSQL server of the test's own on loopback."""

import importlib.util
import os
import pwd
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PASSWORD = "s3cret-of-the-test"


@contextmanager
def quick_sqlite() -> Iterator[None]:
    """SQLite that does not wait for the disk in the ``with`` block."""
    from sqlalchemy import Engine, event

    def hurry(connection: Any, _: Any) -> None:
        if type(connection).__module__.startswith("sqlite3"):
            connection.execute("PRAGMA synchronous = OFF")

    event.listen(Engine, "connect", hurry)
    try:
        yield
    finally:
        event.remove(Engine, "connect", hurry)


def programs() -> Path | None:
    """The folder of PostgreSQL's server programs, the newest; None where it is not installed."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: int(path.parts[-3]))
    on_path = shutil.which("initdb")
    return found[-1].parent if found else Path(on_path).resolve().parent if on_path else None


def why_no_postgresql() -> str:
    """Why no server can be started here; "" where one can."""
    if programs() is None:
        return "PostgreSQL's server is not installed (Debian: apt-get install postgresql)"
    if not any(importlib.util.find_spec(name) for name in ("psycopg", "psycopg2")):
        return "no Python driver of PostgreSQL is installed (pip install psycopg[binary])"
    return "" if os.geteuid() else "" if _user() else "PostgreSQL refuses to run as root, and no other user is here"


def _user() -> str | None:
    """A user that PostgreSQL accepts, where this process is root's."""
    names = {entry.pw_name for entry in pwd.getpwall()}
    return next((name for name in ("postgres", "nobody") if name in names), None)


@contextmanager
def postgresql() -> Iterator[str]:
    """Run a server on loopback with data in a temporary folder, and yield the address of its database."""
    folder = Path(tempfile.mkdtemp(prefix="synq-pg-", dir="/tmp"))  # short, and below no folder that is root's alone
    as_user: dict[str, Any] = {}
    if os.geteuid() == 0:
        entry = pwd.getpwnam(_user() or "")
        os.chown(folder, entry.pw_uid, entry.pw_gid)
        as_user = {"user": entry.pw_uid, "group": entry.pw_gid, "extra_groups": []}
    (folder / "password").write_text(PASSWORD)
    (folder / "password").chmod(0o644)
    home = programs()
    assert home is not None
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    make = [str(home / "initdb"), "-D", str(folder / "data"), "-U", "synq", "-E", "UTF8", "--locale=C", "--no-sync"]
    make += ["--auth=scram-sha-256", f"--pwfile={folder / 'password'}"]
    common: dict[str, Any] = {"cwd": folder, "stdout": subprocess.DEVNULL, **as_user}
    subprocess.run(make, check=True, **common)
    settings = {"listen_addresses": "127.0.0.1", "unix_socket_directories": "", "fsync": "off", "port": port}
    words = [word for name, value in settings.items() for word in ("-c", f"{name}={value}")]
    server = subprocess.Popen(
        [str(home / "postgres"), "-D", str(folder / "data"), *words], stderr=subprocess.DEVNULL, **common
    )
    try:
        end = time.monotonic() + 60
        while subprocess.run([str(home / "pg_isready"), "-h", "127.0.0.1", "-p", str(port)], **common).returncode:
            assert time.monotonic() < end and server.poll() is None, "the server did not start"
            time.sleep(0.1)
        yield f"postgresql://synq:{PASSWORD}@127.0.0.1:{port}/postgres"
    finally:
        server.terminate()
        try:
            server.wait(30)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()
        shutil.rmtree(folder, ignore_errors=True)
