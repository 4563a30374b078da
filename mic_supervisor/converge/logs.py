"""Whose log is meant by a name, and its lines: for a command, and for the daemon's session."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from mic_supervisor.config.names import composed, is_called, shown_id
from mic_supervisor.errors import MicError
from mic_supervisor.model import ObservedState, ObservedWorkload
from mic_supervisor.plan.assess import is_alive, workloads
from mic_supervisor.plan.selection import gpus_called
from mic_supervisor.runtimes import Runtime

_MOST_LINES = 10_000  # that the daemon reads for somebody
_MOST = 4 << 20  # characters of them


@dataclass(frozen=True, slots=True)
class Log:
    """`found` are an instance's workloads, the one that runs, or ran last, first. `server` is its
    id where it is the server of the model that was named. `called` is the id as people know it.
    """

    found: tuple[ObservedWorkload, ...]
    server: str | None
    called: str = ""

    def lines(
        self,
        runtimes: Mapping[str, Runtime],
        *,
        tail: int | None,
        follow: bool = False,
        previous: bool = False,
    ) -> Iterable[str]:
        """With `previous`, of the workload that was replaced, else of the run before in the same
        workload. Raises MicError, perhaps with the first line.
        """
        first, *others = self.found
        runtime = runtimes[first.runtime]
        if not previous:
            return runtime.logs(first, tail=tail, follow=follow)
        if others:
            return runtime.logs(others[0], tail=tail)
        return runtime.previous_logs(first, tail=tail)

    def last(
        self, runtimes: Mapping[str, Runtime], *, tail: int | None, previous: bool, share: int = 1
    ) -> tuple[list[str], bool]:
        """The last lines, as many as fit into an answer that `share` logs are to be in, and whether
        that left some out.
        """
        longest = max(1, _MOST_LINES // share)
        most = longest if tail is None else min(tail, longest)
        kept: deque[str] = deque()
        count = size = 0
        for line in self.lines(runtimes, tail=most, previous=previous):
            kept.append(line)
            count, size = count + 1, size + len(line)
            while size > _MOST // share:
                size -= len(kept.popleft())
        return [*kept], len(kept) < count or (count == longest != tail)


def last_of_each(
    logs: list[Log], runtimes: Mapping[str, Runtime], *, tail: int | None, previous: bool
) -> tuple[list[str], bool]:
    """As `Log.last`; of several each line has the name of its instance before it, and one that
    cannot be read says why in its lines.
    """
    if len(logs) == 1:
        return logs[0].last(runtimes, tail=tail, previous=previous)
    lines: list[str] = []
    cut = False
    for log in logs:
        try:
            found, less = log.last(runtimes, tail=tail, previous=previous, share=len(logs))
        except MicError as error:
            found, less = [f"error: {error.message}"], False
        lines += (f"{log.called} | {line}" for line in found)
        cut |= less
    return lines, cut


def logs_of(
    name: str | None, observed: ObservedState, server_of: Callable[[str], str | None]
) -> list[Log]:
    """The logs of instances, by an id, a model or a GPU; None: of all that there is. `server_of`
    knows the id of the server of several that has a model. Raises MicError where there is none.
    """
    wanted = composed(name or "")
    everything = [*workloads(observed)]
    models = {item.identity.instance: item.identity.model for item in everything}
    called = {one: shown_id(one, model) for one, model in models.items()}
    ids = {*models} if name is None else {wanted} & models.keys()
    ids = ids or {one for one, model in models.items() if is_called(wanted, one, [model])}
    server = None if ids else server_of(wanted)
    if server is not None and server in models:
        ids = {server}
    ids = ids or _on_gpu(wanted, observed, everything)
    if not ids:
        for view in observed.runtimes:
            if view.error is not None:
                raise MicError(f"cannot look for {name}: {view.error}", hint=view.hint)
        known = ", ".join(sorted(called.values()))
        if name is None:
            raise MicError("cannot show any log: nothing of ours runs here")
        raise MicError(
            f"cannot show the log of {name}: there is no such instance",
            hint=f"there is {known}" if known else "nothing of ours runs here",
        )
    everything.sort(key=lambda item: (not is_alive(item), -(item.created_at or 0.0)))
    by_id = {one: [item for item in everything if item.identity.instance == one] for one in ids}
    return [Log(tuple(by_id[one]), server, called[one]) for one in sorted(ids)]


def _on_gpu(name: str, observed: ObservedState, everything: list[ObservedWorkload]) -> set[str]:
    gpus = [(gpu.uuid, gpu.number, gpu.pci_bus_id) for gpu in observed.inventory.gpus]
    uuids = gpus_called(name, gpus)
    ids = {item.identity.instance for item in everything if uuids & {*item.identity.gpus}}
    alive = {item.identity.instance for item in everything if is_alive(item)}
    return ids & alive or ids  # what was there before has left its GPU to another one
