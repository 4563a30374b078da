"""How claims fare: when one is given up, when nothing is left of it, and what a plan says of it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from mic_supervisor.model import (
    Claim,
    DesiredState,
    Ending,
    FleetEntry,
    GpuMemory,
    ObservedState,
    ObservedWorkload,
    RunState,
)
from mic_supervisor.plan.claims import fared, standing
from mic_supervisor.plan.health import Phase
from mic_supervisor.plan.look import Look, look
from mic_supervisor.plan.memory import Drained, Floor, InstanceMemory, Memory, Pause, Paused
from mic_supervisor.views.plan import to_text
from tests.unit.plan import builders as b

MAM = replace(b.on("MAM", 0, start_timeout=300.0), origin="claim")
ENTRY = FleetEntry(MAM.gpus, ("aaaaaaaa",), 1)
CLAIM = Claim("t", "MAM", 1, 500.0, "alice", "task 3", MAM.gpus, MAM.id, got_at=600.0)
RELEASED = Ending("released", "its claim was released")
GIB = 1 << 30


def file(claim: Claim, **values: Any) -> DesiredState:
    """What is desired where one GPU is handed over and the claim has it, or had."""
    held = claim.gpus is not None and claim.ending is None
    models = frozenset({claim.model})
    given = {"fleet": (ENTRY,), "claims": (claim,), "claim_grace": 120.0, "claimable": models}
    given |= values
    if not held:
        given.setdefault("kept_empty", MAM.gpus)
    return b.desired(*([MAM] if held else []), **given)


def seen(
    claim: Claim, observed: ObservedState, memory: Memory | None = None, now: float = b.NOW
) -> Look:
    observed = replace(observed, at=now)
    return look(file(claim), observed, memory or Memory(), now, b.CONTEXT)


def remembered(**values: Any) -> Memory:
    return Memory(instances={MAM.id: InstanceMemory(**values)})


def after(claim: Claim, found: Look, *busy: str) -> Claim:
    (changed,), over = fared((claim,), found, busy)
    assert over == ({changed.token} if changed.gpus is None and changed.ending else set())
    return changed


def up(**values: Any) -> ObservedWorkload:
    return b.workload(MAM, **values)


def test_one_that_is_ready_or_on_its_way_goes_on() -> None:
    for found in (b.observed(up()), b.observed()):
        assert after(CLAIM, seen(CLAIM, found)) == CLAIM


@pytest.mark.parametrize(
    "reason", ["not up within 300 s: GET /health answers 503", "it exited with 1"]
)
def test_one_that_was_never_ready_is_given_up_after_its_first_start(reason: str) -> None:
    entry = remembered(failures=1, attempt=_hash(), retry_at=1005.0, reason=reason)
    found = after(CLAIM, seen(CLAIM, b.observed(), entry))
    assert found.ending == Ending("failed", f"cannot serve MAM: its start failed: {reason}")


def test_one_that_was_ready_has_another_start() -> None:
    for failures, ends in ((1, False), (2, True)):
        entry = remembered(
            failures=failures, attempt=_hash(), ready=_hash(), retry_at=1005.0, reason="it ended"
        )
        found = after(CLAIM, seen(CLAIM, b.observed(), entry))
        assert (found.ending is not None) == ends
    assert found.ending is not None
    assert found.ending.text == (
        "cannot serve MAM: after it had been ready, its start failed: it ended"
    )


def test_what_serves_with_failures_behind_it_is_not_given_up() -> None:
    entry = remembered(failures=2, attempt=_hash(), ready=_hash())
    assert after(CLAIM, seen(CLAIM, b.observed(up()), entry)).ending is None
    degraded = b.observed(up(), health={up().ref: b.failing("readiness")})
    assert after(CLAIM, seen(CLAIM, degraded, entry)).ending is None


def test_one_that_is_held_up_is_given_up_when_that_lasts_longer_than_a_start() -> None:
    full = b.observed(gpus=[b.gpu(0, processes=(b.process(4121),))])
    claim = after(CLAIM, seen(CLAIM, full, now=1000.0))
    assert (claim.down_since, claim.ending) == (1000.0, None)
    assert after(claim, seen(claim, full, now=1299.0)).ending is None
    # That it is tried in between is no end of it; that it runs is.
    assert after(claim, seen(claim, b.observed(), now=1100.0)).down_since == 1000.0
    assert after(claim, seen(claim, b.observed(up()), now=1100.0)).down_since is None
    ending = after(claim, seen(claim, full, now=1300.0)).ending
    assert ending is not None
    assert ending.text.startswith(
        "cannot serve MAM: it could not start for its start_timeout of 300 s: GPU 0 is held by PID"
    )


def test_a_pause_gives_nothing_up() -> None:
    entry = remembered(failures=3, attempt=_hash())
    entry = replace(entry, paused=Paused({"MAM": Pause(1.0)}))
    claim = replace(CLAIM, down_since=1.0)
    assert after(claim, seen(claim, b.observed(), entry)).ending is None


def test_what_may_run_unseen_is_not_given_up_and_what_cannot_is() -> None:
    """An engine that is gone for longer than a start takes no model with it."""
    gone = b.observed(errors={"docker": "gone"}, last=[up()])
    shown = seen(CLAIM, gone, remembered(ready=_hash()))
    assert [row.phase for row in shown.statuses] == [Phase.BLOCKED]
    assert after(CLAIM, shown) == CLAIM
    nothing = b.observed(errors={"docker": "gone"}, last=[b.workload(b.on("MAM", 1))])
    claim = after(CLAIM, seen(CLAIM, nothing))
    assert (claim.down_since, claim.ending) == (1000.0, None)
    assert after(claim, seen(claim, nothing, now=1300.0)).ending is not None


def test_a_host_that_is_drained_ends_each_claim() -> None:
    memory = Memory(drained=Drained(600.0, "a new riser"))
    waiting = replace(CLAIM, gpus=None, instance="MAM-bbbbbbbb")
    for claim in (CLAIM, waiting):
        found = after(claim, seen(claim, b.observed(), memory))
        assert found.ending is not None and found.ending.kind == "drained"
        assert found.ending.text.startswith("cannot serve MAM: the host is drained since ")
        assert found.ending.hint == "mic-supervisor undrain"


# --- its end ------------------------------------------------------------------------------------

OVER = replace(CLAIM, ending=RELEASED)


def test_nothing_is_left_when_nothing_runs_and_the_driver_has_its_memory_back() -> None:
    def used(count: int, *processes: Any) -> ObservedState:
        memory = GpuMemory(24 * GIB, count * GIB, (24 - count) * GIB)
        return b.observed(gpus=[b.gpu(0, memory=memory, processes=processes)])

    floor = Memory(floors={b.uuid(0): Floor(0)})
    assert after(OVER, seen(OVER, b.observed(up()), floor)) == OVER
    listed = seen(OVER, used(5, b.process(9, of=MAM)), floor)
    assert after(OVER, listed).gpus == MAM.gpus
    claim = after(OVER, seen(OVER, used(5), floor))
    assert (claim.gpus, claim.gone_since) == (MAM.gpus, 1000.0)
    assert after(claim, seen(claim, used(5), floor, now=1029.0)).gpus == MAM.gpus
    # As a start, it waits for memory that nobody is listed for no longer than that.
    assert after(claim, seen(claim, used(5), floor, now=1031.0)).gpus is None
    assert after(claim, seen(claim, used(0), floor, now=1001.0)).gpus is None


def test_it_is_not_over_while_that_cannot_be_known() -> None:
    assert after(OVER, seen(OVER, b.observed(errors={"docker": "gone"}))).gpus == MAM.gpus
    assert after(OVER, seen(OVER, b.observed(nvml_error="gone"))).gpus == MAM.gpus
    assert after(OVER, seen(OVER, b.observed()), MAM.id).gpus == MAM.gpus
    assert after(OVER, seen(OVER, b.observed())).gpus is None
    # What an engine that is gone may run is known: nothing else has been started since.
    down = {"errors": {"docker": "gone"}}
    assert after(OVER, seen(OVER, b.observed(**down, last=[up()]))).gpus == MAM.gpus
    other = b.workload(b.on("MAM", 1))
    assert after(OVER, seen(OVER, b.observed(**down, last=[other]))).gpus is None


def test_a_gpu_that_fell_off_the_bus_holds_nobody() -> None:
    assert after(OVER, seen(OVER, b.observed(up(), gpus=[b.gpu(1)]))).gpus is None


# --- what is said -------------------------------------------------------------------------------


def plan_text(claim: Claim, *found: ObservedWorkload, **values: Any) -> str:
    shown = look(file(claim, **values), b.observed(*found), Memory(), b.NOW, b.CONTEXT)
    return to_text(shown.plan, shown.indices)


def test_a_plan_says_for_whom_something_is_started_and_why_it_is_removed() -> None:
    assert plan_text(CLAIM) == (
        "+ create   MAM-aaaaaaaa  GPU 0  nothing runs for it yet; claimed by alice (task 3)\n"
        "\n"
        "Plan: 1 to create.\n"
    )
    gone = replace(CLAIM, ending=Ending("vanished", "its holder vanished 120 s ago"))
    for claim, why in ((OVER, "its claim was released"), (gone, "its holder vanished 120 s ago")):
        assert f"- remove   MAM-aaaaaaaa  GPU 0  {why}\n" in plan_text(claim, up())
    nobody = replace(CLAIM, gpus=None, instance=None)
    left = "- remove   MAM-aaaaaaaa  GPU 0  the file hands its GPU over, and no claim has it\n"
    assert left in plan_text(nobody, up())


def test_an_end_needs_no_word_of_a_person() -> None:
    unconfirmed = replace(b.CONTEXT, confirmed=False)
    shown = look(file(OVER), b.observed(up()), Memory(), b.NOW, unconfirmed)
    assert [change.kind for change in shown.plan.changes] == ["remove"]


def test_without_a_daemon_what_is_claimed_stays_as_it_is() -> None:
    other = b.workload(b.changed(MAM, image="mam:0"))
    said = plan_text(CLAIM, other, claim_grace=None)
    assert said == (
        "! blocked  MAM-aaaaaaaa on GPU 0: it is claimed, and only the daemon knows by whom; would "
        "replace: its specification changed: image; claimed by alice (task 3)\n"
        "    hint: start it: systemctl start mic, or mic-supervisor run\n"
        "\n"
        "No changes; 1 blocked.\n"
    )
    assert plan_text(CLAIM, up(), claim_grace=None).endswith("No changes; 1 to adopt.\n")
    down = b.workload(MAM, RunState.EXITED)
    assert "only the daemon knows" in plan_text(CLAIM, down, claim_grace=None)


def test_how_a_claim_stands_in_words() -> None:
    def state(claim: Claim, found: ObservedState) -> tuple[str, str | None]:
        rows = {row.id: row for row in seen(claim, found).statuses}
        now = standing((claim,), claim, rows, file(claim, config_hash="x"))
        return now.state, now.phase

    away = replace(CLAIM, vanished_at=990.0)
    waits = replace(CLAIM, gpus=None, instance=None)
    assert state(CLAIM, b.observed(up())) == ("ready", "ready")
    assert state(CLAIM, b.observed()) == ("starting", "pending")
    assert state(away, b.observed(up())) == ("vanished", "ready")
    assert state(waits, b.observed()) == ("waiting", None)
    assert state(OVER, b.observed(up())) == ("releasing", "pending")


def test_what_one_waits_for_is_said() -> None:
    def why(size: int, **values: Any) -> str | None:
        claim = replace(CLAIM, gpus=None, instance=None, size=size)
        return standing((claim,), claim, {}, file(claim, **values)).reason

    assert why(1, config_hash="x") == "a GPU: it is number 1 of 1 in the queue"
    assert why(1) == "a valid file: none was accepted yet"
    word = "or a word on it: confirm with `mic-supervisor apply` or `mic-supervisor reload`"
    assert why(2, config_hash="x") == f"the file to hand over 2 at a time, {word}"
    assert why(1, config_hash="x", claimable=frozenset()) == f"the file to describe MAM, {word}"


def _hash() -> str:
    return b.assessment(MAM).hash
