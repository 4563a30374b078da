"""Pulls and registry credentials through the real SDK against an engine of our own."""

from __future__ import annotations

import base64
import json
import os
import pwd
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from mic_supervisor.errors import MicError, PreflightFailed, RuntimeUnavailable, Withdrawn
from mic_supervisor.runtimes.docker.engine import Engine
from mic_supervisor.runtimes.docker.pull import Puller, credentials
from tests.support.waiting import until
from tests.unit.runtimes.docker.engine_fake import (
    Answer,
    FakeEngine,
    Handler,
    fails,
    half,
    hang,
    refuse,
)


@pytest.fixture
def fake(tmp_path: Path) -> Iterator[FakeEngine]:
    fake = FakeEngine(tmp_path / "d.sock")
    yield fake
    fake.close()


# --- Pulling ----------------------------------------------------------------------------------


def pulled(fake: FakeEngine, *reports: dict[str, object], config: Path | None = None) -> list[str]:
    def answer(handler: Handler) -> None:
        handler.begin()
        for report in reports:
            handler.chunk(json.dumps(report).encode() + b"\r\n")
        handler.chunk(b"")

    fake.answers.setdefault("GET /images/r.example/x:1/json", refuse(404, "No such image: x:1"))
    fake.answers["POST /images/create"] = answer
    shown: list[str] = []
    engine = Engine(fake.url, timeout=60.0, work_timeout=60.0)
    Puller(engine, config).ensure("r.example/x:1", shown.append)
    return shown


def test_always_pulls_what_is_there_and_never_pulls_nothing(fake: FakeEngine) -> None:
    def answer(handler: Handler) -> None:
        handler.begin()
        handler.chunk(b"")

    fake.answers["GET /images/there:1/json"] = lambda handler: handler.send(
        200, b'{"Id": "sha256:1"}'
    )
    fake.answers["GET /images/gone:1/json"] = refuse(404, "No such image: gone:1")
    fake.answers["POST /images/create"] = answer
    puller = Puller(Engine(fake.url, timeout=60.0, work_timeout=60.0), None)
    puller.ensure("there:1", pytest.fail, "missing")
    puller.ensure("there:1", pytest.fail, "never")
    shown: list[str] = []
    puller.ensure("there:1", shown.append, "always")
    assert shown == ["pulling there:1", "pulled there:1"]
    with pytest.raises(PreflightFailed, match="with pull: never it is not pulled") as caught:
        puller.ensure("gone:1", pytest.fail, "never")
    assert (
        caught.value.hint == "bring it: docker pull gone:1, or docker load; or remove the key pull"
    )


def loading(layer: str, current: int, total: int, status: str = "Downloading") -> dict[str, object]:
    return {
        "id": layer,
        "status": status,
        "progressDetail": {"current": current, "total": total},
    }


def test_progress_over_all_layers_never_falls(fake: FakeEngine) -> None:
    assert pulled(
        fake,
        {"status": "Pulling from x", "id": "1"},
        loading("a", 10, 100),
        loading("a", 50, 100),
        loading("b", 0, 100),
        loading("b", 10, 100),
        loading("a", 99, 100),
        {"id": "a", "status": "Download complete"},
        loading("a", 1, 100, "Extracting"),
        loading("b", 100, 100),
        loading("b", 1, 100, "Extracting"),
        loading("b", 2, 100, "Extracting"),
        {"id": "b", "status": "Pull complete"},
    ) == [
        "pulling r.example/x:1",
        "pulling r.example/x:1: 10 %",
        "pulling r.example/x:1: 50 %",
        "pulling r.example/x:1: 54 %",
        "pulling r.example/x:1: 55 %",
        "pulling r.example/x:1: 100 %",
        "pulling r.example/x:1: unpacking",
        "pulled r.example/x:1",
    ]


def test_a_disk_that_fills_up_in_the_middle(fake: FakeEngine) -> None:
    error = fails(
        lambda: pulled(
            fake,
            loading("a", 10, 100),
            {"errorDetail": {}, "error": "write /var/lib/docker/tmp/x: no space left on device"},
        )
    )
    assert isinstance(error, PreflightFailed)
    assert str(error) == "cannot pull r.example/x:1: the engine's disk is full"


def test_a_pull_that_gets_stuck(fake: FakeEngine) -> None:
    def stuck(handler: Handler) -> None:
        handler.begin()
        handler.chunk(json.dumps(loading("a", 10, 100)).encode() + b"\r\n")
        time.sleep(3)

    fake.answers["GET /images/x:1/json"] = refuse(404, "No such image: x:1")
    for answer in (stuck, hang(3)):
        fake.answers["POST /images/create"] = answer
        puller = Puller(Engine(fake.url, timeout=60.0, work_timeout=60.0), None, silence=0.3)
        error = fails(lambda: puller.ensure("x:1", lambda line: None))  # noqa: B023
        assert isinstance(error, PreflightFailed)
        assert str(error) == "cannot pull x:1: nothing came for 0.3 s"


def test_an_engine_that_dies_while_pulling(fake: FakeEngine) -> None:
    fake.answers["GET /images/x:1/json"] = refuse(404, "No such image: x:1")
    fake.answers["POST /images/create"] = half
    puller = Puller(Engine(fake.url, timeout=60.0, work_timeout=60.0), None)
    error = fails(lambda: puller.ensure("x:1", lambda line: None))
    assert isinstance(error, RuntimeUnavailable)
    assert "hung up" in str(error)


def test_a_lane_that_gives_up_leaves_the_pull_to_those_who_wait(fake: FakeEngine) -> None:
    waits = threading.Event()

    def answer(handler: Handler) -> None:
        handler.begin()
        assert waits.wait(60)
        handler.chunk(json.dumps(loading("a", 10, 100)).encode() + b"\r\n")
        handler.chunk(b"")

    def give_up(_line: str) -> None:
        if waits.is_set():
            raise Withdrawn("gave up")

    fake.answers["GET /images/x:1/json"] = refuse(404, "No such image: x:1")
    fake.answers["POST /images/create"] = answer
    puller = Puller(Engine(fake.url, timeout=60.0, work_timeout=60.0), None)
    with ThreadPoolExecutor(2) as lanes:
        gone = lanes.submit(puller.renew, "x:1", give_up)
        until(lambda: fake.asked("POST /images/create") == 1, "the pull")
        other = lanes.submit(puller.renew, "x:1", lambda _: None)
        time.sleep(0.1)  # until it waits; if it comes later it pulls by itself
        waits.set()
        assert isinstance(gone.exception(60), Withdrawn)
        assert other.result(60) is None
    assert fake.asked("POST /images/create") == 2


def test_lanes_that_wait_share_a_failure_too(fake: FakeEngine) -> None:
    go = threading.Event()

    def slow(handler: Handler) -> None:
        go.wait(60)
        handler.refuse(404, "manifest for x:1 not found: manifest unknown")

    fake.answers["GET /images/x:1/json"] = refuse(404, "No such image: x:1")
    fake.answers["POST /images/create"] = slow
    puller = Puller(Engine(fake.url, timeout=60.0, work_timeout=60.0), None)
    errors: list[str] = []
    lanes = [
        threading.Thread(
            target=lambda: errors.append(str(fails(lambda: puller.ensure("x:1", lambda _: None))))
        )
        for _ in range(3)
    ]
    for lane in lanes:
        lane.start()
    while fake.asked("GET /images/x:1/json") < 4:  # three looks, and the puller's second
        time.sleep(0.01)
    go.set()
    for lane in lanes:
        lane.join(60)
    assert errors == ["cannot pull x:1: docker.io has no such image or tag"] * 3
    # Not all three may have come in time to wait, but who waited did not pull.
    assert fake.asked("POST /images/create") == 1


# --- Credentials ------------------------------------------------------------------------------


def sent(fake: FakeEngine) -> tuple[list[dict[str, str] | None], Answer]:
    seen: list[dict[str, str] | None] = []

    def answer(handler: Handler) -> None:
        header = handler.headers.get("X-Registry-Auth")
        seen.append(json.loads(base64.urlsafe_b64decode(header)) if header else None)
        handler.begin()
        handler.chunk(b"")

    return seen, answer


@pytest.mark.parametrize(
    ("document", "expected"),
    [
        ({}, {}),
        ({"auths": {}}, {}),
        ({"auths": {"other.example": {"auth": "bWU6cHc="}}}, {}),
        (
            {"auths": {"https://r.example/v2/": {"auth": "bWU6cDp3"}}},
            {"username": "me", "password": "p:w"},
        ),
        ({"auths": {"r.example": {"identitytoken": "tok"}}}, {"IdentityToken": "tok"}),
        (
            {"auths": {"r.example": {}}, "credsStore": "test"},
            {"Username": "me", "Password": "from-helper"},
        ),
        (
            {
                "auths": {"r.example": {"auth": "bWU6cHc="}},
                "credHelpers": {"other.example": "missing"},
            },
            {"username": "me", "password": "pw"},
        ),
        (
            {"auths": {"r.example": {"auth": "bWU6cHc="}}, "credsStore": "empty"},
            {"username": "me", "password": "pw"},
        ),
        ({"credHelpers": {"r.example": "token"}}, {"IdentityToken": "from-helper"}),
    ],
)
def test_the_credentials_that_are_sent(
    fake: FakeEngine,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    document: dict[str, object],
    expected: dict[str, str],
) -> None:
    helpers(tmp_path, monkeypatch)
    (tmp_path / "config.json").write_text(json.dumps(document))
    seen, answer = sent(fake)
    fake.answers["GET /images/r.example/x:1/json"] = refuse(404, "No such image: x:1")
    fake.answers["POST /images/create"] = answer
    Puller(Engine(fake.url, timeout=60.0, work_timeout=60.0), tmp_path).ensure(
        "r.example/x:1", print
    )
    (found,) = seen
    assert found is not None  # with none of ours, the SDK would look for some
    assert bool(found) == bool(expected)
    assert expected.items() <= found.items()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot use the registry credentials in {path}: not JSON: Expecting"),
        ("[" * 100_000, "cannot use the registry credentials in {path}: nested too deeply"),
        ("[]", "cannot use the registry credentials in {path}: an entry is malformed"),
        ('{"auths": []}', ""),
        ('{"auths": [1]}', "cannot use the registry credentials in {path}: an entry is malformed"),
        (
            '{"auths": {"r.example": {"auth": "%"}}}',
            "cannot use the registry credentials in {path}:",
        ),
        (
            '{"auths": {"r.example": {"auth": "c2VjcmV0"}}}',
            "cannot use the registry credentials in {path}: an entry is malformed",
        ),
        (
            '{"credsStore": "missing"}',
            "cannot get credentials for r.example: there is no program docker-credential-missing",
        ),
        (
            '{"credsStore": "failing"}',
            "cannot get credentials for r.example: docker-credential-failing exits with 3: “no",
        ),
        (
            '{"credsStore": "garbled"}',
            "cannot get credentials for r.example: docker-credential-garbled gives an answer that",
        ),
    ],
)
def test_credentials_that_cannot_be_used(
    fake: FakeEngine,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    text: str,
    message: str,
) -> None:
    helpers(tmp_path, monkeypatch)
    path = tmp_path / "config.json"
    path.write_text(text)
    if not message:  # an empty list of credentials is none
        pulled(fake, config=tmp_path)
        return
    error = fails(lambda: pulled(fake, config=path))
    assert isinstance(error, PreflightFailed)
    assert str(error).startswith(message.format(path=path))
    assert "c2VjcmV0" not in str(error) + str(error.hint)
    assert error.hint


@pytest.mark.parametrize(
    ("helper", "why"), [("empty", "gives none: “no HOME”"), ("blank", "gives an empty secret")]
)
def test_a_helper_that_gives_nothing_is_named_where_the_registry_wants_a_login(
    fake: FakeEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, helper: str, why: str
) -> None:
    helpers(tmp_path, monkeypatch)
    (tmp_path / "config.json").write_text(json.dumps({"credsStore": helper}))
    fake.answers["GET /images/r.example/x:1/json"] = refuse(404, "No such image: x:1")

    def error(said: str) -> MicError:
        fake.answers["POST /images/create"] = refuse(500, said)
        puller = Puller(Engine(fake.url, timeout=60.0, work_timeout=60.0), tmp_path)
        return fails(lambda: puller.ensure("r.example/x:1", print))

    denied = error("unauthorized: authentication required")
    assert str(denied) == (
        "cannot pull r.example/x:1: r.example gives no access to it, or has no such image; it went "
        f"out without credentials: docker-credential-{helper} is configured for r.example and {why}"
    )
    assert denied.hint is not None
    assert denied.hint.startswith(f"try it by hand: echo r.example | docker-credential-{helper} ge")
    assert "docker login r.example" in denied.hint
    assert "docker-credential" not in str(error("dial tcp: i/o timeout"))


def test_a_helper_has_a_home_where_the_supervisor_was_given_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """systemd gives no HOME to a service of root."""
    helpers(tmp_path, monkeypatch)
    monkeypatch.delenv("HOME")
    monkeypatch.delenv("LANG", raising=False)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"credsStore": "home"}))
    found, nothing = credentials(path, "r.example")
    home = pwd.getpwuid(os.getuid()).pw_dir
    assert (found["Username"], nothing) == (f"{home} C.UTF-8", None)


def test_a_configuration_that_is_not_there(fake: FakeEngine, tmp_path: Path) -> None:
    path = tmp_path / "none.json"
    error = fails(lambda: pulled(fake, config=path))
    assert str(error) == (
        f"cannot use the registry credentials in {path}: No such file or directory"
    )


def helpers(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def answer(user: str) -> str:
        return json.dumps({"Username": user, "Secret": "from-helper"})

    scripts = {
        "test": f"echo '{answer('me')}'",
        "token": f"echo '{answer('<token>')}'",
        "empty": "echo 'credentials not found in native keychain'; echo no HOME >&2; exit 1",
        "blank": 'echo \'{"Username": "", "Secret": ""}\'',
        "home": 'printf \'{"Username": "%s", "Secret": "x"}\' "$HOME $LANG"',
        "failing": "echo c2VjcmV0; printf 'no\\033[2J network\\n' >&2; exit 3",
        "garbled": "echo c2VjcmV0",
    }
    for name, script in scripts.items():
        path = directory / f"docker-credential-{name}"
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{directory}:/usr/bin:/bin")
