"""Which port an instance serves on: stable over restarts, and derived from its id alone."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Mapping, Sequence

from mic_supervisor.model import ObservedState, Port
from mic_supervisor.plan.assess import Assessment, is_alive, workloads


class Ports:
    """Who has which port of this machine."""

    def __init__(self, observed: ObservedState) -> None:
        self._ours: dict[int, set[str]] = {}
        self._serving: set[int] = set()
        for workload in workloads(observed):
            for number in workload.identity.ports.values():
                self._ours.setdefault(number, set()).add(workload.identity.instance)
                if is_alive(workload):
                    self._serving.add(number)
        self._strangers: dict[int, str] = {}
        for listener in observed.listeners or ():
            if listener.port not in self._serving:
                who = f"{listener.name} (PID {listener.pid})" if listener.pid else "another program"
                self._strangers[listener.port] = who
        for who, numbers in sorted(
            (f"{view.runtime} {stranger.name}", stranger.ports)
            for view in observed.runtimes
            for stranger in view.strangers
            if stranger.running
        ):
            self._strangers.update(dict.fromkeys(numbers, who))

    def taken(self, instance: str) -> set[int]:
        """Numbers that `instance` cannot have. Its own workloads' ports are free to it."""
        ours = {number for number, owners in self._ours.items() if owners - {instance}}
        return ours | set(self._strangers)

    def stranger(self, number: int) -> str | None:
        return self._strangers.get(number)


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
        known = [w for w in (item.match, *item.alive, *item.ended) if w is not None]
        numbers = choose(
            instance.id,
            instance.workload.ports,
            recorded=known[0].identity.ports if known else {},
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
