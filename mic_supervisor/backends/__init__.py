"""Backends translate a model of the file into a workload. They are pure.

Adding one is a file with a class that fits `Backend` and one line in registry.py, or an entry point
in the group `mic_supervisor.backends` that names such a class. Nothing outside a backend's file
names the backend.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import field
from pathlib import Path
from typing import Any, Protocol

from pydantic import BaseModel

from mic_supervisor.model import Gpu, Instance, LoadState, Placement, PlacementState
from mic_supervisor.records import dataclass


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


class Backend(Protocol):
    """A way to serve models.

    `Settings` validates `backends.<name>` of the file, `Options` a model with this backend; both
    are pydantic models that refuse unknown keys, Options a subclass of config.options.ModelOptions.
    """

    name: str
    Settings: type[BaseModel]
    Options: type[BaseModel]

    def compile(self, request: CompileRequest) -> Instance:
        """The instance that serves `request.model` on `request.gpus`.

        The same request gives an equal instance. Raises CompileError in words for the operator.
        """
        ...

    def placement_state(
        self, placement: Placement, status: int | None, body: str
    ) -> PlacementState:
        """What the answer to `placement.verify` means; `status` None: there was no answer."""
        ...

    def load_failure(self, answer: str, log: Sequence[str], model: str) -> str:
        """Why a load or unload failed, in one sentence without a full stop.

        `answer` is the body that the server gave, empty when it gave none; `log` holds the last
        lines of its log, oldest first; `model` is the placement's.
        """
        ...

    def is_drained(self, status: int, body: str) -> bool:
        """Whether the answer to the instance's `drain` call says that nothing is in flight."""
        ...


class BackendBase:
    """What most backends have in common: no model inside their server is loaded over HTTP."""

    def placement_state(
        self,
        placement: Placement,
        status: int | None,  # noqa: ARG002
        body: str,  # noqa: ARG002
    ) -> PlacementState:
        """Unknown: a backend that makes placements says itself how to read the answer."""
        return PlacementState(placement.model, LoadState.UNKNOWN, reason="its server loads none")

    def load_failure(self, answer: str, log: Sequence[str], model: str) -> str:  # noqa: ARG002
        """The server's own words; the last line of its log when it gave none."""
        last = next((line.strip() for line in reversed(log) if line.strip()), "")
        if words := error_text(answer):
            return words
        return f"no answer; the last line of its log is: {last}" if last else "no answer"

    def is_drained(self, status: int, body: str) -> bool:  # noqa: ARG002
        """Always: an instance without a `drain` call is never asked."""
        return True


def error_text(body: str) -> str:
    """What an answer says went wrong: its JSON member "error", or its text; one line, or empty."""
    try:
        document = json.loads(body)
    except ValueError:
        return " ".join(body.split())
    error = document.get("error") if isinstance(document, dict) else None
    return error.strip() if isinstance(error, str) else " ".join(body.split())
