"""From a configuration and this machine's GPUs to desired state. Reads what the file refers to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from mic_supervisor.backends import Backend, CompileRequest
from mic_supervisor.errors import CompileError
from mic_supervisor.model import DesiredState, GpuInventory, Instance, Unsatisfiable
from mic_supervisor.plan.bind import BoundEntry, bind

if TYPE_CHECKING:
    from mic_supervisor.backends.registry import Registry
    from mic_supervisor.config.document import Config


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
    instances: list[Instance] = []
    unsatisfiable = list(binding.unsatisfiable)
    if inventory.error is not None:
        unsatisfiable = [replace(item, reason=inventory.error, hint=None) for item in unsatisfiable]
    kept_empty: list[str] = []
    for bound in binding.entries:
        if bound.instance is None:
            kept_empty += [gpu.uuid for gpu in bound.gpus]
            continue
        try:
            instances.append(_compile(config, bound, bound.instance, registry, instance_data))
        except CompileError as error:
            indices = ",".join(str(gpu.index) for gpu in bound.gpus)
            unsatisfiable.append(
                Unsatisfiable(
                    subject=f"{bound.entry.model} on GPU {indices}",
                    reason=error.message,
                    gpus=tuple(gpu.uuid for gpu in bound.gpus),
                    instances=(bound.instance,),
                    model=bound.entry.model,
                    hint=error.hint,
                )
            )
    return DesiredState(
        instances=tuple(sorted(instances, key=lambda item: item.id)),
        kept_empty=tuple(kept_empty),
        unsatisfiable=tuple(unsatisfiable),
        bindings=binding.bindings,
        warnings=binding.warnings,
        config_hash=config.hash,
    )


class FileDesired:
    """Desired state from a loaded configuration.

    Compiling reads templates and env files; the result is kept until the GPUs or their bindings
    change or `use` brings another configuration. While an entry cannot be compiled it is tried
    again each time: the missing file may have come.
    """

    def __init__(self, config: Config, registry: Registry, instance_data: Path) -> None:
        self._config = config
        self._registry = registry
        self._instance_data = instance_data
        self._kept: tuple[object, DesiredState] | None = None

    @property
    def config(self) -> Config:
        return self._config

    def use(self, config: Config) -> None:
        self._config = config
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
        if kept is not None and kept[0] == identity and not kept[1].unsatisfiable:
            return kept[1]
        state = desired_state(
            self._config, inventory, bindings, self._registry, self._instance_data
        )
        self._kept = (identity, state)
        return state

    def backend(self, name: str) -> Backend:
        backend = self._registry.get(name)
        if backend is None:
            raise CompileError(f"backend {name} is not installed any more")
        return backend


def _compile(
    config: Config, bound: BoundEntry, instance: str, registry: Registry, instance_data: Path
) -> Instance:
    assert bound.entry.model is not None  # `none` has no instance
    definition = config.models[bound.entry.model]
    backend = registry.get(definition.backend)
    if backend is None:
        raise CompileError(f"backend {definition.backend} is not installed any more")
    request = CompileRequest(
        model=definition.name,
        instance=instance,
        options=definition.options,
        settings=config.backends[definition.backend],
        gpus=bound.gpus,
        read_text=_read_text,
        variables=config.variables,
        directory=instance_data / instance,
    )
    try:
        compiled = backend.compile(request)
    except CompileError:
        raise
    # A backend may be a stranger's plug-in: whatever it raises concerns its own models alone.
    except Exception as error:
        raise CompileError(
            f"backend {definition.backend} cannot compile {definition.name}: "
            f"{type(error).__name__}: {error}",
            hint="this is a defect of the backend; report it there",
        ) from error
    return replace(compiled, place=str(bound.entry.place))


def _read_text(path: Path) -> str:
    return path.read_text(encoding="utf-8")
