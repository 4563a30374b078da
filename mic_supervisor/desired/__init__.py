"""From a configuration and this machine's GPUs to desired state. Reads what the file refers to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from mic_supervisor.backends import Backend
from mic_supervisor.backends.registry import Registry
from mic_supervisor.config.document import Config
from mic_supervisor.desired.bind import bind
from mic_supervisor.desired.compile import Compiler, Servers, backend_of, unsatisfiable_entry
from mic_supervisor.errors import CompileError
from mic_supervisor.model import DesiredState, EndpointsHook, GpuInventory, Instance


def desired_state(
    config: Config,
    inventory: GpuInventory,
    kept: Mapping[str, str],
    registry: Registry,
    instance_data: Path,
) -> DesiredState:
    """Bind the file's keys to GPUs and compile every model for its GPUs.

    `kept` are the bindings of earlier generations. `instance_data` is the directory in which each
    instance may have one of its own. What cannot be compiled blocks its own entry.
    """
    binding = bind(config.entries, inventory, kept)
    compiler = Compiler(config, registry, instance_data)
    servers = Servers(compiler, inventory, binding, kept)
    instances: list[Instance] = []
    unsatisfiable = [*binding.unsatisfiable]
    kept_empty: list[str] = []
    for bound in binding.entries:
        if bound.instance is None:
            kept_empty += [gpu.uuid for gpu in bound.gpus]
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
        bindings=tuple(sorted({*binding.bindings, *servers.bindings})),
        warnings=binding.warnings,
        config_hash=config.hash,
        hook=_hook(config),
        down=config.down,
    )


def _hook(config: Config) -> EndpointsHook | None:
    hooks = config.hooks
    if hooks is None or hooks.on_endpoints_change is None:
        return None
    return EndpointsHook(tuple(hooks.on_endpoints_change), hooks.timeout, hooks.settle)


def _unsatisfiable(state: DesiredState) -> bool:
    waits = state.waiting is not None and _unsatisfiable(state.waiting)
    return bool(state.unsatisfiable) or waits


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
        self._config = config
        self._waiting = waiting
        self._registry = registry
        self._instance_data = instance_data
        self._kept: tuple[object, DesiredState] | None = None

    @property
    def config(self) -> Config:
        return self._config

    def use(self, config: Config, waiting: Config | None = None) -> None:
        self._config = config
        self._waiting = waiting
        self._kept = None

    def state(self, inventory: GpuInventory, bindings: Mapping[str, str]) -> DesiredState:
        identity = (
            inventory.source,
            inventory.error,
            inventory.unopened,
            tuple((gpu.uuid, gpu.index, gpu.pci_bus_id) for gpu in inventory.gpus),
            tuple(sorted(bindings.items())),
        )
        kept = self._kept
        if kept is not None and kept[0] == identity and not _unsatisfiable(kept[1]):
            return kept[1]

        def compiled(config: Config) -> DesiredState:
            return desired_state(config, inventory, bindings, self._registry, self._instance_data)

        state = compiled(self._config)
        if self._waiting is not None:
            state = replace(state, waiting=compiled(self._waiting))
        self._kept = (identity, state)
        return state

    def backend(self, name: str) -> Backend:
        return backend_of(self._registry, name)
