"""The keys of `defaults:`: what holds for a model that does not say otherwise."""

from __future__ import annotations

from typing import Literal

from mic_supervisor.config.options import RolloutOptions, Strict
from mic_supervisor.config.types import Duration, ListenAddress, PositiveDuration, SignalName, Size


class Defaults(Strict):
    """Only keys that mean the same for every backend; one that a backend has no use for is passed
    over for its models. A model's own key wins, and a default of the file wins over a backend's."""

    start_timeout: PositiveDuration | None = None
    stop_timeout: Duration | None = None
    drain_timeout: Duration | None = None
    stop_signal: SignalName | None = None
    on_foreign: Literal["block", "wait", "ignore"] | None = None
    foreign_threshold: Size | None = None
    listen: ListenAddress | None = None
    network: Literal["bridge", "host"] | None = None
    rollout: RolloutOptions | None = None
