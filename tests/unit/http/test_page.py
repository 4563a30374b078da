"""The page as it is sent: whole, escaped, its own master, and readable without seeing it."""

from __future__ import annotations

import base64
import hashlib
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mic_supervisor.http import page
from mic_supervisor.http.documents import Published
from mic_supervisor.http.page import Sparkline, duration, sparkline
from mic_supervisor.http.views import KEPT, Sample, Samples
from mic_supervisor.model import Gpu, GpuInventory
from mic_supervisor.views.status import GpuState
from tests.unit.http import views_of
from tests.unit.http.views_of import NOW
from tests.unit.plan import builders as b

VOID = frozenset({"meta", "link", "br"})


class Outline(HTMLParser):
    """Elements with their attributes, and the text of the page; fails where tags do not match."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self._open: list[str] = []
        self.feed(html)
        self.close()
        assert self._open == []

    def handle_starttag(self, name: str, attributes: list[tuple[str, str | None]]) -> None:
        assert len(dict(attributes)) == len(attributes)
        self.elements.append((name, dict(attributes)))
        if name not in VOID:
            self._open.append(name)

    def handle_endtag(self, name: str) -> None:
        assert self._open.pop() == name

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] not in ("script", "style"):
            self.words.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.words))

    def all(self, name: str) -> list[dict[str, str | None]]:
        return [attributes for found, attributes in self.elements if found == name]


def shown(*published: Published, stalled: bool = False) -> Outline:
    clock = views_of.Clock()
    views = views_of.views(*published, clock=clock)
    clock.now = 75 if stalled else 0
    return Outline(page.serve(views).body.decode())


def says(text: str, *parts: str) -> None:
    for part in parts:
        assert part in text, (part, text)


PAGES = {
    "good": views_of.good(),
    "waiting": views_of.waiting(),
    "claimed": views_of.claimed(),
    "bad": views_of.bad(),
    "frozen": views_of.bad(engine_gone=True),
    "starting": views_of.published(None),
    "no gpus": views_of.published(
        views_of.snapshot(
            b.desired(), replace(b.observed(), inventory=GpuInventory("nvml", error="gone"))
        )
    ),
}


@pytest.fixture(params=PAGES.values(), ids=PAGES.keys())
def outline(request: pytest.FixtureRequest) -> Outline:
    return shown(request.param)


# --- what it says ---------------------------------------------------------------------------------


def test_a_tile_says_everything_about_a_gpu() -> None:
    says(
        shown(*views_of.measured()).text,
        "Everything is as it should be",
        "2 ready",
        "GPU 0 MAM",
        "ready for 1 h",
        "18.2 of 80.0 GiB",
        "71 of 700 W",
        "37 %, 36 °C",
        "python (4121), 18.2 GiB, ours",
        "http://127.0.0.1:20000",
        "Together with GPU 2",
        "The file keeps it empty, and it is.",
        "The file does not list it; it is left alone.",
        "None: what runs is what the file says.",
        "/etc/mic/gpus.yaml",
        "generation 5",
    )


def test_a_tile_of_a_slice() -> None:
    part = "MIG-f15ae561-7b5c-5a0c-8ab1-3a1e0c2d9f10"
    slice_ = Gpu(part, 0, "A100 MIG 1g.5gb", processes=(), parent=b.uuid(0))
    gpus = (views_of.gpu(0, mig=True), slice_)
    text = shown(views_of.published(views_of.snapshot(b.desired(), b.observed(gpus=gpus)))).text
    assert "GPU 0" in text
    assert "MIG slice f15ae561" in text
    assert "the driver knows none of a slice" in text


def test_who_claims_what_and_who_waits() -> None:
    says(
        shown(views_of.claimed()).text,
        "GPU 0 MAM ✓ ready",
        "Claimed by alice (task 3) Memory",
        "Claimed by alice, who vanished; until ",
        "handed over The file hands it over, and nobody claims it.",
        "Claims that wait their turn whisper , claimed by bob (<b>), for 1 min",
    )


def test_what_a_file_that_waits_would_change() -> None:
    says(
        shown(views_of.waiting()).text,
        "Everything is as it should be",
        "None: what runs is what was applied last.",
        "What the file would change, which is not used yet",
        "replace MAM-aaaaaaaa (GPU 0): its specification changed: command",
        "create embed-dddddddd (GPU 3): nothing runs for it yet",
        "remove qwen-bbbbbbbbx2 (GPU 1,2): ",
    )


def test_what_is_wrong_says_so_and_since_when() -> None:
    says(
        shown(views_of.bad()).text,
        "7 things are not as they should be, 1 more on the way",
        "MAM on GPU 0 backoff: it exited with 1",
        "for 1 min · next try at",
        "Next try",
        "Restarts 4",
        "blender (999), 1.0 GiB, not ours: container c0ffeec0ffee",
        "GPU 6 ! does not answer",
        "80 GiB, use not measured",
        "cannot be read",
        "GPU 2 is held by PID 4121 (python, 18.2 GiB), not ours",
        "The file has errors and is not used for 10 min",
        f"/etc/mic/gpus.yaml:12:5: error: models.whisper.backend: {views_of.SAYS_WHY}",
        "blocked whisper-cccccccc",
        "start failed: it exited with 1",
    )


def test_the_title_tells_it_in_a_tab_and_the_icon_in_a_glance() -> None:
    good, bad = PAGES["good"], PAGES["bad"]
    assert "Everything is as it should be · gpu-01.example" in shown(good).text
    icons = [shown(item).all("link")[0]["href"] for item in (good, bad)]
    assert icons[0] != icons[1]
    assert all(icon and icon.startswith("data:image/svg+xml,") for icon in icons)


def test_an_old_view_says_that_it_is_old() -> None:
    assert "What follows is old: the loop has not finished a round for 75 s" in (
        shown(views_of.good(), stalled=True).text
    )


def test_a_gpu_with_two_instances_shows_both() -> None:
    old, new = b.on("old", 0), b.on("new", 0)
    observed = b.observed(b.workload(old), gpus=(views_of.gpu(0),))
    text = shown(views_of.published(views_of.snapshot(b.desired(new), observed))).text
    assert "GPU 0 new, old" in text or "GPU 0 old, new" in text


# --- how it is made -------------------------------------------------------------------------------


def test_nothing_comes_from_elsewhere(outline: Outline) -> None:
    for name, attributes in outline.elements:
        for key in ("src", "href", "action", "srcset", "poster"):
            value = attributes.get(key)
            assert value is None or value.startswith(("/", "#", "data:")), (name, value)
            assert value is None or not value.startswith("//")
        assert not any(key.startswith("on") for key in attributes), name
        assert "style" not in attributes, name  # the policy would ignore it


def test_the_policy_lets_in_what_is_there_and_nothing_else() -> None:
    policy = dict(
        part.split(" ", 1) for part in page.headers()["Content-Security-Policy"].split("; ")
    )
    html = page.serve(views_of.views(views_of.good())).body.decode()
    for element, directive in (("script", "script-src"), ("style", "style-src")):
        (inside,) = re.findall(rf"<{element}>(.*?)</{element}>", html, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()
        assert policy[directive] == f"'sha256-{digest}'"
    assert policy["default-src"] == "'none'"
    assert policy["frame-ancestors"] == "'none'"
    assert "unsafe" not in str(policy)


def test_a_screen_reader_finds_its_way(outline: Outline) -> None:
    (html,) = outline.all("html")
    assert html["lang"] == "en"
    names = [name for name, _ in outline.elements]
    for landmark in ("header", "main", "footer", "nav", "h1"):
        assert names.count(landmark) == 1, landmark
    ids = [a["id"] for _, a in outline.elements if a.get("id")]
    assert len(ids) == len(set(ids))
    for section in outline.all("section"):
        assert section["aria-labelledby"] in ids
    for svg in outline.all("svg"):
        assert svg["role"] == "img" and svg["aria-label"]
    for meter in outline.all("meter"):
        assert meter["aria-label"]
    said = next(a for _, a in outline.elements if a.get("id") == "said")
    assert (said["role"], said["aria-live"]) == ("status", "polite")
    icons = [a for _, a in outline.elements if (a.get("class") or "").startswith("icon")]
    assert icons and all(a["aria-hidden"] == "true" for a in icons)
    levels = [int(name[1]) for name in names if re.fullmatch(r"h[1-6]", name)]
    assert all(after <= before + 1 for before, after in pairwise(levels))


def test_without_a_script_the_browser_reloads_it() -> None:
    html = page.serve(views_of.views(views_of.good())).body.decode()
    assert '<noscript><meta http-equiv="refresh" content="10"></noscript>' in html


def test_it_is_made_once_a_round() -> None:
    views = views_of.views(views_of.good())
    assert page.serve(views) is page.serve(views)


NASTY = "<script>alert(1)</script>\"' onload=x &amp;"


def test_no_name_or_reason_becomes_markup() -> None:
    model = b.on(NASTY, 0, id=NASTY)
    holder = replace(views_of.holder(7, 1), name=NASTY)
    gpu = replace(views_of.gpu(0, processes=(holder,)), name=NASTY)
    observed = b.observed(gpus=(gpu,), errors={"docker": NASTY})
    published = replace(
        views_of.published(
            views_of.snapshot(b.desired(model, warnings=(NASTY,)), observed),
            config={"path": NASTY, "error": NASTY, "hash": NASTY},
            history=(views_of.event("failed", NASTY, text=NASTY, phase=NASTY),),
        ),
        host=NASTY,
    )
    outline = shown(published)
    assert len(outline.all("script")) == 1
    assert not any("onload" in attributes for _, attributes in outline.elements)
    assert outline.text.count("<script>alert(1)</script>") > 8


def named(name: str) -> Outline:
    """The page where everything that has a name has this one."""
    return shown(
        replace(
            views_of.published(
                views_of.snapshot(b.desired(b.on(name, 0), warnings=(name,)), b.observed()),
                config={"path": name, "error": name},
                history=(views_of.event("done", name, text=name, phase="start"),),
            ),
            host=name,
        )
    )


@given(st.text("<>&\"'/=;!-- {}%#aé\n", min_size=1).filter(str.strip))
def test_no_name_changes_the_elements(name: str) -> None:
    def skeleton(outline: Outline) -> list[tuple[str, list[str]]]:
        return [(element, sorted(attributes)) for element, attributes in outline.elements]

    assert skeleton(named(name)) == skeleton(named("plain"))


def test_nothing_but_style_and_script_goes_in_unescaped() -> None:
    template = page._asset("page.html.j2")
    assert re.findall(r"([^{}]*)\|\s*safe", template) == [" css ", " js "]
    assert not re.search(r"autoescape|Markup", template)


def test_every_state_of_a_gpu_has_its_words() -> None:
    assert set(page._STATES) == set(get_args(GpuState))


def test_a_process_that_is_no_utf8_is_shown() -> None:
    odd = replace(views_of.holder(7, 1), name=b"caf\xe9".decode(errors="surrogateescape"))
    observed = b.observed(gpus=(views_of.gpu(0, processes=(odd,)),))
    text = shown(views_of.published(views_of.snapshot(b.desired(), observed))).text
    assert "caf\N{REPLACEMENT CHARACTER} (7), 1.0 GiB, nobody's" in text


def test_the_template_engine_is_not_loaded_before_the_page_is_asked_for() -> None:
    code = "import sys, mic_supervisor.http.app; print('jinja2' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("False\n", "")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(-5, "0 s"), (59.9, "59 s"), (60, "1 min"), (3599, "59 min"), (86399, "23 h"), (9e5, "10 d")],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


# --- sparklines -----------------------------------------------------------------------------------


def points(line: Sparkline) -> list[list[tuple[float, float]]]:
    return [
        [(float(x), float(y)) for x, y in re.findall(r"([\d.]+) ([\d.]+)", part)]
        for part in line.path.split("M")[1:]
    ]


def test_a_sparkline_goes_from_left_to_right_and_breaks_where_nothing_was_known() -> None:
    line = sparkline([(0, 0.0), (10, 50.0), (20, None), (30, 100.0)], 100, "Memory", "%")
    assert line is not None
    assert points(line) == [[(0, 22), (40, 12)], [(120, 2), (120, 2)]]
    assert line.label == "Memory over the last 30 s: 0 to 100 %, now 100 %"


@pytest.mark.parametrize("values", [[], [(0, 1.0)], [(0, None), (1, None)], [(0, 1.0), (1, None)]])
def test_one_value_is_no_history(values: list[tuple[float, float | None]]) -> None:
    assert sparkline(values, 100, "Power", "W") is None


@given(
    st.lists(st.one_of(st.none(), st.floats(0, 1e6)), min_size=2, max_size=KEPT),
    st.floats(0, 1e5),
)
def test_a_sparkline_stays_inside_its_box(values: list[float | None], top: float) -> None:
    line = sparkline([(10.0 * i, v) for i, v in enumerate(values)], top, "x", "y")
    if line is not None:
        assert all(0 <= x <= 120 and 0 <= y <= 24 for run in points(line) for x, y in run)


def looks(count: int, **values: object) -> Iterator[tuple[float, GpuInventory]]:
    for step in range(count):
        yield NOW + 10 * step, GpuInventory("nvml", (views_of.gpu(0, 8.0, **values),))


def test_samples_are_few_and_the_newest() -> None:
    samples = Samples()
    for at, inventory in looks(KEPT + 30):
        samples.add(at, inventory)
        samples.add(at + 1, inventory)  # a round that came at once
    found = samples.of(b.uuid(0))
    assert len(found) == KEPT
    assert found[-1] == Sample(NOW + 10 * (KEPT + 29), 0.1, 71.3)


def test_a_gpu_that_was_away_leaves_a_gap_and_one_that_is_gone_leaves_nothing() -> None:
    samples = Samples()
    gone = GpuInventory("nvml", error="gone")
    for at, inventory in looks(3):
        samples.add(at, inventory)
    samples.add(NOW + 30, gone)
    samples.add(NOW + 40, GpuInventory("nvml", (views_of.gpu(0, 8.0),)))
    assert [item.memory for item in samples.of(b.uuid(0))] == [0.1, 0.1, 0.1, None, 0.1]
    for step in range(KEPT):
        samples.add(NOW + 50 + 10 * step, gone)
    assert samples.of(b.uuid(0)) == ()


def test_what_is_never_measured_takes_no_room() -> None:
    samples = Samples()
    samples.add(NOW, GpuInventory("simulated", (views_of.gpu(0, None, power_draw=None),)))
    assert samples.of(b.uuid(0)) == ()
