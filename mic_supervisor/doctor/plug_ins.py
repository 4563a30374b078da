"""The backends that other packages bring, each on its own."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

from mic_supervisor.doctor import Finding, fail, ok, warn
from mic_supervisor.errors import MicError

if TYPE_CHECKING:
    from mic_supervisor.backends.registry import Registry

_SLOW = 1.0  # seconds; a built-in backend takes a few hundredths


def plug_in(registry: Registry, name: str) -> Iterator[Finding]:
    """Whether one can be used. It is loaded for that, which runs its code."""
    subject, origin = f"plug-in {name}", registry.origin(name)
    if registry.is_built_in(name):
        yield fail(
            subject,
            f"{origin} brings a backend with the name of a built-in one, which is used instead",
            "have it renamed, or uninstall it",
        )
        return
    begun = time.monotonic()
    try:
        registry.get(name)
    except MicError as error:
        yield fail(subject, error.message, error.hint)
        return
    took = time.monotonic() - begun
    if took > _SLOW:
        yield warn(
            subject,
            f"{origin} takes {took:.1f} s to load, for which every command has to wait whose file "
            "names it",
            "have it import what is heavy inside the functions that use it",
        )
    else:
        yield ok(subject, origin)
