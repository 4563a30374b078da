"""What gpus.yaml says, after loading: typed, with places, and not yet bound to any hardware."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from pathlib import Path

    from pydantic import BaseModel

    from mic_supervisor.config.hooks import Hooks


@dataclass(frozen=True, slots=True, order=True)
class Place:
    """Where something stands; line and column count from 1, and 0 is the whole file or line."""

    file: str
    line: int
    column: int

    def __str__(self) -> str:
        return ":".join(str(part) for part in (self.file, self.line, self.column) if part != 0)


@dataclass(frozen=True, slots=True)
class GpuKey:
    """One GPU as the file spells it.

    `value` is normalised: "3" for an index, "GPU-…" in lower case after the prefix for a UUID,
    "00000000:3b:00.0" (8-digit domain, lower case) for a PCI bus id.
    """

    kind: Literal["index", "uuid", "pci"]
    value: str

    def __str__(self) -> str:
        return f"GPU {self.value}" if self.kind == "index" else self.value


@dataclass(frozen=True, slots=True)
class GpuEntry:
    """One entry under `gpus:`. A range is already expanded to one entry per GPU.

    `model` None is `none`: kept empty. More than one key: one instance over all of them.
    """

    keys: tuple[GpuKey, ...]
    model: str | None
    place: Place


@dataclass(frozen=True, slots=True)
class ModelDefinition:
    """`fault` says why its backend cannot be used, where that was tolerated; `options` is None."""

    name: str
    backend: str
    options: BaseModel | None  # the backend's Options
    place: Place
    fault: str | None = None
    hint: str | None = None  # the way out of the fault


@dataclass(frozen=True, slots=True)
class Config:
    """A valid configuration. `hash` is of the merged document: comments and order do not enter it.

    `backends` holds the Settings of every backend that a model uses, defaults included.
    `variables` are the values of all `${env:NAME}` the document refers to.
    """

    path: Path
    files: tuple[Path, ...]  # path, then the drop-ins that were merged, in order
    hash: str
    entries: tuple[GpuEntry, ...]
    models: Mapping[str, ModelDefinition]
    backends: Mapping[str, BaseModel]
    variables: Mapping[str, str] = field(default_factory=dict, repr=False)
    hooks: Hooks | None = None
    servers: Mapping[str, str] = field(default_factory=dict)  # of models that share one, by name
    document: Mapping[str, Any] = field(default_factory=dict, repr=False)  # merged, plain data
    texts: tuple[str, ...] = field(default=(), repr=False)  # of `files`, each line end as "\n"
