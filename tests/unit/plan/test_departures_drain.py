"""What is drained before it is stopped, by whose word, and how that is remembered."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from mic_supervisor.model import HttpCall, Instance, RunState
from mic_supervisor.plan import spec as specs
from mic_supervisor.plan.actions import Drain, Plan, Stop
from tests.unit.plan.builders import (
    CONTEXT,
    changed,
    desired,
    observed,
    on,
    plan_for,
    program,
    shortly,
    uuid,
    workload,
)

QUEUE = HttpCall("GET", "/prompt")
FACE = on(
    "face",
    0,
    workload=program(stop_signal="SIGINT", listen="::"),
    drain=QUEUE,
    drain_timeout=60.0,
)
RUNS = workload(FACE)
OTHER = on("other", 0, workload=program())


def drains(plan: Plan) -> list[Drain]:
    return [step for change in plan.changes for step in change.steps if isinstance(step, Drain)]


def test_a_stop_for_good_drains_as_it_was_recorded() -> None:
    plan = plan_for(desired(kept_empty=(uuid(0),)), observed(RUNS))
    assert shortly(plan, face=RUNS) == [
        "drain face",
        "stop face <- drain face",
        "remove face <- stop face",
    ]
    (drain,) = drains(plan)
    assert (drain.call, drain.timeout, drain.listen) == (QUEUE, 60.0, "::")


def test_another_model_waits_for_the_drain() -> None:
    plan = plan_for([OTHER], observed(RUNS))
    assert shortly(plan, face=RUNS) == [
        "drain face <- prepare other-aaaaaaaa",
        "stop face <- drain face",
        "remove face <- stop face",
        "prepare other-aaaaaaaa",
        "release other-aaaaaaaa <- stop face, prepare other-aaaaaaaa",
        "start other-aaaaaaaa <- release other-aaaaaaaa",
    ]


def test_what_the_file_says_now_is_what_counts() -> None:
    longer = replace(changed(FACE, command=("/opt/new",)), drain_timeout=5.0)
    assert [step.timeout for step in drains(plan_for([longer], observed(RUNS)))] == [5.0]
    none = replace(changed(FACE, command=("/opt/new",)), drain=None, drain_timeout=0.0)
    assert drains(plan_for([none], observed(RUNS))) == []


def test_what_another_backend_says_does_not() -> None:
    other = replace(
        changed(FACE, command=("/opt/new",), stop_signal="SIGTERM"),
        backend="another",
        drain=HttpCall("GET", "/elsewhere"),
    )
    plan = plan_for([other], observed(RUNS))
    assert [step.call for step in drains(plan)] == [QUEUE]
    stops = [step for change in plan.changes for step in change.steps if isinstance(step, Stop)]
    assert [step.signal for step in stops] == ["SIGINT"]


def test_what_has_ended_is_not_drained() -> None:
    ended = workload(FACE, RunState.EXITED)
    assert drains(plan_for(desired(kept_empty=(uuid(0),)), observed(ended))) == []


@pytest.mark.parametrize("instance", [replace(FACE, drain_timeout=9.0), replace(FACE, drain=None)])
def test_another_drain_replaces_nothing(instance: Instance) -> None:
    plan = plan_for([instance], observed(RUNS))
    assert plan.changes == ()
    assert plan.empty


def test_it_is_written_down_as_plain_data() -> None:
    spec = specs.of_instance(FACE, CONTEXT.key)
    assert spec["drain"] == {
        "call": {"method": "GET", "path": "/prompt", "body": None, "timeout": 10.0},
        "timeout": 60.0,
    }
    assert specs.drain_parameters(json.loads(json.dumps(spec))) == (QUEUE, 60.0)
    assert "drain" not in specs.of_instance(replace(FACE, drain_timeout=0.0), CONTEXT.key)


@pytest.mark.parametrize(
    "spec",
    [
        None,
        {},
        {"drain": None},
        {"drain": []},
        {"drain": {"timeout": 3}},
        {"drain": {"call": {"method": "GET", "path": "/"}, "timeout": "3"}},
        {"drain": {"call": {"method": "GET", "path": "/", "later": 1}, "timeout": 3}},
        {"drain": {"call": "GET /", "timeout": 3}},
    ],
)
def test_a_record_that_says_something_else_drains_nothing(spec: Any) -> None:
    assert specs.drain_parameters(spec) is None


def test_the_address_is_the_recorded_one() -> None:
    assert specs.listen_address({"listen": "0.0.0.0"}) == "0.0.0.0"
    assert specs.listen_address({}) == "127.0.0.1"
    assert specs.listen_address(None) == "127.0.0.1"
    assert specs.listen_address({"listen": 3}) == "127.0.0.1"
