"""What was rolled back to is asked with its own probes, and looked after like the rest."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mic_supervisor import codec
from mic_supervisor.model import (
    ContainerSpec,
    EngineCheck,
    ExecCheck,
    Health,
    HttpCall,
    HttpCheck,
    LoadState,
    Port,
    Probe,
    ProbeResult,
    Probes,
    Progress,
    RunState,
    TcpCheck,
    WarmUp,
)
from mic_supervisor.plan import ledger
from mic_supervisor.plan.assess import assess
from mic_supervisor.plan.fallback import as_it_runs, earlier, fallback
from mic_supervisor.plan.memory import InstanceMemory, Memory
from mic_supervisor.plan.status import InstanceStatus, converged, instance_statuses
from tests.unit.plan.builders import (
    CONTEXT,
    MAM,
    NEW,
    NOW,
    PROBED,
    changed,
    container,
    desired,
    failing,
    loaded,
    observed,
    on,
    passed,
    placement,
    plan_for,
    reread,
    shortly,
    text,
    workload,
)

GOOD = workload(MAM, started_at=NOW - 100)
BAD = workload(NEW, RunState.EXITED, created_at=200.0)
FAILED = "the new specification failed (it exited with 1)"


def rolled_back(**values: object) -> InstanceMemory:
    """Of MAM, whose second specification failed, and whose first runs again."""
    item = assess(desired(NEW), observed(GOOD, BAD), CONTEXT)[0]
    entry = InstanceMemory(
        failures=1,
        reason="it exited with 1",
        attempt=item.hash,
        failed=item.hash,
        failed_reason="it exited with 1",
        ready="then",
        ready_workload=GOOD.name,
        ready_probes=PROBED,
        retry_at=NOW - 1,
        started=GOOD.name,
        started_at=NOW - 100,
    )
    return replace(entry, **values)  # type: ignore[arg-type]


def memory(entry: InstanceMemory | None = None) -> Memory:
    return Memory({MAM.id: entry or rolled_back()})


def row(health: Health | None, entry: InstanceMemory | None = None) -> InstanceStatus:
    kept = memory(entry)
    state = observed(GOOD, BAD, health={} if health is None else {GOOD.ref: health})
    items = assess(desired(NEW), state, CONTEXT)
    plan = plan_for([NEW], state, kept)
    (found,) = instance_statuses(desired(NEW), state, items, plan, kept, {})
    return found


# --- what it says of itself ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("health", "serving", "how"),
    [
        (passed(), True, ", and is ready"),
        (failing("startup", failures=1), False, ", starting: GET /health answers 503"),
        (failing("readiness"), False, ", degraded: GET /health answers 503"),
        (
            failing("readiness", ok=None),
            None,
            ", degraded: health unknown: GET /health answers 503",
        ),
        (Health(), None, ", starting"),
    ],
)
def test_status_says_whether_it_serves(health: Health, serving: bool | None, how: str) -> None:
    found = row(health)
    assert (found.phase.value, found.sync, found.health) == ("degraded", "out_of_sync", "degraded")
    assert found.serving is serving
    assert found.reason == f"{FAILED}; the last good one runs{how}"
    assert not found.as_desired


def test_it_is_asked_what_it_was_asked_when_it_was_ready() -> None:
    other = replace(NEW, probes=Probes(readiness=Probe(HttpCheck("/new", port="metrics"))))
    item = assess(desired(other), observed(GOOD, BAD), CONTEXT)[0]
    entry = rolled_back(failed=item.hash)
    good = fallback(entry, item)
    assert good is not None
    assert good.instance.probes == PROBED
    assert good.match == GOOD
    # Nothing remembered, as after an upgrade: those of the file that fit its ports.
    unknown = fallback(replace(entry, ready_probes=None), item)
    assert unknown is not None
    assert unknown.instance.probes == Probes()
    fits = replace(
        other, probes=Probes(startup=Probe(ExecCheck(("/ok",))), liveness=PROBED.liveness)
    )
    item = assess(desired(fits), observed(GOOD, BAD), CONTEXT)[0]
    good = fallback(rolled_back(failed=item.hash, ready_probes=None), item)
    assert good is not None
    assert good.instance.probes == fits.probes


def test_it_is_not_warmed_up_by_what_the_file_says_of_another_specification() -> None:
    warm = replace(NEW, warm_up=WarmUp(HttpCall("GET", "/new")))
    entry = rolled_back(cold=True)
    item = assess(desired(warm), observed(GOOD, BAD), CONTEXT, memory(entry))[0]
    good = fallback(rolled_back(failed=item.hash), item)
    assert good is not None
    assert good.instance.warm_up is None and good.serves


def test_a_counter_is_asked_for_where_it_has_its_ports() -> None:
    def asked(progress: Progress) -> Probe | None:
        probes = Probes(readiness=Probe(None, progress=progress))
        item = assess(desired(replace(NEW, probes=probes)), observed(GOOD, BAD), CONTEXT)[0]
        good = fallback(rolled_back(failed=item.hash, ready_probes=None), item)
        assert good is not None
        return good.instance.probes.readiness

    moves = Progress("a_total", HttpCall("GET", "/a"))
    assert asked(moves) == Probe(None, progress=moves)
    assert asked(replace(moves, port="metrics")) is None


def test_it_is_reached_as_it_was_recorded() -> None:
    old = on(
        "MAM",
        0,
        workload=container(network="host", listen="10.0.0.1", ports=(Port("http", 80, 81),)),
    )
    runs = workload(old, ports={"http": 80})
    item = assess(desired(NEW), observed(runs), CONTEXT)[0]
    found = earlier(InstanceMemory(), item)
    assert found is not None
    reached = found.instance.workload
    assert isinstance(reached, ContainerSpec)
    assert (reached.network, reached.listen) == ("host", "10.0.0.1")
    assert reached.ports == (Port("http", 80, 81),)


def test_what_runs_until_its_turn_is_asked_too() -> None:
    state = observed(GOOD, health={GOOD.ref: passed()})
    item = assess(desired(NEW), state, CONTEXT)[0]
    assert as_it_runs(InstanceMemory(), item).serving is True
    assert item.serving is False
    nothing = assess(desired(NEW), observed(), CONTEXT)[0]
    assert as_it_runs(InstanceMemory(), nothing) is nothing


# --- what is done for it ------------------------------------------------------------------------


def test_one_that_hangs_is_restarted_and_the_failed_one_is_not_tried() -> None:
    state = observed(GOOD, BAD, health={GOOD.ref: failing("liveness")})
    plan = plan_for([NEW], state, memory())
    assert text(plan) == (
        "~ restart  MAM-aaaaaaaa  GPU 0  rolled back, and not alive: GET /health answers 503\n"
        "\n"
        f"! blocked  MAM-aaaaaaaa on GPU 0: {FAILED}; the last good one runs\n"
        "    hint: change the file, or: mic-supervisor retry MAM-aaaaaaaa\n"
        "\n"
        "Plan: 1 to restart; 1 blocked.\n"
    )
    assert shortly(plan, good=GOOD) == [
        "stop good",
        "release MAM-aaaaaaaa <- stop good",
        "restart good <- release MAM-aaaaaaaa",
    ]


def test_it_is_restarted_with_backoff() -> None:
    entry = rolled_back(failures=3, reason="not alive: no answer", retry_at=NOW + 10)
    state = observed(GOOD, BAD, health={GOOD.ref: failing("liveness")})
    plan = plan_for([NEW], state, memory(entry))
    assert text(plan) == (
        f"! blocked  MAM-aaaaaaaa on GPU 0: {FAILED}; the last good one failed as well; "
        "backoff: not alive: no answer; next try at 00:16:50\n"
        "    hint: change the file, or: mic-supervisor retry MAM-aaaaaaaa\n"
        "\n"
        "No changes; 1 blocked.\n"
    )
    assert plan.next_wake == NOW + 10


def test_its_failures_are_counted_and_it_is_stable_only_while_it_serves() -> None:
    def after(entry: InstanceMemory, health: Health, now: float) -> InstanceMemory:
        item = assess(desired(NEW), observed(GOOD, BAD, health={GOOD.ref: health}), CONTEXT)[0]
        return ledger.observed(memory(entry), [item], now, jitter=0.0).of(MAM.id)

    sick = after(rolled_back(), failing("liveness"), NOW)
    assert (sick.failures, sick.reason, sick.failed_reason) == (
        2,
        "not alive: GET /health answers 503",
        "it exited with 1",
    )
    assert sick.ready_since is None
    began = rolled_back(cold=True)
    starting = after(began, Health(startup=ProbeResult(False, "refused", NOW, 1)), NOW)
    assert starting.ready_since is None and starting.cold
    well = after(starting, passed(), NOW)
    assert well.ready_since == NOW and not well.cold
    assert after(well, passed(), NOW + 600).failures == 0


def test_a_server_that_took_over_gets_its_models() -> None:
    """It was stopped, so it has none of them any more."""
    server = replace(MAM, placements=(placement("MAM", 0),))
    new = changed(server, image="mam:2")
    good = workload(server)
    state = observed(good, BAD, health={good.ref: passed(loaded("MAM", state=LoadState.ABSENT))})
    item = assess(desired(new), state, CONTEXT)[0]
    entry = rolled_back(failed=item.hash, ready_workload=good.name, started=good.name)
    plan = plan_for([new], state, memory(entry))
    assert [(c.kind, c.cause) for c in plan.changes] == [
        ("load", "the server does not have MAM loaded")
    ]
    assert [step.workload.name for c in plan.changes for step in c.steps] == [good.name]  # type: ignore[attr-defined]
    patient = plan_for([new], state, memory(replace(entry, retry_at=NOW + 5, reason="no room")))
    assert patient.changes == ()
    assert [(item.reason, item.until) for item in patient.blocked] == [
        (
            f"{FAILED}; the last good one cannot be loaded again; backoff: no room",
            NOW + 5,
        )
    ]


def test_apply_waits_until_what_took_over_is_ready() -> None:
    def done(entry: InstanceMemory, health: Health, began: float = NOW) -> bool:
        kept = memory(entry)
        state = observed(GOOD, BAD, health={GOOD.ref: health})
        items = assess(desired(NEW), state, CONTEXT)
        plan = plan_for([NEW], state, kept)
        rows = instance_statuses(desired(NEW), state, items, plan, kept, {})
        return converged(desired(NEW), plan, rows, kept, began=began, now=NOW)

    starting = failing("startup", failures=1)
    assert not done(rolled_back(started_at=NOW - 1), starting)
    assert done(rolled_back(started_at=NOW - 1, ready_since=NOW), passed())
    assert done(rolled_back(started_at=NOW - 400), starting, NOW - 500)  # its budget is spent


# --- probes on disk -----------------------------------------------------------------------------

CHECKS = [
    HttpCheck("/health", "http", (("name", "x"),), (("system.argv", "y"),)),
    TcpCheck("grpc"),
    ExecCheck(("/bin/true", "${port}")),
    EngineCheck(),
]


@pytest.mark.parametrize("check", CHECKS)
def test_probes_come_back_from_the_memory(check: HttpCheck) -> None:
    moves = Progress("a_total", HttpCall("POST", "/a", "{}", 9.0), "/m", "metrics", 9.0)
    probes = Probes(Probe(check, 1.5, 2.0, 4), Probe(progress=moves), Probe(check, progress=moves))
    kept = Memory({MAM.id: rolled_back(ready_probes=probes)})
    assert reread(kept) == kept


@pytest.mark.parametrize(
    "data",
    [
        None,
        3,
        {"startup": 3},
        {"warmup": {"check": {"kind": "engine"}, "period": 1, "timeout": 1, "failures": 1}},
        {"startup": {"check": {"kind": "grpc"}, "period": 1, "timeout": 1, "failures": 1}},
        {
            "startup": {
                "check": {"kind": "engine", "x": 1},
                "period": 1,
                "timeout": 1,
                "failures": 1,
            }
        },
        {"startup": {"check": {"kind": "engine"}, "period": "1", "timeout": 1, "failures": 1}},
        {"startup": {"check": {"kind": "engine"}, "period": -1, "timeout": 1, "failures": 1}},
        {"startup": {"period": 1, "timeout": 1, "failures": 1}},
        {"readiness": {"progress": {"metric": "a", "request": {"path": "/", "headers": {}}}}},
    ],
)
def test_what_a_later_version_remembered_is_unknown(data: object) -> None:
    with pytest.raises(codec.BadDocument):
        codec.decode(Probes, data)
