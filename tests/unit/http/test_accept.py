from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mic_supervisor.http.accept import wants_html

CHROMIUM = "text/html,application/xhtml+xml,application/xml;q=0.9,image/avif,*/*;q=0.8"


@pytest.mark.parametrize(
    ("accept", "page"),
    [
        (CHROMIUM, True),
        ("text/html", True),
        ("TEXT/HTML; charset=utf-8", True),
        ("application/json;q=0.5, text/html", True),
        (None, False),
        ("", False),
        ("*/*", False),
        ("text/*", False),
        ("application/json", False),
        ("application/json, text/html;q=0.9", False),
        ("text/html;q=0", False),
        ("text/html;q=nonsense", False),
        ("application/json, text/plain, */*", False),
    ],
)
def test_only_who_names_html_gets_the_page(accept: str | None, page: bool) -> None:
    assert wants_html(accept) is page


@given(st.text(alphabet="text/html,;q=.01*application json"))
def test_no_header_is_too_strange(accept: str) -> None:
    assert wants_html(accept) in (True, False)
