"""The list without the SDK: every answer that is not a whole one is left to the SDK."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from mic_supervisor.runtimes.docker.peek import peek
from mic_supervisor.runtimes.docker.runtime import DockerRuntime
from tests.unit.runtimes.docker.engine_fake import (
    Answer,
    FakeEngine,
    Handler,
    hang,
    hang_up,
    refuse,
    reply,
)

LIST = "/containers/json?all=1"


@pytest.fixture
def fake(tmp_path: Path) -> Iterator[FakeEngine]:
    fake = FakeEngine(tmp_path / "d.sock")
    yield fake
    fake.close()


def look(fake: FakeEngine, timeout: float = 5.0) -> object:
    answer, _ = peek(str(fake.path), LIST, timeout, version="1.44", oldest=(1, 40))
    return answer


def test_a_whole_answer(fake: FakeEngine) -> None:
    items = [{"Id": "höhe" * 50_000}]
    fake.answers["GET /containers/json"] = reply(items)
    assert look(fake) == items
    assert fake.requests == [("1.44", "GET /containers/json")]


def test_the_version_that_the_engine_names_is_kept(fake: FakeEngine) -> None:
    fake.speaks = "1.41"
    assert peek(str(fake.path), LIST, 5.0, version="1.44", oldest=(1, 40)) == ([], "1.41")


def _cut(handler: Handler) -> None:
    handler.send_response(200)
    handler.send_header("Content-Length", "100")
    handler.end_headers()
    handler.wfile.write(b"[")
    handler.close_connection = True


def _chunked(handler: Handler) -> None:
    handler.begin()
    handler.chunk(b"[]")


def _garbage(handler: Handler) -> None:
    handler.wfile.write(b"SSH-2.0-OpenSSH_9.2\r\n\r\n[]")


@pytest.mark.parametrize(
    "answer",
    [
        _cut,
        _chunked,
        _garbage,
        hang_up,
        refuse(500, "it is on fire"),
        refuse(400, "client version 1.44 is too new. Maximum supported API version is 1.38"),
        lambda handler: handler.send(200, b"[{"),
    ],
)
def test_any_other_answer_is_none(fake: FakeEngine, answer: Answer) -> None:
    fake.answers["GET /containers/json"] = answer
    assert look(fake) is None


def test_no_socket_is_none(fake: FakeEngine) -> None:
    fake.path.unlink()
    assert look(fake) is None


def _dripping(handler: Handler) -> None:
    handler.send_response(200)
    handler.end_headers()
    for _ in range(100):
        handler.wfile.write(b" ")
        time.sleep(0.02)


@pytest.mark.parametrize("answer", [hang(), _dripping])
def test_the_whole_answer_has_one_deadline(fake: FakeEngine, answer: Answer) -> None:
    fake.answers["GET /containers/json"] = answer
    begun = time.monotonic()
    with pytest.raises(TimeoutError):
        look(fake, 0.3)
    assert time.monotonic() - begun < 1


def test_a_silent_engine_is_not_asked_a_second_time(fake: FakeEngine) -> None:
    fake.answers["GET /containers/json"] = hang()
    runtime = DockerRuntime("s", "h", base_url=fake.url, docker_config=None, timeout=0.3)
    view = runtime.observe()
    assert view.error == (
        f"cannot list containers: the engine at {fake.path} does not answer in time"
    )
    assert len(fake.requests) == 1


def test_who_only_looks_does_not_import_the_sdk(fake: FakeEngine) -> None:
    code = (
        "import sys\n"
        "from mic_supervisor.runtimes.docker.runtime import DockerRuntime\n"
        "view = DockerRuntime('s', 'h', base_url=sys.argv[1], docker_config=None).observe()\n"
        "assert view.error is None, view\n"
        "print(sorted({'docker', 'requests', 'urllib3', 'http.client'} & sys.modules.keys()))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, fake.url], capture_output=True, text=True, timeout=30
    )
    assert (done.stdout, done.stderr) == ("[]\n", "")
