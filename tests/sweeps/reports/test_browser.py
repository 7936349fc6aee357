"""Pages in headless Chromium: no errors, no overflow; tabs, sorting and filtering work."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support.made_sweeps import made_sweep
from synq.sweeps.reports.page import Page, Tab, Table, write_page
from synq.sweeps.reports.sweep_page import sweep_page
from synq.sweeps.reports.sweep_view import read_sweep

HOSTILE = "<img src=x onerror=alert(1)><script>alert(2)</script> $x^2$"
DESKTOP, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FIRST_PAINT = "performance.getEntriesByName('first-contentful-paint')[0]?.startTime"
SCROLLED = """async () => {
  const box = document.querySelector("#table-many .scroll"), times = [];
  for (let i = 0; i < 30; i++) {
    box.scrollTop += 40;
    times.push(await new Promise(requestAnimationFrame));
  }
  const steps = times.slice(1).map((time, i) => time - times[i]).sort((a, b) => a - b);
  return steps[Math.floor(steps.length / 2)] / 1000;
}"""
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium (Debian package chromium)"),
]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write the page of a sweep whose model has HTML and a script in its name."""
    folder = tmp_path_factory.mktemp("made")
    made_sweep(folder, trials=12, bits=("W4A4",), model=HOSTILE)
    return write_page(sweep_page(read_sweep(folder), runs=0), folder / "report.html")[0]


def open_page(browser: Any, path: Path, size: dict[str, int]) -> tuple[Any, list[str]]:
    """Open a page and collect its errors, warnings, dialogs and network requests."""
    page = browser.new_page(viewport=size)
    problems: list[str] = []
    page.on("console", lambda message: problems.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("dialog", lambda dialog: (problems.append(f"dialog: {dialog.message}"), dialog.dismiss()))
    page.on("request", lambda request: problems.append(request.url) if request.url.startswith("http") else None)
    page.goto(path.as_uri())
    return page, problems


@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_every_tab_fits_the_screen_and_every_figure_is_shown(browser: Any, path: Path, size: dict[str, int]) -> None:
    page, problems = open_page(browser, path, size)
    tabs = page.locator("[role=tab]")
    titles = tabs.all_inner_texts()
    assert titles == ["Overview", "Leaderboard", "Search", "Trials"]
    drawn = 0
    for i, title in enumerate(titles):
        tabs.nth(i).click()
        assert page.locator("section:visible h2").all_inner_texts() == [title]
        assert page.evaluate("document.documentElement.scrollWidth") == size["width"], (
            f"{title} is wider than the screen"
        )
        images = page.locator("section:visible img")
        drawn += images.count()
        sizes = images.evaluate_all(
            "all => all.map(image => [image.naturalWidth, image.clientWidth, image.clientHeight])"
        )
        assert all(natural > 0 and width > 200 and height > 50 for natural, width, height in sizes), sizes
    assert drawn == 8 and not problems
    page.close()


def test_no_table_is_cut_on_a_phone_and_the_result_is_on_the_first_screen(browser: Any, path: Path) -> None:
    page, problems = open_page(browser, path, PHONE)
    for tab in page.locator("[role=tab]").all():
        tab.click()
        boxes = page.locator("section:visible .scroll").evaluate_all(
            "all => all.map(box => [box.scrollWidth, box.clientWidth])"
        )
        assert all(inside <= outside for inside, outside in boxes), boxes
    page.locator("[role=tab]").first.click()
    for column in ("top1_mean", "drop"):
        number = page.locator("#table-best th[data-column=" + column + "]").evaluate("cell => cell.cellIndex")
        cell = page.locator(f"#table-best td:nth-child({number + 1})").first
        box = cell.bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= PHONE["width"]
        label = cell.evaluate("cell => getComputedStyle(cell, '::before').content")
        assert label in ('"top-1 [%]"', '"drop [points]"')
    chart = page.locator("header figure img").bounding_box()
    assert chart["x"] >= 0 and chart["x"] + chart["width"] <= PHONE["width"] and not problems
    page.close()


@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_the_result_is_seen_without_scrolling_sideways(browser: Any, tmp_path: Path, size: dict[str, int]) -> None:
    made_sweep(tmp_path, trials=12, model="torchvision:shufflenet_v2_x0_5")
    path = write_page(sweep_page(read_sweep(tmp_path), runs=0), tmp_path / "report.html")[0]
    page, problems = open_page(browser, path, size)
    for tab, table in (("Overview", "best"), ("Leaderboard", "leaderboard")):
        page.get_by_role("tab", name=tab).click()
        for column in ("top1_mean", "drop"):
            number = page.locator(f"#table-{table} th[data-column={column}]").evaluate("cell => cell.cellIndex")
            cells = page.locator(f"#table-{table} td:nth-child({number + 1})")
            for box in (cells.first.bounding_box(), cells.last.bounding_box()):
                assert box["x"] >= 0 and box["x"] + box["width"] <= size["width"], (table, column, box)
    assert not problems
    page.close()


def test_cards_on_a_phone_are_sorted_by_a_list(browser: Any, path: Path) -> None:
    page, problems = open_page(browser, path, PHONE)
    page.get_by_role("tab", name="Leaderboard").click()
    column = page.locator("#table-leaderboard th[data-column=top1_mean]").evaluate("cell => cell.cellIndex")
    found = {}
    for name in ("ascending", "descending", "ascending"):
        page.locator("#table-leaderboard .order select").select_option(f"{column} {name}")
        found[name] = page.locator(f"#table-leaderboard td:nth-child({column + 1})").evaluate_all(
            "all => all.map(cell => Number(cell.dataset.number))"
        )
    assert found["ascending"] == sorted(found["ascending"]) == found["descending"][::-1] and not problems
    page.close()


def test_a_dark_screen_has_a_dark_page_and_a_cut_table_says_so(browser: Any, path: Path) -> None:
    page, _ = open_page(browser, path, DESKTOP)
    back = "getComputedStyle(document.body).backgroundColor"
    assert page.evaluate(back) == "rgb(255, 255, 255)"
    page.emulate_media(color_scheme="dark")
    assert page.evaluate(back) == "rgb(18, 22, 28)"
    assert "invert" in page.locator("header figure img").evaluate("image => getComputedStyle(image).filter")
    page.get_by_role("tab", name="Trials").click()
    block = page.locator("#table-trials")
    assert block.locator(".hint").is_visible()
    block.locator(".scroll").evaluate("box => box.scrollTo(box.scrollWidth, 0)")
    block.locator(".hint").wait_for(state="hidden")
    page.close()


def test_a_click_on_a_heading_sorts(browser: Any, path: Path) -> None:
    page, problems = open_page(browser, path, DESKTOP)
    page.get_by_role("tab", name="Leaderboard").click()
    head = page.locator("#table-leaderboard th[data-column=top1_mean]")
    column = head.evaluate("cell => cell.cellIndex")

    def values() -> list[float]:
        return page.locator(f"#table-leaderboard td:nth-child({column + 1})").evaluate_all(
            "all => all.map(cell => Number(cell.dataset.number))"
        )

    before = values()
    head.locator("button").click()
    assert head.get_attribute("aria-sort") == "ascending" and values() == sorted(before) and len(before) == 9
    head.locator("button").click()
    assert head.get_attribute("aria-sort") == "descending" and values() == sorted(before, reverse=True)
    assert not problems
    page.close()


def test_empty_cells_are_sorted_last_in_either_order(browser: Any, path: Path) -> None:
    page, _ = open_page(browser, path, DESKTOP)
    page.get_by_role("tab", name="Trials").click()
    head = page.locator("#table-trials th[data-column=top1]")
    column = head.evaluate("cell => cell.cellIndex")
    for _ in range(2):
        head.locator("button").click()
        texts = page.locator(f"#table-trials td:nth-child({column + 1})").all_inner_texts()
        assert texts[-3:] == [""] * 3 and "" not in texts[:-3]  # of 12: 2 stopped, 1 failed
    page.close()


@pytest.mark.parametrize(
    ("query", "shown"),
    [
        ("failed", 1),
        ("w4a4", 12),
        ("w3a3", 0),
        ("status = failed", 1),
        ("pruned", 2),
        ("status=completed", 9),
        ("status=completed group-w4a4-t000", 1),
        ("top1>0", 9),
        ("top1<0", 0),
        ("nosuch", 0),
    ],
)
def test_search_terms_filter_the_rows(browser: Any, path: Path, query: str, shown: int) -> None:
    page, problems = open_page(browser, path, DESKTOP)
    page.get_by_role("tab", name="Trials").click()
    page.locator("#table-trials input").fill(query)
    assert page.locator("#table-trials tbody tr:visible").count() == shown
    assert page.locator("#table-trials output").first.inner_text() == f"{shown} of 12"
    page.locator("#table-trials input").fill("foo>3")
    assert page.locator("#table-trials output").first.inner_text() == "0 of 12, no column foo here"
    page.locator("#table-trials input").fill("")
    assert page.locator("#table-trials tbody tr:visible").count() == 12 and not problems
    page.close()


def test_html_in_a_name_is_shown_as_text(browser: Any, path: Path) -> None:
    page, problems = open_page(browser, path, DESKTOP)
    assert HOSTILE in page.locator("#table-best td").first.inner_text()
    assert page.locator("img[src=x]").count() == 0 and not problems
    page.close()


def test_all_tabs_are_shown_in_print_and_without_scripts(browser: Any, path: Path) -> None:
    page, _ = open_page(browser, path, DESKTOP)
    page.emulate_media(media="print")
    assert page.locator("section:visible").count() == 4 and not page.locator("nav").is_visible()
    page.close()
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(path.as_uri())
    assert page.locator("section:visible").count() == 4
    assert not page.locator("nav").is_visible() and not page.locator(".filter").first.is_visible()
    context.close()


def test_a_url_fragment_opens_its_tab_and_arrow_keys_switch_tabs(browser: Any, path: Path) -> None:
    page, _ = open_page(browser, path, DESKTOP)
    page.goto(f"{path.as_uri()}#tab-search")
    assert page.locator("section:visible h2").inner_text() == "Search"
    page.locator("#tab-search").press("ArrowRight")
    assert page.locator("section:visible h2").inner_text() == "Trials" and page.url.endswith("#tab-trials")
    page.close()


def test_a_page_of_a_thousand_trials_opens_in_two_seconds(browser: Any, tmp_path: Path) -> None:
    made_sweep(tmp_path, trials=500)
    path = write_page(sweep_page(read_sweep(tmp_path), runs=0), tmp_path / "report.html")[0]
    assert path.stat().st_size < 10e6
    page, problems = open_page(browser, path, DESKTOP)
    assert page.evaluate(FIRST_PAINT) < 2000
    page.get_by_role("tab", name="Trials").click()
    page.locator("#table-trials input").fill("w3a3 status=failed")
    assert page.locator("#table-trials output").first.inner_text() == "50 of 1000" and not problems
    page.close()


def test_a_table_of_thousands_is_shown_in_parts(browser: Any, tmp_path: Path) -> None:
    rows = [{"name": f"row {i}", "value": (i * 7919) % 5000 / 8} for i in range(5000)]
    table = Table(name="many", title="Many", caption="", columns=("name", "value"), rows=rows)
    tabs = [Tab(title="First", blocks=[table]), Tab(title="Second", blocks=[])]
    path = write_page(Page(title="P", verdict=["V"], facts=[], tabs=tabs, foot="F"), tmp_path / "many.html")[0]
    page, problems = open_page(browser, path, DESKTOP)
    cells = page.locator("#table-many tbody tr td:nth-child(2)")
    place = page.locator("#table-many .pages output")

    def numbers() -> list[float]:
        return [float(text) for text in cells.all_inner_texts()]

    first = [row["value"] for row in rows[:100]]
    assert numbers() == pytest.approx(first, rel=1e-3) and place.inner_text() == "rows 1 to 100 of 5000"
    page.get_by_role("button", name="Next").click()
    assert numbers() == pytest.approx([row["value"] for row in rows[100:200]], rel=1e-3)
    page.locator("#table-many th[data-column=value] button").click()
    assert numbers() == pytest.approx([i / 8 for i in range(100)], rel=1e-3)
    page.get_by_role("button", name="Last").click()
    assert place.inner_text() == "rows 4901 to 5000 of 5000" and numbers()[-1] == pytest.approx(4999 / 8, rel=1e-3)
    page.locator("#table-many input").fill("value<2")
    assert place.inner_text() == "rows 1 to 16 of 16" and numbers() == pytest.approx([i / 8 for i in range(16)])
    page.locator("#table-many input").fill("row 4711")
    assert page.locator("#table-many tbody tr").all_inner_texts()[0].startswith("row 4711")
    frames = page.evaluate(SCROLLED)
    assert frames < 0.1 and not problems, "no frame takes a tenth of a second while the table is scrolled"
    page.close()
