"""A read-only server of live pages: GET and HEAD of a few addresses, no file of the disk by its name."""

import errno
import ipaddress
import socket
import sys
from collections.abc import Sequence
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from .pages import LivePage, index_page, state_text

LOOPBACK = "127.0.0.1"
PORT = 8321
"""Default port."""
PRIORITY = 10
"""Niceness of a process that serves pages next to work."""
REQUEST_SECONDS = 30
"""Time after which a connection without a request is closed."""
POLICY = (
    "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
"""Content-Security-Policy: a page has everything in itself and asks only this server."""


class LiveServer(ThreadingHTTPServer):
    """Server of the pages of sweeps and runs.

    Attributes:
        pages: The pages, at /0/, /1/ and so on; a single one also at /.
        local_only: Whether it listens on the loopback address, and serves requests for local names alone.
    """

    daemon_threads = True

    def __init__(self, paths: Sequence[Path], host: str = LOOPBACK, port: int = PORT) -> None:
        """Listen.

        Args:
            paths: Folders of sweeps and runs, which may not exist yet.
            host: Address to listen on.
            port: Port, 0 for any free one.

        Raises:
            ValueError: The address cannot be listened on.
        """
        self.pages = [LivePage(path) for path in paths]
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            super().__init__((host, port), _Handler)
        except socket.gaierror as error:
            raise ValueError(f"`host` must be an address of this machine, but got {host} ({error.strerror})") from None
        except (OSError, OverflowError) as error:
            if getattr(error, "errno", None) == errno.EADDRNOTAVAIL:
                raise ValueError(f"`host` must be an address of this machine, but got {host}") from None
            reason = getattr(error, "strerror", None) or str(error)
            raise ValueError(
                f"`port` must be free on the address {host}, but {port} is not ({reason}); choose another, or 0 for any"
            ) from None
        self.local_only = _is_loopback(str(self.server_address[0]))

    @property
    def url(self) -> str:
        """Address of the first page for a browser."""
        host = str(self.server_address[0])
        return f"http://{f'[{host}]' if ':' in host else host}:{self.server_address[1]}/"

    def server_bind(self) -> None:
        """Bind without asking the network for the name of this machine, which may take seconds."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Stay silent about a browser that has left while its page was drawn; report everything else."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    server: LiveServer
    timeout = REQUEST_SECONDS
    server_version = "SynQ"
    sys_version = ""

    def do_GET(self) -> None:
        """Send a page, its state, or the list of pages."""
        if self.server.local_only and not _is_local_name(self.headers.get("Host", "")):
            # A web page of another name that points here could read the pages otherwise.
            self.send_error(HTTPStatus.FORBIDDEN, "ask for localhost")
            return
        parts = [part for part in self.path.partition("?")[0].split("/") if part]
        pages = self.server.pages
        if len(pages) == 1 and parts in ([], ["state"]):
            parts = ["0", *parts]
        if not parts:
            self._reply(index_page(pages), "text/html; charset=utf-8")
            return
        number = int(parts[0]) if parts[0].isascii() and parts[0].isdigit() and len(parts[0]) < 6 else len(pages)
        if number >= len(pages) or parts[1:] not in ([], ["state"]):
            self.send_error(HTTPStatus.NOT_FOUND)
        elif not parts[1:] and len(pages) > 1 and not self.path.partition("?")[0].endswith("/"):
            self.send_response(HTTPStatus.MOVED_PERMANENTLY)  # the page asks for its state next to it
            self.send_header("Location", f"/{number}/")
            self.send_header("Content-Length", "0")
            self.end_headers()
        elif parts[1:]:
            self._reply(state_text(pages[number]), "application/json")
        else:
            self._reply(pages[number].html(), "text/html; charset=utf-8")

    def do_HEAD(self) -> None:
        """Send what GET sends, without the content."""
        self.do_GET()

    def _reply(self, content: bytes, kind: str) -> None:
        self.send_response(HTTPStatus.OK)
        for name, value in (
            ("Content-Type", kind),
            ("Content-Length", str(len(content))),
            ("Cache-Control", "no-store"),
            ("Content-Security-Policy", POLICY),
            ("X-Content-Type-Options", "nosniff"),
            ("Referrer-Policy", "no-referrer"),
        ):
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        """Print nothing: a browser asks every two seconds."""


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _is_local_name(host: str) -> bool:
    """Return whether the Host of a request, with or without a port, is a name of this machine for itself."""
    name = host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]
    return _is_loopback(name)
