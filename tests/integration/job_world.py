"""The main job on a real engine: a file, the command, and the containers that come of it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import docker

from tests.mock_nvml import MockNvml
from tests.support import scopes
from tests.support.mic import Mic
from tests.support.ports import PortBlock
from tests.support.triton import TritonRepository

LABEL = "io.mic."

# Starts in a tenth of a second, serves /health, ends at once when it is told to.
WEB = (
    "{backend: container, image: mic-test/busybox:1, command: [sh, -c, "
    "'mkdir -p /w; echo ok > /w/health; exec httpd -f -p ${port} -h /w'], probe: {http: /health}}"
)


def simulated(index: int) -> str:
    """The UUID of a simulated GPU."""
    return f"GPU-{0x51000000 + index:08x}-0000-4000-8000-{index:012x}"


def web(*more: str) -> str:
    """The model WEB with more keys: web("port: 8123", "env: {A: b}")."""
    return f"{WEB[:-1]}, {', '.join(more)}}}" if more else WEB


def gated(gate: Path, *more: str) -> str:
    """WEB that serves nothing until `go` is in the directory `gate`."""
    waits = "while ! test -e /gate/go; do sleep 0.05; done; mkdir -p /w"
    mount = f"mounts: [{{source: {gate}, target: /gate}}]"
    return web(mount, *more).replace("mkdir -p /w", waits)


def server(*more: str, **env: object) -> str:
    """A model of mic-test/server:1; `env` are the keys of mic_supervisor/demo/server.py."""
    variables = {"HOST": "0.0.0.0", **env}
    keys = [
        "backend: container",
        "image: mic-test/server:1",
        'command: [model-server, --port, "${port}"]',
        f"env: {json.dumps({key: str(value) for key, value in variables.items()})}",
        *more,
    ]
    if not any(key.startswith("probe:") for key in more):
        keys.append("probe: {http: /health, period: 200ms}")
    return f"{{{', '.join(keys)}}}"


class Run(NamedTuple):
    """One run of a container: another one has another value in at least one of the three."""

    id: str
    started_at: str
    pid: int


@dataclass
class World:
    """One scope of the machine, its file and what runs in it."""

    mic: Mic
    engine: docker.APIClient
    repository: TritonRepository
    settings: str = ""
    models: dict[str, str] = field(default_factory=dict)
    nvml: MockNvml | None = None

    def write(self, gpus: dict[int | str, str], **models: str) -> None:
        """gpus.yaml with these entries; `models` are added to those of earlier calls."""
        self.models |= models
        self.mic.write(self.text(gpus))

    def text(self, gpus: dict[int | str, str]) -> str:
        lines = ["version: 1", self.settings, "models:"]
        lines += [f"  {name}: {text}" for name, text in self.models.items()]
        lines += ["gpus:", *(f"  {json.dumps(key)}: {model}" for key, model in gpus.items())]
        return "\n".join(lines) + "\n"

    def apply(self, *args: str, rc: int | None = 0, timeout: float = 180) -> str:
        """The last lines of apply: the outcome of each instance, without the progress."""
        return outcome(self.mic("apply", *args, rc=rc, timeout=timeout).stdout)

    def plan(self, *args: str, rc: int | None = 0) -> str:
        """Without the names of what it removes: whether an instance has a predecessor to be removed
        depends on the tests before.
        """
        return "".join(
            line
            for line in self.mic("plan", *args, rc=rc).stdout.splitlines(keepends=True)
            if not line.startswith("    removes ")
        )

    def plan_json(self) -> Any:
        return self.mic("plan", "--json", rc=0).json()

    def status(self, *args: str, rc: int | None = None) -> Any:
        return self.mic("status", "--json", *args, rc=rc).json()

    def instances(self) -> dict[str, dict[str, Any]]:
        """`status --json`, by instance."""
        return {row["id"]: row for row in self.mic.status()["instances"]}

    def unchanged(self) -> None:
        """Fails unless plan finds nothing to do."""
        done = self.mic("plan", "--detailed-exitcode")
        assert (done.rc, done.stdout) == (0, "No changes.\n"), done

    def gate(self) -> Path:
        """A closed gate, for `gated`; `(gate / "go").touch()` opens it."""
        path = self.mic.home / "gate"
        path.mkdir(exist_ok=True)
        (path / "go").unlink(missing_ok=True)
        return path

    def containers(self) -> list[dict[str, Any]]:
        return scopes.containers(self.engine, self.mic.scope)

    def all(self, instance: str) -> list[dict[str, Any]]:
        """Every container of an instance as inspected, the newest first."""
        found = [c["Id"] for c in self.containers() if c["Labels"][f"{LABEL}instance"] == instance]
        looked = [self.engine.inspect_container(ref) for ref in found]
        return sorted(looked, key=lambda c: str(c["Created"]), reverse=True)

    def one(self, instance: str) -> dict[str, Any]:
        """The container of an instance that runs."""
        (running,) = [c for c in self.all(instance) if c["State"]["Running"]]
        return running

    def run_of(self, instance: str) -> Run:
        found = self.one(instance)
        return Run(found["Id"], found["State"]["StartedAt"], found["State"]["Pid"])

    def runs(self) -> dict[str, Run]:
        """Everything that runs, by instance. Two running ones of one instance fail."""
        found: dict[str, Run] = {}
        for container in self.containers():
            if container["State"] != "running":
                continue
            instance = container["Labels"][f"{LABEL}instance"]
            assert instance not in found, f"{instance} runs twice"
            found[instance] = self.run_of(instance)
        return found

    def url(self, instance: str) -> str:
        ports = json.loads(self.one(instance)["Config"]["Labels"][f"{LABEL}ports"])
        return f"http://127.0.0.1:{ports['http']}"

    def memory(self, instance: str) -> dict[str, Any]:
        path = self.mic.state_dir / self.mic.scope / "memory.json"
        found: dict[str, Any] = json.loads(path.read_text())["instances"][instance]
        return found


@contextmanager
def world(
    home: Path, engine: docker.APIClient, *, gpus: int = 4, nvml: MockNvml | None = None
) -> Iterator[World]:
    """A world of its own; what runs in its scope is removed at the end.

    With `nvml`, its GPUs are this machine's; else there are `gpus` simulated ones.
    """
    scope, ports = scopes.new_scope(), PortBlock()
    mic = Mic(home / "mic", scope, ports, gpus)
    repository = TritonRepository(home / "model_repository")
    repository.path.mkdir()
    made = World(mic, engine, repository)
    made.settings = (
        "backends: {triton: {image: mic-test/triton:1, shm_size: 256m, exit_timeout: 2s, "
        f"model_repository: {repository.path}}}}}"
    )
    if nvml is not None:
        mic.env |= {"MIC_GPU_SOURCE": "nvml", **nvml.env()}
    try:
        yield made
    finally:
        mic.close()
        scopes.end_processes(scope)
        scopes.remove_containers(engine, scope)
        ports.close()


def outcome(text: str) -> str:
    """What apply prints when it has ended, without addresses' numbers and times of day."""
    lines = [line for line in text.splitlines() if not re.match(r" *\d+\.\d s  ", line)]
    return masked("\n".join(lines) + "\n")


def progress(text: str) -> list[str]:
    """What apply prints while it works: "MAM-51000000: ready", without the times."""
    found = re.findall(r"^ *\d+\.\d s  GPU [\d,]+ +(.*)$", text, re.MULTILINE)
    return [masked(line) for line in found]


def masked(text: str) -> str:
    """Without what differs from run to run."""
    text = re.sub(r"(127\.0\.0\.1|port):? ?\d{5}\b", r"\1:PORT", text)
    text = re.sub(r"\b\d\d:\d\d:\d\d\b", "HH:MM:SS", text)
    text = re.sub(r"\bPID \d+", "PID N", text)
    text = re.sub(r"\b(mic-)test-\d+-[0-9a-f]{6}-", r"\1SCOPE-", text)
    return re.sub(r"(mic-SCOPE-\S+)-[0-9a-f]{8}\b", r"\1-HASH", text)


def lines_of(text: str, *starts: str) -> list[str]:
    """The lines that begin with one of these."""
    return [line for line in text.splitlines() if line.startswith(starts)]
