"""Which backends there are: the built-in ones, then those that other packages bring."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, Any

import yaml

from mic_supervisor.backends import Backend, Recognised, plug_ins
from mic_supervisor.config.yaml import inline
from mic_supervisor.errors import MicError

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

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

    try:
        return entry_points(group=GROUP)
    # A package's metadata is text that anybody may have written, and one that cannot be parsed
    # raises whatever the parser stumbled over. It must not take the backends of others with it.
    except Exception:  # noqa: BLE001
        return _readable()


def _readable() -> Iterator[EntryPoint]:
    from importlib.metadata import distributions

    seen: set[str] = set()
    for package in distributions():
        try:
            name, entries = package.metadata["Name"], package.entry_points.select(group=GROUP)
        except Exception:  # noqa: BLE001 - as above
            continue
        if name not in seen:  # the first on the path hides the others, as for an import
            seen.add(name)
            yield from entries


def examples(names: Iterable[str]) -> str:
    """The examples of these backends, as YAML with the keys `backends:` and `models:`."""
    known = [_built_in(name).example for name in names if name in _BUILT_IN]
    settings = "".join(settings for settings, _ in known)
    models = "".join(model for _, model in known)
    others = (name for name in names if name not in _BUILT_IN)
    plugins = "".join(f"  # {name}: see the documentation of that plug-in\n" for name in others)
    return (f"backends:\n{settings}" if settings else "") + f"models:\n{models}{plugins}"


def recognise(
    command: Sequence[str], directory: str, exists: Callable[[str], bool]
) -> Recognised | None:
    """What a server that runs already would be as a model; see BackendBase."""
    found = (_built_in(name).recognise(command, directory, exists) for name in _BUILT_IN)
    return next((one for one in found if one is not None), None)


def _built_in(name: str) -> Any:
    module, _, attribute = _BUILT_IN[name].partition(":")
    return getattr(import_module(module), attribute)()


class Registry:
    """Backends by name. A built-in one cannot be replaced by a plug-in of the same name."""

    def __init__(self, installed: Callable[[], Iterable[EntryPoint]] = _installed) -> None:
        self._installed = cache(lambda: tuple(installed()))
        self._loaded: dict[str, Backend | MicError] = {}

    def names(self) -> tuple[str, ...]:
        """Every name that `get` knows, sorted; a plug-in's too, whether or not it works."""
        return tuple(sorted({*_BUILT_IN, *self.plug_ins()}))

    def plug_ins(self) -> tuple[str, ...]:
        """The names that other packages bring, sorted; also where a built-in one has that name."""
        return tuple(sorted({entry.name for entry in self._installed()}))

    def origin(self, name: str) -> str:
        """What brings the plug-in of this name: "mic-supervisor-x 1.0 (mic_x:XBackend)"."""
        sources = {plug_ins.source_of(entry) for entry in self._installed() if entry.name == name}
        return " and ".join(sorted(sources))

    def meant(self, name: str, given: Collection[str | int]) -> str | None:
        """A hint for who takes `name` for a backend, in a model with the keys `given`."""
        hints = (_built_in(one).meant_by(name, given) for one in _BUILT_IN)
        return next((hint for hint in hints if hint is not None), None)

    def example(self, name: str) -> str | None:
        """A model with this backend, as a map on one line; the plainest for a name of none."""
        known = _built_in(name if name in _BUILT_IN else "container")
        (model,) = yaml.safe_load(known.example[1]).values()
        return inline(model)

    def is_built_in(self, name: str) -> bool:
        return name in _BUILT_IN

    def get(self, name: str) -> Backend | None:
        """The backend of this name; None: nobody has it.

        Raises MicError when it is a plug-in that cannot be used; the others are not concerned. It
        is loaded once, whether or not that works.
        """
        if name not in self._loaded:
            if name in _BUILT_IN:
                self._loaded[name] = _built_in(name)
            else:
                entries = [entry for entry in self._installed() if entry.name == name]
                if not entries:
                    return None
                try:
                    self._loaded[name] = plug_ins.load(name, entries)
                except MicError as error:
                    self._loaded[name] = error
        found = self._loaded[name]
        if isinstance(found, MicError):
            raise MicError(found.message, hint=found.hint) from found.__cause__
        return found
