"""Which port an instance serves on: stable over restarts, and derived from its id alone."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping

from mic_supervisor.model import Port


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
    busy = set(taken)
    chosen: dict[str, int] = {}
    for port in ports:
        if port.host is not None:
            chosen[port.name] = port.host
        elif (kept := recorded.get(port.name)) is not None and kept not in busy:
            chosen[port.name] = kept
    busy |= set(chosen.values())
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
