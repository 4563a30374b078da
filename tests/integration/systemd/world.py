"""What the tests inside of the machine share: units of a scope of their own, short to write."""

from __future__ import annotations

import os
import subprocess
import uuid
from pathlib import Path
from typing import Any

from mic_supervisor.model import Identity, Launch, ObservedWorkload, Pairs, ProcessSpec, RunState
from mic_supervisor.runtimes.systemd.runtime import SystemdRuntime
from tests.support.waiting import until

HOST = "0123456789ab"


def run(*argv: str, rc: int | None = 0) -> str:
    """A command's standard output."""
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60)
    if rc is not None and done.returncode != rc:
        raise AssertionError(f"{argv}: exit {done.returncode}: {done.stderr or done.stdout}")
    return done.stdout


class World:
    """A runtime with a scope and a directory of its own."""

    def __init__(self, directory: Path) -> None:
        self.scope = f"t{uuid.uuid4().hex[:8]}"
        self.directory = directory
        self._runtimes: list[SystemdRuntime] = []
        self.runtime = self.make()

    def make(self, **options: Any) -> SystemdRuntime:
        """Another one of the same scope, as after a restart of the supervisor."""
        options.setdefault("kill_timeout", 10.0)
        options.setdefault("directory", self.directory)
        runtime = SystemdRuntime(self.scope, options.pop("host", HOST), **options)
        self._runtimes.append(runtime)
        return runtime

    def close(self) -> None:
        for runtime in self._runtimes:
            runtime.close()
        units = self.loaded()
        if units:
            for argv in (
                ("systemctl", "kill", "--signal=KILL", *units),
                ("systemctl", "stop", *units),
                ("systemctl", "reset-failed", *units),
            ):
                run(*argv, rc=None)

    def loaded(self) -> list[str]:
        """Units of this scope that systemd has, in whatever state."""
        listed = run("systemctl", "list-units", "--all", "--plain", "--no-legend", self.pattern)
        return [line.split()[0] for line in listed.splitlines()]

    @property
    def pattern(self) -> str:
        return f"mic-{self.scope}-*"

    # --- making ---------------------------------------------------------------------------

    def name(self, instance: str) -> str:
        return f"mic-{self.scope}-{instance}-0badcafe"

    def launch(
        self, instance: str, command: tuple[str, ...], *, env: Pairs = (), **spec: Any
    ) -> Launch:
        identity = Identity(
            scope=self.scope,
            host=HOST,
            instance=instance,
            model="MAM",
            backend="process",
            gpus=("GPU-1", "GPU-2"),
            ports={"http": 20000},
            spec={"command": list(command), "nested": {"a": [1, None, "$X %n \\ \" ' \n é"]}},
            spec_hash="0badcafe0badcafe",
            schema=1,
            origin="file",
        )
        name = spec.pop("name", self.name(instance))
        return Launch(name, "systemd", identity, ProcessSpec(command, env=env, **spec))

    def start(self, instance: str, command: tuple[str, ...], **spec: Any) -> ObservedWorkload:
        launch = self.launch(instance, command, **spec)
        self.runtime.start(launch)
        return self.look(instance)

    # --- looking --------------------------------------------------------------------------

    def look(self, instance: str, runtime: SystemdRuntime | None = None) -> ObservedWorkload:
        view = (runtime or self.runtime).observe()
        assert view.error is None, view.error
        found = {one.identity.instance: one for one in view.workloads}
        assert instance in found, f"{instance} is not among {sorted(found)}"
        return found[instance]

    def await_state(self, instance: str, state: RunState) -> ObservedWorkload:
        def there() -> ObservedWorkload | None:
            found = self.look(instance)
            return found if found.state is state else None

        found = until(there, f"{instance} to be {state}")
        assert found is not None
        return found

    def ended(self, instance: str) -> ObservedWorkload:
        return self.await_state(instance, RunState.EXITED)

    def alive(self) -> list[int]:
        """Every process that was started with this scope in its environment."""
        wanted = f"MIC_SCOPE={self.scope}".encode()
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and int(entry.name) != os.getpid():
                try:
                    environment = (entry / "environ").read_bytes().split(b"\0")
                except OSError:
                    continue
                if wanted in environment:
                    found.append(int(entry.name))
        return sorted(found)

    def await_alive(self, count: int) -> list[int]:
        until(lambda: len(self.alive()) == count, f"{count} processes of {self.scope}")
        return self.alive()

    def lines(self, instance: str) -> list[str]:
        return [*self.runtime.logs(self.look(instance))]

    def await_line(self, instance: str, text: str) -> None:
        until(lambda: text in self.lines(instance), f"{instance} to say {text}")

    def environment_files(self) -> list[Path]:
        return [path for path in self.directory.rglob("*") if path.is_file()]
