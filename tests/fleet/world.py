"""Three hosts with GPUs that Ansible configures, a proxy and a controller."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.fleet import namespaces
from tests.fleet.controller import Controller
from tests.fleet.host import Service
from tests.fleet.namespaces import ADDRESSES, GPU_HOSTS, SERVER, Machines

EVERYTHING = [f"{host}/chat-5100000{gpu}" for host in GPU_HOSTS for gpu in (0, 1)]
NGINX = """\
events {}
http {
  access_log off;
  include /etc/nginx/mic-upstreams.conf;
  server {
    listen 80;
    location / {
      proxy_pass http://mic_chat;
      proxy_next_upstream off;  # nothing is tried a second time
    }
  }
}
"""


@dataclass
class Fleet(Controller, Machines):
    """All of it."""

    @property
    def prefix(self) -> list[str]:
        return self.within("controller")

    def set_up(self) -> None:
        self.connect_all()
        for host in GPU_HOSTS:
            server = self.home / host / "root" / "opt" / "chat" / "serve"
            server.parent.mkdir(parents=True)
            shutil.copy(SERVER, server)
            server.chmod(0o755)
        nobody = "upstream mic_chat { server 127.0.0.1:1 down; }\n"
        self.write("proxy/root/etc/nginx/mic-upstreams.conf", nobody)
        self.write("proxy/root/etc/nginx/nginx.conf", NGINX)
        daemon = Service("daemon", ["mic-supervisor", "run"], needs="/etc/mic/mic.env")
        for name, address in ADDRESSES.items():
            self.start(name, address, self.sshd(name), daemon)
        self.configure()

    # --- what runs ------------------------------------------------------------------------------

    def status(self, host: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.mic(host, "status", "--json").stdout)
        return found

    def history(self, host: str) -> list[float]:
        """When something happened to an instance there, seconds since the epoch."""
        events = json.loads(self.mic(host, "history", "--json").stdout)["events"]
        return [event["at"] for event in events if event["instance"]]

    def versions(self) -> dict[str, str]:
        """Which version of the model each instance answers with, as "gpu1/chat-51000000"."""
        return {
            f"{host}/{row['id']}": self.version(row["endpoints"].get("http", ""))
            for host in GPU_HOSTS
            for row in self.status(host)["instances"]
        }

    def upstream(self) -> list[str]:
        """Who serves, as the proxy has it written, in the same form."""
        path = "/etc/nginx/mic-upstreams.conf"
        text = self.run([*self.within("proxy", "-a"), "cat", path])
        return sorted(name.replace(".", "/") for name in re.findall(r"# (gpu\S+)", text))

    def serves(self, version: str) -> None:
        """Every instance answers with this version, and the proxy knows them all."""
        assert self.versions() == dict.fromkeys(EVERYTHING, version)
        assert self.upstream() == EVERYTHING

    def marks(self) -> dict[str, int]:
        """The process of each instance, by its PID on its host."""
        return {
            f"{host}/{row['id']}": row["pid"]
            for host in GPU_HOSTS
            for row in self.status(host)["instances"]
        }

    def file(self, host: str) -> str:
        return self.run([*self.within(host, "-a"), "cat", "/etc/mic/gpus.yaml"])

    def version(self, url: str) -> str:
        """Which version of the model answers there."""
        if not url:
            return ""
        command = [*self.within("controller"), "curl", "-s", "-m", "5", f"{url}/v1/models"]
        asked = subprocess.run(command, capture_output=True, text=True)
        return str(json.loads(asked.stdout)["data"][0]["id"]) if asked.returncode == 0 else ""


@contextmanager
def world(home: Path) -> Iterator[Fleet]:
    namespaces.require()
    made = Fleet(home)
    try:
        made.set_up()
        yield made
    finally:
        made.close()
