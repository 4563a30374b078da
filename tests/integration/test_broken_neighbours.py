"""Strangers: on our ports, under our names. They are named and left alone."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import docker
import pytest

from tests.integration.job_world import World, lines_of, outcome, web
from tests.support import scopes
from tests.support.waiting import http, until

pytestmark = pytest.mark.engine


@pytest.fixture
def foreign(engine: docker.APIClient, busybox_image: str) -> Iterator[Callable[..., str]]:
    """Starts a container that is not ours; with its name and a port, if given."""
    made: list[str] = []

    def start(name: str | None = None, port: int | None = None) -> str:
        config = engine.create_host_config(port_bindings={80: port} if port else {})
        container = engine.create_container(
            busybox_image,
            ["sleep", "600"],
            name=name,
            ports=[80] if port else None,
            labels={scopes.LABEL: "not-ours"},
            host_config=config,
        )["Id"]
        made.append(container)
        engine.start(container)
        return str(container)

    yield start
    for container in made:
        engine.remove_container(container, force=True)


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def test_a_port_that_a_process_listens_on(job: World, free_port: Callable[[], int]) -> None:
    port = free_port()
    code = f"import socket, time; s = socket.create_server(('127.0.0.1', {port})); time.sleep(600)"
    holder = subprocess.Popen([sys.executable, "-c", code])
    try:
        until(lambda: _listens(port), "the holder")
        job.write({0: "a", 1: "b"}, a=web(f"port: {port}"), b=web())
        name = Path(f"/proc/{holder.pid}/comm").read_text().strip()
        said = f"port {port} is taken by {name} (PID {holder.pid}), not ours"
        assert job.plan() == (
            "+ create   b-51000001  GPU 1  nothing runs for it yet\n"
            "\n"
            f"! blocked  a-51000000 on GPU 0: {said}\n"
            "    hint: free the port, or give a another one\n"
            "\n"
            "Plan: 1 to create; 1 blocked.\n"
        )
        assert f"blocked    a-51000000  GPU 0  {said}\n" in job.mic("apply", rc=3).stdout
        assert sorted(job.runs()) == ["b-51000001"]
        assert holder.poll() is None
    finally:
        holder.kill()
        holder.wait()
    job.apply()
    assert http(f"http://127.0.0.1:{port}/health").text == "ok\n"
    job.unchanged()


def test_a_port_that_a_foreign_container_publishes(
    job: World, foreign: Callable[..., str], free_port: Callable[[], int]
) -> None:
    port = free_port()
    other = foreign(f"somebody-{job.mic.scope}", port)
    job.write({0: "a", 1: "b"}, a=web(f"port: {port}"), b=web())
    said = f"port {port} is taken by docker somebody-{job.mic.scope}, not ours"
    assert lines_of(job.plan(), "! blocked") == [f"! blocked  a-51000000 on GPU 0: {said}"]
    assert f"blocked    a-51000000  GPU 0  {said}\n" in job.mic("apply", rc=3).stdout
    assert sorted(job.runs()) == ["b-51000001"]
    assert job.engine.inspect_container(other)["State"]["Running"]


def test_a_port_of_the_range_that_is_taken_is_not_chosen(
    job: World, foreign: Callable[..., str]
) -> None:
    job.write({0: "a"}, a=web())
    job.apply()
    port = int(job.url("a-51000000").rpartition(":")[2])
    job.mic("down", "--yes", rc=0)
    foreign(port=port)
    job.apply()
    assert job.url("a-51000000") != f"http://127.0.0.1:{port}"
    job.unchanged()


def test_a_foreign_container_with_our_name(job: World, foreign: Callable[..., str]) -> None:
    job.write({0: "a"}, a=web())
    job.apply()
    name = job.one("a-51000000")["Name"].lstrip("/")
    job.engine.remove_container(name, force=True)
    other = foreign(name)
    job.write({0: "a", 1: "b"}, b=web())
    said = f"the name {name} is taken by a workload that is not ours: it has no labels of ours"
    assert job.plan() == (
        "+ create   b-51000001  GPU 1  nothing runs for it yet\n"
        "\n"
        f"! blocked  a-51000000 on GPU 0: {said}\n"
        f"    hint: rename or remove it: docker rm {name}\n"
        "\n"
        f"warning: docker {name} looks like ours and is not: it has no labels of ours\n"
        "\n"
        "Plan: 1 to create; 1 blocked.\n"
    )
    done = job.mic("apply", rc=3)
    assert f"blocked    a-51000000  GPU 0  {said}\n" in done.stdout
    assert sorted(job.runs()) == ["b-51000001"]
    assert job.engine.inspect_container(other)["State"]["Running"]

    job.engine.rename(name, f"somebody-{job.mic.scope}")
    job.apply()
    assert sorted(job.runs()) == ["a-51000000", "b-51000001"]


def test_what_belongs_to_another_scope_is_left_alone(job: World) -> None:
    job.write({0: "a"}, a=web())
    job.apply()
    before = job.runs()
    with_other = job.mic.env | {"MIC_SCOPE": scopes.new_scope()}
    mine, job.mic.env = job.mic.env, with_other
    try:
        assert lines_of(job.plan(), "+", "-", "~", "=", "warning") == [
            "+ create   a-51000000  GPU 0  nothing runs for it yet"
        ]
        assert outcome(job.mic("down", "--yes", rc=0).stdout) == "Nothing of ours runs here.\n"
    finally:
        job.mic.env = mine
    assert job.runs() == before
    job.unchanged()
