"""Backends that other packages bring: what one must have, and a guard around what it does.

A plug-in is code of another package in this process. Whatever is wrong with one is an error about
that one: it never keeps another backend from working, nor the plan from being made.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from functools import cache
from types import NoneType, UnionType
from typing import (
    TYPE_CHECKING,
    Any,
    Literal,
    TypeVar,
    Union,
    cast,
    get_args,
    get_origin,
    get_type_hints,
)

from pydantic import BaseModel

from mic_supervisor.backends import Ask, Backend, BackendBase, CompileRequest, Member
from mic_supervisor.config.options import ModelOptions
from mic_supervisor.errors import CompileError, MicError
from mic_supervisor.host.files import in_time
from mic_supervisor.model import (
    ContainerSpec,
    ExecCheck,
    HttpCheck,
    Instance,
    LoadState,
    Placement,
    PlacementState,
    Progress,
    TcpCheck,
)
from mic_supervisor.text import quoted

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

_LOADS_IN = 60.0  # seconds: a package may import much from a slow disk
_ANSWERS_IN = 60.0  # seconds; it may ask its server many things

_METHODS = ("compile", "placement_state", "load_failure", "is_drained")
# A name is a key of the file, a label, and part of a JSON pointer.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
_PLACEHOLDER = re.compile(r"\$\{([^{}]*)\}")
_DEFAULTS: Backend = cast(Any, BackendBase)()  # no backend: it cannot compile

T = TypeVar("T")


class Defect(Exception):
    """What a plug-in did instead of answering: it raised something, or does not return."""


def attempt(name: str, call: Callable[[], T], seconds: float = _ANSWERS_IN) -> T:
    """What code of the plug-in `name` gives. Raises Defect, and its own CompileError.

    Whatever else it raises must not take this program with it. Ctrl-C is not the plug-in's.
    """
    try:
        return in_time(("plug-in", name), call, seconds)
    except (CompileError, KeyboardInterrupt):
        raise
    except BaseException as error:
        raise Defect(_words(error)) from error


def source_of(entry: EntryPoint) -> str:
    """ "mic-supervisor-x 1.0 (mic_x:XBackend)"; without a package only what it names."""
    dist = getattr(entry, "dist", None)
    return entry.value if dist is None else f"{dist.name} {dist.version} ({entry.value})"


def load(name: str, entries: Sequence[EntryPoint]) -> Backend:
    """The backend that these entry points, all of one name, bring. Raises MicError."""
    sources = sorted({source_of(entry) for entry in entries})
    if len(sources) > 1:
        raise MicError(
            f"cannot use backend {name}: two packages bring it, as {' and '.join(sources)}",
            hint="uninstall one of them",
        )
    (source,) = sources
    hint = f"upgrade or uninstall the package that brings {source}"
    try:
        backend = attempt(name, lambda: _made(entries[0]), _LOADS_IN)
    except (Defect, CompileError) as error:
        raise MicError(
            f"cannot use backend {name}: {source} does not load: {error}", hint=hint
        ) from error
    try:
        lacks = attempt(name, lambda: _lacks(name, backend))
    except (Defect, CompileError) as error:
        lacks = f"cannot be looked at: {error}"
    if lacks:
        raise MicError(f"cannot use backend {name}: {source} {lacks}", hint=hint)
    return Guarded(backend, source)


def _made(entry: EntryPoint) -> Any:
    found = entry.load()
    return found() if isinstance(found, type) else found


def _lacks(name: str, backend: Any) -> str | None:
    """What keeps an object from being the backend `name`, as the end of a sentence."""
    if not _NAME.fullmatch(name):
        return "has a name that no file can use; it takes letters, digits, - and _"
    if getattr(backend, "name", None) != name:
        return f"calls itself {getattr(backend, 'name', None)!r}"
    for attribute, base in (("Settings", BaseModel), ("Options", ModelOptions)):
        value = getattr(backend, attribute, None)
        if not (isinstance(value, type) and issubclass(value, base)):
            return f"has no {attribute} that derives from {base.__name__}"
        if value.model_config.get("extra") != "forbid":
            return f"has {attribute} that take unknown keys; derive them from config.options.Strict"
        try:
            # Otherwise the schema of every backend would fail together with this one's.
            attempt(name, value.model_json_schema)
        except Defect as error:
            return f"has {attribute} that no schema can be made of: {error}"
    refused = getattr(backend.Options, "unavailable", None)
    if not isinstance(refused, Mapping) or not all(
        isinstance(item, str) for pair in refused.items() for item in pair
    ):
        return "has Options whose `unavailable` is no map from keys to reasons"
    for method in _METHODS:
        found = getattr(backend, method, None)
        if not callable(found) or getattr(found, "__func__", None) is BackendBase.compile:
            return f"has no method {method}"
    return None


class Guarded:
    """A plug-in behind the protocol `Backend`: it fails only in the ways that the protocol names.

    What later versions add to BackendBase is there even for a plug-in that does not derive from it.
    """

    def __init__(self, backend: Backend, source: str, timeout: float = _ANSWERS_IN) -> None:
        self.name = backend.name
        self.Settings = backend.Settings
        self.Options = backend.Options
        self._backend = backend
        self._source = source
        self._timeout = timeout

    def __getattr__(self, name: str) -> Any:
        # Only for what is not defined here.
        if name.startswith("__"):
            raise AttributeError(name)
        backend = self._backend
        return getattr(backend if hasattr(backend, name) else _DEFAULTS, name)

    def compile(self, request: CompileRequest) -> Instance:
        """As the plug-in does. Raises CompileError, too, where it gives what nobody can run."""
        return self._made(request, "compile", lambda made: misfit(made, request), request)

    def placement_state(
        self, placement: Placement, status: int | None, body: str
    ) -> PlacementState:
        """Unknown where the plug-in cannot tell."""
        try:
            state: PlacementState = self._call("placement_state", placement, status, body)
            fault = _type_fault(state, PlacementState, "its answer")
            if fault is None:
                reason = quoted(state.reason) if state.reason else None
                return replace(state, reason=reason)
        except (Defect, CompileError) as error:
            fault = quoted(str(error))
        reason = f"backend {self.name} cannot read its server's answer: {fault}"
        return PlacementState(placement.model, LoadState.UNKNOWN, reason=reason)

    def load_failure(self, answer: str, log: Sequence[str], model: str) -> str:
        """The server's own words where the plug-in has none."""
        # The failure itself is what the operator needs to hear of.
        words = self._safely("load_failure", answer, log, model)
        return (
            quoted(words) if isinstance(words, str) else _DEFAULTS.load_failure(answer, log, model)
        )

    def is_drained(self, status: int, body: str) -> bool:
        """Raises MicError where the plug-in cannot tell."""
        try:
            return attempt(self.name, lambda: bool(self._backend.is_drained(status, body)))
        except (Defect, CompileError) as error:
            raise MicError(
                f"backend {self.name} cannot tell whether it is drained: {quoted(str(error))}"
            ) from error

    # A plug-in that cannot say whether entries share a server has an instance for each.

    def server_of(self, settings: Any, model: str) -> str | None:
        found = self._safely("server_of", settings, model)
        return found if isinstance(found, str) and found else None

    def reserved(self, settings: Any) -> tuple[str | int, ...]:
        found = self._safely("reserved", settings)
        return found if isinstance(found, tuple) else ()

    def conflicts(self, settings: Any, given: Iterable[str]) -> dict[str, str]:
        given = [*given]
        found = self._safely("conflicts", settings, given)
        return {key: str(found[key]) for key in given if isinstance(found, dict) and key in found}

    def compile_placement(self, request: CompileRequest, member: Member) -> Placement:
        def fault(made: Placement) -> str | None:
            return _type_fault(made, Placement, "the placement")

        return self._made(request, "compile_placement", fault, request, member)

    def compile_server(
        self, request: CompileRequest, members: Sequence[Member], placements: Sequence[Placement]
    ) -> Instance:
        def fault(made: Instance) -> str | None:
            return misfit(made, replace(request, model=getattr(made, "model", request.model)))

        return self._made(request, "compile_server", fault, request, members, placements)

    def surplus(self, instance: Instance, ask: Ask) -> tuple[Placement, ...]:
        """Nothing where the plug-in cannot tell: what is not known is not unloaded."""
        found = self._safely("surplus", instance, ask)
        wrong = _type_fault(found, tuple[Placement, ...], "its answer")
        return () if wrong is not None else found

    def _safely(self, method: str, *args: Any) -> Any:
        """What the plug-in answers; None where it fails."""
        try:
            return self._call(method, *args)
        except (Defect, CompileError):
            return None

    def _call(self, method: str, *args: Any) -> Any:
        return attempt(self.name, lambda: self.__getattr__(method)(*args), self._timeout)

    def _made(
        self, request: CompileRequest, method: str, fault_of: Callable[[T], str | None], *args: Any
    ) -> T:
        try:
            made: T = self._call(method, *args)
        except Defect as error:
            raise self._defect(request, quoted(str(error))) from error
        if fault := fault_of(made):
            raise self._defect(request, fault)
        return made

    def _defect(self, request: CompileRequest, fault: str) -> CompileError:
        return CompileError(
            f"backend {self.name} cannot compile {request.model}: {fault}",
            hint=f"this is a defect of {self._source}; report it there",
        )


def _words(error: BaseException) -> str:
    try:
        text = " ".join(str(error).split())
    except Exception:  # noqa: BLE001 - that is the plug-in's code, too
        text = ""
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


# --- What compile gave ------------------------------------------------------------------------


def misfit(made: Any, request: CompileRequest) -> str | None:
    """Why what `compile` gave is not an instance that answers the request; None: it is one.

    Types first: a plan is made of all instances together, and a list where a tuple belongs, or a
    port that does not exist, must not be met there.
    """
    if fault := _type_fault(made, Instance, "the instance"):
        return fault
    instance: Instance = made
    asked = {
        "id": request.instance,
        "model": request.model,
        "backend": request.options.backend,
        "gpus": tuple(gpu.uuid for gpu in request.gpus),
    }
    for name, wanted in asked.items():
        if (found := getattr(instance, name)) != wanted:
            return f"its {name} is {found!r}, and asked for was {wanted!r}"
    workload = instance.workload
    if isinstance(workload, ContainerSpec):
        others = sorted(set(workload.devices) - set(instance.gpus))
        if others:
            return f"its devices hold {others[0]}, which is not one of its GPUs"
    names = [port.name for port in workload.ports]
    if len(set(names)) < len(names):
        return "two of its ports have one name"
    return next(_loose_ends(instance, set(names), {name for name, _ in workload.variables}), None)


def _loose_ends(instance: Instance, ports: set[str], variables: set[str]) -> Iterator[str]:
    """References to what is not there, each as a sentence."""
    workload, probes = instance.workload, instance.probes
    given = (probes.startup, probes.liveness, probes.readiness)
    checks = [probe.check for probe in given if probe is not None]
    progress = [probe.progress for probe in given if probe is not None and probe.progress]
    for check in (*checks, *progress):
        if isinstance(check, HttpCheck | TcpCheck | Progress) and check.port not in ports:
            yield f"a probe asks port {check.port!r}, which it does not have"
    if instance.warm_up and probes.startup is None:
        yield "it has a warm_up, and no startup probe says when its server is up"
    called = instance.placements or instance.drain or instance.warm_up or progress
    if called and "http" not in ports:
        yield "its server is called on port 'http', which it does not have"
    texts = [*workload.command, *(value for _, value in workload.env)]
    if isinstance(workload, ContainerSpec):
        texts += workload.entrypoint or ()
    texts += [item for check in checks if isinstance(check, ExecCheck) for item in check.command]
    for text in texts:
        for name in _PLACEHOLDER.findall(text):
            kind, _, argument = name.partition(":")
            if (kind == "port" and (argument or "http") not in ports) or (
                kind == "env" and argument not in variables
            ):
                yield f"it refers to ${{{name}}}, which has no value"


def _type_fault(value: Any, expected: Any, where: str) -> str | None:
    """Where a value is not of a type of model.py; None: it is, through and through."""
    return next(_type_faults(value, expected, where), None)


def _type_faults(value: Any, expected: Any, where: str) -> Iterator[str]:
    origin, arguments = get_origin(expected), get_args(expected)
    kind = origin or expected
    if origin in (Union, UnionType):
        own = [one for one in arguments if is_dataclass(one) and one in type(value).__mro__]
        fits = bool(own) or any(_type_fault(value, one, where) is None for one in arguments)
        if own:
            yield from _type_faults(value, own[0], where)
    elif origin is Literal:
        fits = value in arguments
    elif kind in (int, float):
        fits = not isinstance(value, bool) and isinstance(value, (int, kind))
    elif not isinstance(value, kind):
        fits = False
    elif origin is tuple:
        if arguments[-1] is Ellipsis:
            arguments = arguments[:1] * len(value)
        if len(arguments) != len(value):
            yield f"{where} has {len(value)} items, not {len(arguments)}"
        for index, (item, one) in enumerate(zip(value, arguments, strict=False)):
            yield from _type_faults(item, one, f"{where}[{index}]")
        fits = True
    else:
        for one in fields(kind) if is_dataclass(kind) else ():
            below = f"{where}.{one.name}".replace("the instance.", "its ", 1)
            yield from _type_faults(getattr(value, one.name), _hints(kind)[one.name], below)
        fits = True
    if not fits:
        yield f"{where} is {_kind(value)}, not {'a tuple' if kind is tuple else _named(expected)}"


_hints = cache(get_type_hints)


def _kind(value: Any) -> str:
    # Never the value: an environment holds secrets.
    return "None" if value is None else f"of type {type(value).__name__}"


def _named(expected: Any) -> str:
    if get_origin(expected) in (Union, UnionType):
        return " or ".join(_named(one) for one in get_args(expected))
    if expected is NoneType:
        return "None"
    return expected.__name__ if isinstance(expected, type) else str(expected)
