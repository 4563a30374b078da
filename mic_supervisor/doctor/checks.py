"""Which checks a machine gets, with what each of them looks at."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from functools import cache, partial
from pathlib import Path
from typing import Any

from mic_supervisor.backends.registry import Registry
from mic_supervisor.config.document import Config
from mic_supervisor.config.load import load
from mic_supervisor.config.settings import NO_DOCKER, Settings
from mic_supervisor.converge.state import StateDir
from mic_supervisor.daemon.client import Client
from mic_supervisor.desired import desired_state
from mic_supervisor.doctor import Check, Finding, engine, fail, files, host, ok, warn
from mic_supervisor.errors import MicError, RuntimeUnavailable
from mic_supervisor.gpu.nvml import read_modes
from mic_supervisor.gpu.source import open_source
from mic_supervisor.host.processes import listener_owners, listeners
from mic_supervisor.model import DesiredState, GpuInventory

_SLOW = 1.0  # seconds to load a plug-in; a built-in backend takes a few hundredths


def checks(found: Settings) -> list[Check]:
    """Every check of this machine, in the order in which they are shown."""
    real = found.gpu_source.kind == "nvml"
    systemd = Path("/run/systemd/system").is_dir()
    source = open_source(found.gpu_source.kind, found.gpu_source.count)
    registry = Registry()

    def config() -> Config:
        return load(found.config, registry, environ=found.environ)

    @cache
    def inventory() -> GpuInventory:
        return source.observe()

    def bindings() -> Mapping[str, str]:
        with suppress(MicError):  # the state may be another user's
            return StateDir(found.scope_state_dir).memory().bindings
        return {}

    def desired() -> DesiredState:
        return desired_state(config(), inventory(), bindings(), registry, found.instance_data)

    def ask_daemon() -> Any:
        client = Client.connect(found.socket)
        return None if client is None else client.call("status", timeout=10.0)

    def no_docker() -> Iterator[Finding]:
        yield warn("docker", "switched off by MIC_DOCKER_HOST=none: no container runs", "unset it")

    docker = [Check("docker", no_docker)]
    if found.docker_host != NO_DOCKER:
        facts, has_image = engine.questions(found)
        docker = [
            Check("docker", lambda: engine.engine(facts, real_gpus=real)),
            Check("docker disk", lambda: _unless_away(files.docker_disk(lambda: facts()["root"]))),
            Check("images", lambda: _unless_away(files.images(desired, has_image))),
        ]
    return [
        Check("settings", lambda: files.settings(found)),
        Check("config", lambda: files.config(found, config)),
        Check("models", lambda: files.models(desired)),
        *(
            Check(f"plug-in {name}", partial(plug_in, registry, name))
            for name in registry.plug_ins()
        ),
        Check("gpus", lambda: host.gpus(inventory, read_modes if real else lambda: ())),
        *docker,
        Check("systemd", host.systemd),
        Check("daemon", lambda: host.daemon(ask_daemon, found.socket, found.lock_path)),
        Check("ports", lambda: host.ports(found.port_range, listeners, len(inventory().gpus))),
        Check("http", lambda: host.listen(found.listen, found.lock_path, listener_owners().get)),
        Check("directories", lambda: files.directories(found)),
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
