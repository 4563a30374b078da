"""From gpus.yaml to a Config, or to every error in it at once.

The merged document is checked against what each backend lets a file say, and `gpus:` against
`models:`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

from pydantic import BaseModel

from mic_supervisor.config.diagnostics import At, Report, closest, dotted, show
from mic_supervisor.config.document import (
    FLEET,
    MAX_NAME,
    NONE,
    Config,
    GpuEntry,
    Location,
    ModelDefinition,
    is_model_name,
)
from mic_supervisor.config.hints import for_map
from mic_supervisor.config.merge import GpuItem, Merged, read_merged
from mic_supervisor.config.names import composed
from mic_supervisor.config.options import Advice, Defaults, Hooks, ModelOptions, Strict
from mic_supervisor.config.profiles import aside, check_covered, no_profile, profile_said
from mic_supervisor.config.validate import check_placeholders, validate
from mic_supervisor.config.yaml import Entry, Node
from mic_supervisor.errors import MicError
from mic_supervisor.host.files import in_time

M = TypeVar("M", bound=BaseModel)

_OURS = "mic_supervisor."  # what the modules of this program are called
_VALIDATES_IN = 60.0  # seconds; nothing of ours takes a thousandth of it


class BackendTypes(Protocol):
    """The part of a backend that the configuration needs: what it lets a file say."""

    Settings: type[BaseModel]
    Options: type[ModelOptions]

    def server_of(self, settings: Any, model: str) -> str | None: ...

    def conflicts(self, settings: Any, given: Iterable[str]) -> dict[str, str]: ...


class BackendSource(Protocol):
    """Where backends are found; `backends.registry` fits it.

    `get` returns None for an unknown name and raises MicError for a backend that cannot be loaded.
    """

    def names(self) -> Sequence[str]: ...

    def get(self, name: str) -> BackendTypes | None: ...

    def meant(self, name: str, given: Collection[str | int]) -> str | None:
        """A hint for who takes `name` for a backend, in a model with these keys."""
        ...

    def example(self, name: str) -> str | None:
        """A model with this backend, as a map on one line; None: there is none to show."""
        ...


def load(
    path: Path,
    registry: BackendSource,
    *,
    environ: Mapping[str, str],
    data: bytes | None = None,
    profile: str | None = None,
    tolerant: bool = False,
) -> Config:
    """The configuration in `path` and its drop-ins, `path`.d/*.yaml.

    `environ` is where `${env:NAME}` is looked up. `data` stands for what is in `path`, as it would
    be after a change that is only planned, and `profile` for the key of that name. `tolerant`: a
    backend that cannot be used is the fault of the models that name it, and no error. Raises
    InvalidConfig, a ConfigError, with every error of all files. Reads files and nothing else.
    """
    report = Report(f"load {path}")
    merged = read_merged(path, report, data)
    if merged is None:
        report.fail()
    checker = Checker(merged, registry, environ, report, tolerant=tolerant)
    checker.check()
    if report:
        report.fail()
    profiles = tuple(sorted(map(str, merged.profiles)))
    if profile is not None and profile not in (NONE, *profiles):
        raise no_profile(f"use profile {profile}", path, profile, profiles)
    on = checker.profile if profile is None else None if profile == NONE else profile
    document = merged.plain(on)
    canonical = json.dumps(document, sort_keys=True, separators=(",", ":"))
    return Config(
        path=path,
        files=tuple(merged.files),
        hash=hashlib.sha256(canonical.encode()).hexdigest(),
        entries=checker.entries[on],
        models=checker.models,
        backends=checker.backends,
        hooks=checker.hooks,
        servers=checker.servers,
        variables=dict(sorted(checker.variables.items())),
        document=document,
        warnings=tuple(warning.render() for warning in report.warnings),
        texts=tuple("\n".join(report.lines[str(file)]) for file in merged.files),
        profile=on,
        profile_at=merged.profile.location if merged.profile is not None else None,
        profiles=profiles,
        aside=aside(checker.entries, on),
    )


class Checker:
    """Reports what is wrong; what is right stands in its attributes after `check`.

    `tolerant`: a backend that cannot be used is the fault of the models that name it, and no error
    of the file.
    """

    models: dict[str, ModelDefinition]
    backends: dict[str, BaseModel]  # settings, of those that the file lists or a model uses
    hooks: Hooks | None
    profile: str | None  # that the file has on
    entries: dict[str | None, tuple[GpuEntry, ...]]  # with each profile; by kind of key and number
    servers: dict[str, str]  # of each model all of whose entries share one
    variables: dict[str, str]  # what `${env:NAME}` refers to

    def __init__(
        self,
        merged: Merged,
        registry: BackendSource,
        environ: Mapping[str, str],
        report: Report,
        *,
        tolerant: bool = False,
    ) -> None:
        self.variables = {}
        self._merged = merged
        self._registry = registry
        self._environ = environ
        self._report = report
        self._tolerant = tolerant
        self._misnamed: set[str] = set()  # models whose name was reported
        self._used: dict[str, tuple[BackendTypes, Location]] = {}  # and the first model that does

    def check(self) -> None:
        self.models = self._models()
        self.backends = self._backends()
        self.hooks = self._section("hooks", Hooks)
        self.profile = profile_said(self._merged, self._report)
        self.entries = {None: self._entries(None)}
        for name, one in self._merged.profiles.items():
            if self._name(name, one.entry, "profile") is not None:
                self.entries[str(name)] = self._entries(str(name))
        check_covered(self._merged, self._report)
        self.servers = self._servers()
        before = len(self._report)
        for profile, entries in self.entries.items():
            if len(self._report) == before:  # what is wrong without one is wrong with each
                self._check_ports(profile, entries)

    def _section(self, name: str, model: type[M]) -> M | None:
        entry = self._merged.sections.get(name)
        return None if entry is None or entry.node.value is None else self._validate(model, entry)

    def _validate(self, model: type[M], entry: Entry) -> M | None:
        try:
            # A plug-in's code may hang. Ours does not, and a thread takes longer than it.
            ours, check = model.__module__.startswith(_OURS), partial(self._checked, model, entry)
            found, advice = (
                check() if ours else in_time(("validators", model), check, _VALIDATES_IN)
            )
            for one in advice:
                given = entry.node.entries.get(one.key)
                at = entry if given is None else given.node
                self._report.warn(at, one.message, hint=one.hint)
            return found
        except MicError as error:
            self._report.add(entry, str(error), hint=error.hint)
        except KeyboardInterrupt:
            raise
        # A plug-in's own code runs in here, and it may even end the program, or hang.
        except BaseException as error:  # noqa: BLE001
            self._report.add(entry, f"cannot be checked: {type(error).__name__}: {error}")
        return None

    def _checked(self, model: type[M], entry: Entry) -> tuple[M | None, list[Advice]]:
        found = validate(model, entry, self._report)
        return found, list(found.advice()) if isinstance(found, Strict) else []

    def _check_placeholders(self, node: Node) -> None:
        check_placeholders(node, self._environ, self._report, self.variables)

    # --- models: and backends: --------------------------------------------------------------------

    def _models(self) -> dict[str, ModelDefinition]:
        checked = self._section("defaults", Defaults)
        defaults = self._merged.entries("defaults") if checked is not None else {}
        models: dict[str, ModelDefinition] = {}
        for key, entry in self._merged.entries("models").items():
            name = self._name(key, entry)
            if name is None:
                self._misnamed.add(str(key))
            model = self._model(name, entry, defaults)
            if model is not None and name is not None:
                models[name] = model
        if not any(model.fault for model in models.values()):
            self._check_defaults_act(defaults)
        return models

    def _model(
        self, name: str | None, entry: Entry, defaults: Mapping[str | int, Entry]
    ) -> ModelDefinition | None:
        node = entry.node
        if not node.valid:
            return None
        if not isinstance(node.value, dict):
            text = "has no value" if node.value is None else f"must be a map, not {node.shown}"
            example = self._registry.example(str(node.value)) or self._registry.example("")
            hint = for_map(node.plain()) or f"write `{entry.source}: {example}`"
            self._report.add(entry, text, hint=hint)
            return None
        backend = self._backend_of(entry)
        if backend is None:
            self._check_placeholders(node)
            return None
        types = self._get(backend, node.entries["backend"], node.entries)
        known = getattr(types, "Options", ModelOptions).model_fields
        # Of a key that is unknown, that is enough to be said.
        self._check_placeholders(
            replace(node, value={key: one for key, one in node.entries.items() if key in known})
        )
        if isinstance(types, MicError):
            if not self._tolerant:
                return None
            return ModelDefinition(
                name or "", backend, None, entry.location, str(types), types.hint
            )
        self._used.setdefault(backend, (types, entry.location))
        options = None if name is None else self._options(types, entry, defaults)
        if name is None or options is None:
            return None
        return ModelDefinition(name, backend, options, entry.location)

    def _check_defaults_act(self, defaults: Mapping[str | int, Entry]) -> None:
        """A default is passed over for a backend that refuses it, but some model must take it."""
        for key, entry in defaults.items():
            reasons = [types.Options.unavailable.get(str(key)) for types, _ in self._used.values()]
            if reasons and reasons[0] is not None and None not in reasons:
                self._report.add(entry, reasons[0])

    def _name(self, key: str | int, entry: Entry, of: str = "model") -> str | None:
        problem = hint = None
        if isinstance(key, int):
            problem, hint = f"a {of}'s name must be a text", f'quote it: "{key}"'
        elif key in (NONE, FLEET):
            where = "gpus" if of == "model" else of
            problem = f"{key} cannot be a {of}'s name: under {where}: it has a meaning of its own"
        elif len(key) > MAX_NAME:
            problem = f"a {of}'s name has at most {MAX_NAME} characters"
        elif not is_model_name(key):
            problem = f"a {of}'s name has letters and digits of any script, and - _ . between them"
        if problem is not None:
            self._report.add(entry, problem, hint=hint)
            return None
        return str(key)

    def _backend_of(self, entry: Entry) -> str | None:
        given = entry.node.entries.get("backend")
        if given is None and entry.node.whole:
            hint = f"known are {', '.join(self._registry.names())}"
            near = closest("backend", map(str, entry.node.entries))
            if near is not None:
                hint = f"did you mean backend where {near} stands? {hint}"
            elif (fitting := self._fitting(entry.node.entries)) is not None:
                hint = f"add `backend: {fitting}`"
            self._report.add(entry, "the key backend is missing", hint=hint)
        elif given is not None and given.node.valid:
            if isinstance(given.node.value, str):
                return given.node.value
            self._report.add(given.node, "must be the name of a backend")
        return None

    def _fitting(self, given: Collection[str | int]) -> str | None:
        """The one backend that a model with these keys, and no other, can have."""
        found = []
        for name in self._registry.names():
            with suppress(MicError):
                options = getattr(self._registry.get(name), "Options", ModelOptions)
                fields = options.model_fields
                needed = {key for key, field in fields.items() if field.is_required()}
                if needed - {"backend"} <= {*given} <= fields.keys() - options.unavailable.keys():
                    found.append(name)
        return found[0] if len(found) == 1 else None

    def _get(
        self, name: str, entry: Entry, given: Collection[str | int] | None = None
    ) -> BackendTypes | MicError:
        """The backend, or why there is none, reported at each place that names it; at the value of
        `backend:` in a model that has the keys `given`."""
        like, at = None, entry if given is None else entry.node
        try:
            types = self._registry.get(name)
            if types is not None:
                return types
            known = self._registry.names()
            hint = self._registry.meant(name, given or ())
            if hint is None:
                like, hint = (name, list(known)), f"known are {', '.join(known)}"
            else:
                hint = hint if given is not None else "remove the key: no backend has that name"
                at = entry
            fault = MicError(f"unknown backend {show(name)}", hint=hint)
        except MicError as error:
            fault = error
        if not self._tolerant:
            self._report.add(at, str(fault), like=like, hint=fault.hint)
        return fault

    def _options(
        self, types: BackendTypes, entry: Entry, defaults: Mapping[str | int, Entry]
    ) -> BaseModel | None:
        before = len(self._report)
        given = dict(entry.node.entries)
        refused = types.Options.unavailable
        for key, reason in refused.items():
            if key in given:
                self._report.add(given.pop(key), reason)
        usable: dict[str | int, Entry] = {
            key: one
            for key, one in defaults.items()
            if key in types.Options.model_fields and key not in refused
        }
        node = _with_defaults(replace(entry.node, value=given), usable)
        options = self._validate(types.Options, Entry(entry.location, node))
        return options if len(self._report) == before else None

    def _backends(self) -> dict[str, BaseModel]:
        """The settings of every backend that the file lists or a model uses."""
        settings: dict[str, BaseModel | None] = {}
        for key, entry in self._merged.entries("backends").items():
            settings[str(key)] = None
            if not entry.node.valid:
                continue
            self._check_placeholders(entry.node)
            types = self._get(str(key), entry)
            if not isinstance(types, MicError):
                settings[str(key)] = self._validate(types.Settings, entry)
        for name, (types, location) in self._used.items():
            if name not in settings:
                # A setting that is missing is reported at the model that needs it.
                empty = Entry(location, Node(location, dotted("backends", name), {}))
                settings[name] = self._validate(types.Settings, empty)
        return {name: one for name, one in sorted(settings.items()) if one is not None}

    # --- gpus: --------------------------------------------------------------------------------

    def _entries(self, profile: str | None) -> tuple[GpuEntry, ...]:
        """Those that count with this profile on."""
        merged = self._merged
        own = None if profile is None else merged.profiles[profile]
        if not merged.names_gpus:
            hint = f"give each GPU a model, or {NONE} to keep it empty"
            self._report.add(At(merged.anchor, "gpus"), "names no GPU", hint=hint)
        listed = dict.fromkeys(map(str, merged.entries("models")))
        entries: list[GpuEntry] = []
        refused = merged.refused if own is None else own.refused
        for item in (*merged.with_profile(profile).values(), *refused):
            model = self._target(item, listed)
            of = profile if own is not None and frozenset(item.keys) in own.gpus else None
            if model == NONE:
                entries += [GpuEntry((gpu,), None, item.entry.location, of) for gpu in item.keys]
            elif model == FLEET and item.keys:
                entries.append(GpuEntry(item.keys, None, item.entry.location, of, fleet=True))
            elif model in self.models and item.keys:
                entries.append(GpuEntry(item.keys, model, item.entry.location, of))
        return tuple(sorted(entries, key=_by_key))

    def _target(self, item: GpuItem, listed: Mapping[str, None]) -> str | None:
        node = item.entry.node
        if not node.valid:
            return None
        if isinstance(node.value, str):
            name = composed(node.value)
            if name not in (NONE, FLEET) and name not in listed:
                if self._merged.models_refused:
                    return None  # it may stand among them
                known = (one for one in (NONE, FLEET, *listed) if one not in self._misnamed)
                hint = f"describe it under models:, or keep the GPU empty: write `{NONE}`"
                text = f"unknown model {show(node.value)}"
                self._report.add(node, text, like=(name, known), hint=hint)
            else:
                node.value = name
                return name
        elif node.value is None:
            hint = f"write `{item.entry.source}: {NONE}` to keep the GPU empty"
            self._report.add(item.entry, "has no value", hint=hint)
        elif node.branching:
            inner = [one.value for one in node.below() if isinstance(one.value, str)]
            only = f"write `{inner[0]}`" if len(inner) == 1 else None
            self._report.add(node, "must be the name of one model", hint=only)
        else:
            self._report.add(node, "must be the name of a model", hint="quote it")
        return None

    def _servers(self) -> dict[str, str]:
        """The server of each model that shares one; reports keys that mean nothing in it."""
        servers: dict[str, str] = {}
        for name, model in self.models.items():
            if model.fault is not None or model.backend not in self.backends:
                continue
            backend, settings = self._used[model.backend][0], self.backends[model.backend]
            server = backend.server_of(settings, name)
            if server is not None:
                servers[name] = server
            given = self._merged.entries("models")[name].node.entries
            for key, why in backend.conflicts(settings, [str(key) for key in given]).items():
                self._report.add(given[key], why)
        return servers

    def _check_ports(self, profile: str | None, entries: Iterable[GpuEntry]) -> None:
        """A fixed port serves one instance."""
        running: dict[str, int] = {}
        there = "" if profile is None else f" with profile {profile}"
        for entry in entries:
            if entry.model is not None:
                count = running.get(entry.model, 0) + 1
                running[entry.model] = 1 if entry.model in self.servers else count
        taken: dict[int, tuple[str, Location]] = {}
        for name in (name for name in self.models if name in running):
            for port, node in self._fixed_ports(name):
                if running[name] > 1:
                    has = f"{name} has {running[name]}{there}"
                    fits = f"the port {port} fits one instance only, and {has}"
                    hint = "leave it out: each instance then gets a port of its own"
                    self._report.add(node, fits, hint=hint)
                elif port in taken:
                    other, first = taken[port]
                    text = f"the port {port} is taken by {other}, in {first}{there}"
                    self._report.add(node, text)
                else:
                    taken[port] = (name, node.location)

    def _fixed_ports(self, model: str) -> Iterator[tuple[int, Node]]:
        keys = self._merged.entries("models")[model].node.entries
        named = keys["ports"].node.below() if "ports" in keys else ()
        for node in (*([keys["port"].node] if "port" in keys else ()), *named):
            if isinstance(node.value, int):
                yield node.value, node


def _with_defaults(node: Node, defaults: Mapping[str | int, Entry]) -> Node:
    """`node` with what `defaults` has and it lacks; maps are completed key by key."""
    entries = dict(node.entries)
    for key, default in defaults.items():
        own = entries.get(key)
        if own is None:
            entries[key] = Entry(default.location, default.node.moved(dotted(node.path, str(key))))
        elif isinstance(own.node.value, dict) and isinstance(default.node.value, dict):
            entries[key] = Entry(own.location, _with_defaults(own.node, default.node.entries))
    return replace(node, value=entries)


def _by_key(entry: GpuEntry) -> tuple[int, int, str]:
    key = entry.keys[0]
    number = int(key.value) if key.kind == "index" else 0
    return (("index", "uuid", "pci").index(key.kind), number, key.value)
