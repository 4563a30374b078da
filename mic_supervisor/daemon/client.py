"""Talks to the daemon of a scope, if there is one."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from mic_supervisor import codec
from mic_supervisor.converge.events import Event
from mic_supervisor.errors import ConfigError, DaemonGone, MicError, Unserviceable

VERSION = 1
_CONNECT_TIMEOUT = 5.0  # seconds


class Client:
    """One request to the running daemon of a scope."""

    def __init__(self, connection: socket.socket, path: Path, scope: str) -> None:
        self._connection = connection
        self._path = path
        self._scope = scope

    @classmethod
    def connect(cls, path: Path, scope: str) -> Client | None:
        """None: no daemon runs. Raises MicError when one may run and cannot be talked to."""
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connection.settimeout(_CONNECT_TIMEOUT)
        try:
            connection.connect(str(path))
        except OSError as error:
            connection.close()
            if isinstance(error, FileNotFoundError | ConnectionRefusedError | NotADirectoryError):
                return None
            why, hint = error.strerror or "it does not answer", "see `systemctl status mic`"
            kind: type[MicError] = DaemonGone
            if isinstance(error, PermissionError):
                why, hint = "permission denied", "run as root, or add yourself to the group mic"
                kind = Unserviceable
            raise kind(f"cannot talk to the daemon at {path}: {why}", hint=hint) from error
        return cls(connection, path, scope)

    def close(self) -> None:
        """Ask nothing."""
        self._connection.close()

    def send(self, method: str) -> None:
        """Ask, and do not wait for the answer."""
        with self._connection:
            self._connection.sendall(self._request(method, {}).encode())

    def _request(self, method: str, params: Mapping[str, Any]) -> str:
        request = {"version": VERSION, "scope": self._scope, "method": method, "params": params}
        return json.dumps(request) + "\n"

    def call(
        self,
        method: str,
        params: Mapping[str, Any] | None = None,
        *,
        emit: Callable[[Event], None] = lambda _event: None,
        timeout: float | None = None,
    ) -> Any:
        """The method's result. Events on the way go to `emit`.

        `timeout` bounds the wait for each line, in seconds; None waits as long as the daemon lives.
        Raises ConfigError or MicError as the daemon says, MicError when it goes away.
        """
        self._connection.settimeout(timeout)
        try:
            with self._connection, self._connection.makefile("rw", encoding="utf-8") as stream:
                stream.write(self._request(method, dict(params or {})))
                stream.flush()
                for line in stream:
                    answer = codec.parse(line)
                    if "event" in answer:
                        with suppress(codec.BadDocument):  # of a kind that only a later one knows
                            emit(codec.decode(Event, answer["event"]))
                    elif "error" in answer:
                        raise _error(answer["error"])
                    else:
                        return answer["result"]
        except (OSError, ValueError) as error:
            raise DaemonGone(
                f"cannot follow the daemon at {self._path}: {error}",
                hint="see `systemctl status mic`",
            ) from error
        raise DaemonGone(
            "the daemon went away before it had finished",
            hint="it continues when it is back; see `systemctl status mic`",
        )


def _error(answer: Mapping[str, Any]) -> MicError:
    if "rendered" in answer:
        return ConfigError(answer["message"], outline=answer["rendered"], hint=answer["hint"])
    kind = Unserviceable if answer.get("final") else MicError
    return kind(answer["message"], hint=answer["hint"])
