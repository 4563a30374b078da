"""What PID 1 says of a unit, as a workload or a stranger."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from mic_supervisor import clocks
from mic_supervisor.model import (
    ForeignWorkload,
    Identity,
    Launch,
    ObservedWorkload,
    ProcessSpec,
    RunState,
)
from mic_supervisor.runtimes.identity import identity_variables
from mic_supervisor.runtimes.systemd import unit as systemd_view
from mic_supervisor.runtimes.systemd.unit import Process, Unit

IDENTITY = Identity("default", "h", "a", "MAM", "process", ("GPU-1",), {"http": 1}, {}, "00")
NAME = "mic-default-a-00"
LAUNCH = Launch(NAME, "systemd", IDENTITY, ProcessSpec(("x",)))
ENVIRONMENT = [f"{k}={v}" for k, v in identity_variables(LAUNCH.name, LAUNCH.identity).items()]
LEFT = Process(77, "sleep 9")


def unit(
    active: str, sub: str, *remains: Process, environment: Any = ENVIRONMENT, **more: Any
) -> Unit:
    properties = {
        "ActiveState": active,
        "SubState": sub,
        "Environment": environment,
        "MainPID": 0,
        "ExecMainCode": 0,
        "ExecMainStatus": 0,
        "ExecMainStartTimestamp": 2_000_000,
        "ExecMainExitTimestamp": 0,
        "InactiveExitTimestamp": 2_000_500,
        "Result": "success",
        **more,
    }
    return Unit(f"{NAME}.service", "/path", properties, remains)


def classify(found: Unit) -> ObservedWorkload:
    seen = systemd_view.classify(found, "default", "h")
    assert isinstance(seen, ObservedWorkload)
    return seen


def ended(code: int, status: int, result: str = "exit-code") -> dict[str, Any]:
    return {
        "ExecMainCode": code,
        "ExecMainStatus": status,
        "ExecMainExitTimestamp": 5_000_000,
        "Result": result,
    }


def test_one_that_runs() -> None:
    assert classify(unit("active", "running", MainPID=42)) == ObservedWorkload(
        runtime="systemd",
        name=NAME,
        ref=f"{NAME}.service",
        identity=IDENTITY,
        state=RunState.RUNNING,
        pid=42,
        created_at=2.0,
        started_at=2.0,
    )


def test_a_unit_runs_since_what_the_monotonic_clock_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clocks, "from_monotonic", lambda stamp: stamp + 10.0)
    monkeypatch.setattr(clocks, "in_wall", lambda at, noted: 1e9 + at)
    seen = classify(
        unit("active", "running", MainPID=42, ExecMainStartTimestampMonotonic=7_000_000)
    )
    assert (seen.running_since, seen.started_at) == (17.0, 1e9 + 17.0)
    over = classify(
        unit("failed", "failed", ExecMainStartTimestampMonotonic=7_000_000, **ended(1, 3))
    )
    assert (over.running_since, over.started_at) == (None, 2.0)


@pytest.mark.parametrize(
    ("active", "sub", "more", "code", "error"),
    [
        ("active", "exited", ended(1, 0, "success"), 0, None),
        ("active", "exited", ended(2, 15, "success"), 143, "ended by SIGTERM"),
        ("failed", "failed", ended(1, 3), 3, None),
        ("inactive", "dead", ended(1, 3), 3, None),
        ("failed", "failed", ended(2, 9, "signal"), 137, "ended by SIGKILL"),
        ("failed", "failed", ended(3, 11, "core-dump"), 139, "ended by SIGSEGV"),
        ("failed", "failed", ended(2, 40, "signal"), 168, "ended by signal 40"),
        (
            *("failed", "failed", ended(2, 9, "oom-kill"), 137),
            "it used more memory than there was, or than its limit, and was killed",
        ),
        (
            *("failed", "failed", ended(2, 9, "timeout"), 137),
            "it did not end in time and was killed",
        ),
        ("failed", "failed", {"Result": "resources"}, None, "systemd could not set it up"),
        ("failed", "failed", {"Result": "exit-code"}, None, "it was never started"),
        ("inactive", "dead", {}, None, "it was never started"),
    ],
)
def test_one_that_has_ended(
    active: str, sub: str, more: dict[str, Any], code: int | None, error: str | None
) -> None:
    seen = classify(unit(active, sub, **more))
    assert (seen.state, seen.pid, seen.exit_code, seen.error) == (
        RunState.EXITED, None, code, error,
    )  # fmt: skip
    assert seen.finished_at == (None if code is None else 5.0)


@pytest.mark.parametrize(
    ("active", "sub", "pid"),
    [("activating", "start", 7), ("reloading", "reload", 7), ("deactivating", "stop-sigterm", 7)],
)
def test_one_in_between_holds_its_gpu(active: str, sub: str, pid: int) -> None:
    seen = classify(unit(active, sub, MainPID=pid))
    assert (seen.state, seen.pid, seen.error) == (RunState.RUNNING, pid, None)


@pytest.mark.parametrize("active", ["inactive", "failed"])
def test_one_whose_start_is_in_flight_holds_its_gpu(active: str) -> None:
    """PID 1 has made the unit and taken the job, and has not come to it."""
    seen = classify(unit(active, "dead", Job=[7, "/org/freedesktop/systemd1/job/7"]))
    assert (seen.state, seen.pid, seen.error) == (RunState.RUNNING, None, "its start is in flight")
    over = classify(unit(active, "dead", Job=[0, "/"]))
    assert over.state is RunState.EXITED


def test_one_whose_main_process_has_ended_holds_its_gpu_until_all_is_gone() -> None:
    seen = classify(unit("deactivating", "stop-sigterm", **ended(1, 3)))
    assert (seen.state, seen.pid, seen.exit_code, seen.finished_at, seen.error) == (
        *(RunState.RUNNING, None, None, None),
        "its main process has ended, and what it left is being ended",
    )
    for active, sub in (("active", "exited"), ("failed", "failed")):
        seen = classify(unit(active, sub, LEFT, Process(78, ""), **ended(1, 0)))
        assert (seen.state, seen.pid, seen.exit_code, seen.error) == (
            *(RunState.RUNNING, None, None),
            "its main process has ended, and its other processes still run: PID 77, 78",
        )


MADE = {"Transient": True, "Slice": "mic.slice", "MainPID": 7}


@pytest.mark.parametrize(
    "environment",
    [
        [],
        None,
        "no list",
        ["MIC_IDENTITY={"],
        ['MIC_IDENTITY={"managed_by": "mic-supervisor"}'],
        ["MIC_SCOPE=default", "MIC_INSTANCE=a"],
    ],
)
def test_one_that_only_we_can_have_made_and_that_tells_nothing_is_in_doubt(
    environment: Any,
) -> None:
    seen = classify(unit("active", "running", environment=environment, **MADE))
    assert (seen.state, seen.pid, seen.identity.spec) == (RunState.UNKNOWN, 7, None)
    assert seen.identity.instance in ("a", "a-00")
    assert seen.doubt is not None
    assert seen.doubt.reason.startswith("it is not certain what it is: its ")
    assert seen.doubt.reason.endswith("; PID 7 runs, and is left as it is")
    assert f"systemctl stop {NAME}.service" in seen.doubt.hint


@pytest.mark.parametrize(
    "more",
    [
        {"Transient": False},  # somebody's own unit file
        {"Slice": "system.slice"},  # systemd-run
        {"environment": ["MIC_SCOPE=default-a"]},
        {"ActiveState": "inactive"},
    ],
)
def test_one_that_others_can_have_made_or_that_is_over_is_foreign(more: dict[str, Any]) -> None:
    found = unit("active", "running", **{"environment": [], **MADE, **more})
    assert isinstance(systemd_view.classify(found, "default", "h"), ForeignWorkload)


@pytest.mark.parametrize("active", ["maintenance", "refreshing", ""])
def test_a_state_that_nobody_knows_is_unknown(active: str) -> None:
    seen = classify(unit(active, "x"))
    assert seen.state is RunState.UNKNOWN
    assert seen.error == f"systemd says that it is {active or 'in no state'}"


@pytest.mark.parametrize(
    ("scope", "host", "environment", "reason"),
    [
        ("other", "h", ENVIRONMENT, "it belongs to scope default"),
        ("default", "x", ENVIRONMENT, "it was made by the supervisor of another machine"),
        ("default", "h", [], "its environment does not name it as ours"),
        ("default", "h", "no list", "its environment does not name it as ours"),
        ("default", "h", None, "its environment does not name it as ours"),
    ],
)
@pytest.mark.parametrize(("sub", "running"), [("running", True), ("exited", False)])
def test_foreign_units(
    scope: str, host: str, environment: Any, reason: str, sub: str, running: bool
) -> None:
    seen = systemd_view.classify(unit("active", sub, environment=environment), scope, host)
    name = f"{NAME}.service"
    assert seen == ForeignWorkload(
        "systemd", name, name, running=running, reason=reason, elsewhere=scope == "other"
    )


def test_a_unit_of_which_nothing_is_known_is_foreign() -> None:
    seen = systemd_view.classify(Unit("mic-default-x.service", "/path", {}), "default", "h")
    assert isinstance(seen, ForeignWorkload)
    assert seen.running  # unknown is never absent


def test_the_invocation_is_in_hex() -> None:
    assert unit("active", "running", InvocationID=bytes(range(16))).invocation == (
        "000102030405060708090a0b0c0d0e0f"
    )
    assert unit("active", "running", InvocationID=[]).invocation == ""
    assert unit("active", "running").invocation == ""


def test_processes_are_named_briefly() -> None:
    assert str(LEFT) == "77 (sleep 9)"
    assert str(Process(1, "")) == "1 (?)"
    assert str(Process(1, "x" * 100)) == f"1 ({'x' * 60})"


# --- copies -----------------------------------------------------------------------------------


def test_a_unit_with_a_copied_environment_is_foreign() -> None:
    copy = replace(unit("active", "running", MainPID=42), name="mic-default-copy.service")
    assert systemd_view.classify(copy, "default", "h") == ForeignWorkload(
        *("systemd", "mic-default-copy.service", "mic-default-copy.service", (), True),
        f"it has the environment of {NAME}.service, and another name: it is a copy",
        "a",
    )


def test_a_unit_of_our_name_from_a_file_is_foreign() -> None:
    path = f"/etc/systemd/system/{NAME}.service"
    seen = systemd_view.classify(
        unit("active", "running", Transient=False, FragmentPath=path), "default", "h"
    )
    assert isinstance(seen, ForeignWorkload)
    assert (seen.reason, seen.claims) == (f"it comes from a unit file, {path}", "a")
    assert classify(unit("active", "running", Transient=True)).name == NAME
