"""A machine of the demo's own: four simulated GPUs, its own scope, directories and ports."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from mic_supervisor.daemon.client import Client
from mic_supervisor.errors import MicError
from mic_supervisor.host.processes import with_environ

GPUS = 4
_BLOCK = 20  # ports, the last of them for the daemon
_FIRST, _LAST = 21000, 31999  # beside the default range, below the kernel's for connections
_STOP = 20.0  # seconds for the daemon, or a command, to end


class DemoFailed(MicError):
    """A step did not do what it should."""


class World:
    """Everything that the demo starts or writes, and how to get rid of it.

    Commands run as a person would run them: a process each, with MIC_* variables that point here.
    `close` ends every process of the scope and removes the directory; it is idempotent.
    """

    def __init__(self) -> None:
        first = _free_block()
        try:
            self.path = Path(tempfile.mkdtemp(prefix="mic-demo-"))
        except OSError as error:
            raise MicError(
                f"cannot make a directory for the demo: {error.strerror}",
                hint="point TMPDIR to a directory that you may write to",
            ) from error
        self.scope = f"demo-{os.getpid()}"
        self.listen = f"127.0.0.1:{first + _BLOCK - 1}"
        self.settings = {
            "MIC_CONFIG": str(self.config),
            "MIC_STATE_DIR": str(self.path / "state"),
            "MIC_RUN_DIR": str(self.path / "run"),
            "MIC_SOCKET": str(self.path / "run" / "mic.sock"),
            "MIC_LISTEN": self.listen,
            "MIC_PORT_RANGE": f"{first}-{first + _BLOCK - 2}",
            "MIC_SCOPE": self.scope,
            "MIC_GPU_SOURCE": f"simulated:{GPUS}",
            "MIC_PROCESS_RUNTIME": "subprocess",
            "MIC_DOCKER_HOST": "none",
            "MIC_HTTP_OPEN": "false",
            "MIC_ON_STOP": "keep",
            "MIC_PRUNE_ON_WATCH": "false",
            "MIC_WATCH": "apply",
            "MIC_RESYNC": "2s",
            "MIC_LOG_LEVEL": "info",
            "MIC_LOG_FORMAT": "text",
        }
        self._daemon: subprocess.Popen[bytes] | None = None
        self._write_serve()
        self._write_env()

    @property
    def config(self) -> Path:
        return self.path / "gpus.yaml"

    @property
    def env(self) -> Path:
        """Sourced by a shell, it makes `mic-supervisor` mean this world."""
        return self.path / "env"

    @property
    def url(self) -> str:
        """Where the daemon answers HTTP."""
        return f"http://{self.listen}"

    @property
    def daemon_log(self) -> Path:
        return self.path / "daemon.log"

    def _write_serve(self) -> None:
        program = shlex.join([sys.executable, str(Path(__file__).with_name("server.py"))])
        (self.path / "serve").write_text(
            "# usage: serve MODEL PORT [OPTION...]\n"
            "model=$1 port=$2\n"
            "shift 2\n"
            f'exec {program} --model "$model" --port "$port" "$@"\n'
        )

    def _write_env(self) -> None:
        lines = [f"export {name}={shlex.quote(value)}" for name, value in self.settings.items()]
        lines.append(f"PATH={shlex.quote(str(Path(sys.executable).parent))}:$PATH")
        self.env.write_text("\n".join(lines) + "\n")

    # --- the file -------------------------------------------------------------------------------

    def write(self, text: str) -> str:
        """Replace gpus.yaml the way an editor does; what it said before."""
        before = self.config.read_text() if self.config.exists() else ""
        fresh = self.path / ".gpus.yaml.new"
        fresh.write_text(text)
        fresh.replace(self.config)
        return before

    # --- commands -------------------------------------------------------------------------------

    def environment(self) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith("MIC_")}
        return {**kept, **self.settings}

    def mic(self, *arguments: str) -> int:
        """Run `mic-supervisor ARGUMENTS` on our own terminal or pipe; its exit status."""
        done: subprocess.CompletedProcess[bytes] = subprocess.run(
            _program(*arguments), env=self.environment(), stderr=subprocess.STDOUT, check=False
        )
        return done.returncode

    def read(self, *arguments: str) -> tuple[int, str]:
        """Run it and keep what it says: (exit status, both streams as text)."""
        done = subprocess.run(
            _program(*arguments),
            env=self.environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            check=False,
        )
        return done.returncode, done.stdout

    def status(self) -> dict[str, Any]:
        """The document of `status --json`; the daemon's own while it runs."""
        if self.daemon_runs:
            client = Client.connect(Path(self.settings["MIC_SOCKET"]), self.scope)
            if client is not None:
                document: dict[str, Any] = client.call("status", timeout=10.0)
                return document
        _, text = self.read("status", "--json")
        try:
            found: dict[str, Any] = json.loads(text)
        except ValueError as error:
            raise DemoFailed(f"cannot read the status: {text.strip()}") from error
        return found

    # --- the daemon -----------------------------------------------------------------------------

    @property
    def daemon_runs(self) -> bool:
        return self._daemon is not None and self._daemon.poll() is None

    @property
    def daemon_pid(self) -> int | None:
        return self._daemon.pid if self._daemon is not None else None

    def start_daemon(self) -> None:
        """Run `mic-supervisor run` beside us until it answers. Raises DemoFailed."""
        with self.daemon_log.open("ab") as log:
            # In a session of its own: Ctrl-C is for us, and we end it.
            self._daemon = subprocess.Popen(
                _program("run"),
                env=self.environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        if not self.wait_for(self._daemon_answers, 15.0):
            raise DemoFailed(f"the daemon does not answer:\n{self._said()}")

    def _said(self) -> str:
        """The end of the daemon's log."""
        return "\n".join(self.daemon_log.read_text().strip().splitlines()[-15:])

    def _daemon_answers(self) -> bool:
        if not self.daemon_runs:
            raise DemoFailed(f"the daemon ended:\n{self._said()}")
        client = Client.connect(Path(self.settings["MIC_SOCKET"]), self.scope)
        return client is not None and bool(client.call("ping", timeout=10.0))

    def kill_daemon(self) -> None:
        """As an accident would. Raises DemoFailed when there is none."""
        if self._daemon is None or not self.daemon_runs:
            raise DemoFailed("there is no daemon to kill")
        self._daemon.kill()
        self._daemon.wait()

    def stop_daemon(self) -> None:
        if self._daemon is None or self._daemon.poll() is not None:
            return
        self._daemon.terminate()
        try:
            self._daemon.wait(_STOP)
        except subprocess.TimeoutExpired:
            self._daemon.kill()
            self._daemon.wait()

    def wait_for(self, condition: Callable[[], bool], timeout: float) -> bool:
        """Whether `condition` came true within `timeout` seconds."""
        deadline = time.monotonic() + timeout
        while not condition():
            if time.monotonic() >= deadline:
                return False
            time.sleep(0.1)
        return True

    # --- the end --------------------------------------------------------------------------------

    def processes(self) -> list[int]:
        """PIDs of everything that runs for this scope: keepers and models."""
        return sorted(set(with_environ("MIC_SCOPE", [self.scope])) - {os.getpid()})

    def close(self) -> None:
        """End everything and remove everything. Raises MicError, and keeps the files, when a
        process stays: they say what it is.
        """
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)  # a second Ctrl-C would leave processes behind
        self.stop_daemon()
        _end_children()
        text = ""
        if self.path.exists() and self.processes():
            _, text = self.read("down", "--yes")
        left = self.processes()
        if left:
            raise MicError(
                f"cannot end {len(left)} processes of the demo: {text.strip() or left}",
                hint=f"try again with: . {self.env} && mic-supervisor down --yes",
            )
        shutil.rmtree(self.path, ignore_errors=True)


def _end_children() -> None:
    """End what a signal left behind: nobody waits for a command that was being started then."""
    commands = psutil.Process().children()
    for command in commands:
        with suppress(psutil.NoSuchProcess):
            command.terminate()
    psutil.wait_procs(commands, timeout=_STOP)


def _program(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "mic_supervisor.cli", *arguments]


def _free_block() -> int:
    """The first of _BLOCK ports in a row that nobody listens on now."""
    blocks = range(_FIRST, _LAST - _BLOCK, _BLOCK)
    turn = os.getpid() % len(blocks)  # two demos at the same time begin at different places
    order: list[int] = [*blocks[turn:], *blocks[:turn]]
    for first in order:
        if all(_is_free(port) for port in range(first, first + _BLOCK)):
            return first
    raise MicError(
        f"cannot find {_BLOCK} free ports in a row from {_FIRST} to {_LAST}",
        hint="end what listens there: ss -ltn",
    )


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        # What closed a moment ago still waits; a server would get its port all the same.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True
