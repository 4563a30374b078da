"""The status page in a real browser: light, dark, on a phone, without scripts, and live.

Screenshots go to $MIC_TEST_SCREENSHOTS if that is set, else to the test's own directory.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mic_supervisor.config.settings import Address
from mic_supervisor.http.access import Access
from mic_supervisor.http.documents import Published
from mic_supervisor.http.server import HttpServer
from tests.support.browser import Browser
from tests.support.waiting import http, until
from tests.unit.http import views_of

VERDICT = "document.getElementById('verdict-title').textContent"
TEXT = "document.body ? document.body.innerText : ''"  # nothing between two pages
CONTRAST = """
(() => {
  const rgb = text => text.match(/[\\d.]+/g).map(Number);
  const part = v => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
  const light = ([r, g, b]) => 0.2126 * part(r) + 0.7152 * part(g) + 0.0722 * part(b);
  const ground = node => {
    for (; node; node = node.parentElement) {
      const colour = rgb(getComputedStyle(node).backgroundColor);
      if (colour.length === 3 || colour[3] > 0) return colour;
    }
    return [255, 255, 255];
  };
  const poor = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const node = walker.currentNode.parentElement;
    if (!walker.currentNode.data.trim() || !node.checkVisibility()) continue;
    if (node.closest('script, .unseen')) continue;
    const [a, b] = [light(rgb(getComputedStyle(node).color)), light(ground(node))];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (ratio < 4.5) poor.push(walker.currentNode.data.trim() + ' ' + ratio.toFixed(2));
  }
  return poor;
})()
"""


class Shown:
    """A server whose machine a test may change."""

    def __init__(self, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}/"
        self.views = [*views_of.measured()]
        self.published: Published = self.views[0]
        self.server = HttpServer(
            Address("127.0.0.1", port), Access(), lambda: self.published, stall_after=3600.0
        )
        self.server.start()
        until(lambda: http(f"{self.url}healthz").status == 200, "the server")


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    browser = Browser()
    yield browser
    browser.close()


@pytest.fixture
def browser(chromium: Browser) -> Iterator[Browser]:
    chromium.scripts(True)
    chromium.look_like(1280, 900, "light")
    chromium.open("about:blank")
    chromium.events.clear()
    yield chromium


@pytest.fixture
def shown(free_port: Callable[[], int]) -> Iterator[Shown]:
    made = Shown(free_port())
    yield made
    made.server.stop()


@pytest.fixture
def shots(tmp_path: Path) -> Path:
    given = os.environ.get("MIC_TEST_SCREENSHOTS")
    path = Path(given) if given else tmp_path
    path.mkdir(parents=True, exist_ok=True)
    return path


STATES: dict[str, Callable[[], Published]] = {
    "good": views_of.good,
    "bad": views_of.bad,
    "frozen": lambda: views_of.bad(engine_gone=True),
    "early": lambda: views_of.published(None),
}


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize(
    ("look", "width", "scheme"),
    [("light", 1280, "light"), ("dark", 1280, "dark"), ("phone", 360, "light")],
)
def test_it_reads_well_everywhere(
    browser: Browser, shown: Shown, shots: Path, state: str, look: str, width: int, scheme: str
) -> None:
    shown.published = STATES[state]()
    browser.look_like(width, 900, scheme, phone=look == "phone")
    browser.open(shown.url)
    browser.screenshot(shots / f"{state}-{look}.png")
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    assert browser.evaluate(CONTRAST) == []
    ground = browser.evaluate("getComputedStyle(document.body).backgroundColor")
    assert ground == ("rgb(20, 23, 28)" if scheme == "dark" else "rgb(246, 247, 249)")
    assert browser.complaints() == []
    assert set(browser.requested()) == {shown.url}


def test_it_changes_by_itself_and_says_so_politely(
    browser: Browser, shown: Shown, shots: Path
) -> None:
    shown.published = views_of.good()
    browser.open(shown.url)
    assert browser.evaluate(VERDICT) == "✓Everything is as it should be"
    browser.evaluate("window.same = document.querySelector('header')")
    shown.published = views_of.bad()
    browser.until(lambda: "7 things" in browser.evaluate(VERDICT), "the bad news")
    said = browser.evaluate("document.getElementById('said').textContent")
    assert said == "7 things are not as they should be, 1 more on the way"
    assert browser.evaluate("document.title").startswith("7 things")
    assert browser.evaluate("document.querySelectorAll('.tile.bad').length") == 5
    assert browser.evaluate("window.same === document.querySelector('header')")
    shown.published = views_of.good()
    browser.until(lambda: "Everything" in browser.evaluate(VERDICT), "the good news")
    assert browser.complaints() == []


def test_what_did_not_change_is_asked_for_cheaply(browser: Browser, shown: Shown) -> None:
    browser.open(shown.url)

    def codes() -> list[int]:
        return [
            event["params"]["response"]["status"]
            for event in browser.events
            if event["method"] == "Network.responseReceived"
        ]

    browser.until(lambda: codes()[-1] == 304, "an answer that nothing has changed")
    assert codes()[0] == 200


def test_a_server_that_is_gone_is_not_hidden(browser: Browser, shown: Shown, shots: Path) -> None:
    browser.open(shown.url)
    shown.server.stop()
    hidden = "document.getElementById('lost').hidden"
    browser.until(lambda: browser.evaluate(hidden) is False, "the notice")
    browser.screenshot(shots / "gone-light.png")
    text = browser.evaluate("document.getElementById('lost').textContent")
    assert text.startswith("No answer since ")
    assert browser.evaluate("document.getElementById('lost').getAttribute('role')") == "alert"


def test_sparklines_are_drawn_from_what_was_measured(
    browser: Browser, free_port: Callable[[], int], shots: Path
) -> None:
    made = Shown(free_port())
    try:
        for published in made.views:
            made.published = published
            until(lambda: http(f"{made.url}api/v1/status").status == 200, "a look")
        browser.open(made.url)
        browser.screenshot(shots / "measured-light.png")
        assert browser.evaluate("document.querySelectorAll('svg.spark path').length") == 10
        label = browser.evaluate("document.querySelector('svg.spark').getAttribute('aria-label')")
        assert label.startswith("Memory over the last 6 min: ")
        box = "document.querySelector('svg.spark path').getBBox().width"
        assert browser.evaluate(box) == 120
    finally:
        made.server.stop()


def test_without_scripts_it_is_whole_and_reloads(
    browser: Browser, shown: Shown, shots: Path
) -> None:
    shown.published = views_of.bad()
    browser.scripts(False)
    browser.open(shown.url)
    browser.screenshot(shots / "bad-no-script.png")
    text = browser.evaluate(TEXT)
    assert "7 things are not as they should be" in text
    shown.published = views_of.good()
    browser.until(
        lambda: "Everything is as it should be" in browser.evaluate(TEXT),
        "the reload",
        timeout=60,
    )


def test_what_a_screen_reader_is_told(browser: Browser, shown: Shown) -> None:
    """The accessibility tree, as the browser hands it to assistive programs."""
    shown.published = views_of.bad()
    browser.open(shown.url)
    nodes = browser.ask("Accessibility.getFullAXTree")["nodes"]
    named = {
        (node["role"]["value"], node.get("name", {}).get("value", ""))
        for node in nodes
        if not node.get("ignored")
    }
    roles = {role for role, _ in named}
    assert {"banner", "main", "contentinfo", "navigation", "status", "meter"} <= roles
    for region in (
        "7 things are not as they should be, 1 more on the way",
        "GPUs",
        "Pending changes",
        "Configuration",
        "Last changes",
    ):
        assert ("region", region) in named, region
    assert ("listitem", "GPU 0 MAM") in named or ("listitem", "GPU 0MAM") in named
    assert ("meter", "Memory of GPU 0") in named
    # Signs beside the words would be read out as noise.
    assert not any(name in ("✓", "!", "…", "?") for role, name in named if role != "InlineTextBox")
