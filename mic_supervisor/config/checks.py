"""What each backend lets a file say of models, and `gpus:` against `models:`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from mic_supervisor.config.diagnostics import Report, dotted, show
from mic_supervisor.config.document import NONE, GpuEntry, ModelDefinition, Place
from mic_supervisor.config.merge import RESERVED, GpuItem, Merged
from mic_supervisor.config.names import MAX_NAME, composed, is_model_name
from mic_supervisor.config.placeholders import check_placeholders
from mic_supervisor.config.yaml import Entry, Node
from mic_supervisor.errors import MicError

if TYPE_CHECKING:
    from pydantic import BaseModel

    from mic_supervisor.config.options import Hooks


class BackendTypes(Protocol):
    """The part of a backend that the configuration needs: what it lets a file say."""

    Settings: type[BaseModel]
    Options: type[BaseModel]


class BackendSource(Protocol):
    """Where backends are found; `backends.registry` fits it.

    `get` returns None for an unknown name and raises MicError for a backend that cannot be loaded.
    """

    def names(self) -> Sequence[str]: ...

    def get(self, name: str) -> BackendTypes | None: ...


@dataclass(frozen=True, slots=True)
class _Fault:
    """Why a backend cannot be used. `like`: what was written, and what may have been meant."""

    text: str
    hint: str | None
    like: tuple[str, list[str]] | None = None


class ModelChecker:
    """Reports what is wrong; `variables` collects what `${env:NAME}` refers to.

    `tolerant`: a backend that cannot be used is the fault of the models that name it, and no error
    of the file.
    """

    def __init__(
        self,
        merged: Merged,
        registry: BackendSource,
        environ: Mapping[str, str],
        report: Report,
        *,
        tolerant: bool = False,
    ) -> None:
        self.variables: dict[str, str] = {}
        self._merged = merged
        self._registry = registry
        self._environ = environ
        self._report = report
        self._tolerant = tolerant
        self._used: dict[str, tuple[BackendTypes, Place]] = {}  # and the first model that does

    def models(self) -> dict[str, ModelDefinition]:
        defaults = self._defaults()
        models: dict[str, ModelDefinition] = {}
        section = self._merged.sections.get("models")
        for key, entry in (section.entries if section is not None else {}).items():
            path = dotted("models", str(key))
            name = self._name(key, entry.place, path)
            if not entry.node.sound:
                continue
            if not isinstance(entry.node.value, dict):
                text = "has no value" if entry.node.value is None else "must be a map"
                self._report.add(
                    entry.place, path, text, hint="write at least the backend: {backend: NAME}"
                )
                continue
            check_placeholders(entry.node, path, self._environ, self._report, self.variables)
            backend = self._backend_of(entry, path)
            if backend is None:
                continue
            types = self._get(backend, entry.node.entries["backend"].node.place, f"{path}.backend")
            if isinstance(types, _Fault):
                if self._tolerant and name is not None:
                    models[name] = ModelDefinition(
                        name, backend, None, entry.place, types.text, types.hint
                    )
                continue
            self._used.setdefault(backend, (types, entry.place))
            if name is not None:
                options = self._options(types, entry, path, defaults)
                if options is not None:
                    models[name] = ModelDefinition(name, backend, options, entry.place)
        if not any(model.fault for model in models.values()):
            self._check_defaults_act(defaults)
        return models

    def _check_defaults_act(self, defaults: Node | None) -> None:
        """A default is passed over for a backend that refuses it, but some model must take it."""
        for key, entry in (defaults.entries if defaults is not None else {}).items():
            reasons = [_refused(types).get(str(key)) for types, _ in self._used.values()]
            if reasons and reasons[0] is not None and None not in reasons:
                self._report.add(entry.place, dotted("defaults", str(key)), reasons[0])

    def _name(self, key: str | int, place: Place, path: str) -> str | None:
        problem = hint = None
        if isinstance(key, int):
            problem, hint = "a model's name must be a text", f'quote it: "{key}"'
        elif key == NONE or key in RESERVED:
            problem = f"{key} cannot be a model's name: under gpus: it has a meaning of its own"
        elif len(key) > MAX_NAME:
            problem = f"a model's name has at most {MAX_NAME} characters"
        elif not is_model_name(key):
            problem = "a model's name has letters and digits of any script, and - _ . between them"
        if problem is not None:
            self._report.add(place, path, problem, hint=hint)
            return None
        return str(key)

    def _backend_of(self, entry: Entry, path: str) -> str | None:
        given = entry.node.entries.get("backend")
        if given is None and not entry.node.whole:
            return None
        if given is None:
            known = ", ".join(self._registry.names())
            self._report.add(
                entry.place, path, "the key backend is missing", hint=f"known are {known}"
            )
            return None
        if not given.node.sound:
            return None
        if not isinstance(given.node.value, str):
            self._report.add(given.node.place, f"{path}.backend", "must be the name of a backend")
            return None
        return given.node.value

    def _get(self, name: str, place: Place, path: str) -> BackendTypes | _Fault:
        """The backend, or why there is none, reported at each place that names it."""
        try:
            types = self._registry.get(name)
        except MicError as error:
            fault = _Fault(str(error), error.hint)
        else:
            if types is not None:
                return types
            known = list(self._registry.names())
            hint = f"known are {', '.join(known)}"
            fault = _Fault(f"unknown backend {show(name)}", hint, (name, known))
        if not self._tolerant:
            self._report.add(place, path, fault.text, like=fault.like, hint=fault.hint)
        return fault

    def _options(
        self,
        types: BackendTypes,
        entry: Entry,
        path: str,
        defaults: Node | None,
    ) -> BaseModel | None:
        before = len(self._report)
        given = dict(entry.node.entries)
        refused = _refused(types)
        for key, reason in refused.items():
            if key in given:
                self._report.add(given.pop(key).place, dotted(path, key), reason)
        node = Node(entry.node.place, given, whole=entry.node.whole)
        if defaults is not None:
            usable: dict[str | int, Entry] = {
                key: one
                for key, one in defaults.entries.items()
                if key in types.Options.model_fields and key not in refused
            }
            node = _with_defaults(node, usable)
        options = self._validate(types.Options, node, entry.place, path)
        return options if len(self._report) == before else None

    def _validate(
        self, model: type[BaseModel], node: Node, place: Place, path: str
    ) -> BaseModel | None:
        from mic_supervisor.config.validate import validate

        try:
            return validate(model, node, place, path, self._report)
        except MicError as error:
            self._report.add(place, path, str(error), hint=error.hint)
        # A plug-in's own validators run in here, and they may even end the program.
        except (Exception, SystemExit) as error:  # noqa: BLE001
            self._report.add(place, path, f"cannot be checked: {type(error).__name__}: {error}")
        return None

    def _defaults(self) -> Node | None:
        from mic_supervisor.config.options import Defaults

        node = self._merged.sections.get("defaults")
        if node is None:
            return None
        place = self._merged.section_places["defaults"]
        return node if self._validate(Defaults, node, place, "defaults") is not None else None

    def hooks(self) -> Hooks | None:
        node = self._merged.sections.get("hooks")
        if node is None:
            return None
        from mic_supervisor.config.options import Hooks

        place = self._merged.section_places["hooks"]
        found = self._validate(Hooks, node, place, "hooks")
        return found if isinstance(found, Hooks) else None

    def backends(self) -> dict[str, BaseModel]:
        """The settings of every backend that the file lists or a model uses; after `models`."""
        settings: dict[str, BaseModel | None] = {}
        section = self._merged.sections.get("backends")
        for key, entry in (section.entries if section is not None else {}).items():
            name, path = str(key), dotted("backends", str(key))
            settings[name] = None
            if not entry.node.sound:
                continue
            check_placeholders(entry.node, path, self._environ, self._report, self.variables)
            types = self._get(name, entry.place, path)
            if not isinstance(types, _Fault):
                settings[name] = self._validate(types.Settings, entry.node, entry.place, path)
        for name, (types, place) in self._used.items():
            if name not in settings:
                # A setting that is missing is reported at the model that needs it.
                path = dotted("backends", name)
                settings[name] = self._validate(types.Settings, Node(place, {}), place, path)
        return {name: one for name, one in sorted(settings.items()) if one is not None}


def _refused(types: BackendTypes) -> Mapping[str, str]:
    refused: Mapping[str, str] = getattr(types.Options, "unavailable", {})
    return refused


def _with_defaults(node: Node, defaults: Mapping[str | int, Entry]) -> Node:
    """`node` with what `defaults` has and it lacks; maps are completed key by key."""
    entries = dict(node.entries)
    for key, default in defaults.items():
        own = entries.get(key)
        if own is None:
            entries[key] = default
        elif isinstance(own.node.value, dict) and isinstance(default.node.value, dict):
            entries[key] = Entry(own.place, _with_defaults(own.node, default.node.entries))
    return Node(node.place, entries, node.sound, node.whole)


def read_entries(
    merged: Merged, models: Mapping[str, ModelDefinition], report: Report
) -> tuple[GpuEntry, ...]:
    """What `gpus:` says, by kind of key and number."""
    section = merged.sections.get("models")
    listed = dict.fromkeys(map(str, section.entries) if section is not None else ())
    if not merged.names_gpus:
        report.add(
            merged.anchor,
            "gpus",
            "names no GPU",
            hint=f"give each GPU a model, or {NONE} to keep it empty",
        )
    entries: list[GpuEntry] = []
    for item in (*merged.gpus.values(), *merged.refused):
        model = _target(item, listed, report)
        if model == NONE:
            entries += [GpuEntry((gpu,), None, item.place) for gpu in item.keys]
        elif model in models and item.keys:
            entries.append(GpuEntry(item.keys, model, item.place))
    return tuple(sorted(entries, key=_by_key))


def _target(item: GpuItem, listed: Mapping[str, None], report: Report) -> str | None:
    value = item.node.value
    if not item.node.sound:
        return None
    if isinstance(value, str):
        name = composed(value)
        if name in RESERVED:
            report.add(item.node.place, item.path, f"{name} is {RESERVED[name]}")
        elif name != NONE and name not in listed:
            report.add(
                item.node.place,
                item.path,
                f"unknown model {show(value)}",
                like=(name, (NONE, *listed)),
            )
        else:
            item.node.value = name
            return name
    elif value is None:
        report.add(
            item.place, item.path, "has no value", hint=f"write {NONE} to keep the GPU empty"
        )
    elif isinstance(value, (list, dict)):
        report.add(item.node.place, item.path, "must be the name of one model")
    else:
        report.add(item.node.place, item.path, "must be the name of a model", hint="quote it")
    return None


def shared_servers(
    models: Mapping[str, ModelDefinition],
    backends: Mapping[str, BaseModel],
    registry: BackendSource,
) -> dict[str, str]:
    """The server of each model all of whose entries share one, by the model's name."""
    found: dict[str, str] = {}
    for name, model in models.items():
        if model.fault is not None:
            continue
        server_of = getattr(registry.get(model.backend), "server_of", None)
        if server_of is not None and model.backend in backends:
            server = server_of(backends[model.backend], name)
            if server is not None:
                found[name] = server
    return found


def check_conflicts(
    merged: Merged,
    models: Mapping[str, ModelDefinition],
    backends: Mapping[str, BaseModel],
    registry: BackendSource,
    report: Report,
) -> None:
    """Keys of a model that mean nothing with the settings of its backend."""
    for name, model in models.items():
        if model.fault is not None:
            continue
        conflicts = getattr(registry.get(model.backend), "conflicts", None)
        if conflicts is None or model.backend not in backends:
            continue
        given = merged.sections["models"].entries[name].node.entries
        for key, why in conflicts(backends[model.backend], [str(key) for key in given]).items():
            report.add(given[key].place, f"{dotted('models', name)}.{key}", why)


def check_ports(
    merged: Merged,
    models: Mapping[str, ModelDefinition],
    entries: Sequence[GpuEntry],
    servers: Mapping[str, str],
    report: Report,
) -> None:
    """A fixed port serves one instance. `servers` says which models have one for all entries."""
    running: dict[str, int] = {}
    for entry in entries:
        if entry.model is not None:
            count = running.get(entry.model, 0) + 1
            running[entry.model] = 1 if entry.model in servers else count
    taken: dict[int, tuple[str, Place]] = {}
    for name in (name for name in models if name in running):
        count = running[name]
        for port, place, path in _fixed_ports(merged, models[name]):
            if count > 1:
                report.add(
                    place,
                    path,
                    f"the port {port} fits one instance only, and {name} has {count}",
                    hint="leave it out: each instance then gets a port of its own",
                )
            elif port in taken:
                other, first = taken[port]
                report.add(place, path, f"the port {port} is taken by {other}, in {first}")
            else:
                taken[port] = (name, place)


def _fixed_ports(merged: Merged, model: ModelDefinition) -> list[tuple[int, Place, str]]:
    found: list[tuple[int, Place, str]] = []
    node = merged.sections["models"].entries[model.name].node
    path = dotted("models", model.name)
    port = node.entries.get("port")
    ports = node.entries.get("ports")
    candidates = [(port, f"{path}.port")] if port is not None else []
    if ports is not None:
        candidates += [(one, f"{path}.ports.{key}") for key, one in ports.node.entries.items()]
    for entry, where in candidates:
        if isinstance(entry.node.value, int):
            found.append((entry.node.value, entry.node.place, where))
    return found


def _by_key(entry: GpuEntry) -> tuple[Any, ...]:
    key = entry.keys[0]
    kinds = ("index", "uuid", "pci")
    number = int(key.value) if key.kind == "index" else 0
    return (kinds.index(key.kind), number, key.value)
