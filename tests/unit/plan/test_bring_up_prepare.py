"""The command of `prepare` in a plan: when it is due, and what it is remembered by."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from mic_supervisor.model import Instance, Preparation, RunState
from mic_supervisor.plan import ledger
from mic_supervisor.plan.actions import Change, Prepare, Start
from mic_supervisor.plan.memory import InstanceMemory, Memory
from tests.unit.plan import builders as b

FETCH = Preparation(("/opt/fetch", "MAM-${port}", "${env:T}"), (("T", "s3cret"),))
ID = "MAM-aaaaaaaa"


def on(**values: Any) -> Instance:
    return b.on("MAM", 0, **{"prepare": FETCH, **values})


def prepare(
    instance: Instance, *found: Any, memory: Memory | None = None
) -> tuple[Change, Prepare]:
    plan = b.plan_for([instance], b.observed(*found), memory)
    (change,) = plan.changes
    (step,) = (one for one in change.steps if isinstance(one, Prepare))
    return change, step


def test_it_is_due_before_all_else_with_its_texts_filled_in() -> None:
    change, step = prepare(on())
    assert change.steps[0] is step
    start = change.steps[-1]
    assert isinstance(start, Start)
    (port,) = start.launch.identity.ports.values()
    assert step.command == ("/opt/fetch", f"MAM-{port}", "s3cret")
    assert "s3cret" not in repr(step)
    assert "    runs /opt/fetch first\n" in b.text(b.plan_for([on()], b.observed()))


def test_it_is_no_part_of_what_runs() -> None:
    runs = b.workload(on(prepare=None))
    assert b.plan_for([on()], b.observed(runs)).count == 0


def test_what_was_done_for_a_specification_is_not_done_again() -> None:
    change, step = prepare(on())
    memory = ledger.done(Memory({ID: InstanceMemory()}), step, change, b.NOW, {})
    assert memory.of(ID).prepared == step.key
    assert "s3cret" not in str(step.key)

    def command(instance: Instance) -> tuple[str, ...]:
        return prepare(instance, memory=memory)[1].command

    assert command(on()) == ()
    assert command(b.changed(on(), user="1000")) == step.command
    other = replace(FETCH, command=("/opt/fetch", "more"))
    assert command(on(prepare=other)) == ("/opt/fetch", "more")
    assert command(on(prepare=None)) == ()


def test_a_person_who_tries_again_what_failed_has_it_run_again() -> None:
    entry = replace(b.known(b.workload(on())).of(ID), prepared="key")
    well, failed = Memory({ID: entry}), Memory({ID: replace(entry, failures=1)})
    assert ledger.forgiven(well, [ID]).of(ID).prepared == "key"
    assert ledger.forgiven(failed, [ID]).of(ID).prepared is None


def test_a_crash_runs_nothing_again() -> None:
    process = on(workload=b.program())
    ended = b.workload(process, RunState.EXITED, exit_code=1)
    change, step = prepare(process, ended)
    memory = ledger.done(b.known(ended), step, change, b.NOW, {})
    assert prepare(process, ended, memory=memory)[1].command == ()
    box = b.workload(on(), RunState.EXITED, exit_code=1)
    (change,) = b.plan_for([on()], b.observed(box)).changes
    assert not [one for one in change.steps if isinstance(one, Prepare)]
