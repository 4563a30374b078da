"""Models and GPUs as a person names them: what is paused, and what a plan is limited to.

And what is said of pauses to who wants to act in spite of one, or to end one.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field

from mic_supervisor.config.diagnostics import closest
from mic_supervisor.config.document import (
    BadKey,
    GpuEntry,
    GpuKey,
    Location,
    parse_gpu_key,
)
from mic_supervisor.config.names import composed, shown_id
from mic_supervisor.desired.bind import bind
from mic_supervisor.errors import MicError
from mic_supervisor.model import DesiredState, GpuInventory
from mic_supervisor.plan.actions import Change, Prepare, Restart, Start, Stop
from mic_supervisor.plan.assess import Assessment, Selection
from mic_supervisor.plan.memory import Drained, Memory, Pause, Paused
from mic_supervisor.plan.spec import spec_hash
from mic_supervisor.plan.words import Code, Reason, because, moment


@dataclass(frozen=True, slots=True)
class Names:
    """What there is to be named. `uuids` are GPUs that need not be there: bound, or paused.
    `instances` has the model and the GPUs of each, by its id."""

    models: Collection[str]
    inventory: GpuInventory
    bindings: Mapping[str, str]
    uuids: Collection[str] = ()
    instances: Mapping[str, tuple[str, tuple[str, ...]]] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        desired: DesiredState,
        models: Iterable[str],
        inventory: GpuInventory,
        uuids: Iterable[str] = (),
        instances: Mapping[str, tuple[str, tuple[str, ...]]] = {},
    ) -> Names:
        """`models` are those of the file and of what runs."""
        bindings = dict(desired.bindings)
        given = {uuid for item in desired.instances for uuid in item.gpus}
        given |= {uuid for item in desired.unsatisfiable for uuid in item.gpus}
        known = {*bindings.values(), *given, *desired.kept_empty, *uuids}
        return cls(sorted({*models}), inventory, bindings, sorted(known), instances)


def select(names: Iterable[str], there: Names, action: str) -> Selection:
    """What these name: a model; an instance by its id, which stands for its GPUs; or a GPU by its
    index, UUID or PCI bus id, a range or a group of them.

    Raises MicError "cannot ACTION: …" with what there is.
    """
    models: set[str] = set()
    gpus: set[str] = set()
    for name in names:
        of_model = composed(name) if composed(name) in there.models else None
        of_instances = [
            gpus
            for instance, (model, gpus) in there.instances.items()
            if composed(name) in (instance, shown_id(instance, model))
        ]
        try:
            of_gpus = of_instances[0] if of_instances else _gpus(name, there)
        except MicError as error:
            if of_model is None:
                raise MicError(f"cannot {action}: {error.message}", hint=error.hint) from error
            of_gpus = ()
        if of_model is not None and of_gpus:
            raise MicError(
                f"cannot {action}: {name} is a model and a GPU",
                hint=f"name the GPU by its UUID, {', '.join(of_gpus)}, or give the model another "
                "name",
            )
        if of_model is not None:
            models.add(of_model)
        gpus.update(of_gpus)
    return Selection(frozenset(models), frozenset(gpus))


def _gpus(name: str, there: Names) -> tuple[str, ...]:
    """The UUIDs. Raises MicError, with the reason alone."""
    try:
        keys = parse_gpu_key(name).keys
    except BadKey as error:
        if name[:4].upper() in ("GPU-", "MIG-") or not name.strip("0123456789-, "):
            raise MicError(f"{name!r}: {error}", hint=error.hint) from error
        meant = closest(name, there.models)
        raise MicError(
            f"there is no model and no GPU {name!r}",
            hint=f"did you mean {meant}?" if meant is not None else _there_is(there),
        ) from error
    found: list[str] = []
    for key in keys:
        binding = bind(
            [GpuEntry((key,), None, Location("", 0, 0))], there.inventory, there.bindings
        )
        if binding.entries:
            found.append(binding.entries[0].gpus[0].uuid)
            continue
        lost = binding.unsatisfiable[0]
        # One that fell off the bus can still be meant, as long as it is known which it was.
        if not lost.gpus or lost.gpus[0] not in there.uuids:
            raise MicError(lost.reason, hint=_there_is(there))
        found.append(lost.gpus[0])
    return tuple(found)


def gpus_called(
    name: str, there: Iterable[tuple[str, int | str | None, str | None]]
) -> frozenset[str]:
    """The UUIDs of those GPUs that a person calls so; `there` has UUID, index and PCI bus id of
    each. None where it is no name of a GPU, or of none of these."""
    try:
        keys = {*parse_gpu_key(name).keys}
    except BadKey:
        return frozenset()
    found = set()
    for uuid, index, bus in there:
        names = {GpuKey("uuid", uuid), GpuKey("index", str(index))}
        with suppress(BadKey):
            names |= {*parse_gpu_key(uuid).keys}
            names |= {*parse_gpu_key(bus).keys} if bus else set()
        if names & keys:
            found.add(uuid)
    return frozenset(found)


def _there_is(there: Names) -> str:
    parts = [f"models are {', '.join(there.models)}"] if there.models else []
    numbers = ", ".join(str(gpu.number) for gpu in there.inventory.gpus)
    parts += [f"GPUs are {numbers}"] if numbers else []
    return "; ".join(parts) or "there is neither a model nor a GPU here"


# --- pauses -------------------------------------------------------------------------------------


def since(pause: Pause, now: float) -> Reason:
    """ "paused since 12:04:10 (a new riser)"; with the date where that was not today."""
    note = f" ({pause.reason})" if pause.reason else ""
    return because(Code.PAUSED, since=moment(pause.since, now), note=note)


def drained(order: Drained, now: float) -> Reason:
    """ "the host is drained since 12:04:10 (a new riser), until it reboots"."""
    note = f" ({order.reason})" if order.reason else ""
    note += ", until it reboots" if order.boot is not None else ""
    return because(Code.DRAINED, since=moment(order.since, now), note=note)


def resume(names: Iterable[str]) -> str:
    """The way out of pauses."""
    return "; ".join(f"mic-supervisor resume {name}" for name in names)


def to_resume(names: Collection[str], there: Names, paused: Paused) -> Selection:
    """What these names mean that is paused; no name is everything. Raises MicError."""
    everything = Selection(frozenset(paused.models), frozenset(paused.gpus))
    if not names:
        return everything
    action = f"resume {' '.join(names)}"
    chosen = select(names, there, action)
    indices = there.inventory.indices
    free = Selection(chosen.models - everything.models, chosen.gpus - everything.gpus)
    if free.models or free.gpus:
        known = everything.called(indices)
        which = free.called(indices)
        raise MicError(
            f"cannot {action}: {', '.join(which)} {'is' if len(which) == 1 else 'are'} not paused",
            hint=f"paused {'is' if len(known) == 1 else 'are'} {', '.join(known)}"
            if known
            else "nothing is paused",
        )
    return chosen


def pause_on(
    paused: Paused, model: str, gpus: Collection[str], indices: Mapping[str, int], now: float
) -> tuple[str, str] | None:
    """("GPU 3 is paused since 12:04:10", the way out) for who would act on these; None: free."""
    paused_gpus = [uuid for uuid in gpus if uuid in paused.gpus]
    if model in paused.models:
        return f"{model} is {since(paused.models[model], now)}", resume([model])
    if paused_gpus:
        (name,) = Selection(gpus=frozenset(paused_gpus[:1])).called(indices)
        out = resume(str(indices.get(uuid, uuid)) for uuid in paused_gpus)
        return f"{name} is {since(paused.gpus[paused_gpus[0]], now)}", out
    return None


def free_of_pauses(
    found: Iterable[tuple[str, str, Collection[str]]],
    paused: Paused,
    action: str,
    indices: Mapping[str, int],
    now: float,
) -> list[str]:
    """Of instances, as (id, model, GPUs), the ids of those that are not paused.

    Raises MicError "cannot ACTION: …" where all of them are.
    """
    paused_gpus = {one: pause_on(paused, model, gpus, indices, now) for one, model, gpus in found}
    free = [instance for instance, why in paused_gpus.items() if why is None]
    reasons = [why for why in paused_gpus.values() if why is not None]
    if reasons and not free:
        reason, out = reasons[0]
        raise MicError(f"cannot {action}: {reason}", hint=out)
    return free


def is_held_back(memory: Memory, change: Change) -> bool:
    """Whether a person has paused what a change concerns, or drained the host, since it was
    planned."""
    if memory.drained is not None and any(isinstance(s, Start | Restart) for s in change.steps):
        return True
    gpus = {*change.gpus}
    for step in change.steps:
        gpus |= {*step.workload.identity.gpus} if isinstance(step, Stop) else set()
    return memory.paused.has(change.model, gpus)


def asked_for(
    changes: Iterable[Change], assessments: Mapping[str, Assessment]
) -> dict[str, str | None]:
    """What the file asks for of the instances of changes, as a hash; None: nothing."""
    found = ((change.instance, assessments.get(change.instance)) for change in changes)
    return {name: None if item is None else item.hash for name, item in found}


def given_up(
    memory: Memory,
    changes: Collection[Change],
    asked: Mapping[str, str | None],
    assessments: Mapping[str, Assessment],
) -> str | None:
    """Why nothing is to be stopped any more for changes of a lane; None: they go on.

    `asked` is what they were planned for, by `asked_for`.
    """
    if any(is_held_back(memory, change) for change in changes):
        return "paused" if memory.drained is None else "drained"
    if memory.drained is None and any(one.why.kind is Code.DRAINED for one in changes):
        return "undrained"
    return None if asked == asked_for(changes, assessments) else "something else was asked for"


def is_withdrawn(memory: Memory, item: Assessment | None, step: Prepare) -> bool:
    """Whether a preparation is not wanted any more; `item` is what the last round says of it."""
    if item is None or memory.drained is not None:
        return True
    if memory.paused.has(item.instance.model, item.gpus):
        return True
    same = spec_hash(item.spec) == step.launch.identity.spec_hash
    return not same or (bool(step.command) and item.instance.prepare != step.asked)
