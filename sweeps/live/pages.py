"""Pages that a browser sees while a sweep or a run goes on, made from its records alone and only when they change."""

import hashlib
import html
import json
import math
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from synq.common.text_tables import plural

from ..reports.page import Page, Tab, Text, render
from ..reports.run_figures import losses
from ..reports.run_page import run_title, settings_blocks
from ..reports.summary import foot, run_facts, run_verdict
from ..reports.sweep_page import sweep_page
from ..reports.sweep_view import is_run, read_sweep, record_of

LEAST_SECONDS, REST = 5.0, 3.0
"""Shortest time between two drawings of a page, and the same in times of the last drawing, so that a sweep of short
trials has its processors for itself."""
POLL_SECONDS = 2
"""Time between two questions of the browser for a newer page."""
LAST_SECONDS = 30.0
"""Maximum time for the last drawing of a page that a browser shows."""
WATCHED_SECONDS = 30.0
"""Time since the last question of a browser after which none is there: on a busy machine they are far apart."""
FILES = ("sweep.json", "record.json", "config.json", "checkpoint.pt")
"""Files next to the folders of records and plans whose change makes a page old."""
NOTHING_YET = (
    "The first trial has not ended. Before trials start, the classifier is loaded and its synthetic images are made, "
    "once for all trials. This page shows results as soon as there are any."
)
SCRIPT = """
(() => {
  const strip = document.getElementById("live"), shown = strip.dataset.version;
  const kept = sessionStorage.getItem("scroll");
  if (kept !== null) { scrollTo(0, +kept); sessionStorage.removeItem("scroll"); }
  const ask = async () => {
    try {
      const state = await (await fetch("state", {cache: "no-store"})).json();
      if (state.version !== shown) {
        sessionStorage.setItem("scroll", scrollY);
        location.reload();
        return;
      }
      strip.textContent = state.text + " \\u00b7 as of " + new Date().toLocaleTimeString();
      strip.className = "";
    } catch {
      strip.textContent = "No longer live: the server has ended. This is the last page.";
      strip.className = "ended";
    }
    setTimeout(ask, SECONDS * 1000);
  };
  ask();
})();
"""
STYLE = """
#live { position: sticky; top: 0; z-index: 9; margin: 0; padding: .3rem 1rem; font-size: .85rem; background: #0b5d3b;
  color: #fff; }
#live.ended { background: #7a2e1d; }
"""


class LivePage:
    """The page of one sweep or run; safe to be read by several threads.

    A page is drawn in the background, and until it is done the last one is shown: drawing takes seconds, and minutes
    where the sweep needs its processors.

    Attributes:
        path: Folder of the sweep or the run, which may not exist yet.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._version, self._text = "", "the page is being drawn"
        self._html = _with_strip(render(_waiting(path, "The page is being drawn.")), "", self._text).encode()
        self._next, self._thread = 0.0, threading.Thread()
        self._asked, self._sent = -math.inf, ""

    def state(self) -> dict[str, str]:
        """Return version of the page and one line of progress; begin a new drawing if there is something new."""
        with self._lock:
            self._asked = time.monotonic()
            self._begin()
            return {"version": self._version, "text": self._text}

    def html(self) -> bytes:
        """Return the page as UTF-8."""
        with self._lock:
            self._begin()
            self._sent = self._version
            return self._html

    def finish(self, seconds: float = LAST_SECONDS) -> None:
        """Wait until a browser that shows this page has the last state of its files, so that it keeps that.

        Args:
            seconds: Maximum time; nothing is waited for without a browser.
        """
        started = time.monotonic()
        if started - self._asked > WATCHED_SECONDS:
            return
        while time.monotonic() - started < seconds:
            with self._lock:
                self._next = 0.0
                self._begin()
                if not self._thread.is_alive() and self._sent == self._version:
                    break
            time.sleep(0.2)
        time.sleep(POLL_SECONDS + 0.5)  # other browsers ask, too

    def _begin(self) -> None:
        if self._thread.is_alive() or time.monotonic() < self._next:
            return
        version = version_of(self.path)
        if version != self._version:
            self._thread = threading.Thread(target=self._draw, args=(version,), daemon=True)
            self._thread.start()

    def _draw(self, version: str) -> None:
        started = time.monotonic()
        with _DRAWING:
            try:
                page, text = _page(self.path)
                content = render(page)
            except Exception as error:  # whatever is damaged, the server goes on and the page names it
                text = "the page cannot be drawn"
                content = render(_waiting(self.path, " ".join(str(error).split()) or type(error).__name__))
        now = time.monotonic()
        with self._lock:
            self._version, self._text = version, text
            self._html = _with_strip(content, version, text).encode()
            self._next = now + max(LEAST_SECONDS, REST * (now - started))


_DRAWING = threading.Lock()
"""Held while a page is drawn: the style of plots is one of the whole process."""


def version_of(path: Path) -> str:
    """Return a short digest of names, sizes and times of the files that a page is made from."""
    digest = hashlib.sha256()
    for file in sorted(_files(path)):
        try:
            status = file.stat()
        except OSError:  # replaced or removed right now
            continue
        digest.update(f"{file} {status.st_size} {status.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:16]


def _files(path: Path) -> Iterator[Path]:
    yield from (path / name for name in FILES)
    for pattern in ("records/*.json", "plans/*.json", "*/record.json", "*/records/*.json"):  # or a folder of several
        yield from path.glob(pattern)


def _page(path: Path) -> tuple[Page, str]:
    """Return the page of a path as it is now, and one line of progress."""
    try:
        if path.is_dir() and is_run(path):
            return _run(path)
        sweep = read_sweep(path)
    except FileNotFoundError:
        return _waiting(path, NOTHING_YET), "waiting for the first trial"
    except ValueError as error:  # a file is damaged: the page reports it
        return _waiting(path, " ".join(str(error).split())), "the page cannot be drawn"
    text = f"{plural(len(sweep.records), 'trial')} ended, {len(sweep.running)} without a result"
    return sweep_page(sweep, runs=0), text


def _run(path: Path) -> tuple[Page, str]:
    if not (path / "record.json").is_file():
        return _waiting(path, "The run is not finished; its record is written at its end."), "not finished"
    record = record_of(path)
    page = Page(
        title=run_title(record),
        verdict=run_verdict(record),
        facts=run_facts(record),
        tabs=[
            Tab(title="Training", blocks=losses(record)),
            Tab(title="Settings", blocks=settings_blocks(record)),
        ],
        foot=foot([record]),
    )
    return page, f"{record.status}; `synq report` adds images, maps and layers"


def _waiting(path: Path, reason: str) -> Page:
    text = Text(title="", lines=[reason])
    return Page(
        title=path.name, verdict=["No result yet."], facts=[], tabs=[Tab(title="State", blocks=[text])], foot=""
    )


def _with_strip(page: str, version: str, text: str) -> str:
    """Return a page with a line of progress on top that asks for newer pages."""
    strip = f'<style>{STYLE}</style><p id="live" role="status" data-version="{version}">{html.escape(text)}</p>'
    script = SCRIPT.replace("SECONDS", str(POLL_SECONDS))
    # The page forbids itself every request; this one asks its server.
    page = page.replace("default-src 'none';", "default-src 'none'; connect-src 'self';", 1)
    return page.replace("<body>", f"<body>\n{strip}", 1).replace("</body>", f"<script>{script}</script>\n</body>", 1)


def index_page(pages: Sequence[LivePage]) -> bytes:
    """Return a list of the pages, numbered from 0, as UTF-8."""
    rows: list[dict[str, Any]] = [{"path": str(page.path), **page.state()} for page in pages]
    items = "".join(
        f'<li><a href="{number}/">{html.escape(row["path"])}</a>: {html.escape(row["text"])}</li>'
        for number, row in enumerate(rows)
    )
    head = '<!doctype html><html lang="en"><meta charset="utf-8"><title>SynQ</title>'
    head += '<meta name="viewport" content="width=device-width, initial-scale=1">'
    return f'{head}<body style="font-family: sans-serif"><h1>SynQ</h1><ul>{items}</ul></body></html>'.encode()


def state_text(page: LivePage) -> bytes:
    """Return the state of a page as JSON."""
    return json.dumps(page.state()).encode()
