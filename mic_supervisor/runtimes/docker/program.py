"""Whether a created container has the program that it is to run.

With an init process the engine starts a container whose program is missing without complaint: it is
the init that fails, with exit code 127, after the predecessor was stopped. A created container's
files can be looked at before, in a few milliseconds each.
"""

from __future__ import annotations

import posixpath
from collections.abc import Mapping
from typing import Any

from docker import APIClient
from docker.errors import NotFound

from mic_supervisor.errors import RuntimeRefused
from mic_supervisor.runtimes.docker.engine import Engine

# What runc falls back to when neither the image nor the specification sets PATH.
_DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

# Bits of Go's os.FileMode, which is how the engine tells a mode.
_DIRECTORY = 1 << 31
_SYMLINK = 1 << 27
_EXECUTABLE = 0o111


def check_program(engine: Engine, what: str, inspected: Mapping[str, Any]) -> None:
    """RuntimeRefused when the program of a created container is certainly not there.

    `inspected` is the engine's description of the container. A file below a mount is not looked
    for, nor is anything that the engine cannot tell: then the start decides.
    """
    program = inspected.get("Path")
    config = inspected.get("Config") or {}
    if not isinstance(program, str) or not program:
        return
    mounts = tuple(
        str(mount.get("Destination", "")).rstrip("/") + "/"
        for mount in inspected.get("Mounts") or ()
        if isinstance(mount, Mapping)
    )
    candidates = _candidates(program, config)
    if any(path.startswith(mounts) for path in candidates if mounts):
        return
    verdicts = []
    for path in candidates:
        verdict = _look(engine, what, str(inspected.get("Id", "")), path, mounts)
        if verdict is None or verdict == "runs":
            return
        verdicts.append(verdict)
    if "not executable" in verdicts:
        raise RuntimeRefused(
            f"{what}: {program} in the image is not an executable file",
            hint="check the command and the entrypoint",
        )
    raise RuntimeRefused(
        f"{what}: the image has no program {program}",
        hint="check the command and the entrypoint",
    )


def _candidates(program: str, config: Mapping[str, Any]) -> list[str]:
    root = str(config.get("WorkingDir") or "/")
    if "/" in program:
        return [posixpath.normpath(posixpath.join("/", root, program))]
    env = [str(entry) for entry in config.get("Env") or ()]
    paths = [entry.removeprefix("PATH=") for entry in env if entry.startswith("PATH=")]
    places = (paths[-1] if paths else _DEFAULT_PATH).split(":")
    return [posixpath.normpath(posixpath.join("/", root, place, program)) for place in places]


def _look(
    engine: Engine, what: str, ref: str, path: str, mounts: tuple[str, ...], links: int = 8
) -> str | None:
    """ "runs", "missing" or "not executable"; None: it cannot be told."""
    if not links or (mounts and path.startswith(mounts)):
        return None
    try:
        stat = _stat(engine, what, ref, path)
    except RuntimeRefused:
        return None
    if stat is None:
        return "missing"
    mode, target = stat.get("mode"), stat.get("linkTarget")
    if not isinstance(mode, int):
        return None
    if mode & _SYMLINK:
        if not isinstance(target, str) or not target:
            return None
        return _look(engine, what, ref, target, mounts, links - 1)
    if mode & _DIRECTORY or not mode & _EXECUTABLE:
        return "not executable"
    return "runs"


def _stat(engine: Engine, what: str, ref: str, path: str) -> Mapping[str, Any] | None:
    def ask(api: APIClient) -> Mapping[str, Any] | None:
        try:
            # The file itself would be read from the other half, which is dropped, and so closed.
            return api.get_archive(ref, path)[1] or {}
        except NotFound:
            return None

    return engine.call(what, ask)
