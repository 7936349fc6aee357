"""The live page of a sweep in a separate process, which ends with the sweep, however that ends.

    python -m synq.sweeps.live.child FOLDER HOST PORT

Drawing a page takes seconds of a processor, which the driver needs for its trials; the process has a low priority.
"""

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .server import LOOPBACK, PRIORITY, LiveServer


@contextmanager
def live_page(folder: Path, port: int) -> Iterator[str]:
    """Serve the page of a sweep as long as the context lasts; yield its address.

    Args:
        folder: Folder of the sweep, which may not exist yet.
        port: Port on the loopback address, 0 for any free one.

    Raises:
        ValueError: The port is not free.
    """
    command = [sys.executable, "-m", "synq.sweeps.live.child", str(folder), LOOPBACK, str(port)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        try:
            line = process.stdout.readline().strip()
            if not line.startswith("http"):
                raise ValueError(line or "the live page did not start")
            yield line
        finally:
            process.stdin.close()


def serve_until_parent_ends(folder: Path, host: str, port: int) -> None:
    """Serve a page until the standard input ends, which the system does as well when the parent is killed.

    A browser that shows the page gets its last state, which may take some seconds.
    """
    os.nice(PRIORITY)
    try:
        server = LiveServer([folder], host, port)
    except ValueError as error:
        print(error, flush=True)
        return
    print(server.url, flush=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    sys.stdin.read()
    for page in server.pages:
        page.finish()
    server.shutdown()
    server.server_close()


if __name__ == "__main__":
    serve_until_parent_ends(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
