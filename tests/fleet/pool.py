"""Three hosts with four GPUs each, whose models a swarm asks for: claims, and who holds them.

Each host has the engine of examples/swarm, from Debian 13, and a supervisor of its own. That engine
runs the holders and nothing else; the models are host processes, so that a host needs no third
engine. All three are managers: there is no fourth machine to be one.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from tests.fleet import holder, namespaces
from tests.fleet.gpu_hosts import GpuHosts
from tests.fleet.host import Service
from tests.fleet.namespaces import ADDRESSES, GPU_HOSTS, make_key
from tests.setup import fleet
from tests.setup.steps import CHECKOUT
from tests.support.waiting import until

EXAMPLES = CHECKOUT / "examples" / "swarm"
SOCKET = "unix:///run/mic-swarm/docker.sock"
TREE_BIN = "/usr/sbin:/usr/bin:/sbin:/bin"

NGINX = """\
events {}
http {
  access_log off;
  upstream chat { include %(home)s/endpoints/chat.servers; }
  server {
    listen 80;
    location / {
      proxy_pass http://chat;
      proxy_connect_timeout 2s;
      %(next)s
    }
  }
}
"""
NOBODY = "server 127.0.0.1:1 down;\n"


def unit() -> tuple[str, list[str]]:
    """Of the engine's unit: what the shell is to do before it starts, and its command."""
    before, command = [], []
    text = (EXAMPLES / "mic-swarm.service").read_text().replace("\\\n", "")
    for line in text.splitlines():
        key, _, value = line.partition("=")
        if key == "ExecStartPre":
            ignored = value.startswith("-")
            before.append(f"{value[1:]} || true" if ignored else value)
        elif key == "ExecStart":
            command = value.split()
    return "\n".join(before), command


def engine_services(files: Path, settings: dict[str, Any], needs: str) -> list[Service]:
    """containerd and the engine of examples/swarm, whose daemon.json has `settings` besides."""
    target = files / "etc" / "mic-swarm" / "daemon.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    given = json.loads((EXAMPLES / "daemon.json").read_text())
    target.write_text(json.dumps(given | settings))
    binds = {}
    for path in ("/var/lib/mic-swarm", "/var/lib/containerd", "/var/lib/docker"):
        disk = files / "disk" / Path(path).name
        disk.mkdir(parents=True, exist_ok=True)
        binds[path] = str(disk)
    before, command = unit()
    tree, env = str(fleet.engine()), {"PATH": TREE_BIN}
    containerd = Service("containerd", ["containerd"], env, tree=tree, binds=binds)
    return [containerd, Service("swarm", command, env, needs, before, tree, binds)]


@dataclass
class Task:
    """What Swarm says of one task of a service."""

    node: str
    desired: str
    state: str
    error: str


@dataclass
class Pool(GpuHosts):
    """`parent` is the control group of all that the engines run."""

    parent: str = field(default_factory=lambda: Path(tempfile.mkdtemp(prefix="mic-pool-")).name)

    def set_up(self) -> None:
        self.connect_all()
        make_key(self.home / "key")
        self.put("proxy/root/etc/nginx/nginx.conf", self.nginx_conf("proxy_next_upstream off;"))
        self.put("endpoints/chat.servers", NOBODY)
        self.start("proxy", ADDRESSES["proxy"], self.sshd("proxy"))
        image = holder.archive()
        for host in GPU_HOSTS:
            self.start_node(host)
        with ThreadPoolExecutor() as threads:
            list(threads.map(lambda host: self.fill_engine(host, image), GPU_HOSTS))
        self.form()

    def nginx_conf(self, following: str) -> str:
        """`following` says what happens to a request whose server does not answer."""
        return NGINX % {"home": self.home, "next": following}

    def hook(self) -> str:
        """examples/endpoints-to-proxy, and at the proxy examples/endpoints-gathered, with a test's
        paths, and an nginx that no systemd reloads.
        """
        gathered = CHECKOUT / "examples" / "endpoints-gathered"
        reload = self.put("reload-nginx", "#!/bin/sh\npkill -HUP -o -x nginx || true\n")
        reload.chmod(0o755)
        there = f"DIR={self.home}/endpoints RELOAD={reload} {gathered}"
        here = {"PROXY": f"root@{ADDRESSES['proxy']}", "KEY": str(self.home / "key")}
        here |= {"HOSTS": "/root/known_hosts", "GATHERED": there}
        text = (CHECKOUT / "examples" / "endpoints-to-proxy").read_text()
        lines = "".join(f'{name}="{value}"\n' for name, value in here.items())
        return text.replace("set -eu\n", f"set -eu\n{lines}")

    def start_node(self, host: str) -> None:
        daemon = self.prepare(host, hook=self.hook())
        files = self.home / host
        parent = {"cgroup-parent": f"/{self.parent}"}
        # As the unit's After=mic.service: a task is rejected where /run/mic is not there yet.
        engine = engine_services(files, parent, needs="/run/mic/mic.sock")
        self.start(host, ADDRESSES[host], *engine, daemon)

    def fill_engine(self, host: str, image: Path) -> None:
        self.await_engine(host)
        with image.open("rb") as given:
            subprocess.run(self.client(host, "load", "-q"), stdin=given, check=True, timeout=300)

    def await_engine(self, host: str) -> None:
        until(lambda: self.try_docker(host, "version"), f"the engine of {host}", timeout=120)

    def form(self) -> None:
        """One swarm of all, in which each is a manager."""
        first, *others = GPU_HOSTS
        self.docker(first, "swarm", "init", "--advertise-addr", ADDRESSES[first])
        token = self.docker(first, "swarm", "join-token", "-q", "manager").strip()
        for host in others:
            mine = ("--advertise-addr", ADDRESSES[host])
            self.docker(host, "swarm", "join", *mine, "--token", token, f"{ADDRESSES[first]}:2377")
        until(lambda: self.nodes() == dict.fromkeys(GPU_HOSTS, "Ready"), "three nodes", timeout=60)

    # --- engines --------------------------------------------------------------------------------

    def client(self, host: str, *words: str) -> list[str]:
        return [*self.inside(host, fleet.engine()), "docker", "-H", SOCKET, *words]

    def docker(self, host: str, *words: str, timeout: float = 60) -> str:
        return self.run(self.client(host, *words), timeout)

    def try_docker(self, host: str, *words: str, timeout: float = 20) -> str:
        """What it printed; nothing where it failed."""
        try:
            command = self.client(host, *words)
            done = subprocess.run(command, capture_output=True, text=True, timeout=timeout)
        except (subprocess.TimeoutExpired, KeyError):
            return ""
        return done.stdout if done.returncode == 0 else ""

    def nodes(self, asked: str = GPU_HOSTS[0]) -> dict[str, str]:
        said = self.try_docker(asked, "node", "ls", "--format", "{{.Hostname}} {{.Status}}")
        return dict(line.split() for line in said.splitlines())

    def tasks(self, service: str = "pool_chat", asked: str = GPU_HOSTS[0]) -> list[Task]:
        form = "{{.Node}}|{{.DesiredState}}|{{.CurrentState}}|{{.Error}}"
        said = self.try_docker(asked, "service", "ps", "--no-trunc", service, "--format", form)
        return [Task(*line.split("|")) for line in said.splitlines()]

    def deploy(self, host: str = GPU_HOSTS[0], *, model: str = "chat-1", **deploy: Any) -> None:
        """The stack file of examples/swarm, with another model and keys of `deploy`."""
        stack = yaml.safe_load((EXAMPLES / "stack.yaml").read_text())
        stack["services"]["chat"]["command"] = ["claim", model]
        stack["services"]["chat"]["deploy"] |= deploy
        path = self.put(f"{host}/stack.yaml", yaml.safe_dump(stack))
        self.docker(host, "stack", "deploy", "--detach=true", "-c", str(path), "pool")

    # --- what runs ------------------------------------------------------------------------------

    def await_running(self, count: int) -> None:
        """Swarm takes a task for running once its health check has passed."""
        until(
            lambda: sum(task.state.startswith("Running") for task in self.tasks()) == count,
            f"{count} tasks to run",
            timeout=120,
            period=0.5,
        )

    def await_proxy(self, count: int) -> None:
        """So many servers stand in what the hosts had the proxy write."""
        servers = self.home / "endpoints" / "chat.servers"
        until(lambda: servers.read_text().count("server 10.") == count, "the proxy", timeout=60)

    def await_update(self, state: str) -> None:
        words = ("service", "inspect", "pool_chat", "--format", "{{.UpdateStatus.State}}")
        until(
            lambda: self.try_docker(GPU_HOSTS[0], *words).strip() == state,
            f"the change to be {state}",
            timeout=180,
            period=0.2,
        )

    def balance(self) -> None:
        """Two claims on each host: the scheduler moves nothing by itself."""
        if Counter(name.partition("/")[0] for name in self.ready()) != dict.fromkeys(GPU_HOSTS, 2):
            self.docker(GPU_HOSTS[0], "service", "scale", "--detach", "pool_chat=0")
            until(lambda: not any(self.seen(host).models for host in GPU_HOSTS), "an end")
            self.docker(GPU_HOSTS[0], "service", "scale", "--detach", "pool_chat=6")
            self.await_ready(6)
            self.await_running(6)
            self.await_proxy(6)

    def engine(self, host: str) -> int:
        return self.service(host, "dockerd", "--config-file")

    def containers(self) -> list[str]:
        return sorted(
            f"{host} {name}"
            for host in GPU_HOSTS
            for name in self.docker(host, "ps", "-q", "--no-trunc").split()
        )

    def start_again(self, host: str) -> None:
        """With the disk that it had."""
        self.start(host, ADDRESSES[host])
        until(lambda: self.nodes().get(host) == "Ready", f"{host} to be back", timeout=120)

    def close(self) -> None:
        super().close()
        Path(tempfile.gettempdir(), self.parent).rmdir()
        until(self._forgotten, "the control groups to be empty")

    def _forgotten(self) -> bool:
        """Whether no control group of the engines is left; the kernel needs a moment."""
        root = Path("/sys/fs/cgroup")
        tops = [*root.glob(self.parent), *root.glob(f"*/{self.parent}")]
        for top in tops:
            for group in (*sorted(top.rglob("*/"), reverse=True), top):
                with suppress(OSError):
                    group.rmdir()
        return not any(top.exists() for top in tops)


@contextmanager
def world(home: Path) -> Iterator[Pool]:
    namespaces.require()
    made = Pool(home)
    try:
        made.set_up()
        yield made
    finally:
        made.close()


def timed(done: Callable[[], object]) -> float:
    """Seconds that it takes."""
    begun = time.monotonic()
    done()
    return time.monotonic() - begun
