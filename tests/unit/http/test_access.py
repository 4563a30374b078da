"""Who may ask, and when the daemon refuses to start."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mic_supervisor.config.settings import Settings, load_settings
from mic_supervisor.errors import MicError
from mic_supervisor.http.access import Access, access_of, wants_html
from tests.unit.http import views_of
from tests.unit.http.ask import Site

TOKEN = "5f1c0a7be2d94c3fb1"


def settings(tmp_path: Path, **values: str) -> Settings:
    environ = {f"MIC_{name.upper()}": value for name, value in values.items()}
    return load_settings(environ, tmp_path / "no-mic.env")


def token_file(tmp_path: Path, text: str = TOKEN, mode: int = 0o600) -> Path:
    path = tmp_path / "token"
    path.write_text(text)
    path.chmod(mode)
    return path


@pytest.mark.parametrize("listen", ["127.0.0.1:6004", "127.8.8.8:6004", "[::1]:6004"])
def test_loopback_needs_nothing(tmp_path: Path, listen: str) -> None:
    assert access_of(settings(tmp_path, listen=listen)) == Access(None)


@pytest.mark.parametrize("listen", ["0.0.0.0:6004", "[::]:6004", "192.0.2.7:80"])
def test_another_address_is_refused_with_a_way_out(tmp_path: Path, listen: str) -> None:
    with pytest.raises(MicError) as caught:
        access_of(settings(tmp_path, listen=listen))
    assert caught.value.message == (
        f"cannot serve HTTP on {listen}: other machines reach that address, "
        "and no token is asked of them"
    )
    assert caught.value.hint == (
        "set MIC_HTTP_TOKEN_FILE to a file that holds one, or MIC_HTTP_OPEN=true if everybody may "
        "read; 127.0.0.1 behind a reverse proxy needs neither"
    )


def test_another_address_is_open_when_that_is_said(tmp_path: Path) -> None:
    assert access_of(settings(tmp_path, listen="0.0.0.0:80", http_open="true")) == Access(None)


def test_a_token_guards_any_address(tmp_path: Path) -> None:
    path = token_file(tmp_path, f"{TOKEN}\n")
    for listen in ("127.0.0.1:6004", "0.0.0.0:6004"):
        found = access_of(settings(tmp_path, listen=listen, http_token_file=str(path)))
        assert found == Access(TOKEN.encode())
        assert TOKEN not in repr(found)


@pytest.mark.parametrize(
    ("text", "mode", "message"),
    [
        (None, 0, "cannot read the token in PATH: no such file or directory"),
        ("", 0o600, "it must be one word of 16 characters or more"),
        ("short", 0o600, "it must be one word of 16 characters or more"),
        ("two words that are long", 0o600, "it must be one word of 16 characters or more"),
        ("pass;word;pass;word", 0o600, "it must be one word of 16 characters or more"),
        (TOKEN, 0o644, "everybody on this machine may read it"),
    ],
)
def test_a_token_that_is_no_good_is_refused(
    tmp_path: Path, text: str | None, mode: int, message: str
) -> None:
    path = tmp_path / "token" if text is None else token_file(tmp_path, text, mode)
    with pytest.raises(MicError) as caught:
        access_of(settings(tmp_path, http_token_file=str(path)))
    assert message.replace("PATH", str(path)) in caught.value.message
    assert caught.value.hint
    assert text is None or not text or text not in caught.value.message


def test_a_token_that_is_not_text(tmp_path: Path) -> None:
    path = tmp_path / "token"
    path.write_bytes(b"\xff\xfe\x00")
    path.chmod(0o600)
    with pytest.raises(MicError, match="it is not text"):
        access_of(settings(tmp_path, http_token_file=str(path)))


@pytest.mark.parametrize(
    ("authorization", "good"),
    [
        (f"Bearer {TOKEN}", True),
        (f"bearer  {TOKEN} ", True),
        (f"Bearer {TOKEN}x", False),
        (f"Bearer {TOKEN[:-1]}", False),
        (f"Basic {TOKEN}", False),
        (TOKEN, False),
        ("Bearer", False),
        ("Bearer \udcff", False),
        ("", False),
        (None, False),
    ],
)
def test_what_admits(authorization: str | None, good: bool) -> None:
    assert Access(TOKEN.encode()).admits(authorization) is good
    assert Access(None).admits(authorization)


def test_without_the_token_nothing_is_told_but_life() -> None:
    site = Site(views_of.good(), access=Access(TOKEN.encode()))
    for path in ("/", "/metrics", "/api/v1/status", "/openapi.json", "/readyz", "/nowhere"):
        answer = site(path)
        assert answer.status == 401, path
        assert answer.headers["www-authenticate"] == 'Bearer realm="mic-supervisor"'
        assert answer.json() == {
            "detail": "send the token of MIC_HTTP_TOKEN_FILE as a bearer token"
        }
        assert site(path, headers={"Authorization": f"Bearer {TOKEN}"}).status != 401
    assert site("/api/v1/models/start", "POST").status == 401
    assert site("/healthz").status == 200


# --- a page or a document -----------------------------------------------------------------------

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
