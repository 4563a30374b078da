"""The invariants, on states of every kind: those that can come about, and those that should not."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from random import Random
from typing import TypeVar

from hypothesis import given, settings
from hypothesis import strategies as st

from mic_supervisor.model import (
    DesiredState,
    ForeignWorkload,
    Instance,
    ObservedState,
    ObservedWorkload,
    RunState,
)
from mic_supervisor.plan.actions import (
    Create,
    Drain,
    Load,
    Plan,
    Prepare,
    Remove,
    Restart,
    Start,
    Step,
    Stop,
    Unload,
)
from mic_supervisor.plan.assess import assess, is_alive, workloads
from tests.support.examples import examples
from tests.unit.plan.builders import (
    NOW,
    changed,
    desired,
    gpu,
    observed,
    on,
    plan_for,
    process,
    text,
    trouble,
    uuid,
    workload,
)
from tests.unit.plan.cases import GPUS, STATES, Case, build, cases

Item = TypeVar("Item")


# --- reading a plan ---------------------------------------------------------------------------


def steps_of(plan: Plan) -> dict[str, Step]:
    return {step.id: step for change in plan.changes for step in change.steps}


def before(step: Step, steps: dict[str, Step]) -> set[str]:
    """The ids of all steps that a step comes after."""
    out: set[str] = set()
    waiting = [*step.depends_on]
    while waiting:
        one = waiting.pop()
        if one not in out:
            out.add(one)
            waiting += steps[one].depends_on
    return out


def starts(plan: Plan) -> dict[str, tuple[str, frozenset[str], frozenset[int]]]:
    """Step id -> instance, GPUs and ports of what it starts."""
    out = {}
    for step in steps_of(plan).values():
        if isinstance(step, Start):
            identity = step.launch.identity
        elif isinstance(step, Restart):
            identity = step.workload.identity
        else:
            continue
        ports = frozenset(identity.ports.values())
        out[step.id] = (step.instance, frozenset(identity.gpus), ports)
    return out


def subject(step: Step) -> ObservedWorkload | None:
    """The workload that a step is done to."""
    touching = Restart | Drain | Stop | Remove | Load | Unload
    return step.workload if isinstance(step, touching) else None


def alive(case: Case) -> list[ObservedWorkload]:
    return [item for item in workloads(case.observed) if is_alive(item)]


INVARIANTS: list[Callable[[Case], None]] = []


def invariant(check: Callable[[Case], None]) -> Callable[[Case], None]:
    """States take longer to make than to check, so that all checks share them."""
    INVARIANTS.append(check)
    return check


# --- the form of a plan -----------------------------------------------------------------------


@invariant
def ids_are_unique_and_dependencies_stay_in_their_lane_and_have_no_circles(
    case: Case,
) -> None:
    plan = case.plan
    ids = [step.id for change in plan.changes for step in change.steps]
    assert len(ids) == len(set(ids))
    steps = steps_of(plan)
    lane = {step.id: change.lane for change in plan.changes for step in change.steps}
    waits = {step.id for change in plan.changes if change.waits for step in change.steps}
    for step in steps.values():
        assert step.id not in before(step, steps)
        assert {lane[one] for one in step.depends_on} <= {lane[step.id]}
        if step.id not in waits:
            assert not waits & {*step.depends_on}
    for change in plan.changes:
        assert {step.instance for step in change.steps} <= {change.instance}
        assert change.cause
    blocked = {item.instance for item in plan.blocked}
    assert all(item.reason for item in plan.blocked)
    assert len(blocked) == len(plan.blocked), "one reason per instance, or status shows one of two"


# --- 1 ----------------------------------------------------------------------------------------


@invariant
def no_start_before_everything_alive_on_its_gpus_was_stopped(case: Case) -> None:
    plan = case.plan
    steps = steps_of(plan)
    taken: list[str] = []
    for start, (_, gpus, ports) in starts(plan).items():
        taken += sorted(gpus)
        earlier = before(steps[start], steps)
        for item in alive(case):
            if gpus & {*item.identity.gpus} or ports & {*item.identity.ports.values()}:
                stops = [s.id for s in steps.values() if isinstance(s, Stop) and s.workload == item]
                assert stops, f"{start} beside {item.name}"
                assert {*stops} <= earlier
    assert len(taken) == len(set(taken)), "a GPU is started on twice"


@invariant
def a_start_on_a_gpu_that_was_used_waits_for_its_release(case: Case) -> None:
    plan = case.plan
    steps = steps_of(plan)
    for start, (_, gpus, _) in starts(plan).items():
        earlier = [steps[one] for one in before(steps[start], steps)]
        stopped = [s for s in earlier if isinstance(s, Stop)]
        if any(gpus & {*s.workload.identity.gpus} for s in stopped):
            release = next(s for s in earlier if s.id.startswith("release "))
            assert {s.id for s in stopped} <= before(release, steps)


# --- 2 ----------------------------------------------------------------------------------------


@invariant
def unknown_is_never_absent(case: Case) -> None:
    plan = case.plan
    if case.observed.inventory.error is not None:
        assert plan.changes == ()
        return
    unread = {view.runtime for view in case.observed.runtimes if view.error is not None}
    running = {item.identity.instance for item in alive(case)}
    last = [item for view in case.observed.runtimes for item in view.last or ()]
    held = {uuid for item in last for uuid in item.identity.gpus}
    unknown = any(view.last is None for view in case.observed.runtimes if view.error is not None)
    for change in plan.changes:
        for step in change.steps:
            item = subject(step)
            assert item is None or item.runtime not in unread
            if isinstance(step, Prepare | Create | Start):
                assert step.launch.runtime not in unread
            if unread and isinstance(step, Start | Restart):
                # Nothing new, since its GPU is known to be its own, or known to be free.
                assert change.instance in running or not (unknown or held & {*change.gpus})
    known = {one.uuid: one for one in case.observed.inventory.gpus}
    for _, gpus, _ in starts(plan).values():
        assert all(known[one].processes is not None for one in gpus)


@invariant
def what_an_entry_in_trouble_may_mean_is_not_touched(case: Case) -> None:
    wanted = {item.id for item in case.desired.instances}
    for entry in case.desired.unsatisfiable:
        for step in steps_of(case.plan).values():
            item = subject(step)
            if item is not None and item.identity.instance not in wanted:
                assert not {*entry.gpus} & {*item.identity.gpus}


# --- 3, 4, 8 ----------------------------------------------------------------------------------


@invariant
def only_what_is_ours_is_touched_and_never_what_is_merely_missing(case: Case) -> None:
    ours = {item.ref for item in workloads(case.observed)}
    wanted = {item.id for item in case.desired.instances}
    named = {one for item in case.desired.instances for one in item.gpus}
    named |= {*case.desired.kept_empty}
    for change in case.plan.changes:
        for step in change.steps:
            item = subject(step)
            if item is None:
                assert change.instance in wanted
                continue
            assert item.ref in ours
            assert item.identity.instance == change.instance, "a stop hides in another's change"
            if item.identity.instance not in wanted and not case.context.confirmed:
                assert {*item.identity.gpus} <= named


@invariant
def nothing_starts_on_a_gpu_that_the_file_does_not_give_it(case: Case) -> None:
    gpus = {item.id: {*item.gpus} for item in case.desired.instances}
    for instance, found, _ in starts(case.plan).values():
        assert {*found} == gpus[instance]
        assert not {*found} & {*case.desired.kept_empty}


# --- 5 ----------------------------------------------------------------------------------------


@invariant
def the_order_in_which_things_are_listed_does_not_matter(case: Case) -> None:
    chance = Random(len(repr(case)))

    def mixed(items: Iterable[Item]) -> tuple[Item, ...]:
        out = list(items)
        chance.shuffle(out)
        return tuple(out)

    state = case.observed
    turned = replace(
        case,
        desired=replace(
            case.desired,
            instances=mixed(case.desired.instances),
            kept_empty=mixed(case.desired.kept_empty),
            unsatisfiable=mixed(case.desired.unsatisfiable),
        ),
        observed=replace(
            state,
            inventory=replace(state.inventory, gpus=mixed(state.inventory.gpus)),
            runtimes=mixed(
                replace(view, workloads=mixed(view.workloads)) for view in state.runtimes
            ),
            health=dict(mixed(state.health.items())),
        ),
        memory=replace(case.memory, instances=dict(mixed(case.memory.instances.items()))),
    )
    assert turned.plan == case.plan
    assert text(turned.plan) == text(case.plan)


@invariant
def what_runs_as_the_file_says_and_is_well_is_not_stopped(case: Case) -> None:
    plan = case.plan
    stopped = {s.workload.ref for s in steps_of(plan).values() if isinstance(s, Stop)}
    for item in assess(case.desired, case.observed, case.context, case.memory):
        entry = case.memory.of(item.instance.id)
        well = item.live_failure is None and item.overdue(None, NOW) is None
        asked = item.instance.id in case.context.forced or entry.failed == item.hash
        if item.runs and well and not asked and item.match is not None:
            assert item.match.ref not in stopped


# --- 7 ----------------------------------------------------------------------------------------


def obstacles(state: ObservedState, broken: Instance) -> list[tuple[DesiredState, ObservedState]]:
    """The same machine with something wrong about GPU 0."""
    wanted = desired(broken, build("B", (2, 3), 1))
    name = workload(broken).name

    def on_gpu_0(**values: object) -> ObservedState:
        found = tuple(
            replace(one, **values) if one.uuid == uuid(0) else one  # type: ignore[arg-type]
            for one in state.inventory.gpus
        )
        return replace(state, inventory=replace(state.inventory, gpus=found))

    docker, *others = state.runtimes
    foreign = replace(
        docker, foreign_workloads=(ForeignWorkload("docker", name, "x", reason="not ours"),)
    )
    return [
        (wanted, on_gpu_0(processes=None)),
        (wanted, on_gpu_0(processes=(process(4121),))),
        (wanted, replace(state, runtimes=(foreign, *others))),
        (wanted, replace(state, inventory=replace(state.inventory, gpus=state.inventory.gpus[1:]))),
        (desired(changed(broken, command=("${port:none}",)), build("B", (2, 3), 1)), state),
        (desired(build("B", (2, 3), 1), unsatisfiable=(trouble("x", "y", 0),)), state),
        (desired(build("B", (2, 3), 1)), state),
    ]


@given(
    st.lists(
        st.builds(build, st.sampled_from("ABP"), st.just((0,)), st.integers(1, 2)).map(workload)
    ),
    st.lists(
        st.builds(build, st.sampled_from("BPS"), st.just((2, 3)), st.integers(1, 2)), max_size=2
    ),
    STATES,
)
def test_what_is_wrong_on_one_gpu_changes_nothing_on_another(
    here: list[ObservedWorkload], there: list[Instance], how: RunState
) -> None:
    found = {(w.runtime, w.name): w for w in (*here, *(workload(item, how) for item in there))}
    state = observed(*found.values(), gpus=[gpu(index) for index in range(GPUS)])
    broken = build("A", (0,), 1)

    def elsewhere(wanted: DesiredState, given_state: ObservedState) -> list[object]:
        plan = plan_for(wanted, given_state)
        mine = {uuid(2), uuid(3)}
        changes = [change for change in plan.changes if mine & {*change.gpus}]
        return [*changes, *(item for item in plan.blocked if mine & {*item.gpus})]

    plain = elsewhere(desired(broken, build("B", (2, 3), 1)), state)
    for wanted, given_state in obstacles(state, broken):
        assert elsewhere(wanted, given_state) == plain


# --- 10 ---------------------------------------------------------------------------------------


@invariant
def nothing_is_stopped_before_what_follows_it_was_prepared(case: Case) -> None:
    plan = case.plan
    steps = steps_of(plan)
    for start, (instance, gpus, _) in starts(plan).items():
        early = {
            s.id
            for s in steps.values()
            if isinstance(s, Prepare | Create) and s.instance == instance
        }
        assert early <= before(steps[start], steps)
        for step in steps.values():
            if isinstance(step, Stop) and gpus & {*step.workload.identity.gpus}:
                assert early <= before(step, steps)


@invariant
def while_one_that_follows_cannot_start_what_runs_stays(case: Case) -> None:
    plan = case.plan
    starting = {instance for instance, _, _ in starts(plan).values()}
    assessed = {
        item.instance.id: item
        for item in assess(case.desired, case.observed, case.context, case.memory)
    }
    for step in steps_of(plan).values():
        if not isinstance(step, Stop):
            continue
        for item in assessed.values():
            shares = {*item.instance.gpus} & {*step.workload.identity.gpus}
            serves = any(
                w.ref != step.workload.ref for w in (*item.alive, item.match) if w and is_alive(w)
            )
            if shares and item.instance.id not in starting:
                assert serves, f"{step.id} leaves {item.instance.id} with nothing"


@invariant
def no_name_is_created_that_is_in_use(case: Case) -> None:
    names = {item.name for item in workloads(case.observed) if item.runtime == "docker"}
    for step in steps_of(case.plan).values():
        if isinstance(step, Create):
            assert step.launch.name not in names


# --- secrets ----------------------------------------------------------------------------------


@given(st.text(min_size=1), st.text(min_size=1))
def test_no_value_of_an_environment_is_in_a_plan(old: str, new: str) -> None:
    mam = on("MAM", 0)
    was = workload(changed(mam, env=(("TOKEN", f"§{old}"),), file_env=(("B", f"§{old}"),)))
    will = changed(mam, env=(("TOKEN", f"§{new}"),), variables=(("C", f"§{new}"),))
    plan = plan_for([will], observed(was))
    assert "§" not in text(plan) + repr(plan)


# --- all of them -------------------------------------------------------------------------------


def test_every_invariant_holds() -> None:
    seen: set[str] = set()

    @settings(max_examples=examples(400))
    @given(cases())
    def holds(case: Case) -> None:
        for check in INVARIANTS:
            check(case)
        plan = case.plan
        seen.update(type(step).__name__ for step in steps_of(plan).values())
        seen.update(change.kind for change in plan.changes)
        seen.update(item.reason.split(" ")[0] for item in plan.blocked)
        seen.update("waits" for change in plan.changes if change.waits)

    kinds = {"create", "start", "restart", "replace", "remove", "load", "adopt"}
    types = {"Prepare", "Create", "Start", "Restart", "Stop", "Release", "Remove", "Load"}
    reasons = {"backoff:", "the", "what", "it", "GPU"}
    # What a property says of starts and stops is worth nothing where there are none. The states
    # are drawn at random, so a rare kind may take another round.
    for _ in range(6):
        holds()
        if not (kinds | types | reasons) - seen:
            break
    assert len(INVARIANTS) == 12
    assert sorted((kinds | types | reasons) - seen) == []
