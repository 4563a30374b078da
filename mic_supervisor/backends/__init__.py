"""Backends translate a model of the file into a workload. They are pure.

Adding one is a file with a class that fits `Backend` and one line in registry.py, or an entry point
in the group `mic_supervisor.backends` that names such a class. Nothing outside a backend's file
names the backend.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from pydantic import BaseModel

from mic_supervisor.model import Gpu, Instance, Placement, PlacementState


@dataclass(frozen=True, slots=True)
class CompileRequest:
    """One model of the file, to be run on these GPUs.

    `read_text` is the only way to the file system: it returns the text of an absolute path and
    raises OSError. `options` and `settings` are instances of the backend's Options and Settings.
    `variables` holds the values for `${env:NAME}`.
    """

    model: str
    instance: str
    options: Any
    settings: Any
    gpus: tuple[Gpu, ...]
    read_text: Callable[[Path], str]
    variables: Mapping[str, str] = field(default_factory=dict, repr=False)


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
