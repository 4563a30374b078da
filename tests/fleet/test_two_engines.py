"""The engine of examples/swarm beside an engine that runs models, in one network namespace."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import docker
import pytest

from tests.fleet import namespaces
from tests.fleet.host import Service
from tests.fleet.namespaces import ADDRESSES
from tests.fleet.pool import TREE_BIN, Pool, engine_services
from tests.setup import fleet
from tests.support.waiting import until

GO = "/run/go"
FIRST = "unix:///run/first.sock"
IMAGE = "mic-test/busybox:1"
WEB = "mkdir /w; echo ok > /w/index.html; exec httpd -f -p 80 -h /w"
OWN = ("mic-swarm0", "docker_gwbridge")


class TwoEngines(Pool):
    """The first has live-restore, as doctor recommends, and is "26" or this machine's own."""

    def begin(self, first: str, image: Path, **settings: object) -> None:
        self.connect_all()
        files = self.home / "gpu1"
        second = engine_services(files, {"cgroup-parent": f"/{self.parent}", **settings}, needs=GO)
        socket = "/run/containerd/containerd.sock"  # one for both, as where systemd starts it
        tree, data = str(fleet.engine()), "/var/lib/docker"
        if first != "26":
            socket, tree, data = "/run/first/containerd.sock", "", f"{files}/disk/docker"
            own = ["--state", "/run/first/containerd", "--root", f"{files}/disk/first-containerd"]
            command = ["containerd", "--address", socket, *own]
            second.insert(0, Service("first-containerd", command, {"PATH": TREE_BIN}))
        command = ["dockerd", "--live-restore", "--host", FIRST, "--data-root", data]
        command += ["--exec-root", "/run/first/exec", "--pidfile", "/run/first/pid"]
        command += ["--containerd", socket, "--cgroup-parent", f"/{self.parent}"]
        env, binds = {"PATH": TREE_BIN}, second[-1].binds
        before = "mkdir -p /run/first; ip link set lo up"
        one = Service("first", command, env, socket, before, tree, binds)
        self.start("gpu1", ADDRESSES["gpu1"], one, *second)
        until(lambda: self.ask("version"), "the first engine", timeout=60)
        with image.open("rb") as given:
            subprocess.run(self.words("load", "-q"), stdin=given, check=True, timeout=60)

    def words(self, *words: str) -> list[str]:
        """A command of the machine's own client, at the first engine."""
        return [*self.within("gpu1", "-n", "-m"), "docker", "-H", FIRST, *words]

    def ask(self, *words: str) -> str:
        done = subprocess.run(self.words(*words), capture_output=True, text=True, timeout=60)
        return done.stdout if done.returncode == 0 else ""

    def network(self) -> list[str]:
        """Addresses, links, routes, rules, and whether packets are forwarded."""
        script = (
            "ip -o addr; ip -o link; ip route; iptables-save; ip6tables-save;"
            " cat /proc/sys/net/ipv4/ip_forward"
        )
        text = self.run([*self.within("gpu1"), "sh", "-c", script])
        plain = re.sub(r"valid_lft.*|\[\d+:\d+\]|^#.*| tentative|^\d+: ", "", text, flags=re.M)
        return [line.strip() for line in plain.splitlines() if line.strip()]

    def serves(self) -> bool:
        """A container of each of the first engine's networks answers, by port and by address."""
        form = "{{.NetworkSettings.IPAddress}}"
        address = self.ask("inspect", "--format", form, "web").strip()
        return all(
            subprocess.run(
                [*self.within("gpu1"), "curl", "-s", "-m", "5", f"http://{where}"],
                capture_output=True,
                text=True,
            ).stdout
            == "ok\n"
            for where in ("127.0.0.1:8080", "127.0.0.1:8081", address)
        )

    def start_second_again(self) -> None:
        """After kill -9."""
        was = self.engine("gpu1")
        os.kill(was, signal.SIGKILL)
        until(lambda: self.engine("gpu1") not in (0, was), "another second engine")
        self.await_engine("gpu1")

    def first_engine(self) -> int:
        return self.service("gpu1", "dockerd", "--live-restore")


@contextmanager
def two_engines(home: Path, first: str, image: Path, **settings: object) -> Iterator[TwoEngines]:
    namespaces.require()
    made = TwoEngines(home)
    try:
        made.begin(first, image, **settings)
        made.ask("network", "create", "own")
        for name, port, network in (("web", 8080, "bridge"), ("web2", 8081, "own")):
            made.ask(
                *("run", "-d", "--name", name, "-p", f"{port}:80", "--network", network),
                *(IMAGE, "sh", "-c", WEB),
            )
        until(made.serves, "two containers to serve")
        yield made
    finally:
        made.close()


@pytest.fixture
def image(engine: docker.APIClient, busybox_image: str, tmp_path: Path) -> Path:
    target = tmp_path / "image.tar"
    packed = engine.get_image(busybox_image)
    target.write_bytes(b"".join(packed))
    return target


@pytest.mark.parametrize("first", ["26", "this machine's"])
def test_the_second_engine_leaves_the_network_of_the_first_alone(
    tmp_path: Path, image: Path, first: str
) -> None:
    with two_engines(tmp_path, first, image) as host:
        before, running = host.network(), host.ask("ps", "-q")
        host.run([*host.within("gpu1", "-a"), "touch", GO])
        host.await_engine("gpu1")
        host.docker("gpu1", "swarm", "init", "--advertise-addr", ADDRESSES["gpu1"])
        with image.open("rb") as given:
            subprocess.run(host.client("gpu1", "load", "-q"), stdin=given, check=True)
        held = ("service", "create", "--detach", "--name", "held", "--network", "host")
        host.docker("gpu1", *held, IMAGE, "sleep", "1000")
        until(lambda: host.tasks("held")[0].state.startswith("Running"), "a task", timeout=60)
        same(before, host.network())
        assert host.serves()

        host.start_second_again()
        same(before, host.network())
        assert host.serves()
        was = host.first_engine()
        os.kill(was, signal.SIGTERM)
        until(lambda: host.first_engine() not in (0, was), "the first engine", timeout=60)
        until(lambda: host.ask("ps", "-q"), "its answer", timeout=60)
        same(before, host.network())
        assert host.ask("ps", "-q") == running
        assert host.serves()


def same(before: list[str], after: list[str]) -> None:
    """Nothing is gone, and what is new belongs to the second engine's two bridges."""
    assert [line for line in before if line not in after] == []
    new = [line for line in after if line not in before]
    links = {
        match[1]
        for line in new
        if (match := re.search(r"(veth\w+)@\S+ .* master (\w+)", line)) and match[2] in OWN
    }
    assert [line for line in new if not any(name in line for name in (*OWN, *links))] == []
    assert any("mic-swarm0" in line for line in new)


@pytest.mark.parametrize(
    ("settings", "starts"),
    [
        ({"bridge": "none"}, 1),
        ({"default-address-pools": [{"base": "10.213.64.0/18", "size": 24}]}, 2),
    ],
    ids=["no bridge", "address pools"],
)
def test_with_another_setting_the_second_engine_deletes_docker0(
    tmp_path: Path, image: Path, settings: dict[str, Any], starts: int
) -> None:
    """Which is why examples/swarm/daemon.json is as it is."""
    with two_engines(tmp_path, "26", image, **settings) as host:
        host.run([*host.within("gpu1", "-a"), "touch", GO])
        host.await_engine("gpu1")
        assert (starts > 1) is any(line.startswith("docker0") for line in host.network())
        if starts > 1:
            host.start_second_again()
        assert not any(line.startswith("docker0") for line in host.network())
        assert not host.serves()


def test_swarm_refuses_the_setting_that_the_first_engine_is_to_have(
    tmp_path: Path, image: Path
) -> None:
    given = {"live-restore": True}
    with two_engines(tmp_path, "26", image, **given) as host:
        host.run([*host.within("gpu1", "-a"), "touch", GO])
        host.await_engine("gpu1")
        command = host.client("gpu1", "swarm", "init", "--advertise-addr", ADDRESSES["gpu1"])
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert (
            done.returncode and "--live-restore daemon configuration is incompatible" in done.stderr
        )
