"""Whether files that changed may be no more than a part of what somebody meant.

A program that was killed, a full disk or a copy under way leaves a file that is cut, or none. Such
a file may be valid and say another thing: `0: m10` cut to `0: m1`. Pure; a person's word is above
it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mic_supervisor.config.document import Config
from mic_supervisor.config.merge import NONE

CONFIRM = "confirm with `mic-supervisor apply` or `systemctl reload mic`"
WAY_OUT = f"finish it, or {CONFIRM}"


def doubt(accepted: Config | None, found: Config, *, prune: bool = False) -> str | None:
    """Why `found` must wait until a person confirms it; None: it may be used.

    `accepted` was used last; None where nothing was. With `prune`, files and entries may go
    unasked, as MIC_PRUNE_ON_WATCH says.
    """
    if accepted is not None and accepted.hash == found.hash:
        return None
    for file, text in zip(found.files, found.texts, strict=True):
        if not text.endswith("\n"):
            what = "does not end with a line end" if text else "is empty"
            return f"{file} {what}; it may have been cut"
    if accepted is None or prune or _only_takes_away(accepted.document, found.document):
        return None
    now = {file.name: text for file, text in zip(found.files[1:], found.texts[1:], strict=True)}
    if _is_cut(found.texts[0], accepted.texts[0]):
        return f"{found.path} is the beginning of what it was; it may have been cut"
    for file, text in zip(accepted.files[1:], accepted.texts[1:], strict=True):
        path = found.path.with_name(f"{found.path.name}.d") / file.name
        if file.name not in now and text not in found.texts:
            return f"{path} is gone, and what it said is something else now"
        if _is_cut(now.get(file.name, text), text):
            return f"{path} is the beginning of what it was; it may have been cut"
    return None


def _is_cut(text: str, before: str) -> bool:
    return text != before and before.startswith(text)


def _only_takes_away(before: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Whether entries are gone, or `none`, and all else is as it was: the plan sees to those."""
    gpus, models = before["gpus"], before.get("models", {})
    return (
        all(before.get(part) == now.get(part) for part in {*before, *now} - {"gpus", "models"})
        and all(models.get(name) == model for name, model in now.get("models", {}).items())
        and all(value == NONE or gpus.get(key) == value for key, value in now["gpus"].items())
    )
