"""Puts the parts together for a command."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mic_supervisor.backends.registry import Registry
from mic_supervisor.config.settings import NO_DOCKER, Settings, load_settings
from mic_supervisor.converge.state import StateDir
from mic_supervisor.errors import MicError
from mic_supervisor.host import host_id

if TYPE_CHECKING:
    from mic_supervisor.config.document import Config
    from mic_supervisor.converge.observe import Sources
    from mic_supervisor.plan.assess import Context
    from mic_supervisor.runtimes import Runtime


@dataclass(frozen=True)
class Machine:
    """This machine, as one command sees it. Nothing is opened before it is asked."""

    settings: Settings
    registry: Registry
    sources: Sources
    state: StateDir
    context: Context


def settings(env_file: Path | None = None) -> Settings:
    """From the environment and /etc/mic/mic.env; or from one file alone, as systemd reads it."""
    return load_settings(os.environ) if env_file is None else load_settings({}, env_file)


def load_config(
    found: Settings, path: Path | None, registry: Registry, profile: str | None = None
) -> Config:
    """The file named on the command line, or MIC_CONFIG; `profile` stands for its own."""
    from mic_supervisor.config.load import load

    return load(path or found.config, registry, environ=found.environ, profile=profile)


def machine(found: Settings, *, create_key: bool) -> Machine:
    """`create_key`: whether this command writes labels and records, under the scope's lock, and so
    needs a key that is kept.
    """
    from mic_supervisor.converge.observe import Sources
    from mic_supervisor.gpu.source import open_source
    from mic_supervisor.host.processes import listener_owners, listeners
    from mic_supervisor.plan.assess import Context

    state = StateDir(found.scope_state_dir)
    host = host_id()
    docker = _docker(found, host, state)
    process = _process(found, host, repairs=create_key)
    return Machine(
        settings=found,
        registry=Registry(),
        sources=Sources(
            gpus=open_source(found.gpu_source.kind, found.gpu_source.count),
            runtimes={docker.name: docker, process.name: process},
            listeners=listeners,
            listener_owners=listener_owners,
        ),
        state=state,
        context=Context(
            scope=found.scope,
            host=host,
            key=state.key(create=create_key),
            port_range=found.port_range,
            process_runtime=process.name,
            creates_ahead=frozenset(
                runtime.name for runtime in (docker, process) if runtime.creates_ahead
            ),
        ),
    )


def _docker(found: Settings, host: str, state: StateDir) -> Runtime:
    if found.docker_host == NO_DOCKER:
        from mic_supervisor.runtimes.docker import DockerOff

        return DockerOff()
    from mic_supervisor.plan.launch import given_name
    from mic_supervisor.runtimes.docker.runtime import DockerRuntime

    try:
        known = state.memory().known
    except MicError:
        known = {}  # who needs the memory says why it cannot be read; names still tell
    return DockerRuntime(
        found.scope,
        host,
        base_url=found.docker_host,
        docker_config=found.docker_config,
        given_name=given_name,
        known=known,
    )


def _process(found: Settings, host: str, *, repairs: bool) -> Runtime:
    from mic_supervisor.host import systemd_is_pid1

    kind = found.process_runtime
    if kind == "systemd" or (kind != "subprocess" and systemd_is_pid1()):
        from mic_supervisor.runtimes.systemd.runtime import SystemdRuntime

        return SystemdRuntime(found.scope, host, directory=found.run_dir)
    from mic_supervisor.plan.launch import given_name
    from mic_supervisor.runtimes.keeper.runtime import KeeperRuntime

    return KeeperRuntime(
        found.scope,
        host,
        directory=found.run_dir / "processes" / found.scope,
        log_directory=found.scope_state_dir / "logs",
        clock=time.time,
        given_name=given_name,
        repairs=repairs,
    )
