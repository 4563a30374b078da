"""`gpus:` against `models:`: what runs where, and on which fixed ports."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mic_supervisor.config.diagnostics import Report, dotted, show
from mic_supervisor.config.document import GpuEntry, ModelDefinition, Place
from mic_supervisor.config.merge import NONE, RESERVED, GpuItem, Merged
from mic_supervisor.config.model_checks import BackendSource
from mic_supervisor.config.names import composed

if TYPE_CHECKING:
    from pydantic import BaseModel


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
