"""gpus.yaml and its drop-ins as one document, each value with the place it came from."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mic_supervisor.config.diagnostics import Report, dotted, show
from mic_supervisor.config.document import GpuKey, Place
from mic_supervisor.config.names import BadKey, parse_gpu_key
from mic_supervisor.config.yaml import Node
from mic_supervisor.config.yaml.reader import Budget, cause_of, parse, read_text, text_of

VERSION = 1
SECTIONS = ("defaults", "backends", "models", "hooks", "gpus")
RESERVED = {"fleet": "reserved for a later version, where a scheduler decides what runs"}
"""Values under `gpus:`, and names, that mean nothing yet."""

MAX_FILES = 64
MAX_TOTAL = 384 * 1024
"""Bytes of all files together."""


@dataclass(slots=True)
class GpuItem:
    """One entry under `gpus:`, ranges expanded; `place` is its key's."""

    keys: tuple[GpuKey, ...]
    place: Place
    path: str
    node: Node

    def __str__(self) -> str:
        return ",".join(key.value for key in self.keys)


@dataclass(slots=True)
class Merged:
    """The document. `sections` holds all but `gpus` as maps, where they are given;
    `gpus` is keyed by the set of GPUs, whatever their order; `refused` are entries whose key was
    reported; `names_gpus` is set if any file has
    something under `gpus:`, be it wrong; `anchor` is where `gpus:` stands, or should."""

    files: list[Path]
    sections: dict[str, Node] = field(default_factory=dict)
    section_places: dict[str, Place] = field(default_factory=dict)
    gpus: dict[frozenset[GpuKey], GpuItem] = field(default_factory=dict)
    refused: list[GpuItem] = field(default_factory=list)
    names_gpus: bool = False
    anchor: Place = field(default_factory=lambda: Place("", 1, 1))

    def plain(self) -> dict[str, Any]:
        """Plain data, the same for the same meaning: what the hash is taken of."""
        document: dict[str, Any] = {"version": VERSION}
        for name, node in self.sections.items():
            document[name] = node.plain()
        document["gpus"] = {str(item): item.node.plain() for item in self.gpus.values()}
        return document


def read_merged(path: Path, report: Report, data: bytes | None = None) -> Merged | None:
    """The file and its drop-ins; None if one of them could not be read or parsed to its end.

    `data` stands for what is in the file itself.
    """
    drop_ins = _drop_ins(path, report)
    merged = Merged([path, *drop_ins])
    budget = Budget()
    given = [data, *(None for _ in drop_ins)]
    roots = [
        _read(file, report, budget, own) for file, own in zip(merged.files, given, strict=True)
    ]
    if any(root is None for root in roots):
        return None
    for number, root in enumerate(roots):
        if root is not None:
            _add_file(merged, root, report, is_drop_in=number > 0)
    _check_overlap(merged, report)
    return merged


def _drop_ins(path: Path, report: Report) -> list[Path]:
    directory = Path(f"{path}.d")
    try:
        found = sorted(
            entry
            for entry in directory.iterdir()
            if entry.suffix == ".yaml" and not entry.name.startswith(".")
        )
    except (FileNotFoundError, NotADirectoryError):
        return []
    except (OSError, ValueError) as error:
        report.lines.setdefault(str(path), [])
        whole = Place(str(directory), 0, 0)
        report.add(whole, "", f"cannot list the drop-ins: {cause_of(error)}")
        return []
    if len(found) > MAX_FILES:
        report.lines.setdefault(str(path), [])
        report.add(Place(str(directory), 0, 0), "", f"holds more than {MAX_FILES} drop-ins")
        return []
    return found


def _read(file: Path, report: Report, budget: Budget, data: bytes | None) -> Node | None:
    text = read_text(file, report) if data is None else text_of(data, file, report)
    if text is None:
        return None
    if sum(len(line) for lines in report.lines.values() for line in lines) > MAX_TOTAL:
        message = f"cannot read the file: it and the files before it exceed {MAX_TOTAL // 1024} KiB"
        report.add(Place(str(file), 0, 0), "", message)
        return None
    before = len(report)
    root = parse(text, str(file), report, budget)
    if root is None:
        return None if len(report) > before else Node(Place(str(file), 1, 1), {})
    if not isinstance(root.value, dict):
        if root.sound:
            report.add(root.place, "", "must be a map with the keys version, models and gpus")
        return None
    return root


def _add_file(merged: Merged, root: Node, report: Report, *, is_drop_in: bool) -> None:
    first = Place(root.place.file, 1, 1)
    _check_version(root, first, report, is_drop_in=is_drop_in)
    if not is_drop_in:
        merged.anchor = first
    for key, entry in root.entries.items():
        if key == "gpus":
            merged.names_gpus |= entry.node.value not in (None, {}) or not entry.node.whole
            merged.anchor = merged.anchor if is_drop_in else entry.place
        if key == "version":
            continue
        if key in RESERVED:
            report.add(entry.place, str(key), f"{key} is {RESERVED[str(key)]}")
        elif key not in SECTIONS:
            report.add(
                entry.place,
                dotted("", str(key)),
                "unknown key",
                like=(str(key), ("version", *SECTIONS)),
            )
        elif not entry.node.sound:
            continue
        elif entry.node.value is None:
            entry.node.value = {}  # everything under it is commented out
            merged.section_places.setdefault(key, entry.place)
        elif not isinstance(entry.node.value, dict):
            report.add(entry.node.place, key, "must be a map")
        elif key == "gpus":
            merged.gpus.update(_gpus(entry.node, merged.refused, report))
        else:
            merged.section_places.setdefault(key, entry.place)
            if key == "backends":
                for settings in entry.node.entries.values():
                    if settings.node.sound and settings.node.value is None:
                        settings.node.value = {}  # everything under it is commented out
            if key in merged.sections:
                overlay(merged.sections[key], entry.node)
            else:
                merged.sections[key] = entry.node


def _check_version(root: Node, first: Place, report: Report, *, is_drop_in: bool) -> None:
    entry = root.entries.get("version")
    if entry is None:
        if not is_drop_in:
            report.add(
                first, "version", "is missing", hint=f"begin the file with: version: {VERSION}"
            )
        return
    value = entry.node.value
    if entry.node.sound and (value != VERSION or not isinstance(value, int) or value is True):
        given = "a list or a map" if isinstance(value, (list, dict)) else show(value)
        report.add(
            entry.node.place,
            "version",
            f"must be {VERSION}, the only version that this mic-supervisor reads; here: {given}",
        )


def overlay(base: Node, over: Node) -> None:
    """Merge `over` into `base`: maps by key, anything else replaces."""
    for key, entry in over.entries.items():
        known = base.entries.get(key)
        if known is None:
            base.entries[key] = entry
        elif isinstance(known.node.value, dict) and isinstance(entry.node.value, dict):
            overlay(known.node, entry.node)
        else:
            base.entries[key] = entry


def _gpus(node: Node, refused: list[GpuItem], report: Report) -> dict[frozenset[GpuKey], GpuItem]:
    """The entries of one file; within it, a GPU is named once in each spelling."""
    items: dict[frozenset[GpuKey], GpuItem] = {}
    named: dict[GpuKey, Place] = {}
    for key, entry in node.entries.items():
        path = dotted("gpus", str(key))
        try:
            selection = parse_gpu_key(key)
        except BadKey as error:
            report.add(entry.place, path, str(error), hint=error.hint)
            refused.append(GpuItem((), entry.place, path, entry.node))
            continue
        twice = next((gpu for gpu in selection.keys if gpu in named), None)
        if twice is not None:
            first = named[twice].line
            report.add(entry.place, path, f"{twice} is named twice, first in line {first}")
            refused.append(GpuItem((), entry.place, path, entry.node))
            continue
        named.update(dict.fromkeys(selection.keys, entry.place))
        for keys in selection.expand():
            items[frozenset(keys)] = GpuItem(keys, entry.place, path, entry.node)
    return items


def _check_overlap(merged: Merged, report: Report) -> None:
    """A drop-in may name part of a group that another file sets up."""
    order = {str(file): number for number, file in enumerate(merged.files)}
    owners: dict[GpuKey, GpuItem] = {}
    for item in sorted(merged.gpus.values(), key=lambda item: order[item.place.file]):
        for gpu in item.keys:
            other = owners.setdefault(gpu, item)
            if other is not item:
                report.add(
                    item.place,
                    item.path,
                    f"{gpu} is named twice, first in {other.place} as {other.path}",
                    hint=f'to replace that entry, use its key: "{other}"',
                )
