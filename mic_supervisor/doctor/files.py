"""The configuration, what it refers to, and the directories that are written to."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from mic_supervisor.config.document import Config
from mic_supervisor.config.settings import Settings
from mic_supervisor.doctor import Finding, fail, ok, warn
from mic_supervisor.errors import ConfigError
from mic_supervisor.model import ContainerSpec, DesiredState
from mic_supervisor.views.config import counted, summary

_MIB, _GIB = 1 << 20, 1 << 30
_SCARCE, _SHORT = 100 * _MIB, _GIB


def settings(found: Settings) -> Iterator[Finding]:
    if found.unread is not None:
        yield warn("settings", found.unread, "run as root, or let this user read it")
    else:
        yield ok("settings", f"scope {found.scope}")
    for name, path in (
        ("MIC_DOCKER_CONFIG", found.docker_config),
        ("MIC_HTTP_TOKEN_FILE", found.http_token_file),
    ):
        if path is not None and not os.access(path, os.R_OK):
            yield fail("settings", f"{name}: {path} {_why(path)}", "correct the path or its mode")


def config(found: Settings, load: Callable[[], Config]) -> Iterator[Finding]:
    """Raises MicError as `load` does, but for errors in the file."""
    path = found.config
    if not _there(path):
        yield fail("config", f"{path} {_why(path)}", "write a first one with: mic-supervisor init")
        return
    try:
        loaded = load()
    except ConfigError as error:
        yield fail("config", error.message, "see all of its errors: mic-supervisor check")
        return
    yield ok("config", f"{path} is {summary(loaded)}")
    for file in loaded.files:
        if file.stat().st_mode & 0o022:
            yield warn(
                "config", f"{file} can be changed by others than its owner", f"chmod go-w {file}"
            )


def models(compiled: Callable[[], DesiredState]) -> Iterator[Finding]:
    """Whether each entry of the file could be started, as far as files go. Quiet without a file."""
    try:
        desired = compiled()
    except ConfigError:
        return  # `config` has said it
    for item in desired.unsatisfiable:
        yield fail("models", f"{item.subject}: {item.reason}", item.hint)
    paths = {
        mount.source
        for instance in desired.instances
        if isinstance(instance.workload, ContainerSpec)
        for mount in instance.workload.mounts
    }
    for path in sorted(paths):
        if not os.access(path, os.R_OK):
            yield fail("models", f"{path} {_why(Path(path))}", "create it, or let root read it")
    files = {
        instance.workload.env_file
        for instance in desired.instances
        if instance.workload.env_file is not None
    }
    for file in sorted(files):
        if Path(file).stat().st_mode & 0o077:
            yield warn(
                "models", f"{file} may be read by others than its owner", f"chmod 600 {file}"
            )
    if desired.instances:
        yield ok("models", f"{counted(len(desired.instances), 'instance')} can be configured")


def images(
    compiled: Callable[[], DesiredState], has_image: Callable[[str], bool]
) -> Iterator[Finding]:
    """Raises MicError when the engine cannot be asked. Quiet without a file."""
    try:
        desired = compiled()
    except ConfigError:
        return
    wanted = {
        instance.workload.image
        for instance in desired.instances
        if isinstance(instance.workload, ContainerSpec)
    }
    for image in sorted(wanted):
        if has_image(image):
            yield ok("images", f"{image} is here")
        else:
            yield warn(
                "images",
                f"{image} is not here: the next start pulls it first",
                f"pull it now with: docker pull {image}",
            )


def directories(found: Settings) -> Iterator[Finding]:
    yield from _own("state", found.state_dir, "MIC_STATE_DIR", 0o077)
    yield from _own("run", found.run_dir, "MIC_RUN_DIR", 0o022)


def _own(subject: str, path: Path, variable: str, refused: int) -> Iterator[Finding]:
    """`refused` are mode bits that would let others at what is in it."""
    there = path
    while not _there(there) and there != there.parent:
        there = there.parent
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        yield fail(
            subject,
            f"cannot write to {path}",
            f"run as root, or point {variable} to a directory you may write to",
        )
        return
    if there == path and path.stat().st_mode & refused:
        mode = f"{path.stat().st_mode & 0o7777:o}"
        change = "go-w" if refused == 0o022 else "700"
        yield warn(subject, f"{path} is open to others (mode {mode})", f"chmod {change} {path}")
    free = shutil.disk_usage(there).free
    text = f"{path}: {free / _GIB:.1f} GiB free"
    if there != path:
        text += "; it is made with the first start"
    if _is_tmpfs(there):
        text += " of memory (tmpfs)"
    if free < _SCARCE:
        yield fail(subject, text, "make room: what is remembered cannot be written")
    elif free < _SHORT:
        yield warn(subject, text, "make room")
    else:
        yield ok(subject, text)


def docker_disk(root: Callable[[], str | None]) -> Iterator[Finding]:
    """Room for images and containers' logs. Raises MicError when the engine cannot be asked."""
    path = root()
    if path is None or not _there(Path(path)):
        return
    usage = shutil.disk_usage(path)
    text = f"{path}: {usage.free / _GIB:.1f} of {usage.total / _GIB:.1f} GiB free"
    if usage.free < 5 * _GIB or usage.free < usage.total * 0.05:
        yield warn(
            "docker disk", text, "remove what nobody uses: docker system df, docker system prune"
        )
    else:
        yield ok("docker disk", text)


def _there(path: Path) -> bool:
    """False also where it may not be looked for, which Path.exists raises for."""
    return os.path.exists(path)  # noqa: PTH110


def _is_tmpfs(path: Path) -> bool:
    """By the longest mount point above it, as /proc/self/mounts lists them."""
    real = path.resolve()
    best, kind = -1, ""
    try:
        lines = Path("/proc/self/mounts").read_text().splitlines()
    except OSError:
        return False
    for line in lines:
        _, point, fstype, *_ = line.split(" ")
        if real.is_relative_to(point) and len(point) >= best:
            best, kind = len(point), fstype
    return kind == "tmpfs"


def _why(path: Path) -> str:
    try:
        path.stat()
    except FileNotFoundError:
        return "does not exist"
    except OSError as error:
        return f"cannot be read: {(error.strerror or str(error)).lower()}"
    return "cannot be read: permission denied"
