"""Real host processes for the tests of the subprocess runtime: short to write, safe to end."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from mic_supervisor.host import processes as procfs
from mic_supervisor.model import Identity, Launch, Limits, ObservedWorkload, Pairs, ProcessSpec
from mic_supervisor.runtimes.keeper.runtime import KeeperRuntime
from tests.support import scopes
from tests.support.commands import STUBBORN, python, sh
from tests.support.waiting import until

__all__ = ["HOST", "STUBBORN", "World", "python", "runs", "sh"]

HOST = "0123456789abcdef"


class World:
    """A runtime in a directory of its own, with a scope of its own."""

    def __init__(self, tmp_path: Path, scope: str) -> None:
        self.scope = scope
        self.directory = tmp_path / "processes"
        self.logs = tmp_path / "logs"
        self.runtime = self.make()

    def make(self, **options: Any) -> KeeperRuntime:
        """Another one on the same directory, as after a restart of the supervisor."""
        options.setdefault("enclosing_service", lambda: None)
        options.setdefault("kill_timeout", 5.0)
        options.setdefault("remains_grace", 0.3)
        options = {"directory": self.directory, "log_directory": self.logs, **options}
        return KeeperRuntime(self.scope, HOST, **options)

    def launch(
        self,
        name: str,
        command: tuple[str, ...],
        *,
        env: Pairs = (),
        limits: Limits = Limits(),  # noqa: B008 - frozen
        **spec: Any,
    ) -> Launch:
        identity = Identity(
            scope=self.scope,
            host=HOST,
            instance=name,
            model="MAM",
            backend="process",
            gpus=("GPU-1", "GPU-2"),
            ports={"http": 20000},
            spec={"command": list(command), "nested": {"a": [1, None]}},
            spec_hash="0badcafe",
        )
        process = ProcessSpec(command, env=env, limits=limits, **spec)
        return Launch(name, "subprocess", identity, process)

    def start(self, name: str, command: tuple[str, ...], **spec: Any) -> ObservedWorkload:
        self.runtime.start(self.launch(name, command, **spec))
        return self.look(name)

    def look(self, name: str) -> ObservedWorkload:
        found = {one.name: one for one in self.runtime.observe().workloads}
        assert name in found, f"{name} is not among {sorted(found)}"
        return found[name]

    def names(self) -> list[str]:
        return [one.name for one in self.runtime.observe().workloads]

    def record(self, name: str) -> dict[str, Any]:
        import json

        document: dict[str, Any] = json.loads((self.directory / name / "record.json").read_text())
        return document

    def await_state(self, name: str, state: str, timeout: float = 60.0) -> ObservedWorkload:
        until(lambda: self.look(name).state == state, f"{name} to be {state}", timeout=timeout)
        return self.look(name)

    def alive(self) -> list[int]:
        """Everything of this scope that runs, keepers not included."""
        return [
            pid
            for pid in scopes.processes(self.scope)
            if (one := procfs.stat(pid)) is not None and one.running
        ]

    def await_lines(self, name: str, count: int) -> list[str]:
        log = self.log(name)
        until(lambda: log.read_text().count("\n") >= count, f"{count} lines of {name}")
        return log.read_text().splitlines()

    def log(self, name: str) -> Path:
        return self.logs / name / str(self.record(name)["run_id"]) / "log"

    def kill_keeper(self, name: str) -> int:
        pid = int(self.record(name)["keeper"]["pid"])
        os.kill(pid, 9)
        until(lambda: not runs(pid), "the keeper to be gone")
        return pid


def runs(pid: int) -> bool:
    found = procfs.stat(pid)
    return found is not None and found.running
