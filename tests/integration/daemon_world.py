"""The daemon at work: its file, what it says of itself, and what really runs."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import docker
from docker.errors import NotFound

from tests.integration.job_world import simulated
from tests.mock_nvml import MockNvml
from tests.support import scopes
from tests.support.mic import Daemon, Mic
from tests.support.ports import PortBlock
from tests.support.waiting import until

LABEL = "io.mic."

PROCESS = (
    '{backend: process, command: [/bin/sleep, "100000"], env: {HOLDS: "${gpu_uuids}"}, '
    "stop_timeout: 2s}"
)
CONTAINER = '{backend: container, image: "mic-test/busybox:1", command: [sleep, "100000"]}'


def process(*more: str) -> str:
    """A host process that does nothing, and is up at once; `more` are more keys."""
    return f"{PROCESS[:-1]}, {', '.join(more)}}}" if more else PROCESS


def container(*more: str) -> str:
    """A container that does nothing, and is up at once. It ends when it is told to: Docker's init
    is its first process.
    """
    return f"{CONTAINER[:-1]}, {', '.join(more)}}}" if more else CONTAINER


def identity(model: str, *indices: int) -> str:
    """The id of an instance on simulated GPUs, the first of which names it."""
    return f"{model}-{simulated(indices[0])[4:12]}"


def start_time(pid: int) -> int | None:
    """Ticks after the boot: with the PID it tells a process from every other."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[19])
    except (OSError, IndexError):
        return None


Mark = tuple[str, str, int, int | None]
"""One run of an instance: ref, when it was started, PID, the kernel's start time of it."""


class Run(NamedTuple):
    """What runs of an instance, and the UUIDs of the GPUs that it holds."""

    instance: str
    gpus: list[str]
    mark: Mark


def by_instance(runs: Iterable[Run]) -> dict[str, Mark]:
    """Two at once of one instance or for one GPU fail."""
    found: dict[str, Mark] = {}
    holders: dict[str, str] = {}
    for instance, gpus, mark in runs:
        assert instance not in found, f"{instance} runs twice: {found[instance]} and {mark}"
        for uuid in gpus:
            assert uuid not in holders, f"{uuid} has both {holders[uuid]} and {instance}"
            holders[uuid] = instance
        found[instance] = mark
    return found


@dataclass
class DaemonWorld:
    """A scope, its file, and a daemon for it that a test starts."""

    mic: Mic
    engine: docker.APIClient | None
    models: dict[str, str] = field(default_factory=dict)

    # --- the file -------------------------------------------------------------------------

    def text(self, gpus: dict[int | str, str]) -> str:
        lines = ["version: 1", "models:"]
        lines += [f"  {name}: {text}" for name, text in self.models.items()]
        lines += ["gpus:", *(f"  {json.dumps(key)}: {model}" for key, model in gpus.items())]
        return "\n".join(lines) + "\n"

    def write(self, gpus: dict[int | str, str], **models: str) -> None:
        """By a rename, as editors do; `models` are added to those of earlier calls."""
        self.models |= models
        self.mic.write(self.text(gpus))

    @property
    def drop_ins(self) -> Path:
        """The directory of drop-ins; a test makes it."""
        return self.mic.config.with_name("gpus.yaml.d")

    # --- what the daemon says ---------------------------------------------------------------

    def status(self) -> dict[str, Any]:
        found: dict[str, Any] = self.mic.ask("status")["result"]
        return found

    def rows(self) -> dict[str, dict[str, Any]]:
        return {row["id"]: row for row in self.status()["instances"]}

    def phases(self) -> dict[str, str]:
        return {name: row["phase"] for name, row in self.rows().items()}

    @property
    def generation(self) -> int:
        return int(self.status()["config"]["generation"])

    def converged(self, *names: str, timeout: float = 60.0) -> None:
        """Waits until the daemon has exactly these instances, all as desired."""

        def look() -> bool:
            rows = self.rows()
            return sorted(rows) == sorted(names) and all(
                row["phase"] in ("ready", "unprobed") and row["sync"] == "in_sync"
                for row in rows.values()
            )

        try:
            until(look, f"{sorted(names)} to be settled", timeout=timeout)
        except AssertionError as error:
            keys = ("id", "phase", "sync", "reason")
            shown = [tuple(row[key] for key in keys) for row in self.rows().values()]
            raise AssertionError(f"{error}\n{shown}\n{self.mic.daemons[-1].text()}") from None

    @property
    def readings(self) -> int:
        """How often the daemon has read its file since it started, or was told to."""
        found = self.mic.ask("history")["result"]
        return sum(event["kind"] == "config" for event in found)

    def read_again(self, before: int) -> None:
        until(lambda: self.readings > before, "the file to be read")

    def accepted(self, number: int) -> None:
        until(lambda: self.generation == number, f"generation {number}; it is {self.generation}")

    def rejected(self) -> str:
        """Waits until the daemon says that its file is broken, and returns its words."""
        until(lambda: not self.status()["config"]["last_reload_ok"], "the file to be rejected")
        return str(self.status()["config"]["error"])

    def history(self, *kinds: str) -> list[dict[str, Any]]:
        found = self.mic("history", "--json", rc=0).json()["events"]
        return [event for event in found if not kinds or event["kind"] in kinds]

    # --- what really runs -------------------------------------------------------------------

    def marks(self) -> dict[str, Mark]:
        """Every run, by instance. Two at once of one instance or for one GPU fail."""
        return by_instance(self.runs())

    def runs(self) -> list[Run]:
        """Everything that runs."""
        return [*self._containers(), *self._processes()]

    def _containers(self) -> Iterator[Run]:
        if self.engine is None:
            return
        for item in scopes.containers(self.engine, self.mic.scope):
            if item["State"] != "running":
                continue
            try:
                looked = self.engine.inspect_container(item["Id"])
            except NotFound:
                continue  # removed since it was listed
            state, labels = looked["State"], item["Labels"]
            if state["Running"]:
                yield Run(
                    labels[f"{LABEL}instance"],
                    labels[f"{LABEL}gpus"].split(","),
                    (item["Id"], state["StartedAt"], state["Pid"], start_time(state["Pid"])),
                )

    def _processes(self) -> Iterator[Run]:
        """By their environment, which no record can get wrong. A child of another is no run of its
        own.
        """
        found = {}
        for pid in scopes.processes(self.mic.scope):
            try:
                environ = Path(f"/proc/{pid}/environ").read_bytes().decode().split("\0")
                command = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
                parent = int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])
            except (OSError, IndexError):
                continue  # it has ended
            values = dict(line.split("=", 1) for line in environ if "=" in line)
            if command[0] == b"/bin/sleep":
                found[pid] = (parent, values)
        for pid, (parent, values) in found.items():
            born = start_time(pid)
            if parent not in found and born is not None:
                mark = (values.get("MIC_RUN_ID", ""), str(born), pid, born)
                yield Run(values["MIC_INSTANCE"], values["HOLDS"].split(","), mark)


@contextmanager
def daemon_world(
    home: Path, engine: docker.APIClient | None, *, gpus: int = 4, nvml: MockNvml | None = None
) -> Iterator[DaemonWorld]:
    """A scope of its own; what runs in it is removed at the end. Without an engine Docker is off.

    With `nvml`, its GPUs are this machine's; else there are `gpus` simulated ones.
    """
    scope, ports = scopes.new_scope(), PortBlock()
    mic = Mic(home / "mic", scope, ports, gpus)
    if engine is None:
        mic.env["MIC_DOCKER_HOST"] = "none"
    if nvml is not None:
        mic.env |= {"MIC_GPU_SOURCE": "nvml", **nvml.env()}
    try:
        yield DaemonWorld(mic, engine)
    finally:
        mic.close()
        scopes.end_processes(scope)
        if engine is not None:
            scopes.remove_containers(engine, scope)
        ports.close()


def lines(daemon: Daemon, pattern: str) -> list[str]:
    """The lines of its log in which the pattern is found."""
    return [line for line in daemon.text().splitlines() if re.search(pattern, line)]
