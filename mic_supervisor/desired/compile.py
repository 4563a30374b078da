"""How a backend is asked to compile something, and what becomes of its refusals."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from mic_supervisor.backends import Backend, CompileRequest
from mic_supervisor.desired.bind import BoundEntry
from mic_supervisor.errors import CompileError
from mic_supervisor.model import Gpu, Unsatisfiable

if TYPE_CHECKING:
    from mic_supervisor.backends.registry import Registry
    from mic_supervisor.config.document import Config

T = TypeVar("T")


def backend_of(registry: Registry, name: str) -> Backend:
    backend = registry.get(name)
    if backend is None:
        raise CompileError(f"backend {name} is not installed any more")
    return backend


def called(backend: str, what: str, call: Callable[[], T]) -> T:
    """What a backend answers. Raises CompileError, whatever it raises."""
    try:
        return call()
    except CompileError:
        raise
    # A backend may be a stranger's plug-in: whatever it raises concerns its own models alone.
    except Exception as error:
        raise CompileError(
            f"backend {backend} cannot compile {what}: {type(error).__name__}: {error}",
            hint="this is a defect of the backend; report it there",
        ) from error


def request_for(
    config: Config,
    backend: str,
    model: str,
    instance: str,
    options: object,
    gpus: tuple[Gpu, ...],
    instance_data: Path,
) -> CompileRequest:
    return CompileRequest(
        model=model,
        instance=instance,
        options=options,
        settings=config.backends[backend],
        gpus=gpus,
        read_text=_read_text,
        variables=config.variables,
        directory=instance_data / instance,
    )


def unsatisfiable_entry(
    bound: BoundEntry, error: CompileError, instances: tuple[str, ...]
) -> Unsatisfiable:
    indices = ",".join(str(gpu.index) for gpu in bound.gpus)
    return Unsatisfiable(
        subject=f"{bound.entry.model} on GPU {indices}",
        reason=error.message,
        gpus=tuple(gpu.uuid for gpu in bound.gpus),
        instances=instances,
        model=bound.entry.model,
        hint=error.hint,
    )


def _read_text(path: Path) -> str:
    return path.read_text(encoding="utf-8")
