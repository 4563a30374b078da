"""Who may ask, and when the daemon refuses to start."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mic_supervisor.config.settings import Settings, load_settings
from mic_supervisor.errors import MicError
from mic_supervisor.http import access
from mic_supervisor.http.access import HIDDEN, Access, Scrubber, access_of
from mic_supervisor.model import ExecCheck, Hook, Preparation, Probe, Probes
from mic_supervisor.text import one_line, quoted
from tests.unit.http import views_of
from tests.unit.http.ask import Site
from tests.unit.plan import builders as b

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
    found = access_of(settings(tmp_path, listen=listen))
    assert found == Access(None, frozenset({socket.gethostname().lower()}))


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


@pytest.mark.parametrize(
    ("host", "good"),
    [
        ("localhost:6004", True),
        ("LOCALHOST", True),
        ("mic.localhost:6004", True),
        ("localhost.:6004", True),
        ("127.0.0.1:6004", True),
        ("[::1]:6004", True),
        ("192.0.2.7", True),  # nobody can make an address point elsewhere
        ("gpu-01", True),
        ("status.example.com:443", True),
        (None, True),  # HTTP/1.0, which no browser speaks
        ("evil.example", False),
        ("evil.example:6004", False),
        ("localhost.evil.example", False),
        ("gpu-01.evil.example", False),
        ("127.0.0.1.evil.example", False),
        ("1", False),
    ],
)
def test_on_loopback_only_names_of_this_machine_are_answered(host: str | None, good: bool) -> None:
    guarded = Access(hosts=frozenset({"gpu-01", "status.example.com"}))
    assert guarded.answers_to(host) is good
    assert Access().answers_to(host)
    site = Site(views_of.good(), access=guarded)
    headers = {} if host is None else {"Host": host}
    for path in ("/", "/metrics", "/api/v1/status"):
        assert site(path, headers=headers).status == (200 if good else 421)
    assert site("/api/v1/models/start", "POST", headers).status == (405 if good else 421)
    assert site("/healthz", headers=headers).status == 200
    if not good:
        assert site("/metrics", headers=headers).json() == {
            "detail": f"{host} is no name of this machine: add it to MIC_HTTP_HOSTS"
        }


def test_more_names_are_a_setting(tmp_path: Path) -> None:
    found = access_of(settings(tmp_path, http_hosts="status.example.com,proxy"))
    assert found.answers_to("Status.Example.com") and found.answers_to("proxy:80")
    assert access_of(settings(tmp_path, http_open="true")).hosts is None
    token = access_of(settings(tmp_path, http_token_file=str(token_file(tmp_path))))
    assert token.hosts is None  # who knows the token is who is meant


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


# --- what is confidential stays out, wherever a sentence picked it up ----------------------------

SECRET = "canary-3f9a"


def scrubber(**values: object) -> Scrubber:
    return Scrubber().including(b.desired(b.on("m", 0, workload=b.program(**values))))  # type: ignore[arg-type]


def test_values_of_every_kind_of_environment_are_hidden() -> None:
    for name in ("env", "file_env", "variables"):
        found = scrubber(**{name: (("TOKEN", SECRET),)})
        assert found.text(f"it said: bad token {SECRET}!") == f"it said: bad token {HIDDEN}!"


def test_arguments_are_hidden_and_what_a_reason_needs_is_not() -> None:
    found = Scrubber().including(
        b.desired(
            b.on("m", 0, workload=b.program("/opt/serve", "--api-key", SECRET, f"--key={SECRET}2"))
        )
    )
    text = f"/opt/serve: unknown option --api-key {SECRET} --key={SECRET}2"
    assert found.text(text) == f"/opt/serve: unknown option --api-key {HIDDEN} --key={HIDDEN}"


def test_a_containers_whole_command_is_arguments() -> None:
    found = Scrubber().including(b.desired(b.on("m", 0, workload=b.container(command=(SECRET,)))))
    assert found.text(f"exec: {SECRET}: not found") == f"exec: {HIDDEN}: not found"


def test_the_longer_of_two_secrets_is_hidden_whole() -> None:
    found = scrubber(env=(("A", SECRET), ("B", f"{SECRET}-and-more")))
    assert found.text(f"{SECRET}-and-more") == HIDDEN


def test_short_values_are_words_like_others() -> None:
    assert scrubber(env=(("DEBUG", "true"),)).text("it is true") == "it is true"


def test_a_short_value_is_hidden_where_its_name_says_that_it_is_secret() -> None:
    found = scrubber(env=(("DB_PASS", "abc1"), ("MODE", "fast"), ("KEY", "k")))
    assert found.text("no: abc1, abc12, fast, k") == f"no: {HIDDEN}, abc12, fast, k"


def test_arguments_of_probes_of_prepare_and_of_the_hook_are_hidden() -> None:
    probe = Probe(ExecCheck(("/usr/bin/psql", f"--password={SECRET}", "-psecret99", "/var/x")))
    wanted = b.desired(
        b.on(
            "m",
            0,
            probes=Probes(liveness=probe),
            prepare=Preparation(
                ("/opt/fetch", "--key=${env:K}", "a-b-c-d-e"), (("K", "k-e-y-k-e-y"),)
            ),
        ),
        hook=Hook(("/usr/bin/notify", "--token", f"{SECRET}-hook"), 10.0, 1.0),
    )
    text = f"psql --password={SECRET} -psecret99 /var/x; notify --token {SECRET}-hook"
    assert Scrubber().including(wanted).text(f"{text}; fetch k-e-y-k-e-y a-b-c-d-e") == (
        f"psql --password={HIDDEN} {HIDDEN} /var/x; notify --token {HIDDEN}; "
        f"fetch {HIDDEN} {HIDDEN}"
    )


@pytest.mark.parametrize("count", range(access.SHORTEST, len(SECRET) + 1))
def test_a_sentence_that_was_cut_in_a_secret_shows_no_beginning_of_it(count: int) -> None:
    found = scrubber(env=(("A", SECRET), ("B", "another-one")))
    assert found.text(f"it said: {SECRET[:count]}…") == f"it said: {HIDDEN}…"
    assert found.text(f"it said: {SECRET[:count]}…; and more") == f"it said: {HIDDEN}…; and more"
    assert found.text(f"it said: {SECRET[:3]}…") == f"it said: {SECRET[:3]}…"


def test_a_secret_is_found_in_the_form_in_which_it_is_shown() -> None:
    found = scrubber(env=(("A", "two\nlines\x1bof it"),))
    assert found.text(one_line("said: two\nlines\x1bof it")) == f"said: {HIDDEN}"


def test_only_sentences_are_scrubbed() -> None:
    document = {
        "id": SECRET,
        "reason": f"x {SECRET}",
        "warnings": [SECRET],
        "inner": [{"hint": SECRET, "name": SECRET, "until": 1.5, "waits": None}],
    }
    assert scrubber(env=(("A", SECRET),)).document(document) == {
        "id": SECRET,
        "reason": f"x {HIDDEN}",
        "warnings": [HIDDEN],
        "inner": [{"hint": HIDDEN, "name": SECRET, "until": 1.5, "waits": None}],
    }


def test_what_another_program_said_is_hidden_whatever_it_is() -> None:
    said = f"the hook exits with 1: {quoted('key (base64) Y2FuYXJ5')}; run it by hand"
    assert Scrubber().text(said) == f"the hook exits with 1: {HIDDEN}; run it by hand"
    assert Scrubber().text(said[:45]) == f"the hook exits with 1: {HIDDEN}"  # cut by somebody
    tricky = f"it said {quoted('a” token “b')} and ended"
    assert Scrubber().text(tricky) == f"it said {HIDDEN} and ended"


def test_what_left_the_file_stays_hidden_and_nothing_is_made_anew_for_the_same() -> None:
    before = scrubber(env=(("TOKEN", SECRET),))
    wanted = b.desired(b.on("m", 0, workload=b.program(env=(("TOKEN", "the-next-one"),))))
    after = before.including(wanted)
    assert after.text(f"{SECRET} the-next-one") == f"{HIDDEN} {HIDDEN}"
    assert after.including(wanted) is after and after.including(b.desired()) is after


def test_nothing_desired_hides_nothing() -> None:
    assert Scrubber().text(SECRET) == SECRET


@given(st.text(min_size=access.SHORTEST), st.text(), st.text())
def test_no_secret_comes_through(secret: str, before: str, after: str) -> None:
    text = scrubber(env=(("A", secret),)).text(f"{before}{secret}{after}")
    assert secret not in text.replace(HIDDEN, "\0")


def test_diffs_of_commands_and_environments_show_no_values() -> None:
    paths = {
        "command": True,
        "command[2]": True,
        "entrypoint": True,
        "env.TOKEN": True,
        "file_env.TOKEN": True,
        "variables.X": True,
        "env_file": False,
        "image": False,
        "ports.http.host": False,
        "environment": False,
    }
    diff = [{"path": path, "before": None, "after": SECRET} for path in paths]
    plan = access.plan_document({"version": 1, "actions": [{"action": "replace", "diff": diff}]})
    assert {d["path"]: d["after"] == HIDDEN for d in plan["actions"][0]["diff"]} == paths
    assert all(d["before"] is None for d in plan["actions"][0]["diff"])
