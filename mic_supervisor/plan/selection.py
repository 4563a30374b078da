"""Models and GPUs as a person names them: what is paused, and what a plan is limited to."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from mic_supervisor.desired.bind import bind
from mic_supervisor.errors import MicError
from mic_supervisor.model import DesiredState, GpuInventory, Instance


@dataclass(frozen=True, slots=True)
class Selection:
    """Models by their names, GPUs by their UUIDs."""

    models: frozenset[str] = frozenset()
    gpus: frozenset[str] = frozenset()

    def has(self, instance: Instance) -> bool:
        """Whether it is of one of the models, serves one, or has one of the GPUs."""
        served = any(item.model in self.models for item in instance.placements)
        return served or self.concerns(instance.model, instance.gpus)

    def concerns(self, model: str | None, gpus: Collection[str]) -> bool:
        return model in self.models or not self.gpus.isdisjoint(gpus)

    def called(self, indices: Mapping[str, int]) -> list[str]:
        """ "MAM", "GPU 3", and the UUID of a GPU that is not there."""
        known = sorted((indices[uuid], uuid) for uuid in self.gpus if uuid in indices)
        lost = sorted(uuid for uuid in self.gpus if uuid not in indices)
        return [*sorted(self.models), *(f"GPU {index}" for index, _ in known), *lost]


@dataclass(frozen=True, slots=True)
class Names:
    """What there is to be named. `uuids` are GPUs that need not be there: bound, or paused."""

    models: Collection[str]
    inventory: GpuInventory
    bindings: Mapping[str, str]
    uuids: Collection[str] = ()

    @classmethod
    def of(
        cls,
        desired: DesiredState,
        models: Iterable[str],
        inventory: GpuInventory,
        uuids: Iterable[str] = (),
    ) -> Names:
        """`models` are those of the file and of what runs."""
        bindings = dict(desired.bindings)
        given = {uuid for item in desired.instances for uuid in item.gpus}
        given |= {uuid for item in desired.unsatisfiable for uuid in item.gpus}
        known = {*bindings.values(), *given, *desired.kept_empty, *uuids}
        return cls(sorted({*models}), inventory, bindings, sorted(known))


def select(names: Iterable[str], there: Names, action: str) -> Selection:
    """What these name: a model, or a GPU by index, UUID or PCI bus id; a range or a group of them.

    Raises MicError "cannot ACTION: …" with what there is.
    """
    models: set[str] = set()
    gpus: set[str] = set()
    for name in names:
        of_model = _model(name, there)
        try:
            of_gpus = _gpus(name, there)
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


def _model(name: str, there: Names) -> str | None:
    from mic_supervisor.config.document import composed

    return composed(name) if composed(name) in there.models else None


def _gpus(name: str, there: Names) -> tuple[str, ...]:
    """The UUIDs. Raises MicError, with the reason alone."""
    from mic_supervisor.config.diagnostics import closest
    from mic_supervisor.config.document import BadKey, GpuEntry, Place, parse_gpu_key

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
        binding = bind([GpuEntry((key,), None, Place("", 0, 0))], there.inventory, there.bindings)
        if binding.entries:
            found.append(binding.entries[0].gpus[0].uuid)
            continue
        lost = binding.unsatisfiable[0]
        # One that fell off the bus can still be meant, as long as it is known which it was.
        if not lost.gpus or lost.gpus[0] not in there.uuids:
            raise MicError(lost.reason, hint=_there_is(there))
        found.append(lost.gpus[0])
    return tuple(found)


def _there_is(there: Names) -> str:
    parts = [f"models are {', '.join(there.models)}"] if there.models else []
    indices = ", ".join(str(gpu.index) for gpu in there.inventory.gpus)
    parts += [f"GPUs are {indices}"] if indices else []
    return "; ".join(parts) or "there is neither a model nor a GPU here"
