"""A sweep watched in a real browser: started, its driver killed, gone on with by two drivers with folders of their own.

`walk` is the test, with few trials; a longer one, with pictures of every stage, is

    python -m pytest -m slow tests/end_to_end/test_watched_sweep.py   with SYNQ_WALK="TRIALS FOLDER" in its environment
"""

import os
import re
import shutil
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support.databases import postgresql, why_no_postgresql
from support.sweep_tools import Start, finish, ray_head, rows, until, whole, write_spec

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.long,
    pytest.mark.timeout(3000),
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium (Debian package chromium)"),
    pytest.mark.skipif(bool(why_no_postgresql()), reason=why_no_postgresql()),
]
SIZES = {"desktop": (1280, 900), "phone": (390, 844)}
STRIP = re.compile(r"(\d+) trials? ended, (\d+) without a result")


class Reader:
    """A browser with the page of one folder at the sizes of a desktop and of a phone."""

    def __init__(self, chromium: Any, shots: Path | None) -> None:
        self.shots, self.problems = shots, list[str]()
        self.pages = {}
        for name, (width, height) in SIZES.items():
            page = chromium.new_page(viewport={"width": width, "height": height})
            page.on("pageerror", lambda error: self.problems.append(str(error)))
            self.pages[name] = page

    def open(self, url: str) -> None:
        for page in self.pages.values():
            page.goto(url)

    def strips(self) -> dict[str, str]:
        return {name: str(page.locator("#live").text_content()) for name, page in self.pages.items()}

    def picture(self, stage: str, *, tabs: bool = False) -> None:
        """Check that no page is wider than its screen, and keep pictures of it."""
        for name, page in self.pages.items():
            assert page.evaluate("document.documentElement.scrollWidth") <= SIZES[name][0], (stage, name)
            if self.shots is None:
                continue
            page.screenshot(path=self.shots / f"{stage}-{name}.png", full_page=True)
            for index in range(page.locator("[role=tab]").count() if tabs else 0):
                page.locator("[role=tab]").nth(index).click()
                page.screenshot(path=self.shots / f"{stage}-{name}-tab{index}.png", full_page=True)

    def until_shows(self, folder: Path, ended: int, seconds: float = 600) -> None:
        """Wait until both pages show at least that many ended trials, as the folder has them."""
        end = time.monotonic() + seconds
        while True:
            known = len(list((folder / "records").glob("*.json")))
            found = {name: STRIP.search(text) for name, text in self.strips().items()}
            numbers = [int(one[1]) for one in found.values() if one is not None]
            assert all(number <= known for number in numbers), (numbers, known)
            if len(numbers) == len(found) and min(numbers) >= ended:
                return
            assert time.monotonic() < end, (self.strips(), known)
            time.sleep(0.2)

    def until_over(self, seconds: float = 60) -> None:
        end = time.monotonic() + seconds
        while any(page.locator("#live").get_attribute("class") != "ended" for page in self.pages.values()):
            assert time.monotonic() < end, self.strips()
            time.sleep(0.2)


def served(process: subprocess.Popen[str]) -> str:
    """The address of the live page that a driver prints first."""
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("live page: "):
            return line.removeprefix("live page: ").strip()
    raise AssertionError("no live page")


def spec_file(folder: Path, address: str, trials: int) -> str:
    """A search of that many trials in two groups, whose weak trials are stopped."""
    text = write_spec(folder / "base.toml", epochs=24).read_text()
    for old, new in (
        ('"tiny"', '"watched"'),
        ("num_trials = 2", f"num_trials = {trials // 2}"),
        ('scheduler = "none"', 'scheduler = "asha"'),
        ("report = false", f'study_storage = "{address}"\nmax_concurrent = 1'),
    ):
        assert old in text
        text = text.replace(old, new)
    path = folder / "watched.toml"
    path.write_text(text)
    return str(path)


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with postgresql() as address:
        yield address


@pytest.fixture(scope="module")
def head() -> Iterator[str]:
    with ray_head() as address:
        yield address


def test_a_watched_sweep_is_killed_and_ends_on_two_drivers(
    start: Start, head: str, server: str, tmp_path: Path
) -> None:
    sync_api = pytest.importorskip("playwright.sync_api")
    number, _, place = os.environ.get("SYNQ_WALK", "6").partition(" ")
    trials, shots = int(number), Path(place) if place else None
    spec, one, two = spec_file(tmp_path, server, trials), tmp_path / "one", tmp_path / "two"

    def drive(folder: Path) -> subprocess.Popen[str]:
        return start(spec, "--output-dir", str(folder), "--serve", "0", RAY_ADDRESS=head)

    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        reader = Reader(chromium, shots)
        first = drive(one)
        reader.open(served(first))
        reader.picture("1-before")
        reader.until_shows(one, 1)
        reader.picture("2-first")
        until(lambda: len(list(one.glob("logs/*.log"))) > len(list(one.glob("records/*.json"))), first)
        first.send_signal(signal.SIGKILL)
        printed = first.communicate(timeout=60)[0]
        reader.until_over()
        reader.picture("3-killed")
        before = {path.stem for path in one.glob("records/*.json")}

        drivers, readers = [drive(one), drive(two)], [reader, Reader(chromium, shots)]
        for driver, each in zip(drivers, readers, strict=True):
            each.open(served(driver))
        for folder, each in zip((one, two), readers, strict=True):
            each.until_shows(folder, len(before) + 1)
            each.picture(f"4-{folder.name}")
        for folder, each in zip((one, two), readers, strict=True):
            each.until_shows(folder, trials, 1200)
            each.picture(f"5-{folder.name}", tabs=True)
        texts = [finish(driver, 600) for driver in drivers]
        for folder, each in zip((one, two), readers, strict=True):
            each.until_over()
            each.picture(f"6-{folder.name}")
            assert each.problems == []
        chromium.close()

    found = [rows(folder / "trials.csv") for folder in (one, two)]
    assert found[0] == found[1] and len(found[0]) == trials
    names = Counter(row["trial"] for row in found[0])
    assert set(names.values()) == {1} and before <= set(names)
    logs = [path for folder in (one, two) for path in folder.glob("logs/*.log")]
    begun = Counter(path.stem for path in logs for _ in range(path.read_text().count("starts\n")))
    twice = [name for name, count in begun.items() if count > 1]
    assert set(begun) == set(names) and len(twice) <= 1 and not set(twice) & before, "at most the one that was killed"
    assert all(f"[{trials}/{trials}]" in text for text in texts), texts
    assert "Traceback" not in printed + "".join(texts)
    for folder in (one, two):
        whole(folder, killed=folder == one)
