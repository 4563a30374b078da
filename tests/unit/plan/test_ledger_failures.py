"""What is remembered of successes and failures, look by look."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mic_supervisor import codec
from mic_supervisor.errors import (
    LoadFailed,
    MicError,
    PreflightFailed,
    ReleaseFailed,
    RuntimeRefused,
    RuntimeUnavailable,
    StopFailed,
    WorkloadGone,
)
from mic_supervisor.model import (
    ForeignWorkload,
    Health,
    HttpCall,
    Instance,
    Launch,
    ObservedWorkload,
    Probes,
    RunState,
    RuntimeView,
    WarmUp,
)
from mic_supervisor.plan import ledger
from mic_supervisor.plan.actions import (
    Create,
    Load,
    Prepare,
    Release,
    Remove,
    Restart,
    Start,
    Step,
    Stop,
    Unload,
    Withdraw,
)
from mic_supervisor.plan.assess import Assessment, assess, with_containers
from mic_supervisor.plan.health import (
    Phase,
    phase_of,
)
from mic_supervisor.plan.memory import InstanceMemory, Memory
from tests.unit.plan.builders import (
    CONTEXT,
    MAM,
    NEW,
    assessment,
    changed,
    desired,
    failing,
    loaded,
    observed,
    on,
    passed,
    placement,
    program,
    reread,
    workload,
)

GOOD = workload(MAM)
EXITED = replace(GOOD, state=RunState.EXITED, exit_code=1)


def after(
    entry: InstanceMemory,
    instance: Instance,
    *found: ObservedWorkload,
    now: float = 1000.0,
    health: Health | None = None,
    jitter: float = 0.0,
    **values: object,
) -> InstanceMemory:
    """The memory of an instance after one look."""
    if health is None:
        health = passed()
    item = assessment(instance, *found, health=health, **values)
    memory = ledger.observed(Memory({instance.id: entry}), [item], now, jitter=jitter)
    return memory.of(instance.id)


def seen(item: ObservedWorkload = GOOD, **values: object) -> InstanceMemory:
    return replace(InstanceMemory(started=item.name, started_at=900.0), **values)  # type: ignore[arg-type]


# --- ends -------------------------------------------------------------------------------------


def test_what_is_found_running_is_adopted() -> None:
    entry = after(InstanceMemory(), MAM, GOOD)
    assert entry.started == GOOD.name
    assert entry.started_at is None
    assert entry.ready_workload == GOOD.name
    assert entry.failures == 0


def test_what_we_started_keeps_the_time_of_its_start() -> None:
    assert after(seen(), MAM, GOOD).started_at == 900.0


def test_a_crash_is_counted_once() -> None:
    once = after(seen(), MAM, EXITED, now=1000.0)
    assert (once.failures, once.reason, once.retry_at) == (1, "it exited with 1", 1000.0)
    assert after(once, MAM, EXITED, now=1001.0) == once


def test_a_crash_before_anyone_saw_it_run_is_counted() -> None:
    # We noted the start, and the next look finds it ended.
    entry = after(seen(ready=None), MAM, replace(EXITED, exit_code=127))
    assert (entry.failures, entry.reason) == (1, "it exited with 127")


def test_the_second_crash_waits_five_seconds_and_the_third_ten() -> None:
    entry = seen(failures=1, attempt=assessment(MAM).hash)
    second = after(entry, MAM, EXITED, now=1000.0, jitter=0.5)
    assert second.failures == 2
    assert second.retry_at == pytest.approx(1005.25)
    third = after(replace(second, started=GOOD.name), MAM, EXITED, now=1010.0)
    assert third.retry_at == pytest.approx(1020.0)


def test_what_was_only_created_did_not_crash() -> None:
    made = workload(MAM, RunState.CREATED)
    assert after(InstanceMemory(), MAM, made).failures == 0


def test_what_somebody_had_started_and_is_only_created_did_not_crash() -> None:
    made = workload(NEW, RunState.CREATED)
    assert after(seen(made), NEW, made) == seen(made)


def test_a_start_that_was_cut_short_is_no_failure_of_the_specification() -> None:
    cut = replace(GOOD, state=RunState.EXITED, started_at=None, error="its start was cut short")
    before = seen(ready="then", ready_workload="mic-earlier")
    assert after(before, MAM, cut) == before


@pytest.mark.parametrize("state", [RunState.UNKNOWN, RunState.REMOVING])
def test_what_no_probe_can_ask_is_not_up_while_its_start_may_be_in_flight(state: RunState) -> None:
    bare = replace(MAM, probes=Probes())
    assert phase_of(assessment(bare, GOOD))[0] is Phase.UNPROBED
    assert phase_of(assessment(bare, replace(GOOD, state=state)))[0] is Phase.STARTING
    assert after(InstanceMemory(), bare, replace(GOOD, state=state)).ready_workload is None


def test_a_stop_of_our_own_is_no_crash() -> None:
    # Whoever stops it forgets `started` first.
    assert after(seen(started=None), MAM, EXITED).failures == 0


def test_a_removal_by_hand_is_no_crash() -> None:
    entry = after(seen(), MAM)
    assert entry.failures == 0
    assert entry.started is None


def test_a_restart_by_hand_after_a_crash_is_seen_as_running_again() -> None:
    crashed = after(seen(), MAM, EXITED)
    again = after(crashed, MAM, GOOD, now=1001.0)
    assert again.started == GOOD.name
    assert again.failures == 1
    assert after(again, MAM, EXITED, now=1002.0).failures == 2


def test_an_unreadable_runtime_says_nothing_about_an_end() -> None:
    before = seen(ready_since=950.0)
    assert after(before, MAM, errors={"docker": "connection refused"}) == before
    assert after(before, MAM, EXITED).failures == 1


def test_of_a_busy_instance_nothing_is_concluded() -> None:
    memory = Memory({MAM.id: seen(), "gone-00000000": seen()})
    item = assessment(MAM, EXITED)
    assert ledger.observed(memory, [item], 0.0, jitter=0.0, busy={MAM.id}) == Memory(
        {MAM.id: seen()}
    )


def test_an_instance_that_is_gone_is_forgotten_and_one_in_trouble_is_kept() -> None:
    memory = Memory({MAM.id: seen(), "gone-00000000": seen()}, {"0": "GPU-0"})
    assert ledger.observed(memory, [], 0.0, jitter=0.0) == Memory({}, {"0": "GPU-0"})
    assert ledger.observed(memory, [], 0.0, jitter=0.0, keep={MAM.id}).instances == {MAM.id: seen()}


# --- ill health -------------------------------------------------------------------------------


def test_each_start_that_turns_out_not_alive_is_counted_once() -> None:
    sick = failing("liveness")
    once = after(seen(), MAM, GOOD, health=sick)
    assert (once.failures, once.reason) == (1, "not alive: GET /health answers 503")
    assert after(once, MAM, GOOD, health=sick, now=1001.0) == once
    restarted = replace(once, started=GOOD.name, started_at=1002.0)
    twice = after(restarted, MAM, GOOD, health=sick, now=1010.0)
    assert (twice.failures, twice.retry_at) == (2, 1015.0)


def test_a_start_that_takes_too_long_is_counted_once() -> None:
    slow = failing("startup")
    late = after(seen(), MAM, GOOD, health=slow, now=1500.0)
    assert late.failures == 1
    assert late.reason == "not up within 300 s: GET /health answers 503"
    assert after(late, MAM, GOOD, health=slow, now=1501.0) == late


def test_a_start_that_is_not_warmed_up_in_time_is_counted_once() -> None:
    warm, cold = replace(MAM, warm_up=WarmUp(HttpCall("GET", "/a"))), seen(cold=True)
    before = Memory({MAM.id: cold})

    def then(memory: Memory, now: float) -> Memory:
        health = {GOOD.ref: failing("warm_up")}
        items = assess(desired(warm), observed(GOOD, health=health), CONTEXT, memory)
        return ledger.observed(memory, items, now, jitter=0.0)

    assert then(before, 1000.0).of(MAM.id) == cold
    late = then(before, 1500.0)
    assert late.of(MAM.id).failures == 1
    assert late.of(MAM.id).reason == "not up within 300 s: GET /health answers 503"
    assert then(late, 1501.0) == late


def test_only_what_we_started_is_cold_and_only_until_it_is_ready() -> None:
    assert after(seen(cold=True), MAM, GOOD, health=failing("readiness")).cold
    assert not after(seen(cold=True), MAM, GOOD).cold
    assert not after(seen(workload(NEW), cold=True), MAM, GOOD, health=failing("readiness")).cold


def test_what_is_not_asked_yet_is_no_failure_however_old_it_is() -> None:
    assert after(InstanceMemory(), MAM, GOOD, health=Health(), now=1e9).failures == 0


def test_one_that_recovers_by_itself_counts_again_later() -> None:
    sick = failing("liveness")
    once = after(seen(), MAM, GOOD, health=sick)
    well = after(once, MAM, GOOD, now=1001.0)
    assert well.started == GOOD.name
    assert after(well, MAM, GOOD, health=sick, now=1002.0).failures == 2


# --- being ready ------------------------------------------------------------------------------


def test_ready_is_remembered_with_its_workload_and_since_when() -> None:
    entry = after(seen(), MAM, GOOD, now=1000.0)
    assert entry.ready == assessment(MAM).hash
    assert entry.ready_workload == GOOD.name
    assert entry.ready_since == 1000.0
    assert after(entry, MAM, GOOD, now=1100.0).ready_since == 1000.0


def test_not_ready_any_more() -> None:
    entry = after(seen(ready_since=900.0), MAM, GOOD, health=failing("readiness", failures=1))
    assert entry.ready_since is None
    assert entry.failures == 0


def test_failures_are_forgotten_once_it_was_ready_for_long() -> None:
    entry = seen(failures=4, reason="x", retry_at=1.0, attempt=assessment(MAM).hash)
    soon = after(replace(entry, ready_since=400.0), MAM, GOOD, now=999.0)
    assert soon.failures == 4
    late = after(replace(entry, ready_since=400.0), MAM, GOOD, now=1000.0)
    assert (late.failures, late.reason, late.retry_at, late.attempt) == (0, None, None, None)
    patient = replace(MAM, start_timeout=900.0)
    assert after(replace(entry, ready_since=400.0), patient, GOOD, now=1000.0).failures == 4


def test_an_unprobed_one_counts_as_good_while_it_runs() -> None:
    blind = replace(MAM, probes=Probes())
    entry = after(seen(), blind, GOOD, health=Health())
    assert entry.ready_workload == GOOD.name


def test_a_server_without_its_model_is_not_ready() -> None:
    server = replace(MAM, placements=(placement("MAM", 0),))
    assert after(seen(), server, GOOD).ready is None
    assert after(seen(), server, GOOD, health=passed(loaded("MAM"))).ready is not None


def test_a_change_in_the_file_clears_what_failed_before() -> None:
    entry = seen(failures=3, reason="x", retry_at=9e9, attempt="other", failed="other")
    cleared = after(replace(entry, failed_reason="x"), MAM, GOOD, health=Health())
    assert cleared == seen()


# --- rolling back -----------------------------------------------------------------------------


def ready_before() -> InstanceMemory:
    return after(seen(), MAM, GOOD)


def new_one(state: RunState = RunState.EXITED) -> ObservedWorkload:
    return workload(NEW, state, created_at=200.0)


def test_a_new_specification_that_fails_is_given_up_for_the_one_before() -> None:
    entry = replace(ready_before(), started=new_one().name)
    failed = after(entry, NEW, new_one(), EXITED, now=1000.0)
    assert failed.failed == assessment(NEW).hash
    assert failed.failed_reason == "it exited with 1"
    assert failed.retry_at == 1000.0  # nothing keeps the good one from starting at once


def refused(
    entry: InstanceMemory, item: Assessment, kind: type[Start | Prepare], reason: str, now: float
) -> InstanceMemory:
    step = kind("it", item.instance.id, LAUNCH)
    memory = Memory({item.instance.id: entry})
    return ledger.failed(memory, step, RuntimeRefused(reason), item, now, 0.0).of(item.instance.id)


def test_a_start_that_was_refused_is_given_up_at_once_too() -> None:
    item = assessment(NEW, new_one(RunState.CREATED), EXITED)
    failed = refused(ready_before(), item, Start, "no such device", 1000.0)
    assert failed.failed == item.hash
    assert failed.retry_at == 1000.0


def test_what_failed_before_anything_was_stopped_is_tried_again() -> None:
    item = assessment(NEW, GOOD)
    entry = refused(ready_before(), item, Prepare, "cannot pull", 1000.0)
    assert entry.failed is None
    assert entry.retry_at == 1005.0
    again = refused(entry, item, Prepare, "cannot pull", 1005.0)
    assert (again.failures, again.retry_at) == (2, 1010.0)


@pytest.mark.parametrize(
    "why",
    ["was ready once", "turned off", "no one to go back to", "other GPUs", "another model"],
)
def test_when_there_is_no_way_back(why: str) -> None:
    entry, instance, back = ready_before(), NEW, EXITED
    if why == "was ready once":
        entry = replace(entry, ready=assessment(NEW).hash)
    elif why == "turned off":
        instance = replace(NEW, rollback=False)
    elif why == "no one to go back to":
        entry = replace(entry, ready_workload="mic-test-other")
    elif why == "other GPUs":
        back = replace(back, identity=replace(back.identity, gpus=("GPU-x",)))
    else:
        back = replace(back, identity=replace(back.identity, model="other"))
    failed = after(replace(entry, started=new_one().name), instance, new_one(), back)
    assert failed.failures == 1
    assert failed.failed is None


def test_there_is_no_way_back_to_a_process_whose_secrets_are_not_kept() -> None:
    face = on("face", 0, workload=program("/opt/face"))
    new = changed(face, command=("/opt/face", "-2"))
    good, bad = workload(face, RunState.EXITED), workload(new, RunState.EXITED, created_at=200.0)
    entry = replace(seen(bad), ready="then", ready_workload=good.name)
    assert after(entry, new, bad, good).failed is None


def rolled_back() -> InstanceMemory:
    entry = replace(ready_before(), started=new_one().name)
    failed = after(entry, NEW, new_one(), EXITED, now=1000.0)
    return replace(failed, started=GOOD.name, started_at=1000.0)


def test_a_crash_of_the_one_that_took_over_is_counted_and_told_apart() -> None:
    entry = after(rolled_back(), NEW, new_one(), replace(EXITED, exit_code=139), now=1010.0)
    assert (entry.failures, entry.retry_at) == (2, 1015.0)
    assert entry.reason == "it exited with 139 (SIGSEGV)"
    assert entry.failed_reason == "it exited with 1"
    assert entry.failed == assessment(NEW).hash
    assert after(entry, NEW, new_one(), EXITED, now=1011.0) == entry


def test_the_one_that_took_over_has_its_failures_forgotten_once_it_stayed_up() -> None:
    up = after(rolled_back(), NEW, new_one(), GOOD, now=1010.0)
    late = after(up, NEW, new_one(), GOOD, now=1610.0)
    assert late.failures == 0
    assert late.failed == assessment(NEW).hash


def test_a_failed_one_that_gets_ready_after_all_is_not_failed_any_more() -> None:
    running = new_one(RunState.RUNNING)
    item = assessment(NEW, running, EXITED, health=passed())
    entry = ledger.observed(Memory({NEW.id: rolled_back()}), [item], 1000.0, jitter=0.0).of(NEW.id)
    assert entry.failed is None
    assert entry.ready_workload == running.name


# --- memory on disk ---------------------------------------------------------------------------


def test_memory_comes_back_without_what_a_newer_version_added() -> None:
    memory = Memory({MAM.id: rolled_back()}, {"0": "GPU-0"}, containers={"c1": True, "c2": False})
    data = codec.encode(memory)
    data["instances"][MAM.id]["colour"] = "blue"
    assert codec.decode(Memory, data) == memory
    assert reread(memory) == memory


def test_containers_are_known_by_id_and_by_name_only_where_no_id_was_written_down() -> None:
    entry = InstanceMemory(started="renamed")
    earlier = Memory({MAM.id: entry, "other": InstanceMemory()})
    assert earlier.known == {"renamed": True}
    copy = ForeignWorkload("docker", "a", "c2", claims=MAM.id, has_our_name=True)
    other = ForeignWorkload("docker", "b", "c3", claims=MAM.id)
    state = observed(GOOD, foreign_workloads=[copy, other])
    seen = with_containers(earlier, state)
    assert seen.known == {GOOD.ref: True, "c2": False}
    # What cannot be read is not forgotten.
    unread = replace(state, runtimes=(RuntimeView("docker", error="gone"),))
    assert with_containers(seen, unread) == seen


# --- whose failure a step's is ----------------------------------------------------------------

LAUNCH = Launch(GOOD.name, "docker", GOOD.identity, MAM.workload)
PLACED = placement("MAM", 0)


@pytest.mark.parametrize(
    ("step", "error"),
    [
        (Prepare("p", MAM.id, LAUNCH), PreflightFailed("no such image")),
        (Create("c", MAM.id, LAUNCH), RuntimeRefused("no such program")),
        (Start("s", MAM.id, LAUNCH), RuntimeRefused("the port is taken")),
        (Restart("r", MAM.id, GOOD), RuntimeRefused("no GPU")),
        (Load("l", MAM.id, GOOD, PLACED), LoadFailed("no such model")),
    ],
)
def test_what_makes_it_run_fails_because_of_the_specification(step: Step, error: MicError) -> None:
    assert ledger.is_of_the_specification(step, error)


@pytest.mark.parametrize(
    ("step", "error"),
    [
        (Remove("d", MAM.id, GOOD), RuntimeRefused("it still runs")),
        (Stop("x", MAM.id, GOOD, "TERM", 1.0), RuntimeRefused("there is no signal TERM")),
        (Stop("x", MAM.id, GOOD, "TERM", 1.0), StopFailed("it is still there")),
        (Withdraw("w", MAM.id, GOOD), RuntimeRefused("no")),
        (Release("f", MAM.id, MAM.gpus, ()), ReleaseFailed("PID 7 has it")),
        (Unload("u", MAM.id, GOOD, PLACED), LoadFailed("no answer")),
        (Start("s", MAM.id, LAUNCH), RuntimeUnavailable("no engine")),
        (Start("s", MAM.id, LAUNCH), StopFailed("what was left of it stays")),
        (Start("s", MAM.id, LAUNCH), WorkloadGone("it does not exist")),
        (Restart("r", MAM.id, GOOD), WorkloadGone("it no longer exists")),
    ],
)
def test_what_was_there_before_says_nothing_about_the_specification(
    step: Step, error: MicError
) -> None:
    assert not ledger.is_of_the_specification(step, error)
