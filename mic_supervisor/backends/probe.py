"""From the keys `probe` and `warm_up` of a model to what its server is asked.

Backends have all of it from backends.common.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import replace

from mic_supervisor.config.options import CheckOptions, ModelOptions, RequestOptions
from mic_supervisor.model import (
    Check,
    EngineCheck,
    ExecCheck,
    HttpCall,
    HttpCheck,
    Port,
    Probe,
    Probes,
    Progress,
    TcpCheck,
    WarmUp,
)


def probes(options: ModelOptions, metrics: str = "http") -> Probes:
    """A single `probe:` is all three, and its progress only reports. `metrics` is the port that has
    the counters.

    Where a split one leaves `startup` out, the liveness or readiness check is the startup check
    too: otherwise a server that is slow to start would be restarted before it is up.
    """
    given = options.probe
    if given is None:
        return Probes()
    if isinstance(given, CheckOptions):
        probe = _probe(given, metrics)
        return Probes(_startup(probe), _without_progress(probe), probe)
    startup, liveness, readiness = (
        None if one is None else _probe(one, metrics)
        for one in (given.startup, given.liveness, given.readiness)
    )
    return Probes(_startup(startup or liveness or readiness), liveness, readiness)


def over(given: Probe | None, own: Probe | None) -> Probe | None:
    """The file's probe, or the backend's own; a progress alone stands beside the own check."""
    if given is None:
        return own
    if given.check is None and own is not None:
        return replace(own, progress=given.progress)
    return given


def _probe(options: CheckOptions, metrics: str) -> Probe:
    check: Check | None = None
    progress: Progress | None = None
    if options.http is not None:
        check = HttpCheck(options.http)
    elif options.exec is not None:
        check = ExecCheck(tuple(options.exec))
    elif options.tcp:
        check = TcpCheck()
    elif options.docker:
        check = EngineCheck()
    if (given := options.progress) is not None:
        request = _request(given.request, given.within)
        progress = Progress(given.metric, request, given.path, metrics, given.within)
    return Probe(check, options.period, options.timeout, options.failures, progress)


def _startup(probe: Probe | None) -> Probe | None:
    """Nothing has to move for it; of a progress alone it is that the counter's path answers."""
    if probe is None or probe.progress is None:
        return probe
    check = probe.check or HttpCheck(probe.progress.path, probe.progress.port)
    return replace(probe, check=check, progress=None)


def _without_progress(probe: Probe) -> Probe | None:
    return None if probe.check is None else replace(probe, progress=None)


def _request(options: RequestOptions, timeout: float) -> HttpCall:
    body = options.body
    if body is None:
        return HttpCall("GET", options.path, timeout=timeout)
    text = body if isinstance(body, str) else json.dumps(body, ensure_ascii=False)
    return HttpCall("POST", options.path, text, timeout)


def checks(options: ModelOptions) -> tuple[CheckOptions, ...]:
    """Every check that a model's `probe:` names."""
    given = options.probe
    if isinstance(given, CheckOptions):
        return (given,)
    split = (given.startup, given.liveness, given.readiness) if given is not None else ()
    return tuple(check for check in split if check is not None)


def metrics_port(ports: Iterable[Port]) -> str:
    """The port that counters are read from: its own one, where there is one."""
    return "metrics" if any(port.name == "metrics" for port in ports) else "http"


def warm_up(options: ModelOptions) -> WarmUp | None:
    given = options.warm_up
    if given is None:
        return None
    return WarmUp(_request(given, options.start_timeout), given.count)


# For the validators of Options; each raises ValueError.


def refuse_engine_probe(options: ModelOptions) -> None:
    if any(check.docker for check in checks(options)):
        raise ValueError("probe: docker: a host process has no image; use http, tcp or exec")


def refuse_unprobed_warm_up(options: ModelOptions) -> None:
    if options.warm_up is not None and options.probe is None:
        raise ValueError(
            "warm_up: nothing says when its server is up and can be asked; add a probe, as in "
            "`probe: {http: /health}`"
        )


def refuse_own_startup(options: ModelOptions, why: str) -> None:
    """For a backend whose startup probe is its own."""
    given = options.probe
    own = given.kinds if isinstance(given, CheckOptions) else given and given.startup
    if own:
        raise ValueError(f"probe: {why}; give probe.liveness or probe.readiness")
