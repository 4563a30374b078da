"""A host process goes back to what it was ready with, where everything that it needs is known."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from mic_supervisor import codec
from mic_supervisor.model import Limits, Port, ProcessSpec, RunState
from mic_supervisor.plan import ledger
from mic_supervisor.plan.assess import assess
from mic_supervisor.plan.fallback import can_roll_back, fallback, rebuilt, relaunch
from mic_supervisor.plan.launch import fill
from mic_supervisor.plan.memory import InstanceMemory, Memory
from tests.unit.plan.builders import (
    CONTEXT,
    HTTP,
    NOW,
    assessment,
    changed,
    desired,
    failing,
    observed,
    on,
    passed,
    plan_for,
    program,
    reread,
    shortly,
    text,
    uuid,
    workload,
)

SECRETS = {
    "env": (("CUDA_VISIBLE_DEVICES", "x"), ("TOKEN", "§a")),
    "file_env": (("KEY", "§b"),),
    "variables": (("NAME", "§c"),),
}
WHOLE = ProcessSpec(
    command=("/opt/face", "--port", "${port}", "${env:NAME}", "${gpu_indices}"),
    env_file="/etc/face.env",
    ports=(HTTP, Port("metrics", 9000)),
    listen="0.0.0.0",
    user="ada",
    working_dir="/srv",
    limits=Limits(cpus=1.5, nofile=1024),
    stop_signal="SIGINT",
    stop_timeout=7.0,
    directories=("/srv/a", "/srv/b"),
    **SECRETS,
)
FACE = on("face", 0, workload=WHOLE)
NEW = changed(FACE, command=("/opt/face", "-2"))
GOOD = workload(FACE, ports={"http": 20003, "metrics": 9000}, started_at=NOW - 9)
BAD = workload(NEW, RunState.EXITED, ports={"http": 20003, "metrics": 9000}, created_at=200.0)
FAILED = "the new specification failed (it exited with 1)"


def ready_once(**values: object) -> InstanceMemory:
    """The memory of face, ready with its first specification, and with its second one running."""
    entry = InstanceMemory(
        started=BAD.name,
        ready="then",
        ready_workload=GOOD.name,
        ready_record=ledger.recorded(GOOD),
    )
    return replace(entry, **values)  # type: ignore[arg-type]


def test_the_whole_specification_comes_back() -> None:
    item = assessment(NEW, BAD)
    found = rebuilt(ledger.recorded(GOOD), item)
    assert found == WHOLE
    target = relaunch(ready_once().ready_record, found, {uuid(0): 3})  # type: ignore[arg-type]
    assert target.name == GOOD.name
    assert target.identity == GOOD.identity
    assert target.spec == fill(WHOLE, GOOD.identity.ports, "3")


@pytest.mark.parametrize(
    "new",
    [
        changed(NEW, env=(("CUDA_VISIBLE_DEVICES", "x"), ("TOKEN", "§other"))),
        changed(NEW, file_env=()),
        changed(NEW, variables=(("NAME", "§other"),)),
        replace(NEW, gpus=(uuid(1),)),
        replace(NEW, model="other"),
        replace(NEW, rollback=False),
    ],
)
def test_there_is_no_way_back_where_something_is_not_known_any_more(new: object) -> None:
    item = assess(desired(new), observed(BAD), CONTEXT)[0]  # type: ignore[arg-type]
    assert not can_roll_back(ready_once(), item)


def test_more_secrets_than_before_are_in_no_way() -> None:
    new = changed(NEW, env=(*SECRETS["env"], ("MORE", "§d")))
    assert rebuilt(ledger.recorded(GOOD), assessment(new, BAD)) == WHOLE


@pytest.mark.parametrize(
    "spec",
    [
        None,
        {},
        {"kind": "container", "image": "x"},
        {"kind": "process", "command": ["/x"], "colour": "blue"},
        {"kind": "process", "command": ["/x"], "limits": {"speed": 1}},
        {"kind": "process", "command": ["/x"], "ports": 3},
        {"kind": "process", "stop_timeout": 3.0},
    ],
)
def test_a_record_that_is_not_understood_is_no_way_back(spec: object) -> None:
    record = replace(
        ready_once().ready_record,  # type: ignore[type-var]
        identity=replace(GOOD.identity, spec=spec),  # type: ignore[arg-type]
    )
    assert rebuilt(record, assessment(NEW, BAD)) is None


def test_a_failure_leads_back_to_it() -> None:
    item = assessment(NEW, BAD)
    kept = ledger.observed(Memory({FACE.id: ready_once()}), [item], NOW, jitter=0.0)
    entry = kept.of(FACE.id)
    assert (entry.failed, entry.failed_reason, entry.retry_at) == (
        item.hash,
        "it exited with 1",
        NOW,
    )
    plan = plan_for([NEW], observed(BAD), kept)
    assert text(plan) == (
        "+ start    face-aaaaaaaa  GPU 0  rollback: it exited with 1\n"
        "    removes mic-test-face-aaaaaaaa-30e4675a\n"
        "\n"
        f"! blocked  face-aaaaaaaa on GPU 0: {FAILED}; the last good one runs\n"
        "    hint: change the file, or: mic-supervisor retry face-aaaaaaaa\n"
        "\n"
        "Plan: 1 to start; 1 blocked.\n"
    )
    assert shortly(plan, good=GOOD, bad=BAD) == [
        "prepare good",
        "remove bad <- prepare good",
        "release face-aaaaaaaa <- prepare good, remove bad",
        "start good <- release face-aaaaaaaa",
    ]
    assert "§" not in text(plan) + json.dumps(codec.encode(kept))
    again = ledger.observed(
        kept.with_instance(FACE.id, replace(entry, started=GOOD.name, started_at=NOW)),
        [assess(desired(NEW), observed(GOOD, health={GOOD.ref: passed()}), CONTEXT)[0]],
        NOW,
        jitter=0.0,
    )
    assert again.of(FACE.id).ready_since == NOW
    running = plan_for([NEW], observed(GOOD), again)
    assert running.changes == ()
    assert [item.reason for item in running.blocked] == [f"{FAILED}; the last good one runs"]


def rolled_back(**values: object) -> InstanceMemory:
    item = assessment(NEW, BAD)
    entry = ready_once(
        failures=1,
        attempt=item.hash,
        reason="it exited with 1",
        failed=item.hash,
        failed_reason="it exited with 1",
        started=GOOD.name,
        started_at=NOW - 9,
        retry_at=NOW - 1,
    )
    return replace(entry, **values)  # type: ignore[arg-type]


def test_its_crash_is_counted_and_answered_with_backoff() -> None:
    ended = replace(GOOD, state=RunState.EXITED, exit_code=139)
    item = assess(desired(NEW), observed(ended), CONTEXT)[0]
    kept = ledger.observed(Memory({FACE.id: rolled_back()}), [item], NOW, jitter=0.0)
    assert (kept.of(FACE.id).failures, kept.of(FACE.id).retry_at) == (2, NOW + 5)
    plan = plan_for([NEW], observed(ended), kept)
    assert [item.reason for item in plan.blocked] == [
        f"{FAILED}; the last good one failed as well; backoff: it exited with 139 (SIGSEGV)"
    ]
    later = plan_for([NEW], observed(ended), kept, now=NOW + 5)
    assert shortly(later, good=GOOD)[-1] == "start good <- release face-aaaaaaaa"


def test_one_that_hangs_is_started_anew() -> None:
    state = observed(GOOD, health={GOOD.ref: failing("liveness")})
    plan = plan_for([NEW], state, Memory({FACE.id: rolled_back()}))
    assert shortly(plan, good=GOOD) == [
        "prepare good",
        "stop good <- prepare good",
        "release face-aaaaaaaa <- stop good, prepare good",
        "start good <- release face-aaaaaaaa",
    ]


def test_when_a_secret_changes_the_file_is_another_one_and_is_tried() -> None:
    third = changed(NEW, env=(("TOKEN", "§other"),))
    plan = plan_for([third], observed(GOOD), Memory({FACE.id: rolled_back()}))
    assert [change.kind for change in plan.changes] == ["replace"]


def test_the_record_survives_in_the_memory() -> None:
    kept = Memory({FACE.id: rolled_back()})
    assert reread(kept) == kept


def test_of_a_container_nothing_is_kept_but_itself() -> None:
    mam = on("MAM", 0)
    assert ledger.recorded(workload(mam)) is None
    plain = on("plain", 0, workload=program())
    item = assessment(plain, workload(plain), health=passed())
    entry = ledger.observed(Memory(), [item], NOW, jitter=0.0).of(plain.id)
    assert entry.ready_record is not None
    assert fallback(entry, item) is None
