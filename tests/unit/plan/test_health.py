"""The phases that an instance is in, and how a workload ended."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mic_supervisor.model import (
    Health,
    HttpCall,
    LoadState,
    ProbeResult,
    Probes,
    RunState,
    WarmUp,
)
from mic_supervisor.plan.assess import Assessment, assess
from mic_supervisor.plan.health import (
    Phase,
    describe_exit,
    phase_of,
)
from mic_supervisor.plan.memory import InstanceMemory, Memory
from tests.unit.plan.builders import (
    CONTEXT,
    MAM,
    NEW,
    assessment,
    desired,
    failing,
    loaded,
    observed,
    passed,
    placement,
    workload,
)

GOOD = workload(MAM)
EXITED = replace(GOOD, state=RunState.EXITED, exit_code=1)


SERVER = replace(MAM, placements=(placement("MAM", 0),))


def phase(item: Assessment, **values: object) -> tuple[str, str | None]:
    found, reason = phase_of(item, **values)  # type: ignore[arg-type]
    return found.value, reason


@pytest.mark.parametrize(
    ("item", "expected"),
    [
        (assessment(MAM), ("pending", None)),
        (assessment(NEW, GOOD), ("pending", "another specification runs")),
        (assessment(MAM, GOOD, health=Health()), ("starting", None)),
        (
            assessment(MAM, GOOD, health=failing("startup")),
            ("starting", "GET /health answers 503"),
        ),
        (assessment(MAM, GOOD, health=passed()), ("ready", None)),
        (
            assessment(MAM, GOOD, health=failing("readiness")),
            ("degraded", "GET /health answers 503"),
        ),
        (
            assessment(MAM, GOOD, health=failing("liveness", ok=None)),
            ("degraded", "health unknown: GET /health answers 503"),
        ),
        (
            assessment(MAM, GOOD, health=Health(startup=ProbeResult(True, "", 0.0))),
            ("starting", "not probed yet"),
        ),
        (
            assessment(replace(MAM, probes=Probes()), GOOD, health=Health()),
            ("unprobed", "it has no probe: nothing can say whether it is healthy"),
        ),
        (
            assessment(MAM, replace(GOOD, state=RunState.PAUSED)),
            ("degraded", "it was paused by hand"),
        ),
        (assessment(SERVER, GOOD, health=passed()), ("loading", "MAM is unknown")),
        (
            assessment(SERVER, GOOD, health=passed(loaded("MAM", 4))),
            ("loading", "MAM runs with another configuration"),
        ),
        (
            assessment(SERVER, GOOD, health=passed(loaded("MAM", digest=None, reason="no answer"))),
            ("loading", "no answer"),
        ),
        (
            assessment(
                SERVER,
                GOOD,
                health=passed(loaded("MAM", state=LoadState.FAILED, reason="no model.py")),
            ),
            ("loading", "no model.py"),
        ),
        (assessment(SERVER, GOOD, health=passed(loaded("MAM"))), ("ready", None)),
    ],
)
def test_phases(item: Assessment, expected: tuple[str, str | None]) -> None:
    assert phase(item) == expected


@pytest.mark.parametrize(
    ("health", "expected"),
    [
        (passed(), ("starting", "not warmed up yet")),
        (failing("warm_up"), ("starting", "GET /health answers 503")),
        (replace(passed(), warm_up=ProbeResult(True, "", 0.0)), ("ready", None)),
        (failing("startup"), ("starting", "GET /health answers 503")),
    ],
)
def test_phases_of_what_warms_up(health: Health, expected: tuple[str, str | None]) -> None:
    warm = replace(MAM, warm_up=WarmUp(HttpCall("GET", "/a")))
    cold = Memory({MAM.id: InstanceMemory(started=GOOD.name, cold=True)})
    seen = observed(GOOD, health={GOOD.ref: health})
    (item,) = assess(desired(warm), seen, CONTEXT, cold)
    assert phase(item) == expected
    assert item.serves is (expected[0] == "ready")
    assert item.serving is (expected[0] == "ready")
    # What was not started by us, or was ready before, has nothing to wait for.
    (item,) = assess(desired(warm), observed(GOOD), CONTEXT, Memory())
    assert phase(item) == ("ready", None)


def test_phases_of_what_does_not_run() -> None:
    item = assessment(MAM, EXITED)
    assert phase(item, blocked=True) == ("blocked", None)
    assert phase(item, blocked=True, retry_at=5.0) == ("backoff", None)
    assert phase(item, activity=Phase.STOPPING, blocked=True) == ("stopping", None)


def test_an_unprobed_instance_is_never_called_ready() -> None:
    item = assessment(replace(MAM, probes=Probes()), GOOD, health=Health())
    assert item.serves
    assert not item.ready


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (0, "0"),
        (1, "1"),
        (137, "137 (SIGKILL)"),
        (-15, "-15 (SIGTERM)"),
        (128, "128"),
        (255, "255"),
    ],
)
def test_exit_codes_in_words(code: int, words: str) -> None:
    assert describe_exit(code) == words
