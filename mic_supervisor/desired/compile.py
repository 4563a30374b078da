"""From models and GPUs to instances: one for each entry, or one for a server that entries share.

Which entries share a server, their backend says. The server has the GPUs of its entries, or those
that are reserved for it, in the order of their places on the bus: so a container counts them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TypeVar

from mic_supervisor.backends import Backend, CompileRequest, Member
from mic_supervisor.backends.registry import Registry
from mic_supervisor.config.document import Config, GpuEntry, Location, parse_gpu_key
from mic_supervisor.config.names import safe_name
from mic_supervisor.desired.bind import Binding, BoundEntry, bind
from mic_supervisor.errors import CompileError
from mic_supervisor.host.files import read_in_time
from mic_supervisor.model import Gpu, GpuInventory, Instance, Placement, Unsatisfiable
from mic_supervisor.text import quoted

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Compiler:
    """Asks backends. `directory` is the one in which each instance may have one of its own."""

    config: Config
    registry: Registry
    directory: Path

    def instance(self, bound: BoundEntry) -> Instance:
        """The instance of an entry. Raises CompileError."""
        assert bound.entry.model is not None and bound.instance is not None  # it has a model
        definition = self.config.models[bound.entry.model]
        if definition.fault is not None:
            raise CompileError(definition.fault, hint=definition.hint)
        backend = backend_of(self.registry, definition.backend)
        request = self.request(
            definition.backend, definition.name, bound.instance, definition.options, bound.gpus
        )
        compiled = called(definition.backend, definition.name, lambda: backend.compile(request))
        return replace(compiled, location=str(bound.entry.location))

    def request(
        self, backend: str, model: str, instance: str, options: object, gpus: tuple[Gpu, ...]
    ) -> CompileRequest:
        return CompileRequest(
            model=model,
            instance=instance,
            options=options,
            settings=self.config.backends[backend],
            gpus=gpus,
            read_text=read_in_time,
            variables=self.config.variables,
            directory=self.directory / instance,
        )


def backend_of(registry: Registry, name: str) -> Backend:
    backend = registry.get(name)
    if backend is None:
        raise CompileError(f"backend {name} is no longer installed")
    return backend


def called(backend: str, what: str, call: Callable[[], T]) -> T:
    """What a backend answers. Raises CompileError, whatever it raises."""
    try:
        return call()
    except CompileError:
        raise
    # A backend may be a plug-in of another package: whatever it raises concerns its own models
    # alone.
    except Exception as error:
        said = quoted(f"{type(error).__name__}: {error}")
        raise CompileError(
            f"backend {backend} cannot compile {what}: {said}",
            hint="this is a defect of the backend; report it there",
        ) from error


def unsatisfiable_entry(
    bound: BoundEntry, error: CompileError, instances: tuple[str, ...]
) -> Unsatisfiable:
    numbers = ",".join(str(gpu.number) for gpu in bound.gpus)
    return Unsatisfiable(
        subject=f"{bound.entry.value} on GPU {numbers}",
        reason=error.message,
        gpus=tuple(gpu.uuid for gpu in bound.gpus),
        instances=instances,
        model=bound.entry.model,
        hint=error.hint,
    )


# --- servers that entries share -------------------------------------------------------------


@dataclass(slots=True)
class _Server:
    """One server, while the entries are gone through. `unsatisfiable` keep it from being
    followed."""

    name: str
    backend: Backend
    reserved: list[Gpu] = field(default_factory=list)
    entries: list[BoundEntry] = field(default_factory=list)
    unsatisfiable: list[Unsatisfiable] = field(default_factory=list)

    @property
    def instance(self) -> str:
        return safe_name(self.name)


class Servers:
    """The shared servers of one desired state."""

    def __init__(
        self, compiler: Compiler, inventory: GpuInventory, binding: Binding, kept: Mapping[str, str]
    ) -> None:
        self.bindings: list[tuple[str, str]] = []
        self._compiler = compiler
        self._config = compiler.config
        self._servers: dict[tuple[str, str], _Server] = {}
        self._reported: list[Unsatisfiable] = []
        for bound in binding.entries:
            if (server := self._server(bound.entry.model)) is not None:
                server.entries.append(bound)
        for lost in binding.unsatisfiable:
            if (server := self._server(lost.model)) is not None:
                server.unsatisfiable.append(lost)
                self._reported.append(lost)
        known = {**kept, **dict(binding.bindings)}
        for server in self._servers.values():
            self._reserve(server, inventory, known)

    def takes(self, bound: BoundEntry) -> bool:
        """Whether an entry is part of a shared server."""
        return any(bound in server.entries for server in self._servers.values())

    def reports(self, refused: Unsatisfiable) -> bool:
        """Whether what is wrong with an entry is reported for its server."""
        return refused in self._reported

    def reserves(self, bound: BoundEntry) -> Unsatisfiable | None:
        """Why an entry cannot have its GPU: a server of others has it for itself."""
        for server in self._servers.values():
            taken = {gpu.uuid for gpu in server.reserved} & {gpu.uuid for gpu in bound.gpus}
            if taken and bound not in server.entries:
                cause = CompileError(
                    f"its GPU is reserved for {server.instance}",
                    hint=f"take it out of `gpus` under backends.{server.backend.name}",
                )
                ids = (bound.instance,) if bound.instance is not None else ()
                return unsatisfiable_entry(bound, cause, ids)
        return None

    def compile(self) -> tuple[list[Instance], list[Unsatisfiable]]:
        """The servers that can be followed, and what of the file cannot be.

        A server that loses a GPU, or has an unsatisfiable entry, is frozen as a whole: to start it
        anew with a smaller set would end everything else in it.
        """
        instances: list[Instance] = []
        unsatisfiable: list[Unsatisfiable] = []
        for _, server in sorted(self._servers.items()):
            if server.unsatisfiable:
                unsatisfiable.append(
                    _frozen(server, server.unsatisfiable[0].reason, server.unsatisfiable[0].hint)
                )
                continue
            if not server.entries:
                continue
            try:
                made, failed = self._compile(server)
            except CompileError as error:
                unsatisfiable.append(_frozen(server, error.message, error.hint))
            else:
                instances.append(made)
                unsatisfiable += failed
        return instances, unsatisfiable

    def _compile(self, server: _Server) -> tuple[Instance, list[Unsatisfiable]]:
        gpus = _in_bus_order([*server.reserved, *(g for b in server.entries for g in b.gpus)])
        if len(gpus) > 1 and any(gpu.parent is not None for gpu in gpus):
            raise CompileError(
                "it has several GPUs, and one of them is a MIG slice: CUDA shows a process one "
                "slice and no other GPU",
                hint=f"set `server: per-gpu` under backends.{server.backend.name}",
            )
        if server.reserved:
            own = {gpu.uuid for gpu in server.reserved}
            if outside := [gpu for gpu in gpus if gpu.uuid not in own]:
                numbers = ", ".join(str(gpu.number) for gpu in outside)
                raise CompileError(
                    f"the file has a model of it on GPU {numbers}, which is not reserved for it",
                    hint=f"add it to `gpus` under backends.{server.backend.name}",
                )
        members: dict[str, Member] = {}
        for bound in server.entries:
            definition = self._config.models[str(bound.entry.model)]
            before = members[definition.name].gpus if definition.name in members else ()
            placed = _in_bus_order([*before, *bound.gpus])
            members[definition.name] = Member(definition.name, definition.options, placed)
        name = server.backend.name
        options = next(iter(members.values())).options
        request = self._compiler.request(name, server.name, server.instance, options, gpus)
        placements: list[Placement] = []
        failed: list[Unsatisfiable] = []
        for member in members.values():
            try:
                make = partial(server.backend.compile_placement, request, member)
                made = called(name, member.model, make)
                placements.append(replace(made, entry=member.model))
            except CompileError as error:
                failed += [
                    unsatisfiable_entry(bound, error, (f"{server.instance}/{member.model}",))
                    for bound in server.entries
                    if bound.entry.model == member.model
                ]
        server_made = called(
            name,
            server.name,
            lambda: server.backend.compile_server(request, [*members.values()], placements),
        )
        return replace(server_made, location=str(server.entries[0].entry.location)), failed

    def _server(self, model: str | None) -> _Server | None:
        found = self._config.servers.get(model or "")
        if model is None or found is None:
            return None
        name = self._config.models[model].backend
        backend = self._compiler.registry.get(name)
        if backend is None:
            return None  # as will show where the entry itself is compiled
        return self._servers.setdefault((name, found), _Server(found, backend))

    def _reserve(self, server: _Server, inventory: GpuInventory, kept: Mapping[str, str]) -> None:
        settings = self._config.backends[server.backend.name]
        for text in server.backend.reserved(settings):
            (key,) = parse_gpu_key(text).keys
            bound = bind([GpuEntry((key,), None, Location("", 0, 0))], inventory, kept)
            self.bindings += bound.bindings
            server.unsatisfiable += bound.unsatisfiable
            server.reserved += [gpu for item in bound.entries for gpu in item.gpus]


def _frozen(server: _Server, reason: str, hint: str | None) -> Unsatisfiable:
    """A server that cannot be followed is left as it is, with all that it has."""
    gpus = [*server.reserved, *(gpu for bound in server.entries for gpu in bound.gpus)]
    uuids = [uuid for refused in server.unsatisfiable for uuid in refused.gpus]
    return Unsatisfiable(
        subject=server.instance,
        reason=reason,
        gpus=tuple(dict.fromkeys([*(gpu.uuid for gpu in gpus), *uuids])),
        instances=(server.instance,),
        model=server.instance,
        hint=hint,
    )


def _in_bus_order(gpus: Iterable[Gpu]) -> tuple[Gpu, ...]:
    unique = {gpu.uuid: gpu for gpu in gpus}.values()
    return tuple(sorted(unique, key=lambda gpu: ((gpu.pci_bus_id or "").lower(), gpu.index)))
