"""Backends translate a model of the file into a workload. They are pure.

Adding one is a file with a class that fits `Backend` and one line in registry.py, or an entry point
in the group `mic_supervisor.backends` that names such a class, as docs/plugins.md explains. Nothing
outside a backend's file names the backend.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from pydantic import BaseModel

from mic_supervisor.config.options import ModelOptions
from mic_supervisor.model import Gpu, HttpCall, Instance, LoadState, Placement, PlacementState
from mic_supervisor.text import one_line, quoted


@dataclass(frozen=True, slots=True)
class CompileRequest:
    """One model of the file, to be run on these GPUs.

    `read_text` is the only way to the file system: it returns the text of an absolute path and
    raises OSError. `options` and `settings` are instances of the backend's Options and Settings.
    `variables` holds the values for `${env:NAME}`. `directory` is a path on this host that is the
    instance's alone, for what its server writes; nobody has made it yet.
    """

    model: str
    instance: str
    options: Any
    settings: Any
    gpus: tuple[Gpu, ...]
    read_text: Callable[[Path], str]
    variables: Mapping[str, str] = field(default_factory=dict, repr=False)
    directory: Path = Path("/var/lib/mic/instance_data/default/instance")


@dataclass(frozen=True, slots=True)
class Member:
    """One model of a server that has several GPUs. `gpus` are its own, of the server's."""

    model: str
    options: Any
    gpus: tuple[Gpu, ...]


@dataclass(frozen=True, slots=True)
class Recognised:
    """A command of a server that runs already, as a backend knows it.

    `entry` are the model's keys without `backend`; `settings` those below `backends:`.
    """

    backend: str
    name: str
    entry: dict[str, Any]
    settings: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


Ask = Callable[[HttpCall], tuple[int | None, str]]
"""Sends a call to the running server: (status, body); None: there was no answer."""


class Backend(Protocol):
    """A way to serve models, with a default for all but what only the backend itself knows.

    `Settings` validates `backends.<name>` of the file, `Options` a model with this backend; both
    are pydantic models that refuse unknown keys, Options a subclass of config.options.ModelOptions.
    """

    name: str
    Settings: type[BaseModel]
    Options: type[ModelOptions]

    def compile(self, request: CompileRequest) -> Instance:
        """The instance that serves `request.model` on `request.gpus`.

        The same request gives an equal instance. Raises CompileError in words for the operator.
        """
        raise NotImplementedError

    def placement_state(
        self,
        placement: Placement,
        status: int | None,  # noqa: ARG002
        body: str,  # noqa: ARG002
    ) -> PlacementState:
        """What the answer to `placement.verify` means; `status` None: there was no answer.

        Unknown: a backend that makes placements says itself how to read the answer.
        """
        return PlacementState(placement.model, LoadState.UNKNOWN, reason="its server loads none")

    def load_failure(self, answer: str, log: Sequence[str], model: str) -> str:  # noqa: ARG002
        """Why a load or unload failed, in one sentence without a full stop.

        `answer` is the body that the server gave, empty when it gave none; `log` holds the last
        lines of its log, oldest first; `model` is the placement's. By default the server's own
        words, and the last line of its log when it gave none.
        """
        last = next((line.strip() for line in reversed(log) if line.strip()), "")
        if words := error_text(answer):
            return quoted(words)
        return f"no answer; the last line of its log is: {quoted(last)}" if last else "no answer"

    def is_drained(self, status: int, body: str) -> bool:  # noqa: ARG002
        """Whether the answer to the instance's `drain` call says that nothing is in flight.

        By default always: an instance without a `drain` call is never asked.
        """
        return True

    # --- servers that entries of the file share; by default there are none ----------------------

    def server_of(self, settings: Any, model: str) -> str | None:  # noqa: ARG002
        """The id of the server in which all entries of `model` are served, perhaps with others.

        None: each entry is an instance of its own. An id ends in nothing that looks like the eight
        digits of a GPU, with which those end.
        """
        return None

    def reserved(self, settings: Any) -> tuple[str | int, ...]:  # noqa: ARG002
        """GPUs, as under `gpus:`, that such a server has whatever is on them now; else none."""
        return ()

    def conflicts(self, settings: Any, given: Iterable[str]) -> dict[str, str]:  # noqa: ARG002
        """Why keys that a model gives mean nothing in such a server, by key."""
        return {}

    def compile_placement(self, request: CompileRequest, member: Member) -> Placement:
        """One model of the server. `request` is of the server, and so are its `gpus`.

        Raises CompileError, which blocks this model alone.
        """
        why = f"{request.model} and {member.model} share no server"
        raise NotImplementedError(why)

    def compile_server(
        self, request: CompileRequest, members: Sequence[Member], placements: Sequence[Placement]
    ) -> Instance:
        """The server. `placements` lack those of `members` that could not be compiled."""
        why = f"{request.model} is no server of several models"
        raise NotImplementedError(why)

    def surplus(self, instance: Instance, ask: Ask) -> tuple[Placement, ...]:  # noqa: ARG002
        """What a running server has loaded for us, and `instance` does not name.

        Never what the server loads by itself, nor what somebody else had it load.
        """
        return ()


class BackendBase(Backend):
    """What a backend derives from."""

    example: tuple[str, str] = ("", "")
    """For a first gpus.yaml: YAML below `backends:` and below `models:`."""

    def meant_by(
        self,
        name: str,  # noqa: ARG002
        given: Collection[str | int],  # noqa: ARG002
    ) -> str | None:
        """A hint for a model that has `backend: NAME` and means this one, or an image or a program
        that this one can run; `given` are the model's keys. None: nobody would mean it."""
        return None

    def recognise(
        self,
        command: Sequence[str],  # noqa: ARG002
        directory: str,  # noqa: ARG002
        exists: Callable[[str], bool],  # noqa: ARG002
    ) -> Recognised | None:
        """What a model would be that runs as `command` does, with an absolute path at its head.

        `directory` is where it was started. None: it is no command of this backend.
        """
        return None


def error_text(body: str) -> str:
    """What an answer says went wrong: its JSON member "error", or its text; one line, or empty."""
    try:
        document = json.loads(body)
    except (ValueError, RecursionError):
        return one_line(body)
    error = document.get("error") if isinstance(document, dict) else None
    return error.strip() if isinstance(error, str) else one_line(body)
