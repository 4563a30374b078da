"""From a configuration, claims and this machine's GPUs to desired state. Reads what the file refers
to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from mic_supervisor.backends import Backend
from mic_supervisor.backends.registry import Registry
from mic_supervisor.config.document import CONFIRM, NONE, Config, GpuEntry
from mic_supervisor.desired.bind import Binding, BoundEntry, bind
from mic_supervisor.desired.claims import ORIGIN, Claims
from mic_supervisor.desired.compile import Compiler, Servers, backend_of, unsatisfiable_entry
from mic_supervisor.errors import CompileError
from mic_supervisor.model import (
    Claim,
    DesiredState,
    FleetEntry,
    Gpu,
    GpuInventory,
    Hook,
    Instance,
    Unsatisfiable,
)


def desired_state(
    config: Config,
    inventory: GpuInventory,
    kept: Mapping[str, str],
    registry: Registry,
    instance_data: Path,
) -> DesiredState:
    """Bind the file's keys to GPUs and compile every model for its GPUs.

    `kept` are the bindings of earlier generations; GPUs that only a profile names that is not on
    keep theirs. `instance_data` is the directory in which each
    instance may have one of its own. What cannot be compiled blocks its own entry.
    """
    binding = bind(config.entries, inventory, kept)
    compiler = Compiler(config, registry, instance_data)
    servers = Servers(compiler, inventory, binding, kept)
    of_profiles = {e.keys: replace(e, model=None, fleet=False) for e in config.aside}
    aside = bind(of_profiles.values(), inventory, kept)
    instances: list[Instance] = []
    unsatisfiable = [*binding.unsatisfiable]
    kept_empty: list[str] = []
    fleet: list[FleetEntry] = []
    for bound in binding.entries:
        uuids = tuple(gpu.uuid for gpu in bound.gpus)
        if bound.entry.fleet:
            refused = servers.reserves(bound)
            trouble, hint = (None, None) if refused is None else (refused.reason, refused.hint)
            fleet.append(FleetEntry(uuids, bound.digits, len(uuids), trouble, hint))
            unsatisfiable += [refused] if refused is not None else []
            kept_empty += uuids if refused is None else ()
        elif bound.instance is None:
            kept_empty += uuids
        elif (refused := servers.reserves(bound)) is not None:
            unsatisfiable.append(refused)
        elif not servers.takes(bound):
            try:
                instances.append(compiler.instance(bound))
            except CompileError as error:
                unsatisfiable.append(unsatisfiable_entry(bound, error, (bound.instance,)))
    shared, shared_unsatisfiable = servers.compile()
    unsatisfiable = [
        item for item in unsatisfiable if not servers.reports(item)
    ] + shared_unsatisfiable
    if inventory.error_line is not None:
        unsatisfiable = [
            replace(item, reason=inventory.error_line, hint=None) for item in unsatisfiable
        ]
    return DesiredState(
        instances=tuple(sorted([*instances, *shared], key=lambda item: item.id)),
        kept_empty=tuple(kept_empty),
        unsatisfiable=tuple(unsatisfiable),
        bindings=tuple(sorted({*binding.bindings, *servers.bindings, *aside.bindings})),
        warnings=binding.warnings,
        config_hash=config.hash,
        hook=_hook(config, "on_endpoints_change"),
        on_transition=_hook(config, "on_transition"),
        profile=config.profile,
        aside=_aside(config, aside),
        fleet=(*fleet, *binding.lost_fleet),
        claimable=config.claimable,
        down=config.down,
    )


def _aside(config: Config, binding: Binding) -> tuple[tuple[str, str], ...]:
    """See DesiredState. `binding` is of the GPUs of these entries."""
    uuids = {bound.entry.keys: bound.gpus[0].uuid for bound in binding.entries}
    there = [entry for entry in config.aside if entry.keys in uuids]
    found = [(uuids[entry.keys], entry.value) for entry in there if entry.value != NONE]
    served = [(uuid, config.servers[model]) for uuid, model in found if model in config.servers]
    return tuple(sorted({*found, *served}))


def _hook(config: Config, name: str) -> Hook | None:
    hooks = config.hooks
    command = getattr(hooks, name, None)
    if hooks is None or command is None:
        return None
    return Hook(tuple(command), hooks.timeout, hooks.settle, name)


def _unsatisfiable(state: DesiredState) -> bool:
    waits = state.waiting is not None and _unsatisfiable(state.waiting)
    return bool(state.unsatisfiable) or waits


@dataclass(frozen=True, slots=True, eq=False)
class _Used:
    """What `use` brought; each time another one, also of the same files."""

    config: Config
    waiting: Config | None
    claimed: dict[object, Instance] = field(default_factory=dict)  # what `_instance` gave


class FileDesired:
    """Desired state from a loaded configuration.

    Compiling reads templates and env files; the result is kept until the GPUs or their bindings
    change or `use` brings another configuration. While an entry cannot be compiled it is tried
    again each time: the missing file may have come. `waiting` is a configuration that is followed
    only once a person says so; until then it is compiled to show what it would change.
    """

    def __init__(
        self,
        config: Config,
        registry: Registry,
        instance_data: Path,
        waiting: Config | None = None,
    ) -> None:
        self._used = _Used(config, waiting)
        self._registry = registry
        self._instance_data = instance_data
        self._kept: tuple[_Used, object, DesiredState] | None = None  # what `state` gave last
        self._last: dict[tuple[str, tuple[str, ...]], Instance] = {}  # of claims, by any file

    @property
    def config(self) -> Config:
        return self._used.config

    @property
    def waiting(self) -> Config | None:
        return self._used.waiting

    def use(self, config: Config, waiting: Config | None = None) -> None:
        self._used = _Used(config, waiting)

    def state(self, inventory: GpuInventory, bindings: Mapping[str, str]) -> DesiredState:
        used = self._used
        identity = (
            inventory.source,
            inventory.error,
            inventory.unopened,
            tuple((gpu.uuid, gpu.index, gpu.pci_bus_id, gpu.mig) for gpu in inventory.gpus),
            tuple(sorted(bindings.items())),
        )
        if self._kept is not None:
            of, looked_at, state = self._kept
            if of is used and looked_at == identity and not _unsatisfiable(state):
                return state

        def compiled(config: Config) -> DesiredState:
            return desired_state(config, inventory, bindings, self._registry, self._instance_data)

        state = compiled(used.config)
        if used.waiting is not None:
            state = replace(state, waiting=compiled(used.waiting))
        self._kept = (used, identity, state)
        return state

    def with_claims(
        self, state: DesiredState, claims: Claims, inventory: GpuInventory
    ) -> DesiredState:
        """What `state` gave last, with an instance for each claim that has GPUs. Blocking, too.

        What runs for a claim goes on as it was while the file only lacks its model or its GPUs, and
        nobody has confirmed that yet.
        """
        assert self._kept is not None  # the state is of it
        used, waiting = self._kept[0], state.waiting
        if waiting is not None and used.waiting is not None:
            offered = [{*entry.gpus} for entry in waiting.fleet]
            kept = tuple(one for one in claims if one.gpus and {*one.gpus} in offered)
            waiting = self._with(used, used.waiting, waiting, kept, inventory)
        return replace(self._with(used, used.config, state, claims, inventory), waiting=waiting)

    def _with(
        self,
        used: _Used,
        config: Config,
        state: DesiredState,
        claims: Claims,
        inventory: GpuInventory,
    ) -> DesiredState:
        there = {gpu.uuid: gpu for gpu in inventory.gpus}
        entries = {entry.gpus: entry for entry in state.fleet}
        instances = [*state.instances]
        unsatisfiable = [*state.unsatisfiable]
        warnings = [*state.warnings]
        had: set[str] = set()
        for claim in claims:
            if claim.gpus is None or claim.instance is None or claim.ending is not None:
                continue
            had |= {*claim.gpus}
            entry = entries.get(claim.gpus)
            if entry is None or claim.model not in config.models:
                what = "hands its GPUs over" if entry is None else f"describes {claim.model}"
                warnings.append(
                    f"{claim.instance}: the file no longer {what}; taking it back waits to be "
                    f"confirmed: {CONFIRM}"
                )
            try:
                if entry is not None and entry.trouble is not None:
                    raise CompileError(entry.trouble, hint=entry.hint)
                instances.append(self._instance(used, config, claim, there))
            except CompileError as error:
                unsatisfiable = [one for one in unsatisfiable if one.gpus != claim.gpus]
                unsatisfiable.append(
                    Unsatisfiable(
                        subject=f"{claim.model} on {', '.join(claim.gpus)}",
                        reason=error.message,
                        gpus=claim.gpus,
                        instances=(claim.instance,),
                        model=claim.model,
                        hint=error.hint,
                    )
                )
        return replace(
            state,
            instances=tuple(sorted(instances, key=lambda item: item.id)),
            unsatisfiable=tuple(unsatisfiable),
            kept_empty=tuple(uuid for uuid in state.kept_empty if uuid not in had),
            warnings=tuple(warnings),
            claims=claims,
        )

    def _instance(
        self, used: _Used, config: Config, claim: Claim, there: Mapping[str, Gpu]
    ) -> Instance:
        """Raises CompileError."""
        assert claim.gpus is not None and claim.instance is not None  # it has had its turn
        last = self._last.get((claim.model, claim.gpus))
        missing = next((uuid for uuid in claim.gpus if uuid not in there), None)
        if missing is not None:
            raise CompileError(f"{missing} is not in this machine")
        if claim.model not in config.models:
            if last is None:
                raise CompileError(f"the file no longer describes {claim.model}", hint=CONFIRM)
            return last
        gpus = tuple(there[uuid] for uuid in claim.gpus)
        identity = tuple((gpu.uuid, gpu.index, gpu.pci_bus_id) for gpu in gpus)
        key = (config.hash, claim.model, identity)
        if (known := used.claimed.get(key)) is None:
            entry = GpuEntry((), claim.model, config.models[claim.model].location)
            compiler = Compiler(config, self._registry, self._instance_data)
            made = compiler.instance(BoundEntry(entry, gpus, claim.instance))
            known = used.claimed[key] = replace(made, origin=ORIGIN)
        if config is used.config:  # else it waits, and nothing is as it says
            self._last[claim.model, claim.gpus] = known
        return known

    def backend(self, name: str) -> Backend:
        return backend_of(self._registry, name)
