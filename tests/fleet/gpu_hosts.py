"""Hosts with four GPUs that their files hand over, each with a supervisor of its own.

The models are host processes, so that what a host runs can be told by its kernel alone.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.fleet.host import Service
from tests.fleet.namespaces import ADDRESSES, GPU_HOSTS, SERVER, Machines
from tests.fleet.watcher import Seen, look, network_of
from tests.support.waiting import until

GPUS = 4
GRACE = 20.0  # seconds; MIC_CLAIM_GRACE of these hosts
MODELS = """\
version: 1
hooks:
  on_endpoints_change: [/opt/chat/endpoints-to-proxy]
  settle: 1s
defaults:
  listen: {address}
  start_timeout: 60s
  stop_timeout: 10s
models:
  chat-1: {{backend: process, command: [/opt/chat/serve, --host, "{address}", --port, "${{port}}"],
           args: [--model, "1"], probe: {{http: /health, period: 1s}},
           env: {{OWNED: "${{gpu_uuids}}", INSTANCE: "${{instance}}"}}}}
  chat-2: {{backend: process, command: [/opt/chat/serve, --host, "{address}", --port, "${{port}}"],
           args: [--model, "2"], probe: {{http: /health, period: 1s}},
           env: {{OWNED: "${{gpu_uuids}}", INSTANCE: "${{instance}}"}}}}
  broken: {{backend: process, command: [/opt/chat/serve, --host, "{address}", --port, "${{port}}"],
           args: [--exit-unless, /nowhere], probe: {{http: /health, period: 1s}},
           env: {{OWNED: "${{gpu_uuids}}", INSTANCE: "${{instance}}"}}}}
gpus:
  "0-{last}": fleet
"""
SETTINGS = f"""\
MIC_GPU_SOURCE=simulated:{GPUS}
MIC_DOCKER_HOST=none
MIC_PROCESS_RUNTIME=subprocess
MIC_RESYNC=2s
MIC_CLAIM_GRACE={GRACE:.0f}s
"""


@dataclass
class GpuHosts(Machines):
    """`home` holds their files, too: what `put` writes before a host starts."""

    def put(self, path: str, text: str) -> Path:
        target = self.home / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)
        return target

    def prepare(self, host: str, hook: str = "#!/bin/sh\n") -> Service:
        """Its files, with a program for `on_endpoints_change`; the supervisor that is to run."""
        files, address = self.home / host, ADDRESSES[host]
        (files / "disk" / "mic").mkdir(parents=True)
        server = files / "root" / "opt" / "chat" / "serve"
        server.parent.mkdir(parents=True)
        shutil.copy(SERVER, server)
        for program in (server, self.put(f"{host}/root/opt/chat/endpoints-to-proxy", hook)):
            program.chmod(0o755)
        settings = f"{SETTINGS}MIC_STATE_DIR={files}/disk/mic\n"
        self.put(f"{host}/root/etc/mic/mic.env", settings)
        text = MODELS.format(address=address, last=GPUS - 1)
        self.put(f"{host}/root/etc/mic/gpus.yaml", text)
        return Service("daemon", ["mic-supervisor", "run"], needs="/etc/mic/mic.env")

    def status(self, host: str) -> dict[str, Any]:
        """The document of `status --json`, from the daemon's socket; empty where nobody answers."""
        if host not in self.machines:
            return {}
        path = f"/proc/{self.first(host)}/root/run/mic/mic.sock"
        request = {"version": 1, "method": "status", "params": {}}
        with socket.socket(socket.AF_UNIX) as connection, suppress(OSError):
            connection.settimeout(20)
            connection.connect(path)
            connection.sendall(json.dumps(request).encode() + b"\n")
            with connection.makefile() as stream:
                lines = stream.readlines()
            found: dict[str, Any] = json.loads(lines[-1]).get("result", {}) if lines else {}
            return found
        return {}

    def ready(self, *hosts: str) -> dict[str, int]:
        """The PID of each instance that is ready, as "gpu1/chat-1-51000000"."""
        return {
            f"{host}/{row['id']}": row["pid"]
            for host in hosts or GPU_HOSTS
            for row in self.status(host).get("instances", ())
            if row["phase"] == "ready"
        }

    def await_ready(
        self, count: int, *hosts: str, model: str = "chat-1", timeout: float = 120
    ) -> dict[str, int]:
        """So many on these hosts, all of them of this model."""

        def found() -> dict[str, int]:
            names = self.ready(*hosts)
            good = len(names) == count and all(f"/{model}-" in name for name in names)
            return names if good else {}

        return until(found, f"{count} of {model}", timeout=timeout, period=0.5)

    def seen(self, host: str) -> Seen:
        """The models and holders there, as the kernel lists them."""
        return look().get(network_of(self.first(host)), Seen())

    def all_claims_ready(self, host: str) -> bool:
        """False where nobody answers."""
        return {claim["state"] for claim in self.status(host).get("claims", ())} == {"ready"}

    def kill_supervisor(self, host: str) -> None:
        """Until another one runs."""
        pid = self.supervisor(host)
        os.kill(pid, signal.SIGKILL)
        until(lambda: self.supervisor(host) not in (0, pid), f"another supervisor of {host}")

    def supervisor(self, host: str) -> int:
        return self.service(host, "mic-supervisor", "run")

    def service(self, host: str, program: str, word: str) -> int:
        """The PID of a service of the host; 0: it does not run."""
        first = self.first(host)
        for child in Path(f"/proc/{first}/task/{first}/children").read_text().split():
            with suppress(OSError):
                words = Path(f"/proc/{child}/cmdline").read_text().split("\0")
                if word in words and any(one.endswith(program) for one in words):
                    return int(child)
        return 0

    @contextmanager
    def another(self, command: list[str]) -> Iterator[None]:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        try:
            yield
        finally:
            process.kill()
            process.wait()
