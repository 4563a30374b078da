"""The engine stops for a while, under a daemon that goes on: what runs is what ran before."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import docker
import pytest
from docker.errors import DockerException

from tests.integration.daemon_world import (
    DaemonWorld,
    container,
    daemon_world,
    identity,
    lines,
    process,
)
from tests.setup.images import BUSYBOX
from tests.support.require import program
from tests.support.waiting import until

pytestmark = [pytest.mark.engine, pytest.mark.slow]

IMAGE = "mic-test/busybox:1"
AWAY = 3.0  # seconds; the daemon looks every second
C0, C1, P2, P3 = identity("c", 0), identity("c", 1), identity("p", 2), identity("p", 3)


class SecondEngine:
    """One that can be killed: with a network of its own, and away from everybody's first one."""

    def __init__(self, *, live_restore: bool) -> None:
        # Sockets live below it, whose paths may have 107 characters.
        self.home = Path(tempfile.mkdtemp(prefix="mic-e2-", dir="/run"))
        self.url = f"unix://{self.home}/docker.sock"
        self._live_restore = live_restore
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> docker.APIClient:
        unshare, dockerd = program("unshare", "util-linux"), program("dockerd", "docker.io")
        script = f'{BUSYBOX} ip link set lo up; exec "$@"'
        with (self.home / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [
                    *(unshare, "--net", "sh", "-c", script, "sh", dockerd, "--host", self.url),
                    *("--data-root", str(self.home / "data"), "--exec-root", str(self.home / "x")),
                    *("--pidfile", str(self.home / "pid"), "--iptables=false"),
                    *("--ip6tables=false", f"--live-restore={str(self._live_restore).lower()}"),
                ],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        client = until(self._answer, "the second engine", timeout=60, period=0.2)
        assert client is not None
        return client

    def _answer(self) -> docker.APIClient | None:
        assert self._process is not None
        assert self._process.poll() is None, self.log()
        with suppress(DockerException, OSError):
            client = docker.APIClient(base_url=self.url, timeout=30)
            client.ping()
            return client
        return None

    def log(self) -> str:
        return "\n".join((self.home / "log").read_text().splitlines()[-15:])

    def stop(self, sig: signal.Signals) -> None:
        assert self._process is not None
        self._process.send_signal(sig)
        self._process.wait(60)

    def close(self) -> None:
        if self._process is not None and self._process.poll() is None:
            self.stop(signal.SIGTERM)
        for entry in Path("/proc").iterdir():  # shims, and what they hold
            if entry.name.isdigit():
                with suppress(OSError):
                    if str(self.home).encode() in (entry / "cmdline").read_bytes():
                        os.kill(int(entry.name), signal.SIGKILL)
        time.sleep(0.3)
        mounts = Path("/proc/self/mounts").read_text().splitlines()
        for place in sorted((line.split()[1] for line in mounts), reverse=True):
            if place.startswith(f"{self.home}/"):
                subprocess.run(["umount", "--lazy", place], check=False)
        shutil.rmtree(self.home, ignore_errors=True)


@pytest.fixture
def second(request: pytest.FixtureRequest, engine: docker.APIClient) -> Iterator[SecondEngine]:
    made = SecondEngine(live_restore=request.param)
    try:
        client = made.start()
        client.load_image(b"".join(engine.get_image(IMAGE)))  # type: ignore[no-untyped-call]
        yield made
    finally:
        made.close()


@pytest.fixture
def world(
    tmp_path_factory: pytest.TempPathFactory, second: SecondEngine, busybox_image: str
) -> Iterator[DaemonWorld]:
    """A daemon whose engine is the second one."""
    client = docker.APIClient(base_url=second.url, timeout=30)
    with daemon_world(tmp_path_factory.mktemp("outage"), client) as made:
        made.mic.env |= {"MIC_DOCKER_HOST": second.url, "MIC_RESYNC": "1s"}
        made.models = {"c": container("stop_timeout: 2s"), "p": process()}
        made.write({0: "c", 1: "c", 2: "p", 3: "none"})
        made.mic.run(http=False)
        made.converged(C0, C1, P2)
        yield made


@pytest.mark.parametrize(
    ("second", "sig"),
    [
        pytest.param(True, signal.SIGTERM, id="live-restore, stopped"),
        pytest.param(True, signal.SIGKILL, id="live-restore, killed"),
        pytest.param(False, signal.SIGTERM, id="stopped"),
    ],
    indirect=["second"],
)
def test_an_engine_that_is_away(
    world: DaemonWorld, second: SecondEngine, sig: signal.Signals, request: pytest.FixtureRequest
) -> None:
    live_restore = request.node.callspec.params["second"]
    before = world.marks()
    second.stop(sig)
    gone = time.monotonic()
    until(lambda: world.status()["unreadable"], "the outage to be seen")
    assert any("docker" in text.lower() for text in world.status()["unreadable"])
    # A process runs on, and the daemon answers; of the containers nothing is concluded.
    while time.monotonic() - gone < AWAY:
        began = time.perf_counter()
        phases = world.phases()
        assert time.perf_counter() - began < 4  # an engine that is given up is so after 15 s
        assert phases[P2] == "unprobed"
        assert sorted(phases) == sorted([C0, C1, P2])
        assert "restart" not in phases[C0] + phases[C1]
        time.sleep(0.3)
    assert not [event for event in world.history("begin") if event["at"] > time.time() - AWAY]

    second.start()
    world.converged(C0, C1, P2, timeout=60)
    after = world.marks()
    assert after[P2] == before[P2]
    rows = world.rows()
    for name in (C0, C1):
        assert after[name][0] == before[name][0], "another container"
        if live_restore:
            assert after[name] == before[name]
            assert rows[name]["restarts"] == 0
        else:
            assert after[name] != before[name]
            assert rows[name]["restarts"] == 1
    # The engine's events are followed anew: a death is seen at once, not by the next look.
    os.kill(after[C0][2], signal.SIGKILL)
    until(lambda: world.marks().get(C0, after[C0]) != after[C0], "it to be back")
    world.write({0: "c", 1: "c", 2: "p", 3: "p"})
    world.converged(C0, C1, P2, P3)
    complaints = lines(world.mic.daemons[-1], "WARNING.*trying again every few seconds")
    assert len(complaints) <= 2, complaints
