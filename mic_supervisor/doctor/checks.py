"""Which checks a machine gets. Those of the configuration, and of what it refers to, are here."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cache, partial
from pathlib import Path
from typing import Any

from mic_supervisor.backends.registry import Registry
from mic_supervisor.config.document import Config
from mic_supervisor.config.load import load
from mic_supervisor.config.merge import NOT_A_DROP_IN, not_read
from mic_supervisor.config.schema import FILES, json_schema
from mic_supervisor.config.settings import NO_DOCKER, Settings
from mic_supervisor.converge.state import StateDir
from mic_supervisor.daemon.client import Client
from mic_supervisor.desired import desired_state
from mic_supervisor.doctor import Check, Finding, fail, host, installation, ok, warn
from mic_supervisor.errors import ConfigError, MicError, RuntimeUnavailable
from mic_supervisor.gpu.source import open_source
from mic_supervisor.host import systemd_is_pid1
from mic_supervisor.host.processes import listener_owners, listeners
from mic_supervisor.model import ContainerSpec, DesiredState, GpuInventory
from mic_supervisor.plan.memory import Memory
from mic_supervisor.views.config import counted, summary

_SLOW = 1.0  # seconds to load a plug-in; a built-in backend takes a few hundredths


def installation_checks(registry: Registry) -> list[Check]:
    """Those of what is installed, which no setting changes."""
    systemd = systemd_is_pid1()

    def program() -> Iterator[Finding]:
        started = installation.program_of(host.show(host.UNIT)) if systemd else None
        path = os.environ.get("PATH", "")
        yield from installation.programs(installation.this_program(), path, started)
        yield from installation.unit_files(host.UNIT)

    return [
        Check("program", program),
        Check("schema", lambda: installation.schema(FILES, lambda: json_schema(registry))),
        *([Check("group mic", installation.group)] if systemd else []),
        Check("systemd", host.systemd),
    ]


def checks(found: Settings) -> list[Check]:
    """Every check of this machine, in the order in which they are shown."""
    real = found.gpu_source.kind == "nvml"
    systemd = systemd_is_pid1()
    source = open_source(found.gpu_source.kind, found.gpu_source.count)
    registry = Registry()

    def loaded() -> Config:
        return load(found.config, registry, environ=found.environ)

    @cache
    def inventory() -> GpuInventory:
        return source.observe()

    def memory() -> Memory:
        with suppress(MicError):  # the state may be another user's
            return StateDir(found.scope_state_dir).memory()
        return Memory()

    def desired() -> DesiredState:
        return desired_state(
            loaded(), inventory(), memory().bindings, registry, found.instance_data
        )

    def ask_daemon() -> Any:
        client = Client.connect(found.socket, found.scope)
        return None if client is None else client.call("status", timeout=10.0)

    def no_docker() -> Iterator[Finding]:
        yield warn("docker", "switched off by MIC_DOCKER_HOST=none: no container runs", "unset it")

    docker = [Check("docker", no_docker)]
    if found.docker_host != NO_DOCKER:
        facts, has_image = host.questions(found)
        docker = [
            Check("docker", lambda: host.engine(facts, real_gpus=real)),
            Check("docker disk", lambda: _unless_away(docker_disk(lambda: facts()["root"]))),
            Check("images", lambda: _unless_away(images(desired, has_image))),
        ]

    return [
        *installation_checks(registry),
        Check("settings", lambda: settings(found)),
        Check("config", lambda: config(found, loaded)),
        Check("models", lambda: models(desired)),
        *(
            Check(f"plug-in {name}", partial(plug_in, registry, name))
            for name in registry.plug_ins()
        ),
        Check("gpus", lambda: host.gpus(inventory)),
        *docker,
        Check("daemon", lambda: host.daemon(ask_daemon, found.socket, found.lock_path)),
        Check("drained", lambda: host.drained(memory(), ask_daemon)),
        Check("ports", lambda: host.ports(found.port_range, listeners, len(inventory().gpus))),
        Check("http", lambda: host.listen(found.listen, found.lock_path, listener_owners().get)),
        Check("directories", lambda: directories(found)),
        Check("clock", lambda: host.clock(found.scope_state_dir, systemd=systemd)),
    ]


def _unless_away(findings: Iterator[Finding]) -> Iterator[Finding]:
    """An engine that cannot be reached is said once, by the check of the engine itself."""
    with suppress(RuntimeUnavailable):
        yield from findings


def plug_in(registry: Registry, name: str) -> Iterator[Finding]:
    """Whether one can be used. It is loaded for that, which runs its code."""
    subject, origin = f"plug-in {name}", registry.origin(name)
    if registry.is_built_in(name):
        yield fail(
            subject,
            f"{origin} brings a backend with the name of a built-in one, which is used instead",
            "ask its author to rename it, or uninstall it",
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
            f"{origin} takes {took:.1f} s to load, and every command whose file names it "
            "waits that long",
            "import heavy modules inside the functions that use them",
        )
    else:
        yield ok(subject, origin)


# --- the configuration, what it refers to, and the directories that are written to --------------

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
    for file in not_read(path):
        yield warn("config", f"{file} is not read: {NOT_A_DROP_IN}", "rename it, or move it away")
    for file in loaded.files:
        if file.stat().st_mode & 0o022:
            yield warn(
                "config",
                f"{file} can be changed by users other than its owner",
                f"chmod go-w {file}",
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
                "models", f"{file} can be read by users other than its owner", f"chmod 600 {file}"
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
    with suppress(MicError):  # this user may not read it, nor write there: that was said
        if (lost := StateDir(found.scope_state_dir).memory().lost) is not None:
            yield warn("state", lost, "see what would be done now: mic-supervisor plan")
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
        yield fail(subject, text, "make room: the supervisor cannot write its files")
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
            "docker disk", text, "remove what is not used: docker system df, docker system prune"
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
