"""What the daemon publishes after every round, and all that HTTP may look at."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mic_supervisor.converge.documents import status_document
from mic_supervisor.converge.events import Event
from mic_supervisor.converge.loop import Snapshot


@dataclass(frozen=True, slots=True)
class ConfigState:
    """Which configuration runs. `error` is the whole report on the file as it is now, or None.

    `generation` counts accepted configurations, over restarts. `hash` is "" while there is none.
    """

    path: str
    hash: str
    generation: int
    loaded_at: float | None
    last_reload_ok: bool
    error: str | None
    error_at: float | None
    models: Mapping[str, str] = field(default_factory=dict)  # name -> backend


@dataclass(frozen=True, slots=True)
class LoopState:
    """How the loop itself is. Durations in seconds, times since the epoch."""

    rounds: int = 0
    errors: int = 0
    last_duration: float | None = None
    last_success_at: float | None = None
    started_at: float = 0.0


@dataclass(frozen=True, slots=True)
class Published:
    """One consistent view. `snapshot` is None until the first round is done.

    `history` is the newest first.
    """

    host: str
    version: str
    config: ConfigState
    loop: LoopState
    snapshot: Snapshot | None = None
    history: tuple[Event, ...] = ()


def status_of(published: Published) -> dict[str, Any] | None:
    """The document of `status --json`; None until the first round is done."""
    config, snapshot = published.config, published.snapshot
    if snapshot is None:
        return None
    return status_document(
        host=published.host,
        config={
            "path": config.path,
            "hash": config.hash,
            "generation": config.generation,
            "loaded_at": config.loaded_at,
            "last_reload_ok": config.last_reload_ok,
            "error": config.error,
        },
        desired=snapshot.desired,
        observed=snapshot.observed,
        statuses=snapshot.statuses,
        warnings=snapshot.plan.warnings,
    )
