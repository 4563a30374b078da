"""claim: holds an instance of a model on GPUs that the file hands over, for a scheduler."""

from __future__ import annotations

import signal
import sys
import threading
import time
import uuid
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mic_supervisor.cli.common import Whole, completes
from mic_supervisor.cli.ready_file import ReadyFile, check, ready_file
from mic_supervisor.cli.session import daemon, daemon_socket
from mic_supervisor.config.names import composed, shown_id
from mic_supervisor.errors import DaemonGone, MicError, Unserviceable

if TYPE_CHECKING:
    from mic_supervisor.converge.events import Event
    from mic_supervisor.daemon.client import Client

_AGAIN = 1.0  # seconds between two tries to reach the daemon
_ASK_TIMEOUT = 10.0  # seconds for the daemon to answer a question


@click.command(name="claim")
@click.argument("model", required=False, shell_complete=completes("models"))
@click.option("--gpus", "size", type=Whole(1, 128), default=1, metavar="N", help="How many; 1.")
@click.option(
    "--ready-file",
    "path",
    type=click.Path(path_type=Path),
    help="A file that is there exactly while the instance is ready.",
)
@click.option("--holder", default="", metavar="TEXT", help="Shown as who holds the claim.")
@click.option(
    "--check", "only_check", is_flag=True, help="Exit with 0 if a claim is held and ready."
)
def command(model: str | None, size: int, path: Path | None, holder: str, only_check: bool) -> int:
    """Hold a claim: an instance of MODEL on GPUs that the file hands over with `fleet`.

    It waits its turn, tells when the instance is ready, and stays. SIGTERM and SIGINT release the
    claim: it ends when the instance was drained and stopped, and its GPUs are free again. While no
    daemon can be reached, it tries again every second; the instance runs on meanwhile.

    Exits with 0 when it was released, 1 when the instance failed or the claim was lost, and 78
    where trying again here cannot help: no such model, no GPUs of that number, another scope.

    --check is for health checks, and needs no daemon: it exits with 0 while the holder of the claim
    lives and its instance is ready, 1 otherwise.
    """
    if only_check:
        check(path, None if model is None else composed(model))
        return 0
    if model is None:
        raise click.UsageError("Missing argument 'MODEL'.")
    with ready_file(path, composed(model)) as ready:
        return Holder(composed(model), size, holder, ready).hold()


class Holder:
    """One claim, from the first try until nothing is left of it."""

    def __init__(self, model: str, size: int, holder: str, ready: ReadyFile) -> None:
        from sdnotify import SystemdNotifier

        self._model = model
        self._size = size
        self._holder = holder
        self._ready = ready
        self._notify = SystemdNotifier().notify
        self._token = uuid.uuid4().hex
        self._began = time.monotonic()
        self._instance: str | None = None  # the id of what it has
        self._gpus: list[dict[str, Any]] = []  # as the daemon's status names them
        self._said_gone = False
        self._stopping = threading.Event()
        self._over = threading.Event()

    def hold(self) -> int:
        """The exit status. Raises MicError where the claim cannot be served."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: self._stop())
        try:
            while True:
                if (client := self._reach()) is not None and self._asked(client):
                    return 0
                if self._stopping.is_set() and self._instance is None:
                    return 0  # it has nothing
                time.sleep(_AGAIN)
        finally:
            self._over.set()

    def _reach(self) -> Client | None:
        try:
            client = daemon()
        except DaemonGone:
            client = None
        if client is None and not self._said_gone:
            self._said_gone = True
            self._say(f"no daemon answers at {daemon_socket()}; trying again every second")
        return client

    def _asked(self, client: Client) -> bool:
        """Whether the claim is over; False: the daemon went away before that."""
        method = "release" if self._stopping.is_set() else "claim"
        try:
            client.call(method, self._params(), emit=self._heed)
        except DaemonGone:
            return False
        except MicError as error:
            if method == "release" and not isinstance(error, Unserviceable):
                return False  # it is still held
            if not self._stopping.is_set():
                raise
        return True

    def _params(self) -> Mapping[str, Any]:
        return {
            "model": self._model,
            "gpus": self._size,
            "token": self._token,
            "instance": self._instance,
            "holder": self._holder,
            "waited": time.monotonic() - self._began,
        }

    def _stop(self) -> None:
        """Ask for the end, on a connection beside the one that holds the claim."""
        if self._stopping.is_set():
            return
        self._stopping.set()
        self._notify("STOPPING=1")
        threading.Thread(target=self._release, name="mic-release", daemon=True).start()

    def _release(self) -> None:
        while not self._over.is_set():
            with suppress(
                MicError
            ):  # the connection that holds the claim ends as well, and says so
                if (client := daemon()) is not None:
                    client.call("release", self._params())
            self._over.wait(_AGAIN)

    def _heed(self, event: Event) -> None:
        """One word of the daemon."""
        self._said_gone = False
        if event.kind != "claim":
            return
        had, self._instance = self._instance, event.instance if event.gpus else None
        try:
            if event.phase == "ready":
                self._is_ready()
            else:
                self._ready.remove()
        except MicError as error:  # the claim is held all the same
            self._echo(f"error: {error.message}", err=True)
        if event.phase != "ready" and self._instance is not None and self._instance != had:
            self._look()
        numbers = [str(gpu["uuid"] if gpu["index"] is None else gpu["index"]) for gpu in self._gpus]
        where = f"GPU {','.join(numbers)}" if self._instance and numbers else "-"
        self._say(event.text, where)

    def _is_ready(self) -> None:
        row = self._look()
        document = {
            "model": self._model,
            "instance": self._instance,
            "gpus": self._gpus,
            "endpoints": row.get("endpoints", {}),
        }
        self._ready.write(document)
        self._notify("READY=1")

    def _look(self) -> dict[str, Any]:
        """What the daemon's status says of the instance; nothing where it cannot be asked."""
        row: dict[str, Any] = {}
        with suppress(MicError):
            if (client := daemon()) is not None:
                rows = client.call("status", timeout=_ASK_TIMEOUT)["instances"]
                row = next((one for one in rows if one["id"] == self._instance), row)
        self._gpus = row.get("gpus", [])
        return row

    def _say(self, text: str, where: str = "-") -> None:
        self._notify(f"STATUS={' '.join(text.split())}")
        name = shown_id(self._instance, self._model) if self._instance else self._model
        passed = time.monotonic() - self._began
        self._echo(f"{passed:6.1f} s  {where:<7}  {name}: {text}")

    def _echo(self, text: str, *, err: bool = False) -> None:
        try:
            click.echo(text, err=err)
        except OSError:  # who read it is gone, or its disk is full; the claim is still held
            setattr(sys, "stderr" if err else "stdout", None)
