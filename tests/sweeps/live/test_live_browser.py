"""A live page in headless Chromium: it asks its server only, is drawn anew by itself, and says when it is over."""

import shutil
import threading
from pathlib import Path

import pytest

from support.made_sweeps import made_sweep
from synq.sweeps.live import pages
from synq.sweeps.live.server import LiveServer

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium (Debian package chromium)"),
]


def test_a_page_is_drawn_anew_where_its_reader_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sync_api = pytest.importorskip("playwright.sync_api")
    monkeypatch.setattr(pages, "LEAST_SECONDS", 0.0)
    monkeypatch.setattr(pages, "REST", 0.0)
    folder = made_sweep(tmp_path / "made", trials=6)
    last = sorted((folder / "records").glob("*.json"))[-1]
    content = last.read_bytes()
    last.unlink()
    server = LiveServer([folder], port=0)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = chromium.new_page(viewport={"width": 390, "height": 844})
        problems: list[str] = []
        page.on("console", lambda one: problems.append(one.text) if one.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.goto(server.url)
        strip = page.locator("#live")
        sync_api.expect(strip).to_contain_text("11 trials ended, 1 without a result · as of", timeout=60_000)
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        page.locator("[role=tab]").nth(3).click()
        last.write_bytes(content)
        sync_api.expect(strip).to_contain_text("12 trials ended, 0 without a result · as of", timeout=60_000)
        assert page.url.endswith("#tab-trials") and problems == []
        server.shutdown()
        server.server_close()
        sync_api.expect(strip).to_have_class("ended", timeout=60_000)
        chromium.close()
