"""Which backends there are: the built-in ones, then those that other packages bring."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, Any, cast

from mic_supervisor.errors import MicError

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

    from mic_supervisor.backends import Backend

GROUP = "mic_supervisor.backends"

_BUILT_IN = {
    "comfyui": "mic_supervisor.backends.comfyui:ComfyUIBackend",
    "container": "mic_supervisor.backends.container:ContainerBackend",
    "process": "mic_supervisor.backends.process:ProcessBackend",
    "triton": "mic_supervisor.backends.triton:TritonBackend",
    "vllm": "mic_supervisor.backends.vllm:VllmBackend",
}


def _installed() -> Iterable[EntryPoint]:
    # Reading the metadata of every installed package takes longer than everything else that a
    # command like `check` does, so it waits until a name is not a built-in one.
    from importlib.metadata import entry_points

    return entry_points(group=GROUP)


class Registry:
    """Backends by name. A built-in one cannot be replaced by a plug-in of the same name."""

    def __init__(self, installed: Callable[[], Iterable[EntryPoint]] = _installed) -> None:
        self._installed = cache(lambda: tuple(installed()))
        self._loaded: dict[str, Backend] = {}

    def names(self) -> tuple[str, ...]:
        """Every name that `get` knows, sorted; a plug-in's too, whether or not it works."""
        return tuple(sorted({*_BUILT_IN, *(entry.name for entry in self._installed())}))

    def get(self, name: str) -> Backend | None:
        """The backend of this name; None: nobody has it.

        Raises MicError when it is a plug-in that cannot be used; the others are not concerned.
        """
        if name not in self._loaded:
            if (target := _BUILT_IN.get(name)) is not None:
                module, _, attribute = target.partition(":")
                self._loaded[name] = getattr(import_module(module), attribute)()
            else:
                entries = [entry for entry in self._installed() if entry.name == name]
                if not entries:
                    return None
                self._loaded[name] = _plug_in(name, entries)
        return self._loaded[name]


def _plug_in(name: str, entries: list[EntryPoint]) -> Backend:
    targets = sorted({entry.value for entry in entries})
    if len(targets) > 1:
        raise MicError(
            f"cannot use backend {name}: two packages bring it, as {' and '.join(targets)}",
            hint="uninstall one of them",
        )
    hint = f"upgrade or uninstall the package that brings {targets[0]}"
    try:
        made = entries[0].load()
        backend = made() if isinstance(made, type) else made
    # Importing a plug-in runs a stranger's code: whatever it raises concerns this plug-in alone.
    except Exception as error:
        raise MicError(
            f"cannot use backend {name}: {targets[0]} does not load: "
            f"{type(error).__name__}: {error}",
            hint=hint,
        ) from error
    if lacks := _lacks(name, backend):
        raise MicError(f"cannot use backend {name}: {targets[0]} {lacks}", hint=hint)
    return cast("Backend", backend)


def _lacks(name: str, backend: Any) -> str | None:
    """What keeps an object from being the backend `name`, as the end of a sentence."""
    from pydantic import BaseModel

    from mic_supervisor.config.options import ModelOptions

    if getattr(backend, "name", None) != name:
        return f"calls itself {getattr(backend, 'name', None)!r}"
    for attribute, base in (("Settings", BaseModel), ("Options", ModelOptions)):
        value = getattr(backend, attribute, None)
        if not (isinstance(value, type) and issubclass(value, base)):
            return f"has no {attribute} that derives from {base.__name__}"
    for method in ("compile", "placement_state", "load_failure"):
        if not callable(getattr(backend, method, None)):
            return f"has no method {method}"
    return None
