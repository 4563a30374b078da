"""`profiles:` of the file: which one is on, and what each of them may say of `gpus:`.

The entries of the profile that is on take the place of those under `gpus:` that have their GPUs. So
one model over two GPUs may follow one on each, and the other way round.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from mic_supervisor.config.diagnostics import Report, closest, show
from mic_supervisor.config.document import NONE, GpuEntry, is_model_name
from mic_supervisor.config.merge import Merged
from mic_supervisor.config.names import composed
from mic_supervisor.config.yaml import scalar
from mic_supervisor.errors import MicError


def _example(name: str) -> str:
    name = name if is_model_name(name) else "night"
    return f"profiles: {{{scalar(name)}: {{gpus: {{0: none}}}}}}"


def profile_said(merged: Merged, report: Report) -> str | None:
    """The profile that the key `profile` names, after reporting one that is not there; None: no
    profile is on."""
    entry = merged.profile
    if entry is None or not entry.node.valid:
        return None
    value, known = entry.node.value, (NONE, *map(str, merged.profiles))
    if value is None:
        report.add(entry, "has no value", hint=f"write `profile: {NONE}` for no profile")
    elif not isinstance(value, str):
        report.add(entry.node, "must be the name of a profile", hint=f"known are {_list(known)}")
    elif composed(value) in known:
        return None if composed(value) == NONE else composed(value)
    else:
        hint = f"known are {_list(known)}" if merged.profiles else f"add `{_example(value)}`"
        report.add(entry.node, f"unknown profile {show(value)}", like=(value, known), hint=hint)
    return None


def check_covered(merged: Merged, report: Report) -> None:
    """An entry whose GPUs a profile has in part would leave the other ones without any."""
    for profile in merged.profiles.values():
        named = {gpu: item for item in profile.gpus.values() for gpu in item.keys}
        for item in merged.gpus.values():
            found = [gpu for gpu in item.keys if gpu in named]
            left = [gpu for gpu in item.keys if gpu not in named]
            if found and left:
                report.add(
                    named[found[0]].entry,
                    f"takes {found[0]} out of {item}, in {item.entry.location}, and the profile "
                    f"does not name {left[0]}",
                    hint=f"name it in the profile as well: add `{left[0].value}: {NONE}`",
                )


def aside(entries: Mapping[str | None, Sequence[GpuEntry]], on: str | None) -> tuple[GpuEntry, ...]:
    """An entry for each GPU that only profiles name that are not on, and each model, or `fleet`,
    that they have there, from the entries with each profile."""
    named = {key for entry in entries[on] for key in entry.keys}
    found = {
        (key, entry.value): replace(entry, keys=(key,), profile=profile)
        for profile, several in entries.items()
        for entry in several
        for key in entry.keys
        if key not in named
    }
    return tuple(found.values())


def no_profile(action: str, path: Path, name: str, profiles: Sequence[str]) -> MicError:
    """That what was asked for cannot be done: the file has no profile of this name."""
    meant = closest(name, (NONE, *profiles))
    hint = f"did you mean {meant}?" if meant is not None else f"known are {_list(profiles)}"
    return MicError(
        f"cannot {action}: {path} has no profile {show(name)}",
        hint=hint if profiles else f"add one to the file, as in `{_example(name)}`",
    )


def _list(names: Sequence[str]) -> str:
    return ", ".join(names)
