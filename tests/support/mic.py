"""Runs the installed command as a person would, each test in a world of its own."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

from mic_supervisor import cli
from tests.support import waiting
from tests.support.ports import PortBlock

PROGRAM = Path(sys.executable).with_name("mic-supervisor")
_SHORTENED = """\
import importlib, sys
for name, value in {times!r}.items():
    module, _, constant = name.rpartition(".")
    found = importlib.import_module(module)
    assert isinstance(getattr(found, constant), float), name
    setattr(found, constant, value)
sys.argv[0] = {program!r}
from mic_supervisor.cli import main
main()
"""


@dataclass(frozen=True)
class Result:
    """`rc` as the shell shows it; the streams as text."""

    rc: int
    stdout: str
    stderr: str

    def json(self) -> Any:
        return json.loads(self.stdout)

    def __str__(self) -> str:
        return f"exit {self.rc}\n--- stdout\n{self.stdout}\n--- stderr\n{self.stderr}"


def here(
    *args: str | Path, env: Mapping[str, str], cwd: Path | None = None, stdin: str = ""
) -> Result:
    """Runs the command in this process, where it takes a tenth of the time.

    For tests of what a command reads and says. Streams are pipes of UTF-8; what lasts as long as
    its process is not undone: threads, handlers of signals, the driver's library.
    """
    arguments = [str(arg) for arg in args]
    out, err = (io.TextIOWrapper(io.BytesIO(), "utf-8", "backslashreplace") for _ in range(2))
    with (
        mock.patch.dict(os.environ, env, clear=True),
        mock.patch.object(sys, "argv", [str(PROGRAM), *arguments]),
        mock.patch.object(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin.encode()), "utf-8")),
        contextlib.chdir(cwd or Path.cwd()),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            rc = cli.run(arguments)
        except SystemExit as error:  # as click ends when a shell completes
            rc = int(error.code or 0)
    for stream in (out, err):
        stream.flush()
    said, complained = (stream.buffer.getvalue().decode() for stream in (out, err))
    return Result(rc, said, complained)


@dataclass
class Daemon:
    """A command that stays: `mic("run")` and its like. Both streams go to `log`."""

    process: subprocess.Popen[bytes]
    log: Path

    @property
    def pid(self) -> int:
        return self.process.pid

    def text(self) -> str:
        return self.log.read_text(errors="replace")

    def stop(self, sig: signal.Signals = signal.SIGTERM, timeout: float = 30.0) -> int:
        """Sends `sig` and returns the exit code; one that stays is killed, and fails the test."""
        if self.process.poll() is None:
            self.process.send_signal(sig)
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise AssertionError(
                f"still there {timeout:g} s after {sig.name}:\n{self.text()}"
            ) from None


@dataclass
class Mic:
    """The command with its settings in `env`, which a test may change before a call.

    Calling it runs `mic-supervisor ARGS`. Nothing of the caller's MIC_* settings shines through.
    `shortened` are times of the program itself that a test cannot wait for, as in
    {"mic_supervisor.plan.release.TIMEOUT": 3.0}; unit tests hold them to what they really are.
    `within` is a command that runs the program, as unshare(1) does.
    """

    home: Path
    scope: str
    ports: PortBlock
    gpus: int = 4
    env: dict[str, str] = field(default_factory=dict)
    daemons: list[Daemon] = field(default_factory=list)
    shortened: dict[str, float] = field(default_factory=dict)
    within: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        for directory in (self.state_dir, self.run_dir):
            directory.mkdir(parents=True)
        self.listen = f"127.0.0.1:{self.ports.take()}"
        settings = {
            "CONFIG": self.config,
            "LISTEN": self.listen,
            "SOCKET": self.socket,
            "STATE_DIR": self.state_dir,
            "RUN_DIR": self.run_dir,
            "GPU_SOURCE": f"simulated:{self.gpus}",
            "PROCESS_RUNTIME": "subprocess",
            "PORT_RANGE": self.ports.range,
            "SCOPE": self.scope,
        }
        self.env = {f"MIC_{name}": str(value) for name, value in settings.items()} | self.env
        if "DOCKER_HOST" in os.environ:
            self.env.setdefault("MIC_DOCKER_HOST", os.environ["DOCKER_HOST"])

    @property
    def config(self) -> Path:
        return self.home / "gpus.yaml"

    @property
    def state_dir(self) -> Path:
        return self.home / "state"

    @property
    def run_dir(self) -> Path:
        return self.home / "run"

    @property
    def socket(self) -> Path:
        return self.run_dir / "mic.sock"

    @property
    def url(self) -> str:
        return f"http://{self.listen}"

    def write(self, text: str) -> Path:
        """Replaces gpus.yaml, indentation removed, the way an editor does: by a rename."""
        fresh = self.config.with_suffix(".new")
        fresh.write_text(textwrap.dedent(text))
        return fresh.replace(self.config)

    def program(self) -> list[str]:
        """The first words of every command."""
        if not self.shortened:
            return [*self.within, str(PROGRAM)]
        code = _SHORTENED.format(times=self.shortened, program=str(PROGRAM))
        return [*self.within, sys.executable, "-c", code]

    def environment(self) -> dict[str, str]:
        inherited = {k: v for k, v in os.environ.items() if not k.startswith("MIC_")}
        return {**inherited, "NO_COLOR": "1", "COLUMNS": "200", **self.env}

    def __call__(
        self, *args: str | Path, timeout: float = 60.0, rc: int | None = None, stdin: str = ""
    ) -> Result:
        """Runs to the end. With `rc`, another exit code fails the test and shows both streams."""
        try:
            done = subprocess.run(
                [*self.program(), *args],
                env=self.environment(),
                cwd=self.home,
                input=stdin,
                capture_output=True,
                text=True,
                timeout=timeout,
            )
        except subprocess.TimeoutExpired as error:
            seen = b"".join(s for s in (error.stdout, error.stderr) if s).decode(errors="replace")
            raise AssertionError(f"{_line(args)}: no end in {timeout:g} s:\n{seen}") from None
        return _held_to(rc, args, Result(done.returncode, done.stdout, done.stderr))

    def here(self, *args: str | Path, rc: int | None = None, stdin: str = "") -> Result:
        """The same in this process; see `here`."""
        done = here(*args, env=self.environment(), cwd=self.home, stdin=stdin)
        return _held_to(rc, args, done)

    def start(self, *args: str | Path) -> Daemon:
        """Starts a command that stays; it is ended with the test."""
        log = self.home / f"daemon-{len(self.daemons)}.log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                [*self.program(), *args],
                env=self.environment(),
                cwd=self.home,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            )
        daemon = Daemon(process, log)
        self.daemons.append(daemon)
        return daemon

    def run(self, timeout: float = 60.0, *, http: bool = True) -> Daemon:
        """Starts the daemon and waits until it has looked at the machine and answers everywhere.

        Without `http` its socket is enough.
        """
        daemon = self.start("run")

        def alive() -> bool:
            if daemon.process.poll() is not None:
                raise AssertionError(f"exit {daemon.process.returncode}:\n{daemon.text()}")
            if "result" not in self.ask("status", timeout=timeout):
                return False
            return not http or waiting.http(f"{self.url}/healthz", timeout=2).status == 200

        waiting.until(alive, f"the daemon of {self.socket} and {self.url}", timeout=timeout)
        return daemon

    def ask(self, method: str, timeout: float = 10.0, **params: Any) -> dict[str, Any]:
        """The last line of the daemon's answer on its socket; empty when nobody answers."""
        request = {"version": 1, "method": method, "params": params}
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(timeout)
            try:
                connection.connect(str(self.socket))
                connection.sendall(json.dumps(request).encode() + b"\n")
                with connection.makefile() as stream:
                    lines = stream.readlines()
            except OSError:
                return {}
        found: dict[str, Any] = json.loads(lines[-1]) if lines else {}
        return found

    def status(self) -> dict[str, Any]:
        """The document of `status --json`. Where a daemon listens it is asked on its socket: a
        program that is started for each look of a test that waits takes most of a core.
        """
        asked = self.ask("status").get("result")
        found: dict[str, Any] = asked if asked is not None else self("status", "--json").json()
        return found

    def close(self) -> None:
        for daemon in self.daemons:
            if daemon.process.poll() is None:
                daemon.process.kill()
                daemon.process.wait()


def _held_to(rc: int | None, args: tuple[str | Path, ...], result: Result) -> Result:
    if rc is not None and result.rc != rc:
        raise AssertionError(f"{_line(args)}: wanted exit {rc}, got {result}")
    return result


def _line(args: tuple[str | Path, ...]) -> str:
    return " ".join(["mic-supervisor", *map(str, args)])
