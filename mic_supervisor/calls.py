"""What a running workload is asked: its probes, and the calls about the models inside it.

Part of the nouns in model.py, which is where everybody imports them from.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Literal

Pairs = tuple[tuple[str, str], ...]

# --- Probes -----------------------------------------------------------------------------------
#
# They are remembered, so that what runs by an earlier specification can be asked by it. `kind` says
# which check it was.

# A probe that a later version wrote, with something that this one does not know, is no probe: what
# it would ask is unknown.
_WHOLE = {"extra": "forbid"}


@dataclass(frozen=True, slots=True)
class HttpCheck:
    """GET `path` on the port called `port`; 2xx or 3xx passes.

    A port may be answered by a foreign process. `expect` names top-level members of the JSON answer
    and the values they must have; `listed` names lists in it by their path ("system.argv", or
    "data[].id" for that member of each item), and an item that each must hold.
    """

    path: str
    port: str = "http"
    expect: Pairs = ()
    listed: Pairs = ()
    kind: Literal["http"] = field(default="http", kw_only=True)
    __pydantic_config__ = _WHOLE


@dataclass(frozen=True, slots=True)
class TcpCheck:
    port: str = "http"
    kind: Literal["tcp"] = field(default="tcp", kw_only=True)
    __pydantic_config__ = _WHOLE


@dataclass(frozen=True, slots=True)
class ExecCheck:
    """A command, run on the host for a process and inside the container for a container."""

    command: tuple[str, ...]
    kind: Literal["exec"] = field(default="exec", kw_only=True)
    __pydantic_config__ = _WHOLE


@dataclass(frozen=True, slots=True)
class EngineCheck:
    """The health check that the image itself declares, as the engine reports it."""

    kind: Literal["engine"] = field(default="engine", kw_only=True)
    __pydantic_config__ = _WHOLE


Check = HttpCheck | TcpCheck | ExecCheck | EngineCheck


@dataclass(frozen=True, slots=True)
class Probe:
    check: Check
    period: float = 5.0  # seconds from the end of one try to the next
    timeout: float = 3.0  # seconds
    failures: int = 3  # in a row, until it counts
    __pydantic_config__ = _WHOLE

    def __post_init__(self) -> None:
        if min(self.period, self.timeout, self.failures) <= 0:
            raise ValueError(f"{self} would never be asked, or never count")


@dataclass(frozen=True, slots=True)
class Probes:
    """Startup gates the other two; liveness restarts; readiness only reports."""

    startup: Probe | None = None
    liveness: Probe | None = None
    readiness: Probe | None = None
    __pydantic_config__ = _WHOLE


# --- Placements: models inside a server -------------------------------------------------------


@dataclass(frozen=True, slots=True)
class HttpCall:
    """One call to a running server's port "http". A 2xx answer is success."""

    method: Literal["GET", "POST"]
    path: str
    body: str | None = None
    timeout: float = 10.0  # seconds


@dataclass(frozen=True, slots=True)
class Placement:
    """One model inside a server, on some of the server's GPUs. `digest` identifies the
    configuration to be loaded.
    """

    model: str
    gpus: tuple[str, ...]
    digest: str
    load: HttpCall = field(repr=False)
    unload: HttpCall = field(repr=False)
    verify: HttpCall = field(repr=False)  # its answer goes to the backend's `placement_state`
    summary: Pairs = ()  # what a person would call it: (("instances_per_gpu", "8"),)
    entry: str | None = None  # as the file calls it, where that is another name than the server's

    @property
    def called(self) -> str:
        """As people know it: by the file."""
        return self.entry or self.model


class LoadState(StrEnum):
    LOADED = "loaded"
    LOADING = "loading"
    ABSENT = "absent"
    FAILED = "failed"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class PlacementState:
    """What the server says of one model. `digest` is comparable with Placement's, None unknown."""

    model: str
    state: LoadState
    digest: str | None = None
    reason: str | None = None
    summary: Pairs = ()
