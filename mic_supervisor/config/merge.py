"""gpus.yaml and its drop-ins as one document, each value with the location it came from."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mic_supervisor.config.diagnostics import At, Report
from mic_supervisor.config.document import NONE, BadKey, GpuKey, Location, parse_gpu_key
from mic_supervisor.config.hints import for_map, other_file
from mic_supervisor.config.yaml import Budget, Entry, Node, parse
from mic_supervisor.host.files import read_file

VERSION = 1
SECTIONS = ("defaults", "backends", "models", "hooks", "gpus", "profiles", "profile")
NO_FILE = "run `mic-supervisor init` to write a first one"
NOT_A_DROP_IN = "the name of a drop-in ends in .yaml, and begins with no dot"
MAX_FILES = 64
MAX_TOTAL = 384 * 1024
"""Bytes of all files together."""


@dataclass(slots=True)
class GpuItem:
    """One entry under a `gpus:`, ranges expanded; `entry` is what the file has."""

    keys: tuple[GpuKey, ...]
    entry: Entry

    def __str__(self) -> str:
        return ",".join(key.value for key in self.keys)


@dataclass(slots=True)
class Profile:
    """What stands under one key of `profiles:`, which is at `entry`; `gpus` and `refused` are as
    those of the document."""

    entry: Entry
    gpus: dict[frozenset[GpuKey], GpuItem] = field(default_factory=dict)
    refused: list[GpuItem] = field(default_factory=list)


@dataclass(slots=True)
class Merged:
    """The document. `anchor` is where `gpus:` stands, or should; `sections` holds all else that is
    given, as maps, or as None where everything under the key is commented out; `gpus` is keyed by
    the set of GPUs, whatever their order; `refused` are entries whose key was reported;
    `names_gpus` is set if any file has something under `gpus:`, be it wrong; `models_refused` if
    what stands under a `models:` is no map, which was reported. `profile` is the key of that name,
    which says which one of `profiles` is on."""

    files: list[Path]
    anchor: Location
    sections: dict[str, Entry] = field(default_factory=dict)
    gpus: dict[frozenset[GpuKey], GpuItem] = field(default_factory=dict)
    refused: list[GpuItem] = field(default_factory=list)
    names_gpus: bool = False
    models_refused: bool = False
    profiles: dict[str | int, Profile] = field(default_factory=dict)
    profile: Entry | None = None

    def with_profile(self, name: str | None) -> dict[frozenset[GpuKey], GpuItem]:
        """`gpus` with a profile on: its entries take the place of those whose GPUs they have."""
        over = self.profiles[name].gpus if name is not None else {}
        named = frozenset(gpu for keys in over for gpu in keys)
        return {keys: one for keys, one in self.gpus.items() if not keys & named} | over

    def entries(self, section: str) -> dict[str | int, Entry]:
        return self.sections[section].node.entries if section in self.sections else {}

    def plain(self, profile: str | None) -> dict[str, Any]:
        """Plain data, the same for the same meaning: what the hash is taken of. `profile` is on."""
        document: dict[str, Any] = {"version": VERSION}
        for name, entry in self.sections.items():
            if entry.node.value is not None:
                document[name] = entry.node.plain()
        document["gpus"] = _plain(self.with_profile(profile))
        if self.profiles:
            document["profiles"] = {str(n): _plain(one.gpus) for n, one in self.profiles.items()}
        if profile is not None:
            document["profile"] = profile
        return document


def _plain(gpus: dict[frozenset[GpuKey], GpuItem]) -> dict[str, Any]:
    return {str(item): item.entry.node.plain() for item in gpus.values()}


def read_merged(path: Path, report: Report, data: bytes | None = None) -> Merged | None:
    """The file and its drop-ins; None if one of them could not be read or parsed to its end.

    `data` stands for what is in the file itself.
    """
    merged = Merged([path, *_drop_ins(path, report)], Location(str(path), 1, 1))
    budget = Budget()
    roots = [_read(file, report, budget, data if file == path else None) for file in merged.files]
    if any(root is None for root in roots):
        return None
    for number, root in enumerate(filter(None, roots)):
        _add_file(merged, root, report, is_drop_in=number > 0)
    for gpus in (merged.gpus, *(one.gpus for one in merged.profiles.values())):
        _check_overlap(merged.files, gpus, report)
    return merged


def not_read(path: Path) -> list[Path]:
    """What lies among the drop-ins of this file and is none by its name, as 10-more.yml is."""
    try:
        return sorted(entry for entry in Path(f"{path}.d").iterdir() if not _is_drop_in(entry))
    except OSError:
        return []  # whoever reads the drop-ins says so


def _is_drop_in(entry: Path) -> bool:
    return entry.suffix == ".yaml" and not entry.name.startswith(".")


def _drop_ins(path: Path, report: Report) -> list[Path]:
    directory = Path(f"{path}.d")
    try:
        found = sorted(entry for entry in directory.iterdir() if _is_drop_in(entry))
    except (FileNotFoundError, NotADirectoryError):
        return []
    except (OSError, ValueError) as error:
        problem = f"cannot list the drop-ins: {cause_of(error)}"
    else:
        if len(found) <= MAX_FILES:
            return found
        problem = f"holds more than {MAX_FILES} drop-ins"
    report.lines.setdefault(str(path), [])
    report.add(At(Location(str(directory))), problem)
    return []


def _read(file: Path, report: Report, budget: Budget, data: bytes | None) -> Node | None:
    text = read_text(file, report) if data is None else text_of(data, file, report)
    if text is None:
        return None
    if sum(len(line) for lines in report.lines.values() for line in lines) > MAX_TOTAL:
        message = f"cannot read the file: it and the files before it exceed {MAX_TOTAL // 1024} KiB"
        report.add(At(Location(str(file))), message)
        return None
    before = len(report)
    root = parse(text, str(file), report, budget)
    if root is None:
        return None if len(report) > before else Node(Location(str(file), 1, 1), "", {})
    if (other := other_file(root)) is not None:
        report.replace(str(file), At(Location(str(file), 1, 1)), other[0], hint=other[1])
        return None
    if isinstance(root.value, dict):
        return root
    if root.valid:
        report.add(root, "must be a map with the keys version, models and gpus")
    return None


def _add_file(merged: Merged, root: Node, report: Report, *, is_drop_in: bool) -> None:
    _check_version(root, report, is_drop_in=is_drop_in)
    for key, entry in root.entries.items():
        node = entry.node
        if key == "gpus":
            merged.names_gpus |= node.value not in (None, {}) or not node.whole
            merged.anchor = merged.anchor if is_drop_in else entry.location
        if key == "models":
            merged.models_refused |= not (node.valid and isinstance(node.value, dict | None))
        if key == "version":
            continue
        if key not in SECTIONS:
            report.add(entry, "unknown key", like=(str(key), ("version", *SECTIONS)))
        elif not node.valid:
            continue
        elif key == "profile":
            merged.profile = entry
        elif not isinstance(node.value, dict | None):
            report.add(node, f"must be a map, not {node.shown}", hint=_hint(key, node))
        elif key == "gpus":
            merged.gpus.update(_gpus(node, merged.refused, report))
        elif key == "profiles":
            for name, one in node.entries.items():
                _add_profile(merged.profiles.setdefault(name, Profile(one)), one.node, report)
        else:
            if key == "backends":
                for settings in node.below():
                    if settings.valid and settings.value is None:
                        settings.value = {}  # everything under it is commented out
            known = merged.sections.setdefault(key, entry)
            if known.node.value is None:
                known.node = node
            elif known is not entry:
                overlay(known.node, node)


def _add_profile(profile: Profile, node: Node, report: Report) -> None:
    if not node.valid or node.value is None:
        return  # what is not there changes nothing
    if not isinstance(node.value, dict):
        said = f"must be a map with the key gpus, not {node.shown}"
        report.add(node, said, hint="write `{gpus: {0: none}}`")
    for key, entry in node.entries.items():
        if key != "gpus":
            report.add(entry, "unknown key: a profile has only gpus", like=(str(key), ("gpus",)))
        elif entry.node.valid and not isinstance(entry.node.value, dict | None):
            hint = _hint("gpus", entry.node)
            report.add(entry.node, f"must be a map, not {entry.node.shown}", hint=hint)
        else:
            profile.gpus.update(_gpus(entry.node, profile.refused, report))


def _check_version(root: Node, report: Report, *, is_drop_in: bool) -> None:
    entry = root.entries.get("version")
    if entry is None:
        if not is_drop_in:
            first = At(Location(root.location.file, 1, 1), "version")
            report.add(
                first, "is missing", hint=f"begin the file with it: add `version: {VERSION}`"
            )
    elif entry.node.valid and (type(entry.node.value) is not int or entry.node.value != VERSION):
        report.add(
            entry.node,
            f"must be {VERSION}, the only version that this mic-supervisor reads; "
            f"here: {entry.node.shown}",
            hint=f"write `{VERSION}`",
        )


def _hint(section: str, node: Node) -> str | None:
    """How a section is written, where it is no map."""
    hint = for_map(node.plain())
    if hint is None and section == "profiles":
        hint = "name each profile: write `{night: {gpus: {0: none}}}`"
    if hint is None and section == "gpus":
        model = node.value if isinstance(node.value, str) else NONE
        hint = f"give each GPU a model, or {NONE}: write `{{0: {model}}}`"
    return hint


def overlay(base: Node, over: Node) -> None:
    """Merge `over` into `base`: maps by key, anything else replaces."""
    for key, entry in over.entries.items():
        known = base.entries.get(key)
        if known and isinstance(known.node.value, dict) and isinstance(entry.node.value, dict):
            overlay(known.node, entry.node)
        else:
            base.entries[key] = entry


def _gpus(node: Node, refused: list[GpuItem], report: Report) -> dict[frozenset[GpuKey], GpuItem]:
    """The entries of one file; within it, a GPU is named once in each spelling."""
    items: dict[frozenset[GpuKey], GpuItem] = {}
    named: dict[GpuKey, Location] = {}
    for key, entry in node.entries.items():
        try:
            selection = parse_gpu_key(key)
            for gpu in selection.keys:
                if gpu in named:
                    raise BadKey(f"{gpu} is named twice, first in line {named[gpu].line}")
        except BadKey as error:
            report.add(entry, str(error), hint=error.hint)
            refused.append(GpuItem((), entry))
            continue
        named.update(dict.fromkeys(selection.keys, entry.location))
        for keys in selection.expand():
            items[frozenset(keys)] = GpuItem(keys, entry)
    return items


def _check_overlap(
    files: list[Path], gpus: dict[frozenset[GpuKey], GpuItem], report: Report
) -> None:
    """A drop-in may name part of a group that another file sets up."""
    order = {str(file): number for number, file in enumerate(files)}
    owners: dict[GpuKey, GpuItem] = {}
    for item in sorted(gpus.values(), key=lambda item: order[item.entry.location.file]):
        for gpu in item.keys:
            other = owners.setdefault(gpu, item)
            if other is not item:
                first = f"first in {other.entry.location} as {other.entry.path}"
                report.add(
                    item.entry,
                    f"{gpu} is named twice, {first}",
                    hint=f'to replace that entry, use its key: "{other}"',
                )


# --- the text of a file -------------------------------------------------------------------------

MAX_BYTES = 256 * 1024

# What YAML calls printable, less what it counts as the end of a line and no editor does (NEL, LS,
# PS, a lone CR): locations would be wrong after it.
_UNFIT = re.compile(
    "[^\t\n\r\x20-\x7e\xa0-\u2027\u202a-\ud7ff\ue000-\ufefe\uff00-\ufffd"
    "\U00010000-\U0010ffff]|\r(?!\n)"
)


def read_text(path: Path, report: Report) -> str | None:
    """The text of a regular file, or None after reporting why not. Never blocks on a FIFO."""
    report.lines.setdefault(str(path), [])
    try:
        return text_of(read_file(path, MAX_BYTES), path, report)
    except IsADirectoryError:
        problem, hint = "it is a directory", None
    except OSError as error:
        problem = cause_of(error)
        # A link that leads nowhere is something else than no file.
        absent = isinstance(error, FileNotFoundError) and not path.is_symlink()
        hint = NO_FILE if absent else None
    report.add(At(Location(str(path))), f"cannot read the file: {problem}", hint=hint)
    return None


def text_of(data: bytes, path: Path, report: Report) -> str | None:
    """The text of a file that holds `data`, or None after reporting why it has none."""
    file = str(path)
    report.lines.setdefault(file, [])
    if len(data) > MAX_BYTES:
        problem = f"cannot read the file: it is larger than {MAX_BYTES // 1024} KiB"
        report.add(At(Location(file)), problem)
        return None
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        problem = "cannot read the file: it is UTF-16"
        report.add(At(Location(file, 1, 1)), problem, hint="save it as UTF-8")
        return None
    try:
        text = data.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        report.lines[file] = data.decode("utf-8", "replace").split("\n")
        location = _location_of(file, data[: error.start].decode("utf-8"))
        problem = f"the byte 0x{data[error.start]:02x} is not UTF-8"
        report.add(At(location), problem, hint="save the file as UTF-8")
        return None
    report.lines[file] = [line.removesuffix("\r") for line in text.split("\n")]
    bad = _UNFIT.search(text)
    if bad is not None:
        number = ord(bad[0])
        hint = f'inside double quotes it can be written as "\\u{number:04x}"'
        report.add(
            At(_location_of(file, text[: bad.start()])),
            f"the character U+{number:04X} cannot stand here",
            hint=hint if 0 < number < 0x10000 else None,
        )
        return None
    return text


def _location_of(file: str, before: str) -> Location:
    """The location after the text `before`."""
    return Location(file, before.count("\n") + 1, len(before) - before.rfind("\n"))


def cause_of(error: OSError | ValueError) -> str:
    """What the system says, as the end of a sentence."""
    cause = (error.strerror if isinstance(error, OSError) else None) or str(error)
    return cause[:1].lower() + cause[1:]
