"""What the engine lists as created or ended, and whether that is so."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from mic_supervisor.errors import RuntimeUnavailable, StopFailed, WorkloadGone
from mic_supervisor.model import ObservedWorkload, RunState
from mic_supervisor.runtimes.docker import view as module
from mic_supervisor.runtimes.docker.create import labels
from mic_supervisor.runtimes.docker.runtime import DockerRuntime
from mic_supervisor.runtimes.docker.view import InactiveContainers, StartTimes, is_new
from tests.support.waiting import until
from tests.unit.runtimes.docker.engine_fake import (
    IDENTITY,
    WORKLOAD,
    FakeEngine,
    fails,
    hang,
    hang_up,
    refuse,
    reply,
)

CREATED = replace(WORKLOAD, state=RunState.CREATED)
REF = "5e" * 32
EXITED = replace(WORKLOAD, state=RunState.EXITED, exit_code=0)


class Inspections:
    """Answers with `found`, or raises it. One that is held is waited for in vain, and every other
    one for as long as it takes.
    """

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.found: ObservedWorkload | Exception = CREATED
        self.count = 0
        self._go = threading.Event()
        self._patch = patch
        self.let_go()

    def hold(self) -> None:
        self._patch.setattr(module, "INSPECT_TIMEOUT", 0.1)
        self._go.clear()

    def let_go(self) -> None:
        self._patch.setattr(module, "INSPECT_TIMEOUT", 60.0)
        self._go.set()

    def __call__(self, _: ObservedWorkload) -> ObservedWorkload:
        self.count += 1
        self._go.wait(60)
        if isinstance(self.found, Exception):
            raise self.found
        return self.found


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Iterator[Inspections]:
    engine = Inspections(monkeypatch)
    yield engine
    engine.let_go()


@pytest.fixture
def inactive(engine: Inspections) -> InactiveContainers:
    return InactiveContainers(engine)


@pytest.mark.parametrize("listed", [CREATED, EXITED])
def test_a_start_in_flight_counts_as_alive_until_it_has_come_to_an_end(
    inactive: InactiveContainers, engine: Inspections, listed: ObservedWorkload
) -> None:
    engine.hold()
    engine.found = WORKLOAD
    for _ in range(2):
        (seen,) = inactive.sure([listed])
        assert seen.state is RunState.UNKNOWN
    assert engine.count == 1  # it is not asked for again while it waits
    engine.let_go()
    until(lambda: inactive.sure([listed])[0].state is RunState.RUNNING, "the end of the start")


def test_what_rests_is_inspected_once(inactive: InactiveContainers, engine: Inspections) -> None:
    for _ in range(3):
        assert inactive.sure([CREATED]) == (CREATED,)
    assert engine.count == 1


def test_each_ending_is_inspected_once_for_what_went_wrong(
    inactive: InactiveContainers, engine: Inspections
) -> None:
    for count, cause in ((1, "it used more memory than its limit"), (2, "no GPU")):
        assert inactive.sure([WORKLOAD]) == (WORKLOAD,)
        engine.found = replace(EXITED, error=cause, finished_at=1.0)
        for _ in range(3):
            assert inactive.sure([EXITED]) == (replace(EXITED, error=cause),)
        assert engine.count == count


def test_what_is_removed_is_forgotten(inactive: InactiveContainers, engine: Inspections) -> None:
    inactive.sure([EXITED])
    assert inactive.sure([]) == ()
    inactive.sure([EXITED])
    assert engine.count == 2


def test_what_went_wrong_before_our_start_is_not_told_of_what_ended_after_it(
    inactive: InactiveContainers, engine: Inspections
) -> None:
    engine.found = replace(EXITED, error="no GPU")
    engine.hold()
    inactive.sure([EXITED])
    with inactive.starting(EXITED.ref):
        engine.let_go()
    engine.found = replace(EXITED, error="it used more memory than its limit")
    assert inactive.sure([EXITED]) == (engine.found,)


def test_what_the_list_still_has_and_the_engine_has_not_is_absent(
    inactive: InactiveContainers, engine: Inspections
) -> None:
    engine.found = WorkloadGone("it no longer exists")
    assert inactive.sure([CREATED]) == ()


def test_a_removal_in_flight_is_one(inactive: InactiveContainers, engine: Inspections) -> None:
    engine.found = replace(WORKLOAD, state=RunState.REMOVING)
    assert [item.state for item in inactive.sure([EXITED])] == [RunState.REMOVING]


@pytest.mark.parametrize("error", [RuntimeUnavailable("it hung up"), KeyError("State")])
def test_what_cannot_be_inspected_is_unknown_and_asked_again(
    inactive: InactiveContainers,
    engine: Inspections,
    error: Exception,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    said = threading.Event()  # a defect is: by the hook, with its traceback
    monkeypatch.setattr(threading, "excepthook", lambda _: said.set())
    engine.found = error
    assert [item.state for item in inactive.sure([CREATED])] == [RunState.UNKNOWN]
    engine.found = CREATED
    assert inactive.sure([CREATED]) == (CREATED,)
    assert said.wait(0 if isinstance(error, RuntimeUnavailable) else 10) == isinstance(
        error, KeyError
    )


def test_nobody_waits_for_a_start_of_our_own_and_its_end_is_looked_at(
    inactive: InactiveContainers, engine: Inspections
) -> None:
    inactive.sure([CREATED])
    with inactive.starting(CREATED.ref):
        assert inactive.sure([CREATED]) == (CREATED,)
    assert engine.count == 1
    engine.found = WORKLOAD  # the call was not answered, and the engine went on
    assert inactive.sure([CREATED]) == (WORKLOAD,)


def test_one_that_hangs_costs_one_wait_and_hides_no_other(
    inactive: InactiveContainers, engine: Inspections
) -> None:
    engine.hold()
    runs = replace(WORKLOAD, ref="c2", name="other")
    resting = [replace(CREATED, ref=f"r{number}") for number in range(20)]
    seen = inactive.sure([runs, *resting])
    assert seen[0] == runs
    assert {item.state for item in seen[1:]} == {RunState.UNKNOWN}


# --- by the API ---------------------------------------------------------------------------------


LISTED = {
    "Id": "c1",
    "Names": ["/mic-mam"],
    "State": "created",
    "Labels": labels(IDENTITY),
    "ImageID": "sha256:i",
}


@pytest.fixture
def fake(tmp_path: Path) -> Iterator[FakeEngine]:
    fake = FakeEngine(tmp_path / "d.sock")
    fake.answers["GET /containers/json"] = reply([LISTED])
    yield fake
    fake.close()


@pytest.fixture
def runtime(fake: FakeEngine, monkeypatch: pytest.MonkeyPatch) -> Iterator[DockerRuntime]:
    monkeypatch.setattr(module, "INSPECT_TIMEOUT", 60.0)
    made = DockerRuntime("default", "h", base_url=fake.url, docker_config=None, timeout=60.0)
    yield made
    made.close()


def state(runtime: DockerRuntime) -> list[RunState]:
    view = runtime.observe()
    assert view.error is None
    return [item.state for item in view.workloads]


def test_a_look_tells_why_a_container_ended(fake: FakeEngine) -> None:
    fake.answers["GET /containers/json"] = reply(
        [{**LISTED, "State": "exited", "Status": "Exited (137) 3 seconds ago"}]
    )
    said = 'OCI runtime create failed: exec: "nosuch": executable file not found in $PATH'
    for found, cause in (
        ({"OOMKilled": True}, "it used more memory than its limit and was killed"),
        ({"Error": said}, "the image has no program nosuch"),
    ):
        fake.answers["GET /containers/c1/json"] = reply({"State": {"Status": "exited", **found}})
        made = DockerRuntime("default", "h", base_url=fake.url, docker_config=None)
        for _ in range(2):
            (seen,) = made.observe().workloads
            assert (seen.state, seen.exit_code, seen.error) == (RunState.EXITED, 137, cause)
    assert fake.asked("GET /containers/c1/json") == 2


@pytest.mark.parametrize(
    ("status", "seen"),
    [
        ("created", [RunState.CREATED]),
        ("running", [RunState.RUNNING]),
        ("removing", [RunState.REMOVING]),
    ],
)
def test_a_look_tells_what_the_inspection_does(
    runtime: DockerRuntime, fake: FakeEngine, status: str, seen: list[RunState]
) -> None:
    fake.answers["GET /containers/c1/json"] = reply({"State": {"Status": status}})
    assert state(runtime) == seen


PID = 4121


@pytest.fixture
def running(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A /proc in which one process is in the control group of the container."""
    process = tmp_path / "proc" / str(PID)
    process.mkdir(parents=True)
    (process / "stat").write_text(f"{PID} (serve) R 1 1 1 {'0 ' * 13}1 0 777\n")
    (process / "cgroup").write_text(f"0::/system.slice/docker-{REF}.scope\n")
    monkeypatch.setattr(psutil, "PROCFS_PATH", str(tmp_path / "proc"))
    return process


@pytest.mark.parametrize("status", ["created", "exited", "dead"])
def test_what_the_engine_takes_for_inactive_while_it_runs_is_in_doubt(
    runtime: DockerRuntime, fake: FakeEngine, running: Path, status: str
) -> None:
    fake.answers["GET /containers/json"] = reply([{**LISTED, "Id": REF, "State": status}])
    fake.answers[f"GET /containers/{REF}/json"] = reply({"State": {"Status": status}})
    for _ in range(2):  # also when it was looked at before
        (seen,) = runtime.observe().workloads
        assert (seen.state, seen.pid) == (RunState.UNKNOWN, PID)
        assert seen.doubt is not None
        assert seen.doubt.reason.endswith(f", and PID {PID} in it runs")
    stat = running / "stat"
    stat.write_text(stat.read_text().replace(" R ", " Z "))  # it has ended
    assert state(runtime) == [RunState.CREATED if status == "created" else RunState.EXITED]


def test_a_stop_that_the_engine_takes_for_done_while_it_runs_has_failed(
    runtime: DockerRuntime, fake: FakeEngine, running: Path
) -> None:
    fake.answers[f"POST /containers/{REF}/kill"] = refuse(409, "Container x is not running")
    error = fails(lambda: runtime.stop(replace(WORKLOAD, ref=REF), signal="SIGTERM", grace=1.0))
    assert isinstance(error, StopFailed)
    assert f"PID {PID} in it does" in str(error)


def test_a_look_without_an_answer_to_the_inspection(
    runtime: DockerRuntime, fake: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "INSPECT_TIMEOUT", 0.2)
    fake.answers["GET /containers/c1/json"] = hang(1.0)
    assert state(runtime) == [RunState.UNKNOWN]


def test_an_inspection_that_is_refused_is_unknown_and_one_of_nothing_is_absent(
    runtime: DockerRuntime, fake: FakeEngine
) -> None:
    fake.answers["GET /containers/c1/json"] = refuse(500, "no")
    assert state(runtime) == [RunState.UNKNOWN]
    del fake.answers["GET /containers/c1/json"]
    assert state(runtime) == []


def test_after_a_start_without_an_answer_its_container_is_inspected(
    runtime: DockerRuntime, fake: FakeEngine
) -> None:
    fake.answers["GET /containers/c1/json"] = reply({"State": {"Status": "created"}})
    assert state(runtime) == state(runtime) == [RunState.CREATED]
    asked = fake.asked("GET /containers/c1/json")
    assert asked == 1
    fake.answers["POST /containers/c1/start"] = hang_up
    fails(lambda: runtime.restart(CREATED))
    assert state(runtime) == [RunState.CREATED]
    assert fake.asked("GET /containers/c1/json") == asked + 1


# --- when what runs was started -----------------------------------------------------------------


def test_a_start_is_known_from_the_third_look_on_and_asked_for_again_while_it_is_new(
    engine: Inspections,
) -> None:
    starts = StartTimes(engine)
    engine.found = replace(WORKLOAD, started_at=100.0)

    def seen(*, new: bool = False) -> float | None:
        (one,) = starts.added([WORKLOAD], [WORKLOAD.ref] if new else [])
        return one.started_at

    assert seen() is None
    assert engine.count == 0  # a command looks once
    until(lambda: seen() == 100.0, "the inspection")
    assert [seen() for _ in range(3)] == [100.0] * 3
    assert engine.count == 1
    engine.found = replace(WORKLOAD, started_at=200.0)  # somebody restarted it by hand
    until(lambda: seen(new=True) == 200.0, "the other start")
    (ended,) = starts.added([replace(EXITED, ref=WORKLOAD.ref)], [])
    assert ended.started_at is None
    assert seen() is None


def test_an_inspection_that_hangs_or_fails_leaves_the_start_unknown(engine: Inspections) -> None:
    starts = StartTimes(engine)
    engine.hold()
    engine.found = RuntimeUnavailable("no engine")
    for _ in range(5):
        assert starts.added([WORKLOAD], [])[0].started_at is None
    assert engine.count == 1
    engine.let_go()
    until(lambda: starts.added([WORKLOAD], []) and engine.count > 1, "another try")


@pytest.mark.parametrize(
    ("status", "new"),
    [
        ("Up Less than a second", True),
        ("Up 59 seconds (healthy)", True),
        ("Up About a minute", False),
        ("Up 3 weeks", False),
        (None, False),
    ],
)
def test_what_has_run_for_seconds_is_new(status: object, new: bool) -> None:
    assert is_new({"Status": status}) is new
