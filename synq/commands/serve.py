"""`synq serve`: the pages of sweeps and runs in a browser while they run."""

import os
from pathlib import Path

import click

from synq.config.command_line import Command
from synq.config.command_options import INT, argument, option
from synq.config.parsing import between

EXAMPLES = """\
  %(prog)s runs/demo                       http://127.0.0.1:8321/, the page of a sweep that runs elsewhere
  %(prog)s runs/monday runs/tuesday --port 9000
  ssh -L 8321:localhost:8321 HOST          on your own machine, for a sweep on HOST"""


@click.command(
    "serve", cls=Command, examples=EXAMPLES, exit_codes="0 never by itself, 2 input rejected, 130 interrupted"
)
@argument("paths", nargs=-1, required=True, metavar="PATH", help="folder of a sweep or a run; it may not exist yet")
@option("--port", type=INT, metavar="N", default=8321, help="port; 0 for any free one (default: 8321)")
@option(
    "--host",
    metavar="ADDRESS",
    default="127.0.0.1",
    help="address to listen on (default: 127.0.0.1, this machine alone; with another, everyone who reaches it reads "
    "the pages)",
)
def command(paths: tuple[str, ...], port: int, host: str) -> None:
    """Show leaderboard, trials and plots in a browser, and draw them again as trials end.

    Read-only: pages are made from records, nothing is written, no network is loaded and no code of yours is run. The
    process has a low priority.
    """
    between("port", port, 0, 65535)
    for path in paths:
        if "://" in path or Path(path).is_file():
            raise ValueError(f"`PATH` must be the folder of a sweep or a run, but got {path}")
    from synq.sweeps.live.server import PRIORITY, LiveServer

    server = LiveServer([Path(path) for path in paths], host, port)
    os.nice(PRIORITY)  # of this process, only once it serves
    print(f"{server.url} shows {', '.join(paths)}; Ctrl-C ends it", flush=True)
    try:
        server.serve_forever()
    finally:
        server.server_close()


main = command.run
