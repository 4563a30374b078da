"""Fills in what was left open in a workload: ports, indices, variables, its name.

A port is stable over restarts, and derived from the instance's id alone.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace

from mic_supervisor import codec
from mic_supervisor.model import (
    ContainerSpec,
    Gpu,
    Identity,
    Launch,
    Limits,
    Listener,
    Near,
    ObservedState,
    Pairs,
    Port,
    Preparation,
    Workload,
)
from mic_supervisor.plan import spec as specs
from mic_supervisor.plan.assess import Assessment, Context, is_alive, workloads
from mic_supervisor.text import printable

_PLACEHOLDER = re.compile(
    r"\$\{(port|gpu_indices)(?::([a-z]+))?\}|\$\{env:([A-Za-z_][A-Za-z0-9_]*)\}"
)


def launch(
    assessment: Assessment, ports: Mapping[str, int], indices: Mapping[str, int], context: Context
) -> Launch:
    """What to create for an instance, with these host ports. `indices` maps UUIDs to indices."""
    instance = assessment.instance
    identity = Identity(
        scope=context.scope,
        host=context.host,
        instance=instance.id,
        model=instance.model,
        backend=instance.backend,
        gpus=instance.gpus,
        ports=dict(ports),
        spec=assessment.spec,
        spec_hash=specs.spec_hash(assessment.spec),
        schema=specs.SCHEMA,
        origin=instance.origin,
    )
    return Launch(
        name=given_name(identity),
        runtime=assessment.runtime,
        identity=identity,
        spec=fill(instance.workload, ports, listed(instance.gpus, indices)),
    )


def near_of(limits: Limits, uuids: Collection[str], gpus: Mapping[str, Gpu]) -> Near | None:
    """What is next to any of these GPUs, where the limits ask for that.

    None: it is confined to nothing. So it is where the driver does not say it of each of the GPUs.
    """
    known = [near for uuid in uuids if uuid in gpus and (near := gpus[uuid].near) is not None]
    if limits.numa is None or not known or len(known) < len(uuids):
        return None
    cpus = {number for near in known for number in near.cpus}
    nodes = {number for near in known for number in near.nodes}
    whole = all(near.nodes for near in known)
    return Near(tuple(sorted(cpus)), tuple(sorted(nodes)) if whole else ())


def given_name(identity: Identity) -> str:
    """The name that a workload with this identity is created with.

    It follows from what the workload carries, so that a copy is known by having another one. Do not
    change it: what runs since an earlier version would be taken for a copy.
    """
    # The ports are part of the name: where a port had to be chosen anew, the container that
    # recorded the old one may still be there.
    parts = [identity.spec_hash, sorted(identity.ports.items()), list(identity.gpus)]
    unique = hashlib.sha256(codec.canonical(parts).encode()).hexdigest()[:8]
    return f"mic-{identity.scope}-{identity.instance}-{unique}"


def listed(gpus: Iterable[str], indices: Mapping[str, int]) -> str:
    """What `${gpu_indices}` stands for: "0,1"."""
    return ",".join(str(indices[uuid]) for uuid in gpus if uuid in indices)


def text_of(workload: Workload, value: str, ports: Mapping[str, int], indices: str) -> str:
    """`value` with every `${…}` that belongs to the workload replaced."""
    variables = dict(workload.variables)

    def one(match: re.Match[str]) -> str:
        if match[3]:
            return variables[match[3]]
        if match[1] == "gpu_indices":
            return indices
        return str(ports[match[2] or "http"])

    return _PLACEHOLDER.sub(one, value)


def fill(workload: Workload, ports: Mapping[str, int], indices: str) -> Workload:
    """The workload with every `${…}` replaced and its environment merged.

    A key of `env` wins over the same key in `env_file`.
    """

    def text(value: str) -> str:
        return text_of(workload, value, ports, indices)

    env: Pairs = tuple(
        sorted({**dict(workload.file_env), **{k: text(v) for k, v in workload.env}}.items())
    )
    filled_ports = tuple(
        Port(port.name, ports[port.name], port.container or ports[port.name])
        for port in workload.ports
    )
    command = tuple(text(item) for item in workload.command)
    if isinstance(workload, ContainerSpec) and workload.entrypoint is not None:
        workload = replace(workload, entrypoint=tuple(text(item) for item in workload.entrypoint))
    if isinstance(workload, ContainerSpec) and workload.digest is not None:
        workload = replace(workload, image=f"{workload.image}@{workload.digest}", digest=None)
    return replace(
        workload, command=command, env=env, file_env=(), variables=(), ports=filled_ports
    )


def preparation(
    workload: Workload, asked: Preparation, identity: Identity, indices: Mapping[str, int]
) -> tuple[str, ...]:
    """The command of `prepare`, with every `${…}` replaced."""
    own, listing = replace(workload, variables=asked.variables), listed(identity.gpus, indices)
    return tuple(text_of(own, item, identity.ports, listing) for item in asked.command)


# --- ports --------------------------------------------------------------------------------------


class Ports:
    """Who has which port of this machine."""

    def __init__(self, observed: ObservedState) -> None:
        self._ours: dict[int, set[str]] = {}
        self._serving: set[int] = set()
        last = [workload for view in observed.runtimes for workload in view.last or ()]
        for workload in (*workloads(observed), *last):
            for number in workload.identity.ports.values():
                self._ours.setdefault(number, set()).add(workload.identity.instance)
                if is_alive(workload):
                    self._serving.add(number)
        self._foreign: dict[int, str] = {}
        self._addresses: dict[int, Collection[str]] = {}
        for listener in observed.listeners or ():
            if listener.port not in self._serving:
                who = _named(listener)
                self._foreign[listener.port] = who
                self._addresses[listener.port] = listener.addresses
        for who, numbers in sorted(
            (f"{view.runtime} {foreign.name}", foreign.ports)
            for view in observed.runtimes
            for foreign in view.foreign_workloads
            if foreign.running
        ):
            self._foreign.update(dict.fromkeys(numbers, who))
            for number in numbers:
                self._addresses.pop(number, None)

    def taken(self, instance: str) -> set[int]:
        """Numbers that `instance` cannot have. Its own workloads' ports are free to it."""
        ours = {number for number, owners in self._ours.items() if owners - {instance}}
        return ours | set(self._foreign)

    def foreign(self, number: int, listen: str) -> str | None:
        """Who else has this port where something is to listen on `listen`; None: nobody."""
        addresses = self._addresses.get(number)
        if addresses and not any(meet(one, listen) for one in addresses):
            return None
        return self._foreign.get(number)


def _named(listener: Listener) -> str:
    if listener.pid is None:
        return printable(listener.name or "another program")
    return f"{printable(listener.name or '?')} (PID {listener.pid})"


def meet(one: str, other: str) -> bool:
    """Whether two addresses cannot have the same port: one is the other, or a wildcard over it."""
    both = {one.removeprefix("::ffff:"), other.removeprefix("::ffff:")}
    if len(both) == 1 or "::" in both:  # which takes IPv4 along unless a socket says not to
        return True
    return "0.0.0.0" in both and not any(":" in address for address in both)


def assign(
    assessments: Sequence[Assessment],
    taken: Callable[[str], Collection[int]],
    port_range: tuple[int, int],
) -> dict[str, dict[str, int] | None]:
    """The numbers of every instance, by its id; None where the range has none left for it.

    `taken` says which numbers an instance cannot have. Nothing else that happens in a plan enters:
    an obstacle on one GPU must not move a port on another.
    """
    reserved = {
        port.host
        for item in assessments
        for port in item.instance.workload.ports
        if port.host is not None
    }
    out: dict[str, dict[str, int] | None] = {}
    for item in assessments:
        if item.match is not None and item.runs:
            out[item.instance.id] = dict(item.match.identity.ports)  # it holds them
            reserved |= set(item.match.identity.ports.values())
    for item in sorted(assessments, key=lambda item: item.instance.id):
        instance = item.instance
        if instance.id in out:
            continue
        numbers = choose(
            instance.id,
            instance.workload.ports,
            recorded=item.ours[0].identity.ports if item.ours else {},
            taken={*taken(instance.id), *reserved},
            port_range=port_range,
        )
        out[instance.id] = numbers
        reserved |= set((numbers or {}).values())
    return out


def choose(
    instance: str,
    ports: tuple[Port, ...],
    *,
    recorded: Mapping[str, int],
    taken: Collection[int],
    port_range: tuple[int, int],
) -> dict[str, int] | None:
    """A number for each port's name, or None when the range has none left.

    A fixed port stays as it is, taken or not: whether that blocks is not decided here. A recorded
    one is kept while nobody else has it. The rest is the next free number after the id's own.
    """
    first, last = port_range
    size = last - first + 1
    chosen = {port.name: port.host for port in ports if port.host is not None}
    busy = {*taken, *chosen.values()}
    for port in ports:
        kept = recorded.get(port.name)
        if port.host is None and kept is not None and kept not in busy:
            chosen[port.name] = kept
            busy.add(kept)
    start = int.from_bytes(hashlib.sha256(instance.encode()).digest()[:4], "big") % size
    candidates = (first + (start + step) % size for step in range(size))
    free = (number for number in candidates if number not in busy)
    for port in ports:
        if port.name not in chosen:
            number = next(free, None)
            if number is None:
                return None
            chosen[port.name] = number
    return chosen
