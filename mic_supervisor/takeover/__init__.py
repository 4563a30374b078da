"""What runs on the GPUs already and is not ours, as proposals for gpus.yaml. Reads only."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import PurePosixPath
from typing import Any

from mic_supervisor.config.document import is_model_name
from mic_supervisor.config.env_file import SYSTEMD_NAME
from mic_supervisor.model import Pairs

RESERVED = frozenset({"none", "fleet"})


@dataclass(frozen=True, slots=True)
class Proposal:
    """One model for the file.

    `gpus` are indices, and UUIDs of MIG slices; empty: not known. `secrets` go into an env_file of
    their own. `stop` are the commands that end what runs now. `left` are the settings that no key
    of the file says, a line each. `refused`: why it cannot be taken over as it is.
    """

    name: str
    what: str  # "container web", "PID 4121 (python)"
    entry: Mapping[str, Any]
    gpus: tuple[int | str, ...]
    stop: tuple[str, ...]
    notes: tuple[str, ...] = ()
    left: tuple[str, ...] = ()
    secrets: Pairs = field(default=(), repr=False)
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    refused: str | None = None


def named(wanted: str, taken: set[str]) -> str:
    """A name that a model may have and no other has; it is added to `taken`."""
    kept = "".join(char if is_model_name(char) or char in "-_." else "-" for char in wanted)
    base = kept.strip("-_.")[:60] or "model"
    if base.lower() in RESERVED:
        base = f"{base}-1"
    name, number = base, 2
    while name in taken:
        name, number = f"{base}-{number}", number + 1
    taken.add(name)
    return name


def distinct(proposals: Iterable[Proposal]) -> list[Proposal]:
    """The same, each with a name of its own."""
    taken: set[str] = set()
    return [replace(one, name=named(one.name, taken)) for one in proposals]


def for_env_file(pairs: Iterable[tuple[str, str]]) -> tuple[Pairs, tuple[str, ...]]:
    """What an env_file can hold, sorted, and the names of what it cannot."""
    kept, lost = [], []
    for name, value in sorted(pairs):
        if SYSTEMD_NAME.fullmatch(name) and "\0" not in value:
            kept.append((name, value))
        else:
            lost.append(name)
    return tuple(kept), tuple(lost)


def refusal(texts: Iterable[str]) -> str | None:
    """`${` begins a placeholder in gpus.yaml, and there is no way around it."""
    for text in texts:
        if "${" in text:
            return f"{text!r} holds ${{, which is a placeholder here"
    return None


def numbers_of(wanted: Sequence[str], known: Mapping[str, int | str]) -> tuple[int | str, ...]:
    """What GPUs are called that are given by index, UUID (its beginning will do) or `all`."""
    found: set[int | str] = set()
    for text in wanted:
        if text == "all":
            found.update(known.values())
        elif text.isdigit():
            found.update(number for number in known.values() if number == int(text))
        elif text:
            found.update(number for uuid, number in known.items() if uuid.startswith(text))
    return in_order(found)


def in_order(numbers: Iterable[int | str]) -> tuple[int | str, ...]:
    """Each once; GPUs by their index, and behind them slices by their UUID."""
    once = set(numbers)
    indices = sorted(number for number in once if isinstance(number, int))
    return *indices, *sorted(number for number in once if isinstance(number, str))


def base_name(path: str) -> str:
    return PurePosixPath(path).name
